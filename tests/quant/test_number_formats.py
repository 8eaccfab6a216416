"""Each GGUF number format against the `gguf` package, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.quant.formats import (
    BF16,
    CHUNK_VALUES,
    F16,
    F32,
    FORMATS,
    Q4_0,
    Q8_0,
    Format,
    dequantise,
    quantise,
)

QUANTISED = [form for form in FORMATS.values() if form.values > 1]
WRITTEN = [F32, F16, BF16, Q8_0, Q4_0]
# Where a block keeps its fp16 numbers, if not in its first bytes: (byte, count).
SCALES = {
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 2),
    "Q3_K": (108, 1), "Q6_K": (208, 1),
}  # fmt: skip


def named(form: Format) -> str:
    return form.name


def random_blocks(form: Format, blocks: int, seed: int) -> np.ndarray:
    """Every bit of the integers random; the fp16 scales finite and of both signs."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (blocks, form.bytes), dtype=np.uint8)
    at, count = SCALES.get(form.name, (0, 1))
    scales = rng.normal(0, 0.1, (blocks, count)).astype(np.float16)
    raw[:, at : at + 2 * count] = scales.view(np.uint8)
    return raw


def encoded(values: np.ndarray, form: Format) -> np.ndarray:
    return torch.cat(list(quantise(torch.from_numpy(values.copy()), form))).numpy()


@pytest.mark.parametrize("form", QUANTISED, ids=named)
def test_decodes_to_the_bits_of_the_reference(form: Format) -> None:
    raw = random_blocks(form, 77, seed=form.number)
    wanted = quants.dequantize(raw, GGMLQuantizationType(form.number)).reshape(-1)
    got = dequantise(torch.from_numpy(raw.reshape(-1)), form)
    np.testing.assert_array_equal(got.numpy(), wanted)


@pytest.mark.parametrize("form", [F32, F16, BF16], ids=named)
def test_plain_numbers(form: Format) -> None:
    values = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    kind = GGMLQuantizationType(form.number)
    raw = quants.quantize(values, kind).view(np.uint8).reshape(-1)
    wanted = quants.dequantize(raw.reshape(3, -1), kind).reshape(-1)
    got = dequantise(torch.from_numpy(raw.copy()), form)
    np.testing.assert_array_equal(got.numpy(), wanted)


def test_a_narrower_type_is_the_rounded_value() -> None:
    raw = torch.from_numpy(random_blocks(Q8_0, 50, seed=2).reshape(-1))
    wanted = dequantise(raw, Q8_0).to(torch.bfloat16)
    assert torch.equal(dequantise(raw, Q8_0, torch.bfloat16), wanted)


def test_chunks_join() -> None:
    """More values than are decoded at a time."""
    raw = random_blocks(Q8_0, 2 * CHUNK_VALUES // 32 + 5, seed=3)
    whole = dequantise(torch.from_numpy(raw.reshape(-1)), Q8_0)
    single = dequantise(torch.from_numpy(raw[-7:].copy().reshape(-1)), Q8_0)
    assert torch.equal(whole[-7 * 32 :], single)


@pytest.mark.parametrize("form", WRITTEN, ids=named)
def test_encodes_to_the_bytes_of_the_reference(form: Format) -> None:
    rng = np.random.default_rng(4)
    values = rng.normal(size=(40, 96)) * 10.0 ** rng.integers(-9, 4, (40, 1))
    values[3] = 0  # a block of nothing has no scale
    values[4, :32] = np.tile([2.0, -2.0], 16)  # which of two largest values counts
    values[5, :32] = np.arange(-16, 16) / 2  # halves are rounded away from zero
    values[6, :3] = [-0.0, 1e-38, 2.5e-41]
    values = values.astype(np.float32)
    wanted = quants.quantize(values, GGMLQuantizationType(form.number))
    np.testing.assert_array_equal(encoded(values, form), wanted.view(np.uint8).reshape(-1))


@given(
    arrays.arrays(
        np.float32, (4, 32), elements=st.floats(-(2.0**15), 2.0**15, width=32, allow_nan=False)
    )
)
def test_any_values_encode_to_the_bytes_of_the_reference(values: np.ndarray) -> None:
    for form in WRITTEN:
        with np.errstate(all="ignore"):
            wanted = quants.quantize(values, GGMLQuantizationType(form.number))
        np.testing.assert_array_equal(
            encoded(values, form), wanted.view(np.uint8).reshape(-1), form.name
        )


@pytest.mark.parametrize("form", WRITTEN, ids=named)
def test_what_was_written_is_read_back_within_its_error(form: Format) -> None:
    values = np.random.default_rng(5).normal(size=(8, 64)).astype(np.float32)
    back = dequantise(torch.from_numpy(encoded(values, form)), form).numpy().reshape(-1, 32)
    blocks = values.reshape(-1, 32)
    largest = np.abs(blocks).max(1, keepdims=True)
    scale = 2**-11  # the blocks' scale is rounded too
    steps = {
        "F32": 0,
        "F16": 2**-11,
        "BF16": 2**-8,
        "Q8_0": 0.5 / 127 + scale,
        "Q4_0": 1 / 8 + scale,
    }
    assert (np.abs(back - blocks) <= steps[form.name] * largest).all()


def test_parts_join_and_a_transposed_tensor_is_read_in_its_own_order() -> None:
    values = torch.randn(320, 2000).t()  # more than two parts
    parts = list(quantise(values, Q8_0))
    assert len(parts) > 2
    wanted = quants.quantize(values.contiguous().numpy(), GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(torch.cat(parts).numpy(), wanted.reshape(-1))


def test_bf16_weights_are_encoded_from_their_values() -> None:
    values = torch.randn(4, 64).to(torch.bfloat16)
    wanted = torch.cat(list(quantise(values.float(), Q4_0)))
    assert torch.equal(torch.cat(list(quantise(values, Q4_0))), wanted)


@pytest.mark.parametrize("form", WRITTEN, ids=named)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_no_format_holds_are_refused(form: Format, value: float) -> None:
    values = torch.zeros(2, 32)
    values[1, 3] = value
    with pytest.raises(UserError, match="not finite"):
        list(quantise(values, form))


def test_too_large_for_half_precision() -> None:
    with pytest.raises(UserError, match="too large"):
        list(quantise(torch.full((1, 32), 7e4), F16))


def test_encoding_takes_memory_for_a_part_only() -> None:
    values = torch.zeros(64, CHUNK_VALUES // 8)
    assert [part.nbytes for part in quantise(values, F16)] == [2 * CHUNK_VALUES] * 8
