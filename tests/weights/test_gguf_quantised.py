"""Every architecture in every number format: what is loaded is what the blocks decode to."""

from __future__ import annotations

import dataclasses
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from llm_from_scratch.model.config import ExpertsConfig
from llm_from_scratch.quant.formats import F32, FORMATS, Format
from llm_from_scratch.quant.packed import why_not_packed
from llm_from_scratch.weights.gguf import GGUF
from llm_from_scratch.weights.gguf_architectures import ARCHITECTURES
from llm_from_scratch.weights.gguf_load import load_gguf
from llm_from_scratch.weights.gguf_save import save_gguf
from llm_from_scratch.weights.gguf_write import Planned, write_gguf
from llm_from_scratch.weights.packing import packed_layers, unpacked
from tests.weights.gguf_models import MODELS, make

# Rows of whole blocks of 256.
SIZES: dict[str, Any] = {
    "vocab_size": 40, "d_model": 256, "d_ff": 512, "n_heads": 8, "n_kv_heads": 2, "n_layers": 2,
}  # fmt: skip
# Where the half-precision scales lie in a block; all other bytes may be anything.
SCALES = {
    "Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q2_K": [80, 82],
    "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
}  # fmt: skip
QUANTISED = [form for form in FORMATS.values() if form.values > 1]
# Tables and routers are left in fp32, as llama.cpp leaves them.
KEPT = ("position_embd.", "token_types.", "ffn_gate_inp.")


def large(name: str) -> Any:
    """A model of the architecture, all of whose rows are whole blocks."""
    ours = MODELS[name]
    changes = {**SIZES, "head_dim": 96 if "head_dim" in ours else 32}
    if ours.get("n_kv_heads") == 6:  # the architecture has no grouped heads
        changes["n_kv_heads"] = 8
    if "window_layers" in ours:
        changes |= {"window_layers": (0,) if name == "gemma2" else (0, 1)}
    if "attention_width" in ours:
        changes["attention_width"] = 96
    if "experts" in ours:
        changes["experts"] = ExpertsConfig(3, 2, 512, layers=(0, 1))
    return make(name, **changes)


def made_up(form: Format, shape: tuple[int, ...]) -> np.ndarray:
    """Blocks of random bytes with sound scales."""
    rng = np.random.default_rng(form.number)
    blocks = rng.integers(0, 256, (prod(shape) // form.values, form.bytes), dtype=np.uint8)
    for at in SCALES[form.name]:
        scales = rng.uniform(1e-4, 3e-4, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
    return blocks


def holding(form: Format, blocks: np.ndarray) -> Format:
    """The format, writing these blocks whatever the values are."""
    left = torch.from_numpy(blocks)

    def encode(_x: torch.Tensor, out: torch.Tensor) -> None:
        nonlocal left
        out.copy_(left[: len(out)])
        left = left[len(out) :]

    return dataclasses.replace(form, encode=encode)


@pytest.mark.parametrize("form", QUANTISED, ids=lambda form: form.name)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_quantised_files_load_as_the_values_they_hold(
    architecture: str, form: Format, plain_files: dict[str, GGUF], tmp_path: Path
) -> None:
    """The same parameters as those of an F32 file with the decoded values, packed ones too."""
    file = plain_files[architecture]
    packed, decoded = [], []
    for name, info in file.tensors.items():
        plain = Planned(name, info.shape, F32, lambda name=name: file.read(name))
        if len(info.shape) == 1 or any(part in name for part in KEPT):
            packed.append(plain)
            decoded.append(plain)
            continue
        blocks = made_up(form, info.shape)
        values = quants.dequantize(blocks, GGMLQuantizationType(form.number))
        read = partial(torch.from_numpy, values.reshape(info.shape))
        packed.append(Planned(name, info.shape, holding(form, blocks), read))
        decoded.append(Planned(name, info.shape, F32, read))
    write_gguf(tmp_path / "packed.gguf", file.metadata, packed)
    write_gguf(tmp_path / "decoded.gguf", file.metadata, decoded)
    ours, _ = load_gguf(tmp_path / "packed.gguf")
    kept, _ = load_gguf(tmp_path / "packed.gguf", packed=True)
    wanted, _ = load_gguf(tmp_path / "decoded.gguf")
    assert sum(entry.form.number == form.number for entry in packed) > 8
    layers = packed_layers(kept)
    assert {part.packed.kind for _, part in layers} <= {form.name.lower(), "fp32"}
    assert (why_not_packed(form, 256) is None) == (len(layers) > 4)
    for model in (ours, unpacked(kept)):
        found = dict(model.named_parameters())
        for name, value in wanted.named_parameters():
            assert torch.equal(found.pop(name), value), name
        assert not found


@pytest.fixture(scope="module")
def plain_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, GGUF]:
    """An F32 file of each architecture."""
    folder = tmp_path_factory.mktemp("plain")
    for architecture in ARCHITECTURES:
        save_gguf(large(architecture), None, folder / f"{architecture}.gguf", "F32")
    return {name: GGUF(folder / f"{name}.gguf") for name in ARCHITECTURES}
