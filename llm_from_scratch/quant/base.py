"""The frozen base of adapters in few bits (QLoRA, arXiv:2305.14314): packed in place, at once.

NF4 is the paper's format; int4 and int8 are plain integers with a scale for each group. Gradients
go through the packed matrices to what lies before them, and never into them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.layers import Linear
from llm_from_scratch.quant.linear import QuantLinear, set_module
from llm_from_scratch.quant.nf4 import BLOCK, quantize_nf4
from llm_from_scratch.quant.packed import PackedWeight
from llm_from_scratch.quant.rtn import fitting_group, quantize_rtn

GROUP = {"int4": 32, "int8": 128}  # inputs that share a scale, at most


@dataclass(frozen=True)
class PackedBase:
    """What became of a model: the layers in few bits, and the bytes of all weights in the blocks
    and around them, before and after."""

    layers: int
    bytes_before: int
    bytes_after: int


@torch.no_grad()
def pack_base(model: nn.Module, kind: str) -> PackedBase:
    """Put the linear layers of a model's blocks into nf4, int4 or int8, one after the other.

    What is packed already (a GGUF that was loaded so) stays as it is. Raises `UserError` where no
    layer fits, and on a device other than the CPU, where packed layers are not computed with.
    """
    before, count = bytes_of(model), 0
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            count += 1
        if not isinstance(layer, Linear) or ".blocks." not in f".{name}":
            continue
        if name.endswith("router"):  # small, and a wrong choice of expert costs much
            continue
        if layer.weight.device.type != "cpu":
            raise UserError(
                f"lora.base is {kind}, but packed layers are computed on the CPU alone; leave "
                "lora.base out, or set train.device to cpu."
            )
        packed = packed_weight(layer, kind)
        if packed is not None:
            bias = None if layer.bias is None else layer.bias.detach()
            set_module(model, name, QuantLinear(packed, bias))
            count += 1
    if not count:
        raise UserError(
            f"lora.base is {kind}, but no layer of this model can be packed: the inputs of none "
            f"are a multiple of {BLOCK if kind == 'nf4' else 32}. Leave lora.base out."
        )
    return PackedBase(count, before, bytes_of(model))


def packed_weight(layer: Linear, kind: str) -> PackedWeight | None:
    """The layer's matrix in few bits; None where its rows are not whole groups."""
    weight_oi = layer.weight.detach()
    inputs = weight_oi.shape[1]
    if kind == "nf4":
        if inputs % BLOCK:
            return None
        blocks = quantize_nf4(weight_oi)
        return PackedWeight.from_nf4(blocks.codes_oi, blocks.absmax_og)
    size = fitting_group(inputs, GROUP[kind])
    if size is None or size % 32:
        return None
    codes = quantize_rtn(weight_oi, int(kind[3:]), size, scale_dtype=torch.float32)
    return PackedWeight.from_groups(codes.codes_oi, codes.scales_og, codes.offsets(), codes.bits)


def bytes_of(model: nn.Module) -> int:
    """The bytes of a model's weights, each counted once."""
    found = {p.untyped_storage().data_ptr(): p.nbytes for p in model.parameters()}
    for part in model.modules():
        packed = getattr(part, "packed", None)
        if isinstance(packed, PackedWeight):
            found[packed.data.untyped_storage().data_ptr()] = packed.nbytes
    return sum(found.values())
