"""Each GGUF number format against the `gguf` package, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from llm_from_scratch.quant.formats import CHUNK_VALUES, FORMATS, dequantise

QUANTISED = [kind for kind, form in FORMATS.items() if form.values > 1]


def random_blocks(kind: int, blocks: int, seed: int) -> np.ndarray:
    """Every bit of the integers random; the fp16 scales finite and of both signs."""
    form = FORMATS[kind]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (blocks, form.bytes), dtype=np.uint8)
    scales = rng.normal(0, 0.1, (blocks, 2)).astype(np.float16).view(np.uint8)
    if form.name == "Q6_K":
        raw[:, -2:] = scales[:, :2]
    elif form.name in ("Q4_1", "Q4_K"):
        raw[:, :4] = scales
    else:
        raw[:, :2] = scales[:, :2]
    return raw


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: FORMATS[kind].name)
def test_decodes_to_the_bits_of_the_reference(kind: int) -> None:
    form = FORMATS[kind]
    raw = random_blocks(kind, 77, seed=kind)
    wanted = quants.dequantize(raw, GGMLQuantizationType(kind)).reshape(-1)
    got = dequantise(torch.from_numpy(raw.reshape(-1)), form)
    np.testing.assert_array_equal(got.numpy(), wanted)


@pytest.mark.parametrize("kind", [0, 1, 30], ids=lambda kind: FORMATS[kind].name)
def test_plain_numbers(kind: int) -> None:
    values = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    raw = quants.quantize(values, GGMLQuantizationType(kind)).view(np.uint8).reshape(-1)
    wanted = quants.dequantize(raw.reshape(3, -1), GGMLQuantizationType(kind)).reshape(-1)
    got = dequantise(torch.from_numpy(raw.copy()), FORMATS[kind])
    np.testing.assert_array_equal(got.numpy(), wanted)


def test_names_and_sizes_are_those_of_the_reference() -> None:
    from gguf.constants import GGML_QUANT_SIZES

    for kind, form in FORMATS.items():
        assert GGMLQuantizationType(kind).name == form.name
        assert GGML_QUANT_SIZES[GGMLQuantizationType(kind)] == (form.values, form.bytes)


def test_more_than_one_chunk_and_another_dtype() -> None:
    form = FORMATS[3]
    raw = random_blocks(3, CHUNK_VALUES // 32 + 5, seed=0)
    wanted = torch.from_numpy(quants.dequantize(raw, GGMLQuantizationType.Q4_1)).reshape(-1)
    flat = torch.from_numpy(raw.reshape(-1))
    assert torch.equal(dequantise(flat, form), wanted)
    assert torch.equal(dequantise(flat, form, torch.bfloat16), wanted.bfloat16())
