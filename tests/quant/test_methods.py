"""Rounding, GPTQ, NF4 and pruning: error bounds, and each beats what it claims to beat."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llm_from_scratch.core.errors import RunError
from llm_from_scratch.quant.gptq import quantize_gptq
from llm_from_scratch.quant.nf4 import quantize_nf4
from llm_from_scratch.quant.packed import PackedWeight
from llm_from_scratch.quant.prune import keep_mask
from llm_from_scratch.quant.rtn import Grouped, fitting_group, quantize_rtn, search_scales
from llm_from_scratch.quant.tiles import NF4_VALUES


def random_weight(seed: int, outputs: int = 24, inputs: int = 128) -> Tensor:
    """Rows of unlike size, with a few large weights."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    weight *= torch.rand(outputs, 1, generator=generator) + 0.05
    return weight + (torch.rand(outputs, inputs, generator=generator) > 0.99) * 2.0


def random_inputs(seed: int, inputs: int = 128, tokens: int = 600) -> Tensor:
    """Inputs that go together, some far stronger than others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs // 4, inputs, generator=generator)
    x = torch.randn(tokens, inputs // 4, generator=generator) @ mix
    x += 0.3 * torch.randn(tokens, inputs, generator=generator)
    return x * torch.logspace(-1, 1, inputs)[torch.randperm(inputs, generator=generator)]


@given(
    seed=st.integers(0, 1000),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64, None]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_rounding_is_to_the_nearest_code(
    seed: int, bits: int, group: int | None, symmetric: bool, dtype: torch.dtype
) -> None:
    weight = random_weight(seed)
    codes = quantize_rtn(weight, bits, group, symmetric=symmetric, scale_dtype=dtype)
    assert codes.scales_og.dtype == dtype
    assert codes.group_size == (group or 128)
    back = codes.dequantize().unflatten(1, (-1, codes.group_size))
    w = weight.unflatten(1, (-1, codes.group_size))
    scales = codes.scales_og.float()[..., None]
    zeros = 2.0 ** (bits - 1) if codes.zeros_og is None else codes.zeros_og[..., None].float()
    lowest, highest = (0 - zeros) * scales, (2**bits - 1 - zeros) * scales
    off = (back - w).abs()
    inside = (w >= lowest) & (w <= highest)
    assert (off <= scales * 0.5001)[inside].all()
    # What lies outside of the codes becomes the last of them.
    assert (torch.isclose(back, torch.where(w < lowest, lowest, highest)) | inside).all()


def test_the_search_for_scales_pays() -> None:
    weight = random_weight(0)
    w = weight.unflatten(1, (-1, 32))
    plain = (w.amax(-1) / 7).maximum(w.amin(-1) / -8)
    naive = Grouped(
        (w / plain[..., None] + 8).round().clamp(0, 15).flatten(1).to(torch.uint8), plain, None, 4
    )
    found = quantize_rtn(weight, 4, 32)
    error, naive_error = ((codes.dequantize() - weight).square().mean() for codes in (found, naive))
    assert error < 0.97 * naive_error


def test_bits_per_weight_count_scales_and_zero_points() -> None:
    weight = random_weight(1)
    plain = quantize_rtn(weight, 4, 32, scale_dtype=torch.bfloat16)
    zeros = quantize_rtn(weight, 4, 64, symmetric=False, scale_dtype=torch.bfloat16)
    assert plain.bits_per_weight == 4.5
    assert zeros.bits_per_weight == 4 + 20 / 64
    assert quantize_rtn(weight, 8, None).bits_per_weight == 8 + 32 / 128
    assert quantize_nf4(weight).bits_per_weight == 4.5


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e30])
@pytest.mark.parametrize("symmetric", [True, False])
def test_extreme_weights_stay_finite(scale: float, symmetric: bool) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * scale
    weight[0] = 0.0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        codes = quantize_rtn(weight, 4, 32, symmetric=symmetric, scale_dtype=dtype)
        assert torch.isfinite(codes.dequantize()).all()
        assert (codes.dequantize()[0] == 0).all()
        assert (codes.scales_og > 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_are_bitwise_the_same(bits: int, symmetric: bool) -> None:
    codes = quantize_rtn(
        random_weight(2, 40), bits, 32, symmetric=symmetric, scale_dtype=torch.bfloat16
    )
    packed = PackedWeight.from_groups(codes.codes_oi, codes.scales_og, codes.offsets(), bits)
    assert torch.equal(packed.dequantize(), codes.dequantize())
    nf4 = quantize_nf4(random_weight(2, 40))
    assert torch.equal(
        PackedWeight.from_nf4(nf4.codes_oi, nf4.absmax_og).dequantize(), nf4.dequantize()
    )


def test_nf4_takes_the_nearest_value() -> None:
    weight = random_weight(3)
    codes = quantize_nf4(weight)
    unit = weight.unflatten(1, (-1, 64)) / codes.absmax_og[..., None]
    distance = (unit[..., None] - torch.tensor(NF4_VALUES)).abs()
    chosen = distance.gather(-1, codes.codes_oi.long().unflatten(1, (-1, 64))[..., None])
    assert torch.allclose(chosen[..., 0], distance.amin(-1), atol=1e-6)
    largest = weight.unflatten(1, (-1, 64)).abs().amax(-1)
    assert torch.equal(codes.absmax_og, largest)


def test_groups_that_fit() -> None:
    assert fitting_group(576, 128) == 64
    assert fitting_group(576, 32) == 32
    assert fitting_group(1536, 128) == 128
    assert fitting_group(48, 128) is None
    assert fitting_group(96, None) == 96
    assert fitting_group(100, None) is None


def output_error(x: Tensor, weight: Tensor, codes: Grouped) -> float:
    return float((x @ (codes.dequantize() - weight).t()).square().sum())


@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_beats_rounding_on_the_outputs(group: int | None, symmetric: bool) -> None:
    for seed in range(3):
        x, weight = random_inputs(seed), random_weight(seed)
        hessian = x.t() @ x / len(x)
        gptq = quantize_gptq(weight, hessian, 4, group, symmetric=symmetric)
        rtn = quantize_rtn(weight, 4, group, symmetric=symmetric)
        assert output_error(x, weight, gptq) < 0.5 * output_error(x, weight, rtn)
        assert gptq.codes_oi.shape == weight.shape
        assert gptq.scales_og.shape == rtn.scales_og.shape


def test_gptq_without_correlations_is_rounding() -> None:
    """Where inputs are independent and equally strong, no weight can make up for another."""
    weight = random_weight(5)
    gptq = quantize_gptq(weight, torch.eye(128) * 3.0, 4, 32)
    assert torch.equal(gptq.codes_oi, quantize_rtn(weight, 4, 32).codes_oi)


def gptq_by_definition(weight: Tensor, hessian: Tensor, group: int) -> Tensor:
    """Round column after column; after each, solve anew for the best of all that are left."""
    inputs = weight.shape[1]
    damped = (hessian + torch.eye(inputs) * 0.01 * hessian.diagonal().mean()).double()
    scales, zeros = search_scales(
        weight.unflatten(1, (-1, group)), 4, symmetric=True, scale_dtype=torch.float32,
        importance_i=hessian.diagonal() + 0.01 * hessian.diagonal().mean(),
    )  # fmt: skip
    left = weight.double().clone()
    order = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    codes = torch.empty_like(weight)
    for step, column in enumerate(order):
        scale, zero = scales[:, column // group].double(), zeros[:, column // group]
        codes[:, column] = (left[:, column] / scale + zero).round().clamp(0, 15)
        error = (codes[:, column] - zero) * scale - left[:, column]
        rest = order[step + 1 :]
        if rest:
            pull = torch.linalg.solve(damped[rest][:, rest], damped[rest][:, column])
            left[:, rest] -= error[:, None] * pull
        left[:, column] += error
    return codes


def test_gptq_is_the_greedy_method_of_the_paper() -> None:
    x, weight = random_inputs(7, inputs=160), random_weight(7, outputs=6, inputs=160)
    hessian = x.t() @ x / len(x)
    codes = quantize_gptq(weight, hessian, 4, 32)
    wanted = gptq_by_definition(weight, hessian, 32)
    # In another order of operations a value on the edge between two codes may fall either way.
    assert (codes.codes_oi == wanted).float().mean() > 0.99


def test_gptq_with_dead_and_repeated_inputs() -> None:
    x = random_inputs(1)
    x[:, 5] = 0.0
    x[:, 9] = x[:, 8]
    codes = quantize_gptq(random_weight(1), x.t() @ x, 4, 32)
    assert torch.isfinite(codes.dequantize()).all()
    assert torch.isfinite(
        quantize_gptq(random_weight(1), torch.zeros(128, 128), 4, 32).dequantize()
    ).all()
    with pytest.raises(RunError, match="not finite"):
        quantize_gptq(random_weight(1), torch.full((128, 128), torch.nan), 4, 32)


# --- pruning -------------------------------------------------------------------------------------


def test_magnitude_keeps_the_largest() -> None:
    weight = random_weight(4)
    mask = keep_mask(weight, 0.3)
    assert (~mask).sum() == round(weight.numel() * 0.3)
    assert weight[mask].abs().min() >= weight[~mask].abs().max()


def test_wanda_weighs_by_the_inputs_and_within_each_output() -> None:
    weight, x = random_weight(4), random_inputs(4)
    squares = x.square().mean(0)
    mask = keep_mask(weight, 0.5, input_squares_i=squares)
    score = weight.abs() * squares.sqrt()
    for row in range(len(weight)):
        assert (~mask[row]).sum() == 64
        assert score[row][mask[row]].min() >= score[row][~mask[row]].max()

    def error(keep: Tensor) -> Tensor:
        return (x @ (weight * ~keep).t()).square().sum()

    assert error(mask) < 0.6 * error(keep_mask(weight, 0.5))


@pytest.mark.parametrize("with_inputs", [False, True])
def test_two_of_four(with_inputs: bool) -> None:
    weight = random_weight(6)
    weight[0, :8] = 1.0  # ties
    squares = random_inputs(6).square().mean(0) if with_inputs else None
    mask = keep_mask(weight, pattern="2:4", input_squares_i=squares)
    assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    score = (weight.abs() * (1.0 if squares is None else squares.sqrt())).unflatten(1, (-1, 4))
    quads = mask.unflatten(1, (-1, 4))
    kept = torch.where(quads, score, torch.inf).amin(-1)
    gone = torch.where(quads, -torch.inf, score).amax(-1)
    assert (kept >= gone).all()
