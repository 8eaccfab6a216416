"""Growing and cutting a model: more tokens, longer texts, tied or untied matrices, fewer layers.

Every function returns a new model and leaves the old one as it was; each says what the new one has
kept exactly and what must be learnt. Under a head (`heads.py`) the backbone is operated on and the
head put back. `modernise.py` builds on `rebuild` and turns a GPT-2, one step at a time, into a
Llama. Which class can hold the result, `weights.families.family_of` says.

Axes: v vocabulary, p positions, m features of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.model.config import LARGEST_SIZE, ModelConfig, RopeScaling
from llm_from_scratch.model.decoder import Decoder, Stack
from llm_from_scratch.model.encoder import Encoder
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.model.heads import Backbone, Head, MaskedLM, make_head
from llm_from_scratch.model.unfilled import unfilled
from llm_from_scratch.text.tokenizer import Tokenizer

M = TypeVar("M", bound=Backbone | Head)
P = TypeVar("P", bound=EncoderDecoder | Head)
W = TypeVar("W", bound=Decoder | EncoderDecoder)

# How a context is stretched, by the kind of the positions; the first is the default.
STRETCHES = {
    "rope": ("yarn", "linear", "llama3", "theta"),
    "learned": ("stretch", "repeat"),
}


@torch.no_grad()
def rebuild(model: M, config: Any, values: Mapping[str, Tensor] | None = None) -> M:
    """A model of `config` with copies of the parameters of `model`, or of `values` by their names.

    Both must have the shapes that `config` asks for; parameters that it does not ask for are left
    behind. Precision, device and mode are those of the model, and what is frozen stays frozen.
    """
    refuse_few_bits(model)
    own = dict(model.named_parameters(remove_duplicate=False))
    values = {**own, **(values or {})}
    like = next(model.parameters())
    with unfilled():
        new = _like(model, config)
    for name, parameter in list(new.named_parameters()):
        value = values[name]
        assert value.shape == parameter.shape, f"{name} is {value.shape}, not {parameter.shape}"
        owner, _, last = name.rpartition(".")
        fresh = nn.Parameter(value.detach().to(like.device, like.dtype, copy=True))
        like_it = value if isinstance(value, nn.Parameter) else own.get(name)
        fresh.requires_grad_(like_it is None or like_it.requires_grad)
        setattr(new.get_submodule(owner), last, fresh)
    for part in new.modules():
        if isinstance(part, Decoder) and part.config.tie_embeddings:
            part.head.weight = part.embedding.weight
        if isinstance(part, Stack):
            part.make_frequencies()
    for part in new.modules():
        if isinstance(part, EncoderDecoder | MaskedLM):
            part.tie()
    new.to(like.device).train(model.training)
    new.compute_dtype = model.compute_dtype
    return new


def refuse_few_bits(model: nn.Module) -> None:
    """Raise `UserError` where matrices are packed (quant/linear.py) and hold no numbers."""
    if any(hasattr(part, "dequantize") for part in model.modules()):
        raise UserError(
            "This model's matrices are in few bits, and only numbers can be operated on: load it "
            "with dtype='fp32'."
        )


def _like(model: Any, config: Any) -> Any:
    """A model of `config` under the same head, if any, and without what a head took away."""
    if isinstance(model, Head):
        head, longest = model.head_config, config.max_seq_len
        if head.max_length is not None and longest > model.config.max_seq_len:
            head = replace(head, max_length=longest)
        return make_head(type(model.backbone)(config), head)
    new = type(model)(config)
    if isinstance(getattr(model, "head", None), nn.Identity):
        new.head = nn.Identity()
    return new


def _inside(model: Backbone | Head) -> tuple[Backbone, str]:
    """The model without its head, and what the names of its parameters begin with."""
    return (model.backbone, "backbone.") if isinstance(model, Head) else (model, "")


def on_side(model: P, side: str, change: Callable[[Any], Decoder | Encoder]) -> P:
    """An encoder-decoder of whose two stacks the `side` ("encoder" or "decoder") is changed.

    `on_side(model, "decoder", lambda stack: drop_layers(stack, keep=[0, 3]))` is a smaller writer
    behind the same reader.
    """
    if side not in ("encoder", "decoder"):
        raise UserError(f"There is no side '{side}'; it must be encoder or decoder.")
    whole, inside = _inside(model)
    if not isinstance(whole, EncoderDecoder):
        raise UserError(f"A {type(whole).__name__} has no sides; change it as it is.")
    old = getattr(whole, side)
    if isinstance(old, nn.Identity):  # a head that looks at the source alone took it away
        with unfilled():
            old = Decoder(whole.config.decoder)
    stack = change(old)
    here = f"{inside}{side}."
    values = {here + name: p for name, p in stack.named_parameters(remove_duplicate=False)}
    changed: dict[str, Any] = {side: stack.config}
    return rebuild(model, replace(whole.config, **changed), values)


# --- tokens --------------------------------------------------------------------------------------


def add_tokens(
    model: M, tokenizer: Tokenizer, tokens: Sequence[str], *, special: bool = False
) -> tuple[M, Tokenizer]:
    """A model and a tokenizer that know `tokens` as well; `special` as in `Tokenizer.add_tokens`.

    The new rows are the mean of the old ones, see `grow_vocabulary`. A model whose vocabulary is
    larger than its tokenizer's (padded to a round number) has its spare rows used first.
    """
    grown = copy.copy(tokenizer)
    grown.config, grown.extra_stop_ids = dict(grown.config), set(grown.extra_stop_ids)
    grown.add_tokens(tokens, special=special)
    return grow_vocabulary(model, tokenizer.vocab_size, grown.vocab_size), grown


@torch.no_grad()
def grow_vocabulary(model: M, used: int, wanted: int) -> M:
    """A model with `wanted` entries or more; those from `used` on are the mean of those before.

    This holds for the embedding, for an untied head (that of a masked language model as well) and
    for a bias of the logits (Hewitt 2021, "Initializing new word embeddings for pretrained language
    models"). The logit of a new entry is then the mean of the old ones, which is below the
    logarithm of their mean exponential: n new entries behind v old ones together take less than
    n / (n + v) of the probability, and among the old ones it is shared as before. (A soft-cap on
    the logits changes this a little.)
    """
    config: Any = model.config
    pair = hasattr(config, "encoder")
    if pair and config.encoder.vocab_size != config.decoder.vocab_size:
        raise UserError(
            f"The source's vocabulary has {config.encoder.vocab_size} entries and the target's "
            f"{config.decoder.vocab_size}; only one that both share can be grown."
        )
    if used > config.vocab_size or used < 1:
        raise UserError(
            f"The tokenizer has {used} entries and the model {config.vocab_size}; they do not "
            "belong together."
        )
    size = max(config.vocab_size, wanted)
    _check_size("The vocabulary", size)
    ends = ("embedding.weight", "head.weight")
    own = ("out.weight", "out.bias") if isinstance(model, MaskedLM) else ("logits_bias",)
    values = {}
    for name, rows_vm in model.named_parameters(remove_duplicate=False):
        if name.endswith(ends) or name in own:
            new = rows_vm.new_zeros(size, *rows_vm.shape[1:])
            new[: len(rows_vm)] = rows_vm
            new[used:wanted] = rows_vm[:used].float().mean(0).to(rows_vm.dtype)
            values[name] = new
    if pair:
        encoder, decoder = (replace(c, vocab_size=size) for c in (config.encoder, config.decoder))
        return rebuild(model, replace(config, encoder=encoder, decoder=decoder), values)
    return rebuild(model, replace(config, vocab_size=size), values)


def _check_size(name: str, size: int) -> None:
    if size > LARGEST_SIZE:
        raise UserError(f"{name} would be {size:,} long; there may be {LARGEST_SIZE:,} at most.")


# --- context -------------------------------------------------------------------------------------


def extend_context(model: M, max_seq_len: int, how: str | None = None) -> M:
    """A model that takes texts of `max_seq_len` tokens. f is the new length over the old one.

    Rotary positions (no parameter changes; every text is read a little differently, so that some
    training on long texts should follow):
      "yarn"    slow pairs turn f times more slowly, fast ones as before (arXiv:2309.00071);
      "llama3"  the same with Llama 3's limits between slow and fast (arXiv:2407.21783);
      "linear"  all turn f times more slowly: position f * p is read as p was (arXiv:2306.15595);
      "theta"   the base is raised so that the slowest pair turns f times more slowly and the
                fastest as before ("NTK-aware").
    Learned positions:
      "stretch" new rows lie on the lines between the old ones, first and last row stay;
      "repeat"  the old rows again and again, as Longformer did (arXiv:2004.05150): texts up to the
                old length are read exactly as before.
    The first of these is the default, or else the one by which the model was stretched before, so
    that it goes on. Sinusoidal positions and relative distances know no length: every text that
    fitted is read exactly as before.
    """
    stack, inside = _inside(model)
    if isinstance(stack, EncoderDecoder):
        both: Any = model
        for side in ("encoder", "decoder"):
            both = on_side(both, side, lambda stack: extend_context(stack, max_seq_len, how))
        return both
    config = stack.config
    if max_seq_len <= config.max_seq_len:
        raise UserError(
            f"The context is {config.max_seq_len} tokens already; max_seq_len must be larger, not "
            f"{max_seq_len}."
        )
    _check_size("The context", max_seq_len)
    choices = STRETCHES.get(config.position, ())
    if how is None and choices:
        before = config.rope_scaling if config.position == "rope" else None
        how = choices[0] if before is None else before.kind
    if how is not None and how not in choices:
        raise UserError(
            f"'{how}' is no way to extend {config.position} positions; "
            + (f"there are {', '.join(choices)}." if choices else "leave it out.")
            + nearest(how, choices)
        )
    longer = replace(config, max_seq_len=max_seq_len)
    if config.position == "rope":
        assert how is not None
        return rebuild(model, _turned_slower(longer, max_seq_len / config.max_seq_len, how))
    if config.position == "learned":
        assert how is not None
        rows = _more_positions(stack.positions.weight, config.position_offset, max_seq_len, how)
        return rebuild(model, longer, {f"{inside}positions.weight": rows})
    return rebuild(model, longer)


def _turned_slower(config: ModelConfig, factor: float, how: str) -> ModelConfig:
    old = config.rope_scaling
    if how == "theta":
        d = config.rope_dim
        if d < 4:
            raise UserError(f"'theta' needs at least two rotary pairs; here {d} features turn.")
        return replace(config, rope_theta=config.rope_theta * factor ** (d / (d - 2)))
    if old is None:
        least, most = {"yarn": (1.0, 32.0)}.get(how, (1.0, 4.0))
        original = round(config.max_seq_len / factor)
        if how == "linear":  # which has no use for the rest, so that it stays at its defaults
            return replace(config, rope_scaling=RopeScaling("linear", factor))
        return replace(config, rope_scaling=RopeScaling(how, factor, least, most, original))
    if old.kind != how:
        raise UserError(
            f"The context was stretched by '{old.kind}' before; go on with '{old.kind}' or "
            f"'theta', not with '{how}'."
        )
    return replace(config, rope_scaling=replace(old, factor=old.factor * factor))


def _more_positions(rows_pm: Tensor, offset: int, length: int, how: str) -> Tensor:
    """The table for `length` positions; its first `offset` rows are of no position and stay."""
    first, old = rows_pm[:offset], rows_pm[offset:]
    if how == "repeat":
        return torch.cat([first, old.repeat(-(-length // len(old)), 1)[:length]])
    columns = old.float().T[None]
    new = F.interpolate(columns, size=length, mode="linear", align_corners=True)[0].T
    return torch.cat([first, new.to(rows_pm.dtype)])


# --- tied and untied -----------------------------------------------------------------------------


def untie(model: W) -> W:
    """A model whose output matrix is a copy of its embedding: every logit stays as it is.

    Of an encoder-decoder it is the decoder's. T5 and mT5 can have that, and a Marian whose stacks
    have an embedding each; BART's class has one matrix for everything.
    """
    _writer(model, "untie")
    config: Any = model.config
    if isinstance(model, EncoderDecoder) and config.share_embeddings and config.logits_bias:
        raise UserError(
            "An encoder-decoder with a bias on its logits and one embedding for both stacks (BART, "
            "Marian) is of a class without an output matrix of its own; leave it tied."
        )
    return rebuild(model, _tying(config, False))


def tie(model: W, keep: str = "embedding") -> W:
    """A model whose output matrix is its embedding; of two the one named by `keep` stays.

    "embedding", "head", or "mean". Exact where both were equal, else one end of the model must be
    learnt anew. Of an encoder-decoder it is the decoder's embedding, and with it the encoder's
    where the two are one.
    """
    writer = _writer(model, "tie")
    config: Any = model.config
    embedding, head = writer.embedding.weight, writer.head.weight
    kept = {"embedding": embedding, "head": head, "mean": (embedding + head) / 2}
    if keep not in kept:
        raise UserError(f"keep is '{keep}'; it must be one of {', '.join(kept)}.")
    places = [""]
    if isinstance(model, EncoderDecoder):
        places = ["decoder.", "encoder."] if config.share_embeddings else ["decoder."]
    values = {f"{place}embedding.weight": kept[keep] for place in places}
    return rebuild(model, _tying(config, True), values)


def _tying(config: Any, tied: bool) -> Any:
    if isinstance(config, ModelConfig):
        return replace(config, tie_embeddings=tied)
    return replace(config, decoder=replace(config.decoder, tie_embeddings=tied))


def _writer(model: nn.Module, what: str) -> Decoder:
    """The stack with the output matrix."""
    writer = model.decoder if isinstance(model, EncoderDecoder) else model
    if not isinstance(writer, Decoder):
        raise UserError(
            f"{what} is for a Decoder or an EncoderDecoder, not for a {type(model).__name__}."
        )
    refuse_few_bits(model)
    return writer


# --- layers --------------------------------------------------------------------------------------


def drop_layers(model: M, keep: Sequence[int]) -> M:
    """A model of the blocks with the numbers `keep` alone (from 0), in this order.

    A block that adds nothing (its last matrices are zero) is dropped exactly; for the rest, the
    further apart two neighbours stood before, the more is to be learnt. Which blocks have windows
    and experts moves with them.
    """
    stack, inside = _inside(model)
    if isinstance(stack, EncoderDecoder):
        raise UserError(
            "An encoder-decoder has two stacks; say which one loses layers: on_side(model, "
            '"decoder", lambda stack: drop_layers(stack, keep)).'
        )
    config = stack.config
    if not keep or any(not 0 <= layer < config.n_layers for layer in keep):
        raise UserError(
            f"keep is {list(keep)}; it must name some of the blocks 0 to {config.n_layers - 1}."
        )
    if not config.first_norm and (keep[0] != 0 or 0 in keep[1:]):
        raise UserError("The first block of this family has one norm less; keep it, and first.")
    places: dict[int, list[int]] = {}
    for new, old in enumerate(keep):
        places.setdefault(old, []).append(new)

    def moved(layers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(new for old in layers for new in places.get(old, ())))

    values = {
        f"{inside}blocks.{new}.{name}": parameter
        for new, old in enumerate(keep)
        for name, parameter in stack.blocks[old].named_parameters()
    }
    windows = moved(config.window_layers)
    experts = config.experts and replace(config.experts, layers=moved(config.experts.layers))
    changed = replace(
        config, n_layers=len(keep), window_layers=windows, experts=experts,
        window=config.window if windows else None,
    )  # fmt: skip
    return rebuild(model, changed, values)
