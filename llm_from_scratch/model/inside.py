"""Looking inside a model while it reads: attention, the prediction layer by layer, neighbours.

A model is a loop over its blocks (`Stack.run`). `Reading` is that loop with a handle: one text, one
block at a time, so that what lies between two blocks can be looked at. No arithmetic is written a
second time and no model is changed; whatever a model is made of (grouped heads, windows, capped
scores, biases for distances, norms before, behind or around a branch, weights in 4 bits), it is its
own code that runs.

The three questions that one may ask:

- `attention_weights`: which positions does each head of a block look at?
- `logit_lens`: what would the model say if it had to stop after this block?
- `neighbours`: which tokens have a vector like this one's?

Axes: b batch (one text here), t time (positions that look), s positions that are looked at, h query
heads, m features of the model, l places along the blocks, k the likeliest, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.attend import attend_by_hand
from llm_from_scratch.model.decoder import Decoder, Stack
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.model.heads import Backbone, Head
from llm_from_scratch.model.layers import Attention

Looked = Backbone | Head
AT_ONCE = 1 << 23  # numbers of a table that are held at a time while neighbours are searched
LOGITS_AT_ONCE = 1 << 21  # logits that are computed at a time while predictions are read off


class Lens(NamedTuple):
    """The likeliest next tokens: at the embedding, and behind each block."""

    ids_ltk: Tensor
    probabilities_ltk: Tensor  # fp32


class Neighbours(NamedTuple):
    """Tokens and the cosines of the angles between their vectors and that of the one asked for."""

    ids_k: Tensor
    cosines_k: Tensor  # fp32, falling


def reader_of(model: Looked) -> Stack:
    """The stack that reads the text: the decoder, the encoder, or of both the encoder."""
    backbone = model.backbone if isinstance(model, Head) else model
    return backbone.encoder if isinstance(backbone, EncoderDecoder) else backbone


class Reading:
    """One text on its way through a model's blocks.

    `x_btm` is the residual stream (1, t, m) behind the first `passed` blocks: at first the
    embeddings, at the end what the last norm is given. Each step may be taken on another day:
    nothing of the model is held between them, and other work may use it.

    The text goes through a decoder or an encoder. Of an encoder-decoder it is the encoder, unless
    there is a `source`: then the encoder has read that, and the text goes through the decoder.

    Raises `UserError` for a text without tokens, one that is longer than the model's context, and
    ids that are not in its vocabulary.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Looked,
        ids: Sequence[int] | Tensor,
        source: Sequence[int] | Tensor | None = None,
    ) -> None:
        self.model = model
        self.stack = reader_of(model)
        encoded_bsm = None
        if source is not None:
            if not isinstance(model, EncoderDecoder):
                raise UserError("Only an encoder-decoder reads a source: leave it out.")
            with resting(model.encoder):
                encoded_bsm = model.encoder(checked(model.encoder, source))
            self.stack = model.decoder
        tokens_bt = checked(self.stack, ids)
        with resting(self.stack):
            self.sight = self.stack.sight(tokens_bt, None, None)
            self.sight.look_across(encoded_bsm, None, None)
            self.x_btm: Tensor = self.stack.embed(tokens_bt, self.sight.positions, None)
        self.passed = 0

    @property
    def ended(self) -> bool:
        """Whether all blocks are passed."""
        return self.passed == len(self.stack.blocks)

    @torch.no_grad()
    def step(self) -> None:
        """Through the next block."""
        with resting(self.stack):
            self.x_btm = self.stack.blocks[self.passed](self.x_btm, self.sight, None)
        self.passed += 1

    def watched_step(self, across: bool = False) -> Tensor:
        """Through the next block: the attention weights (h, t, s) that it used on the way.

        `across`: those of the attention to the source. Raises `UserError` for a block that mixes
        positions without attention.
        """
        attention = getattr(self.stack.blocks[self.passed], "cross" if across else "attention")
        if not isinstance(attention, Attention):
            raise UserError(
                f"Block {self.passed} has no attention weights: it mixes positions by "
                f"{type(attention).__name__}."
            )
        with overheard(attention) as heard:
            self.step()
        return heard[0][0]

    @torch.no_grad()
    def predictions(self, top: int, first: int = 0, last: int | None = None) -> tuple[Tensor, ...]:
        """Ids and probabilities (t, k) of the likeliest tokens to follow positions first to last.

        What the model would say if the blocks ended here: the state goes through the last norm and
        the output matrix as if it were the last. Behind the last block that is what it does say.
        """
        model, stack = self.model, self.stack
        if not isinstance(model, Decoder | EncoderDecoder) or not isinstance(stack, Decoder):
            raise UserError("This model predicts no next token: the logit lens is for decoders.")
        with resting(stack):
            x_tm = stack.final_norm(self.x_btm[0, first:last])
            p_tv = model.logits(x_tm).float().softmax(-1)
        found = p_tv.topk(max(1, min(top, p_tv.shape[-1])))
        return found.indices, found.values


