"""Packed matrices: exactly the weights of their formats, and products with exactly these."""

from __future__ import annotations

import copy

import pytest
import torch

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.quant import kernels
from llm_from_scratch.quant.formats import FORMATS, Format, dequantise
from llm_from_scratch.quant.linear import QuantEmbedding, QuantLinear, set_module
from llm_from_scratch.quant.packed import PackedWeight, why_not_packed
from llm_from_scratch.quant.tiles import NF4_VALUES, SCALE_TYPES
from tests.quant.test_number_formats import random_blocks

Made = tuple[PackedWeight, torch.Tensor]
PACKABLE = [form for form in FORMATS.values() if why_not_packed(form, 512) is None]
GGUF = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"]


def from_gguf(name: str, out: int = 37, seed: int = 0) -> Made:
    """A random matrix and its weights as formats.py decodes them."""
    form = next(form for form in FORMATS.values() if form.name == name)
    width = max(form.values * 2, 96 if form.values == 32 else 0)
    raw = torch.from_numpy(random_blocks(form, out * width // form.values, seed).reshape(-1))
    weights = dequantise(raw, form).view(out, width)
    return PackedWeight.from_blocks(raw, form, out, width), weights


def from_groups(
    bits: int, group: int, offset: str, dtype: torch.dtype, out: int = 21, width: int = 384
) -> Made:
    generator = torch.Generator().manual_seed(bits * group)
    codes = torch.randint(0, 1 << bits, (out, width), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(out, width // group, generator=generator) * 0.1 + 1e-3).to(dtype)
    middle = 1 << (bits - 1)
    zeros = torch.randint(0, 1 << bits, scales.shape, generator=generator).float()
    offsets = {
        "none": None,
        "symmetric": -middle * scales.float(),
        "zeros": -zeros * scales.float(),
        "free": torch.randn(scales.shape, generator=generator).to(dtype),
    }[offset]
    scale = scales.float().repeat_interleave(group, 1)
    if offset == "free":
        assert offsets is not None
        weights = scale * codes + offsets.float().repeat_interleave(group, 1)
    else:
        constant = torch.tensor(middle if offset == "symmetric" else 0)
        zero = zeros.repeat_interleave(group, 1) if offset == "zeros" else constant
        weights = scale * (codes.float() - zero)
    return PackedWeight.from_groups(codes, scales, offsets, bits), weights


def from_nf4(out: int = 19, width: int = 192) -> Made:
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 16, (out, width), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(out, width // 64, generator=generator)
    weights = torch.tensor(NF4_VALUES)[codes.int()] * absmax.repeat_interleave(64, 1)
    return PackedWeight.from_nf4(codes, absmax), weights


def from_dense(dtype: torch.dtype, out: int = 35, width: int = 75) -> Made:
    weights = torch.randn(out, width, generator=torch.Generator().manual_seed(6)).to(dtype)
    return PackedWeight.from_dense(weights), weights.float()


GROUPS = [
    (4, 32, "free", torch.float16),
    (4, 32, "symmetric", torch.float16),
    (4, 64, "zeros", torch.bfloat16),
    (4, 128, "none", torch.float32),
    (8, 384, "symmetric", torch.float32),
    (8, 128, "zeros", torch.float32),
    (8, 32, "free", torch.bfloat16),
]
MAKERS = {
    **{name: lambda name=name: from_gguf(name) for name in GGUF},
    **{f"int{c[0]}-{c[1]}-{c[2]}": lambda case=c: from_groups(*case) for c in GROUPS},
    "nf4": from_nf4,
    **{str(dtype): lambda dtype=dtype: from_dense(dtype) for dtype in SCALE_TYPES.values()},
}


def test_the_formats_that_can_be_packed() -> None:
    assert sorted(form.name for form in PACKABLE) == sorted(GGUF)


@pytest.mark.parametrize("name", MAKERS)
def test_the_weights_are_bitwise_those_of_the_format(name: str) -> None:
    packed, weights = MAKERS[name]()
    assert torch.equal(packed.dequantize(), weights)
    ids = torch.tensor([3, 0, packed.out_features - 1, 3])
    assert torch.equal(packed.rows_plain(ids), weights[ids])
    assert torch.equal(packed.rows(ids), weights[ids])
    assert packed.rows(ids[:0]).shape == (0, packed.in_features)
    assert packed.bits_per_weight < 1.05 * 8 * packed.nbytes / weights.numel()


@pytest.mark.parametrize("name", MAKERS)
def test_products_are_those_of_the_weights(name: str) -> None:
    packed, weights = MAKERS[name]()
    generator = torch.Generator().manual_seed(1)
    for n in (1, 2, 3, 7, 8, 13, 70):  # every way in which rows are taken together
        x = torch.randn(n, packed.in_features, generator=generator)
        wanted = x.double() @ weights.double().T
        got = packed.linear(x)
        assert (got - wanted).norm() < 5e-5 * wanted.norm()
        assert (packed.linear_plain(x) - wanted).norm() < 1e-6 * wanted.norm()
    halves = x.view(7, 10, -1).bfloat16()
    assert packed.linear(halves).dtype == torch.bfloat16
    assert packed.linear(halves).shape == (7, 10, packed.out_features)
    exact = packed.linear_plain(halves.float())  # without kernels the weights become bf16, too
    assert (packed.linear(halves) - exact).norm() < 1e-2 * exact.norm()
    assert packed.linear(x[:0]).shape == (0, packed.out_features)


@pytest.mark.skipif(not kernels.available(), reason="PyTorch does not promise this")
def test_a_row_is_the_same_whatever_stands_beside_it() -> None:
    packed, _ = from_gguf("Q4_1", out=100)
    x = torch.randn(45, packed.in_features, generator=torch.Generator().manual_seed(2))
    together = packed.linear(x)
    for i in (0, 7, 44):
        assert torch.equal(packed.linear(x[i : i + 1])[0], together[i])


def test_extremes_of_the_activations() -> None:
    packed, weights = from_gguf("Q8_0")
    x = torch.zeros(4, packed.in_features)
    x[1, 5], x[1, 6], x[1, 40] = 3e4, 1e-3, 1e-3  # an outlier hurts its own 32 alone
    x[2, 0], x[3, 0] = float("nan"), float("inf")
    got = packed.linear(x)
    assert torch.equal(got[0], torch.zeros(packed.out_features))
    torch.testing.assert_close(got[1], x[1] @ weights.T, rtol=1e-4, atol=0.5)
    assert got[2].isnan().all()
    assert not got[3].isfinite().any()
    x = torch.randn(1, packed.in_features, generator=torch.Generator().manual_seed(2))
    tiny = packed.linear(x * 1e-30) * 1e30
    assert (tiny - x @ weights.T).norm() < 1e-4 * (x @ weights.T).norm()


def test_parts_of_one_matrix() -> None:
    parts = [from_gguf("Q4_K", out, seed)[0] for seed, out in enumerate((32, 16, 21))]
    joined = PackedWeight.join(parts)
    weights = torch.cat([part.dequantize() for part in parts])
    assert torch.equal(joined.dequantize(), weights)
    x = torch.randn(3, joined.in_features)
    for start, part in ((0, parts[0]), (32, parts[1]), (48, parts[2])):
        again = joined.narrow(start, part.out_features)
        assert torch.equal(again.data, part.data)
        assert again.data.data_ptr() == joined.data[start // 16].data_ptr()
        assert torch.equal(again.linear(x), joined.linear(x)[:, start : start + part.out_features])


def test_layers_stand_where_linears_stood() -> None:
    packed, weights = from_gguf("Q4_0")
    bias = torch.randn(packed.out_features)
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(96, 37)))
    layer = QuantLinear(packed, bias)
    set_module(model, "0.0", layer)
    x = torch.randn(2, 5, packed.in_features)
    torch.testing.assert_close(model(x), x @ weights.T + bias, rtol=1e-3, atol=1e-3)
    assert model.get_submodule("0.0") is layer
    assert torch.equal(layer.dequantize(), weights)
    embedding = QuantEmbedding(packed, torch.bfloat16)
    ids = torch.tensor([[1, 2], [36, 0]])
    assert torch.equal(embedding(ids), weights[ids].bfloat16())
    x.requires_grad_()  # adapters train through a packed matrix
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, weights.sum(0).expand_as(x), rtol=1e-4, atol=1e-4)


def test_copies_and_pickles() -> None:
    packed, _ = from_nf4()
    assert copy.deepcopy(QuantLinear(packed)).packed is packed
    with pytest.raises(TypeError, match="save the model in its format"):
        copy.copy(packed)
    with pytest.raises(IndexError, match="a row was asked for"):
        packed.rows_plain(torch.tensor([-1]))


def test_what_cannot_be_packed_is_said() -> None:
    def form(name: str) -> Format:
        return next(form for form in FORMATS.values() if form.name == name)

    assert "Q2_K" in str(why_not_packed(form("Q2_K"), 512))
    assert "whole blocks of 256" in str(why_not_packed(form("Q4_K"), 576))
    with pytest.raises(UserError, match="no kernel"):
        PackedWeight.from_blocks(torch.zeros(84, dtype=torch.uint8), form("Q2_K"), 1, 256)
    codes = torch.zeros(2, 96, dtype=torch.uint8)
    with pytest.raises(UserError, match="multiple of 32"):
        PackedWeight.from_groups(codes, torch.ones(2, 2), None, 4)
    with pytest.raises(UserError, match="every 64"):
        PackedWeight.from_nf4(codes, torch.ones(2, 2))
