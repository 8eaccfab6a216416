"""Heads: what turns the states of a model into labels, choices, vocabulary entries or one vector.

A head wraps a backbone (`Decoder`, `Encoder` or `EncoderDecoder`) and leaves its code alone. All
heads that give scores are one sequence of parts, of which a `HeadStyle` says which are there:

    states -> pool -> dropout -> dense -> activation -> norm -> dropout -> last matrix -> scores

BERT's classifier, RoBERTa's, the single matrix on top of a Llama and the layers before a masked
language model's vocabulary differ in nothing but their style.

Axes: b batch, c choices, t time, m features of the model, n labels, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.model.config import EncoderDecoderConfig, ModelConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder import Encoder, first_state
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.model.layers import Linear, activate, make_norm

Backbone = Decoder | Encoder | EncoderDecoder
POOLINGS = ("cls", "mean", "last", "pooler")
PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


@dataclass(frozen=True)
class HeadStyle:
    """Which parts stand between the states and the scores."""

    pooling: str = "cls"
    """The vector of a whole text: that of its first token (cls), of its last, their mean, or BERT's
    pooler, which is part of the backbone. Heads that look at each token have no use for it."""
    dense: bool = False
    dense_bias: bool = True
    activation: str | None = None
    """The activation behind the dense layer; None: the backbone's own."""
    norm: bool = False
    bias: bool = True
    """Whether the last matrix has a bias."""
    dropout: float | None = None
    """None: the backbone's."""
    dropout_first: bool = False
    """Whether there is dropout before the dense layer as well."""


@dataclass(frozen=True)
class HeadConfig:
    """A head: its kind, its style and what its outputs mean."""

    kind: str
    """One of `HEADS`."""
    style: HeadStyle = field(default_factory=HeadStyle)
    labels: tuple[str, ...] = ()
    """The names of the outputs, in their order."""
    problem_type: str | None = None
    """What the labels are (`PROBLEMS`); None: what their number and type suggest."""
    pad_id: int | None = None
    """The padding by which others find the end of a text; ours is told by the attention mask."""
    normalise: bool = False
    """Whether an embedding is scaled to length 1."""
    max_length: int | None = None
    """The longest text, in tokens, that an embedder was made for."""

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("kind", self.kind, tuple(HEADS)),
            ("style.pooling", self.style.pooling, POOLINGS),
            ("problem_type", self.problem_type or PROBLEMS[0], PROBLEMS),
        ):
            if value not in choices:
                raise UserError(
                    f"head.{name} is '{value}'; it must be one of {', '.join(choices)}."
                    + nearest(value, choices)
                )
        if self.kind in LABELLED and not self.labels:
            raise UserError(f"A head of the kind {self.kind} needs labels, at least one.")