def checked(stack: Stack, ids: Sequence[int] | Tensor) -> Tensor:
    """The text as (1, t) on the model's device, or a `UserError`."""
    size, count = stack.config.vocab_size, len(ids)
    if count == 0:
        raise UserError("There is no token to look at: give at least one.")
    stack.check_length(count)
    wrong = next((int(i) for i in ids if not 0 <= int(i) < size), None)
    if wrong is not None:
        raise UserError(f"There is no token {wrong}: the model's vocabulary ends at {size - 1}.")
    return torch.as_tensor([int(i) for i in ids], device=stack.device)[None]


@contextmanager
def resting(stack: Stack) -> Iterator[None]:
    """Without dropout, whatever mode the model is in."""
    training = stack.training
    if training:
        stack.eval()
    try:
        yield
    finally:
        if training:
            stack.train()


# --- attention -----------------------------------------------------------------------------------


@contextmanager
def overheard(attention: Attention) -> Iterator[list[Tensor]]:
    """The weights (b, h, t, s) of every pass through a layer, for as long as this is open.

    The layer hands `mix` the queries, the keys and who may see whom, all turned, normed and shared
    as the model wants it. Here one instance's `mix` is wrapped in one that keeps what it is given.
    """
    heard: list[Tensor] = []
    inner = attention.mix

    def mix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        heard.append(weights_of(attention, q, k, mask, causal))
        return inner(q, k, v, mask, causal)

    wrapped: Any = mix
    attention.mix = wrapped  # type: ignore[method-assign]
    try:
        yield heard
    finally:
        del attention.mix


