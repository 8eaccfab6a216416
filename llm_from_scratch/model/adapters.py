"""What is done with a model that has adapters: switched off, chosen row by row, merged, frozen."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.decoder import Decoder, Stack
from llm_from_scratch.model.heads import Head
from llm_from_scratch.model.layers import Linear
from llm_from_scratch.model.lora import switch_of
from llm_from_scratch.model.low_rank import Adapted, AdaptedEmbedding, AdaptedLinear, Switch

M = TypeVar("M", bound=nn.Module)
__all__ = [
    "adapted_layers", "adapter_names", "changes_nothing", "freeze_layers", "merged", "rows_with",
    "stacks_of", "use_adapter", "with_adapter", "without_adapters",
]  # fmt: skip


def adapted_layers(model: nn.Module) -> list[tuple[str, Adapted]]:
    """The wrapped layers of a model, with their names."""
    return [(name, part) for name, part in model.named_modules() if isinstance(part, Adapted)]


def adapter_names(model: nn.Module) -> list[str]:
    """The names of a model's adapters, in the order in which they were added."""
    found: dict[str, None] = {}
    for _, layer in adapted_layers(model):
        found |= dict.fromkeys(layer.names)
    return list(found)


def changes_nothing(model: nn.Module) -> bool:
    """Whether a model has adapters, all of which are as they were drawn: it is its base still."""
    layers = adapted_layers(model)
    adapters = [layer.named(name) for _, layer in layers for name in layer.names]
    return bool(layers) and not any(a is not None and a.a.any() and a.b.any() for a in adapters)


# --- which of them acts --------------------------------------------------------------------------


def use_adapter(model: nn.Module, name: str | None) -> None:
    """Let the adapter of that name act on all rows from now on; None is the base alone."""
    known = adapter_names(model)
    if name is not None and name not in known:
        raise UserError(
            f"The model has no adapter '{name}'; it has {', '.join(known) or 'none at all'}."
        )
    switch = switch_of(model)
    if switch is not None:
        switch.active = name


@contextlib.contextmanager
def with_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Inside the block the adapter of that name acts on all rows; None is the base alone."""
    switch = switch_of(model)
    if switch is None:
        yield
        return
    before = switch.active, switch.rows
    switch.active, switch.rows = name, None
    try:
        yield
    finally:
        switch.active, switch.rows = before


def without_adapters(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside the block the model is its base alone: the reference of DPO, say.

    A head that was trained beside the adapters stays what it is.
    """
    return with_adapter(model, None)


@contextlib.contextmanager
def rows_with(
    switch: Switch, names: Sequence[str | None], device: torch.device | str = "cpu"
) -> Iterator[None]:
    """Inside the block row number i of every batch goes through the adapter names[i].

    For inference: outputs are changed in place.
    """
    before = switch.active, switch.rows
    different = dict.fromkeys(names)
    if len(different) == 1:
        switch.active, switch.rows = names[0], None
    else:
        switch.rows = [
            (name, torch.tensor([i for i, n in enumerate(names) if n == name], device=device))
            for name in different
        ]
    try:
        yield
    finally:
        switch.active, switch.rows = before


# --- merging -------------------------------------------------------------------------------------


@torch.no_grad()
def merged(model: M, name: str | None = None) -> M:
    """A model with plain layers that computes what `model` does with the adapter of that name.

    None is the one that acts. A model without adapters is given back itself; else the result is a
    copy, so that nothing ever has to be un-merged. What was not adapted is shared with the
    original where it is fp32 already: the result is in fp32, because bf16 would swallow the small
    changes that adapters make.
    """
    layers = adapted_layers(model)
    if not layers:
        return model
    if name is not None and name not in adapter_names(model):
        use_adapter(model, name)  # which says what there is
    switch = switch_of(model)
    assert switch is not None
    chosen = switch.active if name is None else name
    shared: list[Any] = [*model.parameters(), *model.buffers()]
    plain = copy.deepcopy(model, {id(part): part for part in shared})
    for place, layer in layers:
        _set(plain, place, _plain(layer, chosen))
    _untie(plain, model, chosen)
    done: dict[int, nn.Parameter] = {}
    for part in plain.modules():  # what is one parameter in several places stays one
        for key, parameter in part._parameters.items():
            if parameter is not None and parameter.dtype in (torch.bfloat16, torch.float16):
                fresh = done.get(id(parameter))
                if fresh is None:
                    fresh = nn.Parameter(parameter.float(), parameter.requires_grad)
                    done[id(parameter)] = fresh
                part._parameters[key] = fresh
    return plain


def _plain(layer: Adapted, name: str | None) -> nn.Module:
    """The layer with its adapter in its matrix."""
    adapter = layer.named(name)
    base: Any = layer.base
    if adapter is None:
        return layer.base
    weight = nn.Parameter(layer.merged(name), requires_grad=False)
    made: nn.Module
    if isinstance(layer, AdaptedEmbedding):
        made = nn.Embedding(layer.num_embeddings, layer.embedding_dim, device="meta")
        made.weight = weight
    else:
        assert isinstance(layer, AdaptedLinear)
        made = Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        made.weight = weight
        made.register_parameter("bias", base.bias)
    return made.train(layer.training)


def _untie(plain: nn.Module, model: nn.Module, name: str | None) -> None:
    """Let an embedding and a head be two matrices where only one of them was changed."""
    for place, part in plain.named_modules():
        if not isinstance(part, Decoder) or not part.config.tie_embeddings:
            continue
        if isinstance(model, Head):  # the decoder's own output is not used
            part.head.weight = part.embedding.weight
            continue
        before = model.get_submodule(place) if place else model
        assert isinstance(before, Decoder)
        changed = [
            isinstance(layer, Adapted) and layer.named(name) is not None
            for layer in (before.embedding, before.head)
        ]
        if any(changed):
            part.config = replace(part.config, tie_embeddings=False)
            own: Any = part.embedding if changed[1] else part.head
            own.weight = nn.Parameter(own.weight.detach().clone(), requires_grad=False)


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


# --- freezing ------------------------------------------------------------------------------------


class Freeze(Protocol):
    """What `freeze_layers` is told; see `FreezeSettings`."""

    @property
    def blocks(self) -> int: ...

    @property
    def embeddings(self) -> bool: ...


def stacks_of(model: nn.Module) -> list[Stack]:
    """The stacks of blocks in a model, in the order in which a text goes through them."""
    return [part for part in model.modules() if isinstance(part, Stack)]


def freeze_layers(model: nn.Module, settings: Freeze) -> None:
    """Keep the first blocks, or all but the last, and the embeddings from learning.

    The blocks of an encoder-decoder are counted through: the encoder's, then the decoder's.
    """
    stacks = stacks_of(model)
    blocks = [block for stack in stacks for block in stack.blocks]
    count = settings.blocks if settings.blocks >= 0 else len(blocks) + settings.blocks
    if not 0 <= count <= len(blocks):
        raise UserError(
            f"freeze.blocks is {settings.blocks}, but the model has {len(blocks)} blocks; give a "
            f"number from {-len(blocks)} to {len(blocks)}."
        )
    frozen: list[nn.Module] = [*blocks[:count]]
    if settings.embeddings:
        for stack in stacks:
            for name in ("embedding", "positions", "segments", "embedding_norm"):
                part = getattr(stack, name, None)
                frozen += [part] if isinstance(part, nn.Module) else []
    for part in frozen:
        part.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("freeze.blocks and freeze.embeddings leave nothing to learn.")
