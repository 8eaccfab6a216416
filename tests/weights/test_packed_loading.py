"""`load` keeps matrices in few bits where it may, and makes numbers of them where it must."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

import llm_from_scratch as llm
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.generate import complete
from llm_from_scratch.model import modernise
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.surgery import (
    drop_layers,
    extend_context,
    grow_vocabulary,
    tie,
    untie,
)
from llm_from_scratch.quant.linear import QuantEmbedding, QuantLinear
from llm_from_scratch.weights.convert import convert
from llm_from_scratch.weights.folder import load_folder, save_folder
from llm_from_scratch.weights.gguf_save import save_gguf
from llm_from_scratch.weights.packing import packed_layers, unpacked

TOKENS = torch.arange(30)[None] * 7 % 251


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def file(request: pytest.FixtureRequest, gguf_case: type, tmp_path: Path) -> Path:
    case = gguf_case(GGMLQuantizationType.Q4_0, tie_word_embeddings=request.param)
    written: Path = case.write(tmp_path / "model.gguf")
    return written


def test_packed_unless_something_else_is_asked_for(file: Path) -> None:
    packed, _ = llm.load(file, device="cpu")
    assert isinstance(packed, Decoder)
    assert isinstance(packed.embedding, QuantEmbedding) and isinstance(packed.head, QuantLinear)
    shared = packed.head.packed is packed.embedding.packed
    assert shared == packed.config.tie_embeddings
    assert not any(p.dim() > 1 for p in packed.parameters())
    dense, _ = llm.load(file, device="cpu", dtype="fp32")
    assert packed_layers(dense) == []
    assert packed_layers(llm.load(file, device="cpu", dtype="stored")[0]) == []
    assert packed_layers(llm.load(file, device="cpu", head="embedding")[0]) == []
    with torch.no_grad():
        torch.testing.assert_close(packed(TOKENS), dense(TOKENS), atol=2e-3, rtol=0)


def test_it_writes_the_same_text(file: Path) -> None:
    texts = []
    for dtype in (None, "fp32"):
        model, tokenizer = llm.load(file, device="cpu", dtype=dtype)
        done = complete(model, tokenizer, ["in the an"], max_new_tokens=12, temperature=0.0)
        texts.append(done[0].tokens)
    assert texts[0] == texts[1]


def test_saved_and_converted_as_numbers(file: Path, tmp_path: Path) -> None:
    packed, tokenizer = llm.load(file, device="cpu")
    dense, _ = llm.load(file, device="cpu", dtype="fp32")
    llm.save(packed, tokenizer, tmp_path / "saved")
    save_gguf(packed, tokenizer, tmp_path / "saved.gguf", kind="F32")
    convert(file, "hf", tmp_path / "converted", report=lambda line: None)
    for path in ("saved", "saved.gguf", "converted"):
        back, _ = llm.load(tmp_path / path, device="cpu", dtype="fp32")
        for (name, mine), theirs in zip(dense.named_parameters(), back.parameters(), strict=True):
            assert torch.equal(mine, theirs), (path, name)
    assert unpacked(dense) is dense
    assert isinstance(packed.blocks[0].attention.q, QuantLinear)  # saving left it alone


def test_rows_that_are_no_whole_blocks_stay_numbers(
    make_model: Callable[..., Decoder], tmp_path: Path
) -> None:
    model = make_model()  # of width 24
    save_folder(model, None, tmp_path / "model")
    assert packed_layers(load_folder(tmp_path / "model", packed=True)[0]) == []


def test_only_numbers_are_operated_on(file: Path) -> None:
    steps: list[Callable[[Decoder], object]] = [
        lambda model: extend_context(model, 2 * model.config.max_seq_len),
        lambda model: grow_vocabulary(model, 5, model.config.vocab_size + 3),
        lambda model: drop_layers(model, [0]),
        lambda model: tie(untie(model)),
        lambda model: modernise.check(model, "", norm=("rms",)),
    ]
    packed, numbers = (llm.load(file, device="cpu", dtype=dtype)[0] for dtype in (None, "fp32"))
    assert isinstance(packed, Decoder) and isinstance(numbers, Decoder)
    for step in steps:
        with pytest.raises(UserError, match=r"in few bits, and only numbers .*dtype='fp32'"):
            step(packed)
        step(numbers)
