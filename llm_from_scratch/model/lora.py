"""LoRA, rsLoRA and DoRA: which layers get adapters, and what stays trained beside them.

The layers themselves are in `low_rank.py`; switching, merging and freezing in `adapters.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder import Encoder
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.model.heads import MaskedLM
from llm_from_scratch.model.low_rank import (
    DEFAULT,
    Adapted,
    AdaptedEmbedding,
    AdaptedLinear,
    LowRank,
    Switch,
)

KINDS = ("lora", "rslora", "dora")
BASES = ("nf4", "int4", "int8")
# Tables in which all texts of a batch may look up the same, and the axes of entries text by text.
SHARED = {"positions": 2, "segments": 2, "relative_bias": 3}


@dataclass(frozen=True)
class LoraSettings:
    """Which layers get an adapter, and of which kind; rank 0 trains the model itself."""

    rank: int = 0
    """The adapters' rank; 0 trains the weights themselves."""
    alpha: float = 16.0
    """What the detour is multiplied by, before the division by the rank."""
    dropout: float = 0.0
    """Share of the detour's inputs dropped while training."""
    kind: str = "lora"
    """lora, rslora (divides by the root of the rank) or dora (learns the lengths apart)."""
    targets: tuple[str, ...] = ()
    """Names of the layers that get one; default all linear layers in the blocks."""
    base: str | None = None
    """nf4, int4 or int8: keep the frozen base in so many bits (QLoRA)."""

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("kind", self.kind, KINDS),
            ("base", self.base or BASES[0], BASES),
        ):
            if value not in choices:
                raise UserError(
                    f"lora.{name} is '{value}'; it must be one of {', '.join(choices)}."
                    + nearest(value, choices)
                )
        if self.rank < 0:
            raise UserError(f"lora.rank is {self.rank}; it must be 0 (no adapter) or more.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout is {self.dropout}; it must be in [0, 1).")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"lora.alpha is {self.alpha}; it must be above 0.")
        if self.base and not self.rank:
            raise UserError(
                f"lora.base is {self.base}, but a base in few bits is frozen and there is no "
                "adapter to train; set lora.rank as well, 16 for instance."
            )

    @property
    def scale(self) -> float:
        """What the detour is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.kind == "rslora" else self.rank)


# --- which layers --------------------------------------------------------------------------------


def is_linear(module: nn.Module) -> bool:
    """Whether a low-rank detour can be led around it."""
    return all(hasattr(module, name) for name in ("in_features", "out_features", "forward"))


def is_embedding(module: nn.Module) -> bool:
    """Whether it looks rows up in a table."""
    return hasattr(module, "num_embeddings") and hasattr(module, "embedding_dim")


def backbones(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost decoders, encoders and pairs in a model, with their names."""
    if isinstance(model, Decoder | Encoder | EncoderDecoder):
        yield "", model
        return
    for name, child in model.named_children():
        for below, found in backbones(child):
            yield f"{name}.{below}" if below else name, found


def layers_of(model: nn.Module, heads: bool = False) -> dict[str, nn.Module]:
    """Every layer of the backbones that may have an adapter, by its name in the model.

    Layers that have one already are the wrappers; what is inside of them is not told. With `heads`
    those of what stands on the backbones are there as well.
    """
    found: dict[str, nn.Module] = {}
    for prefix, backbone in [("", model)] if heads else backbones(model):
        inside: list[str] = []
        for name, module in backbone.named_modules():
            if any(name.startswith(f"{outer}.") for outer in inside):
                continue
            if isinstance(module, Adapted):
                inside.append(name)
            if is_linear(module) or is_embedding(module):
                found[f"{prefix}.{name}" if prefix else name] = module
    return found


def chosen(layers: dict[str, nn.Module], targets: Sequence[str]) -> list[str]:
    """The layers that the targets name by their full name or its end; default all linear ones in
    the blocks but the routers of mixtures."""
    if not targets:
        return [
            name for name, layer in layers.items()
            if is_linear(layer) and ".blocks." in f".{name}" and not name.endswith("router")
        ]  # fmt: skip
    found: list[str] = []
    for target in targets:
        named = [name for name in layers if f".{name}".endswith(f".{target}")]
        if not named:
            known = sorted({name.rpartition(".")[2] for name in layers})
            raise UserError(
                f"lora.targets has '{target}', which no layer of this model is called; there are "
                f"{', '.join(known)}.{nearest(target, known)}"
            )
        found += [name for name in named if name not in found]
    return [name for name in layers if name in found]


def check_targets(model: nn.Module, places: Sequence[str]) -> None:
    """Refuse adapters around matrices that are one with another, which no class could untie."""
    for prefix, backbone in backbones(model):
        start = f"{prefix}." if prefix else ""
        config: Any = backbone.config
        if isinstance(backbone, EncoderDecoder):
            one = config.share_embeddings or config.decoder.tie_embeddings
        else:
            one = isinstance(model, MaskedLM) and config.tie_embeddings
        tied = [
            place for place in places
            if place.removeprefix(start).rpartition(".")[2] in ("embedding", "head")
        ]  # fmt: skip
        if one and tied:
            raise UserError(
                f"lora.targets has '{tied[0]}', but the model's embedding is one matrix with its "
                "output: an adapter would part them, and no class could hold the result. Leave it "
                "out."
            )