def weights_of(
    attention: Attention, q_bhtd: Tensor, k_bksd: Tensor, mask: Tensor | None, causal: bool
) -> Tensor:
    """softmax(q k^T * scale), (b, h, t, s) in fp32: how much each position takes from each other.

    Attention sums values, weighted. If the value of position j is the j-th unit vector, the sum
    *is* the weights: the arithmetic is that of the model, without a second copy of it.
    """
    q_bhtd, k_bksd = q_bhtd.float(), k_bksd.float()
    k_bhsd = k_bksd.repeat_interleave(q_bhtd.shape[1] // k_bksd.shape[1], dim=1)
    t, s = q_bhtd.shape[2], k_bhsd.shape[2]
    if causal:
        mask = torch.ones(t, s, dtype=torch.bool, device=q_bhtd.device).tril_()
    units_ss = torch.eye(s, device=q_bhtd.device)
    return attend_by_hand(
        q_bhtd,
        k_bhsd,
        units_ss,
        mask,
        scale=attention.scale,
        softcap=attention.config.attention_softcap,
    )


def attention_weights(
    model: Looked,
    ids: Sequence[int] | Tensor,
    layer: int,
    *,
    source: Sequence[int] | Tensor | None = None,
    across: bool = False,
) -> Tensor:
    """What each head of block `layer` (from 0) looks at while the model reads: (h, t, s), fp32.

    Row t says how position t divides its attention among the positions s: it is never negative and
    sums to one. In a decoder nothing is taken from later positions, in a layer with a window
    nothing from far ones. Query heads that share keys (grouped-query attention) come one by one.

    Of an encoder-decoder these are the weights of the encoder. With the ids of a `source` they are
    the decoder's, and `across` the weights with which it looks at that source (h, t, s): in a
    translator they say where each word came from (Bahdanau et al., arXiv:1409.0473).

    A weight says where a head looks, not what it takes from there, nor that the result depends on
    it (Jain and Wallace, arXiv:1902.10186).
    """
    reading = Reading(model, ids, source)
    if not 0 <= layer < len(reading.stack.blocks):
        raise UserError(
            f"There is no layer {layer}: the model's are 0 to {len(reading.stack.blocks) - 1}."
        )
    if across and source is None:
        raise UserError("Attention across needs the ids of a source to look at.")
    for _ in range(layer):
        reading.step()
    return reading.watched_step(across)


# --- the logit lens ------------------------------------------------------------------------------


def lens_rows(reading: Reading, top: int) -> Iterator[tuple[Tensor, ...]]:
    """The predictions at one place of the stack, some positions at a time (logits are large)."""
    rows = max(1, LOGITS_AT_ONCE // reading.stack.config.vocab_size)
    for first in range(0, reading.x_btm.shape[1], rows):
        yield reading.predictions(top, first, first + rows)


def logit_lens(
    model: Looked,
    ids: Sequence[int] | Tensor,
    top: int = 3,
    *,
    source: Sequence[int] | Tensor | None = None,
) -> Lens:
    """What a decoder would predict behind each position if it had to stop early: l, t, k.

    Place 0 is the embedding, place l the stream behind block l; the last place is the prediction
    that the model makes. All blocks write into one stream, so what they have written so far can be
    read with the norm and the matrix that read it at the end (nostalgebraist 2020, "interpreting
    GPT: the logit lens"; Geva et al., arXiv:2203.14680). Early places are read with a key that was
    not made for them, so nonsense there does not mean that nothing is known.

    Raises `UserError` for models that predict no next token.
    """
    reading = Reading(model, ids, source)
    places = [_place(reading, top)]
    while not reading.ended:
        reading.step()
        places.append(_place(reading, top))
    ids_ltk, probabilities_ltk = (torch.stack(part) for part in zip(*places, strict=True))
    return Lens(ids_ltk, probabilities_ltk)


def _place(reading: Reading, top: int) -> tuple[Tensor, ...]:
    return tuple(torch.cat(part) for part in zip(*lens_rows(reading, top), strict=True))


# --- neighbours ----------------------------------------------------------------------------------


@torch.no_grad()
def cosines(model: Looked, token: int, count: int | None = None) -> Iterator[Tensor]:
    """The cosines (fp32) of `token` with the first `count` tokens, some rows of the table a time.

    Rows are looked up by their ids as a text's are, so a table in 4 bits need not be unpacked.
    """
    stack = reader_of(model)
    device = checked(stack, [token]).device
    count = min(count or stack.config.vocab_size, stack.config.vocab_size)
    wanted_m = stack.embedding(torch.tensor([token], device=device))[0].float()
    wanted_m = nn.functional.normalize(wanted_m, dim=0)
    rows = max(1, AT_ONCE // stack.config.d_model)
    for first in range(0, count, rows):
        some = torch.arange(first, min(first + rows, count), device=device)
        rows_nm = stack.embedding(some).float()
        yield (rows_nm @ wanted_m) / rows_nm.norm(dim=1).clamp(min=1e-12)


def neighbours(model: Looked, token: int, top: int = 12, *, count: int | None = None) -> Neighbours:
    """The `top` tokens whose embeddings point most nearly where that of `token` points.

    The embedding is the one place where a token is a vector by itself, before any context; training
    moves tokens that occur alike near each other (Mikolov et al., arXiv:1301.3781). The cosine
    leaves out lengths, which say more about how frequent a token is than about what it means.
    `count` cuts off the table's spare rows, which belong to no token.

    Of an encoder-decoder this is the encoder's table.
    """
    return nearest_of(torch.cat(list(cosines(model, token, count))), token, top)


def nearest_of(cosines_v: Tensor, token: int, top: int) -> Neighbours:
    """The `top` largest of all cosines, the token itself left out."""
    cosines_v = cosines_v.clone()
    if token < len(cosines_v):
        cosines_v[token] = -2.0  # below every cosine
    found = cosines_v.topk(max(0, min(top, len(cosines_v) - 1)))
    return Neighbours(found.indices, found.values)
