"""Matrices that stay quantised in a loaded model, and how they become numbers again.

Kept packed are the linear layers of the blocks and, in a plain decoder, the embedding and the head:
that is nearly all there is. Position tables, norms, biases and the heads of classifiers stay dense.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.layers import Linear
from llm_from_scratch.quant.formats import Format
from llm_from_scratch.quant.linear import QuantEmbedding, QuantLinear, set_module
from llm_from_scratch.quant.nf4 import NF4Blocks
from llm_from_scratch.quant.packed import PackedWeight, why_not_packed
from llm_from_scratch.quant.rtn import Grouped
from llm_from_scratch.quant.tiles import SCALE_TYPES
from llm_from_scratch.weights.families.table import Entry
from llm_from_scratch.weights.layouts import take_apart

M = TypeVar("M", bound=nn.Module)
GROUP_UNIT = 32  # the kernels' groups are multiples of it


def can_keep(model: nn.Module, name: str) -> bool:
    """Whether the matrix of this parameter may stay packed in this model."""
    place, _, last = name.rpartition(".")
    if last != "weight":
        return False
    if isinstance(model, Decoder) and place in ("embedding", "head"):
        return True
    return "blocks." in place and isinstance(model.get_submodule(place), nn.Linear)


def put_packed(model: nn.Module, name: str, packed: PackedWeight) -> None:
    """Let a packed matrix take the place of the layer whose parameter is called `name`."""
    place = name.removesuffix(".weight")
    layer = model.get_submodule(place)
    shape = tuple(layer.get_parameter("weight").shape)
    assert shape == (packed.out_features, packed.in_features), name
    if isinstance(layer, nn.Embedding):
        set_module(model, place, QuantEmbedding(packed))
    else:
        bias = layer.bias
        set_module(model, place, QuantLinear(packed, bias if isinstance(bias, Tensor) else None))


def packed_codes(codes: Grouped | NF4Blocks) -> PackedWeight | None:
    """The same matrix as the kernels take it; None where they cannot."""
    if isinstance(codes, NF4Blocks):
        return PackedWeight.from_nf4(codes.codes_oi, codes.absmax_og)
    if codes.group_size % GROUP_UNIT:
        return None
    return PackedWeight.from_groups(codes.codes_oi, codes.scales_og, codes.offsets(), codes.bits)


def can_keep_blocks(model: nn.Module, entry: Entry, form: Format, shape: tuple[int, ...]) -> bool:
    """Whether a GGUF tensor may stay as it is: a matrix in blocks that the kernels know."""
    if len(shape) != 2 or form.values == 1 or entry.index is not None:
        return False
    known = why_not_packed(form, shape[1]) is None
    return known and all(can_keep(model, name) for name in entry.ours)


def tie_packed(model: Decoder) -> bool:
    """Let the head share a packed embedding; False where the embedding is not packed."""
    if not isinstance(model.embedding, QuantEmbedding):
        return False
    set_module(model, "head", QuantLinear(model.embedding.packed))
    return True


def pack_the_rest(model: nn.Module) -> None:
    """In a model that has packed matrices, lay out those that are numbers for the kernels, too.

    Their values stay what they are. Norms and biases become fp32, as the activations are.
    """
    if not packed_layers(model):
        return
    for name, parameter in list(model.named_parameters()):
        if can_keep(model, name):
            known = parameter.dtype in SCALE_TYPES.values()
            put_packed(
                model, name, PackedWeight.from_dense(parameter if known else parameter.float())
            )
    if isinstance(model, Decoder) and model.config.tie_embeddings:
        tie_packed(model)
    model.float()


def packed_layers(model: nn.Module) -> list[tuple[str, QuantLinear | QuantEmbedding]]:
    """The layers of a model whose weights are packed, with their names."""
    kinds = (QuantLinear, QuantEmbedding)
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, kinds)]


@torch.no_grad()
def unpacked(model: M) -> M:
    """The model itself, or where it has packed matrices a copy that has them as numbers.

    Everything else is shared with the original. Their type is that of the model's norms.
    """
    layers = packed_layers(model)
    if not layers:
        return model
    shared: list[Any] = [*model.parameters(), *model.buffers()]
    shared += [layer.packed for _, layer in layers]
    dense = copy.deepcopy(model, {id(part): part for part in shared})
    dtype = next(model.parameters()).dtype
    for name, layer in layers:
        weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
        new: nn.Module
        if isinstance(layer, QuantEmbedding):
            new = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
        else:
            new = Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            new.register_parameter("bias", layer.bias)
        new.weight = weight
        set_module(dense, name, new.train(model.training))
    for part in dense.modules():
        if isinstance(part, Decoder) and part.config.tie_embeddings:
            part.head.weight = part.embedding.weight
    return dense


def keep_codes(model: nn.Module, entry: Entry, codes: Grouped | NF4Blocks, heads: int) -> bool:
    """Let one stored matrix be packed layers of the model; False where it cannot be."""
    if not all(can_keep(model, name) for name in entry.ours):
        return False
    shapes = [model.get_parameter(name).shape for name in entry.ours]

    def split(tensor: Tensor) -> list[Tensor]:
        return [part.contiguous() for part in take_apart(tensor, entry, shapes, heads)]

    parts: list[Grouped | NF4Blocks]
    rows = split(codes.codes_oi)
    if isinstance(codes, NF4Blocks):
        parts = [NF4Blocks(*p) for p in zip(rows, split(codes.absmax_og), strict=True)]
    else:
        zeros = [None] * len(rows) if codes.zeros_og is None else split(codes.zeros_og)
        scales = split(codes.scales_og)
        parts = [Grouped(*p, codes.bits) for p in zip(rows, scales, zeros, strict=True)]
    packed = [packed_codes(part) for part in parts]
    if any(one is None for one in packed):
        return False
    for name, one in zip(entry.ours, packed, strict=True):
        assert one is not None
        put_packed(model, name, one)
    return True