# --- putting them on -----------------------------------------------------------------------------


def switch_of(model: nn.Module) -> Switch | None:
    """The switch of a model's adapters; None where it has none."""
    return next((part.switch for part in model.modules() if isinstance(part, Adapted)), None)


def wrap(model: nn.Module, name: str) -> Adapted:
    """The layer of that name with room for adapters."""
    layer = model.get_submodule(name)
    if isinstance(layer, Adapted):
        return layer
    switch = switch_of(model) or Switch()
    parent, _, last = name.rpartition(".")
    made: Adapted
    if is_linear(layer):
        made = AdaptedLinear(layer, switch)
    else:
        made = AdaptedEmbedding(layer, switch, SHARED.get(last, 1))
    made.train(layer.training)
    setattr(model.get_submodule(parent), last, made)
    return made


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer computes; packed ones are on the CPU."""
    return next((p.device for p in layer.parameters()), torch.device("cpu"))


def put_adapter(
    layer: Adapted,
    name: str,
    rank: int,
    scale: float,
    dropout: float = 0.0,
    dora: bool = False,
    rooted: bool = False,
) -> LowRank:
    """A new adapter of one layer that changes nothing yet."""
    lengths = None
    if isinstance(layer, AdaptedLinear):
        sizes = layer.in_features, layer.out_features
        if dora:
            lengths = layer.whole().detach().float().norm(dim=1)
    else:
        assert isinstance(layer, AdaptedEmbedding)
        assert not dora, "DoRA is for matrices"
        sizes = layer.num_embeddings, layer.embedding_dim
    made = LowRank(*sizes, rank, scale, dropout, lengths, rooted, device_of(layer))
    layer.put(name, made.train(layer.training))
    return made


def freeze_backbones(model: nn.Module) -> None:
    """Freeze what adapters are led around. A head for labels stays trained, and BERT's pooler
    with it; the head of a masked language model is part of what was learnt already.

    Where the model computes in bf16, frozen matrices are kept in bf16: half the memory, and no
    conversion in every step.
    """
    parts = [model] if isinstance(model, MaskedLM) else [part for _, part in backbones(model)]
    for part in parts:
        headed = part is not model
        low = getattr(part, "compute_dtype", None) == torch.bfloat16
        for name, parameter in part.named_parameters():
            if ".adapters." in name:
                continue
            if headed and name.startswith("pooler."):
                continue
            parameter.requires_grad_(False)
            if low and parameter.dim() >= 2 and parameter.dtype == torch.float32:
                parameter.data = parameter.data.bfloat16()


def add_lora(model: nn.Module, settings: LoraSettings, seed: int, name: str = DEFAULT) -> None:
    """Freeze the model and put adapters around its layers, which change nothing at first.

    What is no part of the backbone (the matrix of a classifier, a CRF) goes on learning. A is
    drawn uniformly as PEFT does it, by the seed; B is zero. `settings.base` is not looked at here:
    see `quant/base.py`.
    """
    layers = layers_of(model)
    names = chosen(layers, settings.targets)
    if not names:
        raise UserError("This model has no linear layer in its blocks that could have an adapter.")
    check_targets(model, names)
    if any(name in layer.names for layer in layers.values() if isinstance(layer, Adapted)):
        raise UserError(
            f"The model has an adapter '{name}' already, which a new one would take the place of. "
            "Leave lora.rank out to train that one on, or merge it into a model first (scratchlm "
            "convert)."
        )
    if settings.kind == "dora" and any(is_embedding(layers[place]) for place in names):
        raise UserError(
            "DoRA stretches the rows of matrices; an embedding can have lora or rslora: leave it "
            "out of lora.targets or set lora.kind."
        )
    freeze_backbones(model)
    generator = torch.Generator().manual_seed(seed)
    for place in names:
        adapter = put_adapter(
            wrap(model, place), name, settings.rank, settings.scale, settings.dropout,
            settings.kind == "dora", settings.kind == "rslora",
        )  # fmt: skip
        draw(adapter, isinstance(model.get_submodule(place), AdaptedEmbedding), generator)
    switch = switch_of(model)
    assert switch is not None
    switch.active = name


@torch.no_grad()
def draw(adapter: LowRank, embedding: bool, generator: torch.Generator) -> None:
    """Fresh weights: one of the two matrices is zero, so that nothing is changed yet."""
    if embedding:  # the rows that are looked up begin at zero
        adapter.b.copy_(torch.empty(adapter.b.shape).normal_(generator=generator))
        return
    bound = adapter.a.shape[1] ** -0.5  # Kaiming's with a = sqrt(5)
    adapter.a.copy_(torch.empty(adapter.a.shape).uniform_(-bound, bound, generator=generator))