class Head(nn.Module):
    """A backbone with something on top of it; the part that all heads share.

    The backbone loses what the head replaces: a decoder its own output matrix (unless that is the
    embedding matrix), and an encoder-decoder its decoder if the head looks at the source alone.
    """

    source_only = False  # whether the head looks at no more than the encoder's states

    def __init__(self, backbone: Backbone, head_config: HeadConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.head_config = head_config
        if isinstance(backbone, EncoderDecoder):
            if hasattr(backbone, "logits_bias"):
                del backbone.logits_bias
            if self.source_only:
                backbone.decoder = nn.Identity()  # type: ignore[assignment]
            elif not backbone.config.decoder.tie_embeddings:
                backbone.decoder.head = nn.Identity()  # type: ignore[assignment]
        elif isinstance(backbone, Decoder) and not backbone.config.tie_embeddings:
            backbone.head = nn.Identity()  # type: ignore[assignment]
        if head_config.style.pooling == "pooler" and not getattr(self.stack, "pooler", False):
            raise UserError("The head needs BERT's pooler, which the model does not have.")

    @property
    def config(self) -> ModelConfig | EncoderDecoderConfig:
        """The backbone's config."""
        return self.backbone.config

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The precision of the activations; None means that of the weights."""
        return self.backbone.compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype | None) -> None:
        self.backbone.compute_dtype = dtype

    @property
    def stack(self) -> ModelConfig:
        """The config of the stack whose states the head sees."""
        config = self.backbone.config
        if isinstance(config, ModelConfig):
            return config
        return config.encoder if self.source_only else config.decoder

    def forward(
        self,
        tokens_bt: Tensor,
        *,
        attention_mask: Tensor | None = None,
        segments_bt: Tensor | None = None,
    ) -> Tensor:
        """The head's answer to each row.

        `attention_mask` (b, t) is 1 for text and 0 for padding; `segments_bt` is 0 for the first
        text of a pair and 1 for the second.
        """
        hidden_btm = self.states(tokens_bt, attention_mask, segments_bt)
        return self.answer(hidden_btm, attention_mask)

    def answer(self, hidden_btm: Tensor, mask_bt: Tensor | None) -> Tensor:
        """What the head makes of the last states."""
        raise NotImplementedError

    def states(
        self, tokens_bt: Tensor, mask_bt: Tensor | None, segments_bt: Tensor | None
    ) -> Tensor:
        """The last state of each position: (b, t, m)."""
        backbone = self.backbone
        if isinstance(backbone, Encoder):
            return backbone(tokens_bt, attention_mask=mask_bt, segments_bt=segments_bt)
        if isinstance(backbone, Decoder):
            return backbone.hidden(tokens_bt, document_ids_bt=mask_bt)
        encoded = backbone.encoder(tokens_bt, attention_mask=mask_bt)
        if self.source_only:
            return encoded
        # The decoder reads the source again, one step late: its last state has seen all of it.
        start = torch.full_like(tokens_bt[:, :1], backbone.config.start_id)
        target_bt = torch.cat([start, tokens_bt[:, :-1]], dim=1)
        return backbone.hidden(target_bt, encoded, attention_mask=mask_bt)

    def pool(self, hidden_btm: Tensor, mask_bt: Tensor | None) -> Tensor:
        """One vector for each row: (b, m)."""
        match self.head_config.style.pooling:
            case "cls":
                return first_state(hidden_btm, mask_bt)
            case "last":
                flipped = None if mask_bt is None else mask_bt.flip(1)
                return first_state(hidden_btm.flip(1), flipped)
            case "pooler":
                assert isinstance(self.backbone, Encoder)
                return self.backbone.pooled(hidden_btm, mask_bt)
        if mask_bt is None:
            return hidden_btm.float().mean(1).to(hidden_btm.dtype)
        weights_bt1 = mask_bt[..., None].float()
        count = weights_bt1.sum(1).clamp(min=1)
        return ((hidden_btm.float() * weights_bt1).sum(1) / count).to(hidden_btm.dtype)


class ScoringHead(Head):
    """A head that ends in a matrix with one row per output."""

    def __init__(self, backbone: Backbone, head_config: HeadConfig, outputs: int) -> None:
        super().__init__(backbone, head_config)
        if isinstance(backbone, Encoder) and head_config.style.pooling != "pooler":
            backbone.drop_pooler()
        style, m = head_config.style, self.stack.d_model
        self.dropout = self.stack.dropout if style.dropout is None else style.dropout
        self.activation = style.activation or self.stack.activation
        if style.dense:
            self.dense = Linear(m, m, bias=style.dense_bias)
        if style.norm:
            self.norm = make_norm(self.stack, m)
        self.out = Linear(m, outputs, bias=style.bias)

    def score(self, x: Tensor) -> Tensor:
        """(..., m) -> (..., outputs)."""
        style = self.head_config.style
        if style.dropout_first:
            x = F.dropout(x, self.dropout, self.training)
        if style.dense:
            x = activate(self.dense(x), self.activation)
        if style.norm:
            x = self.norm(x)
        return self.out(F.dropout(x, self.dropout, self.training))

    @torch.no_grad()
    def initialise(self, seed: int, names: Collection[str] | None = None) -> None:
        """Draw fresh weights for the head's parameters, or for those called `names`.

        Matrices are normal(0, init_std); norms start at one, biases at zero.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.startswith("backbone.") if names is None else name not in names:
                continue
            if parameter.dim() < 2:
                one = name.endswith("norm.weight") and self.stack.norm != "rms_plus_one"
                parameter.fill_(1.0 if one else 0.0)
                continue
            drawn = torch.empty(parameter.shape).normal_(generator=generator)
            parameter.copy_(drawn * self.stack.init_std)


class SequenceClassifier(ScoringHead):
    """Scores (b, n) of the labels of a whole text; with one label, the value of a regression."""

    def __init__(self, backbone: Backbone, head_config: HeadConfig) -> None:
        super().__init__(backbone, head_config, len(head_config.labels))

    def answer(self, hidden_btm: Tensor, mask_bt: Tensor | None) -> Tensor:
        return self.score(self.pool(hidden_btm, mask_bt))


class TokenClassifier(ScoringHead):
    """Scores (b, t, n) of the labels of each token: names in a text, parts of speech."""

    source_only = True

    def __init__(self, backbone: Backbone, head_config: HeadConfig) -> None:
        super().__init__(backbone, head_config, len(head_config.labels))

    def answer(self, hidden_btm: Tensor, mask_bt: Tensor | None) -> Tensor:
        return self.score(hidden_btm)


class MultipleChoice(ScoringHead):
    """A score for each choice, (b, c). A choice is a text of its own: question and answer, say.

    What is one row elsewhere is here one choice: all arguments are (b, c, t).
    """

    def __init__(self, backbone: Backbone, head_config: HeadConfig) -> None:
        super().__init__(backbone, head_config, 1)

    def forward(
        self,
        tokens_bt: Tensor,
        *,
        attention_mask: Tensor | None = None,
        segments_bt: Tensor | None = None,
    ) -> Tensor:
        flat = (None if x is None else x.flatten(0, 1) for x in (attention_mask, segments_bt))
        mask, segments = flat
        scores = super().forward(tokens_bt.flatten(0, 1), attention_mask=mask, segments_bt=segments)
        return scores.view(tokens_bt.shape[:2])

    def answer(self, hidden_btm: Tensor, mask_bt: Tensor | None) -> Tensor:
        return self.score(self.pool(hidden_btm, mask_bt))


class MaskedLM(ScoringHead):
    """Scores (b, t, v) of every vocabulary entry at each position: which token was masked there?

    The last matrix is the embedding matrix where the config ties the two.
    """

    source_only = True

    def __init__(self, backbone: Backbone, head_config: HeadConfig) -> None:
        super().__init__(backbone, head_config, backbone.config.vocab_size)
        self.tie()

    def tie(self) -> None:
        """Let the two matrices be one; called again once real weights stand in."""
        if isinstance(self.backbone, Encoder) and self.backbone.config.tie_embeddings:
            self.out.weight = self.backbone.embedding.weight

    def answer(self, hidden_btm: Tensor, mask_bt: Tensor | None) -> Tensor:
        return self.score(hidden_btm)


class Embedder(Head):
    """One vector per text, (b, m): texts of like meaning have close vectors (arXiv:1908.10084)."""

    source_only = True

    def answer(self, hidden_btm: Tensor, mask_bt: Tensor | None) -> Tensor:
        x_bm = self.pool(hidden_btm, mask_bt)
        return F.normalize(x_bm, dim=-1) if self.head_config.normalise else x_bm


HEADS: dict[str, type[Head]] = {
    "classification": SequenceClassifier,
    "token_classification": TokenClassifier,
    "multiple_choice": MultipleChoice,
    "masked_lm": MaskedLM,
    "embedding": Embedder,
}
LABELLED = ("classification", "token_classification")


def make_head(backbone: Backbone, head_config: HeadConfig) -> Head:
    """The head that the config describes, on this backbone."""
    return HEADS[head_config.kind](backbone, head_config)
