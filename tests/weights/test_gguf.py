"""Our GGUF reader against files that the `gguf` package writes, whole and broken."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.positions import rope_frequencies
from llm_from_scratch.weights.folder import load_folder
from llm_from_scratch.weights.gguf import GGUF
from llm_from_scratch.weights.gguf_load import load_gguf

Case = Callable[..., Any]
KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q6_K]


def logits(model: torch.nn.Module, vocab: int) -> torch.Tensor:
    tokens = torch.randint(0, vocab, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result = model(tokens)
    return result if isinstance(result, torch.Tensor) else result.logits


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_logits_equal_those_of_the_same_weights_in_a_folder(
    kind: Kind, gguf_case: Case, tmp_path: Path
) -> None:
    case = gguf_case(kind)
    ours, _ = load_gguf(case.write(tmp_path / "model.gguf"))
    wanted = logits(case.model, case.vocab)
    assert wanted.std() > 0.1
    torch.testing.assert_close(logits(ours, case.vocab), wanted, atol=1e-5, rtol=0)
    case.model.save_pretrained(tmp_path / "folder")
    folder, _ = load_folder(tmp_path / "folder")
    assert replace(folder.config, init_std=ours.config.init_std) == ours.config
    for (name, mine), theirs in zip(ours.named_parameters(), folder.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"attention_bias": True}])
def test_tied_embeddings_and_biases(
    changes: dict[str, Any], gguf_case: Case, tmp_path: Path
) -> None:
    case = gguf_case(Kind.F32, **changes)
    ours, _ = load_gguf(case.write(tmp_path / "model.gguf"))
    wanted = logits(case.model, case.vocab)
    torch.testing.assert_close(logits(ours, case.vocab), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_factors(factor: float, gguf_case: Case, tmp_path: Path) -> None:
    """The divisors that llama.cpp's converter stores for Llama 3.1 and 3.2."""
    rope = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    case = gguf_case(Kind.F32, rope_parameters=rope)
    plain = rope_frequencies(64, 500_000.0, None)
    divisors = (plain / case.model.model.rotary_emb.inv_freq).numpy()
    assert divisors.min() == pytest.approx(1.0) and divisors.max() == pytest.approx(factor)
    edit = lambda w: w.add_tensor("rope_freqs.weight", divisors)  # noqa: E731
    ours, _ = load_gguf(case.write(tmp_path / "model.gguf", edit))
    assert ours.config.rope_scaling is not None and ours.config.rope_scaling.factor == factor
    wanted = logits(case.model, case.vocab)
    torch.testing.assert_close(logits(ours, case.vocab), wanted, atol=1e-5, rtol=0)

    odd = lambda w: w.add_tensor("rope_freqs.weight", divisors**2)  # noqa: E731
    with pytest.raises(UserError, match=r"rope_freqs\.weight"):
        load_gguf(case.write(tmp_path / "odd.gguf", odd))


def test_metadata_and_places_equal_those_of_the_reference(gguf_case: Case, tmp_path: Path) -> None:
    def edit(writer: GGUFWriter) -> None:
        writer.add_array("test.numbers", [1, -2, 3])
        writer.add_array("test.flags", [True, False])
        writer.add_float64("test.double", 0.1)
        writer.add_uint64("test.large", 1 << 60)
        writer.add_int16("test.small", -7)
        writer.add_string("test.text", "日本語 🍣")

    path = gguf_case(Kind.Q4_1).write(tmp_path / "model.gguf", edit)
    ours, theirs = GGUF(path), GGUFReader(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert ours.metadata[key] == field.contents(), key
    assert {t.name: (t.data_offset, t.n_bytes) for t in theirs.tensors} == {
        name: (info.start, info.size) for name, info in ours.tensors.items()
    }


def test_the_tokenizer_in_the_file(gguf_case: Case, tmp_path: Path) -> None:
    path = gguf_case(Kind.Q8_0).write(tmp_path / "model.gguf", lambda w: w.add_eot_token_id(1))
    _, tokenizer = load_gguf(path)
    text = "the 2024 thein <|im_end|> 日本"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_text(tokenizer.encode("in the")[-1]) == " the"
    assert 2 not in tokenizer.encode("<|im_end|>")
    assert tokenizer.encode("<|im_end|>", special=True) == [2]
    assert len(tokenizer.encode("2024")) == 4
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 2)
    assert tokenizer.stop_ids == {1, 2}
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"


@pytest.mark.parametrize("pre", ["default", "gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_each_known_way_to_cut_text(pre: str, gguf_case: Case, tmp_path: Path) -> None:
    path = gguf_case(Kind.Q8_0).write(
        tmp_path / "model.gguf", lambda w: _set(w, "tokenizer.ggml.pre", pre)
    )
    _, tokenizer = load_gguf(path)
    for text in ("the the1234 don't DON'T\n\n  x==y", "日本語 thein", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def _set(writer: GGUFWriter, key: str, value: Any) -> None:
    """Change (or, with None, take out) a value that was added before."""
    if value is None:
        del writer.kv_data[0][key]
    else:
        writer.kv_data[0][key].value = value


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("general.architecture", "mamba", "general.architecture"),
        ("tokenizer.ggml.model", "lama", "Did you mean 'llama'"),
        ("tokenizer.ggml.pre", "smolm", "Did you mean 'smollm'"),
        ("tokenizer.ggml.tokens", None, "lacks 'tokenizer.ggml.tokens'"),
        ("tokenizer.ggml.eos_token_id", 5000, "eos_token_id' is 5000"),
        ("tokenizer.ggml.token_type", [1], "token_type' has 1 entries"),
        ("tokenizer.ggml.merges", ["zz q"], "does not fit the vocabulary"),
        ("llama.block_count", None, "llama.block_count"),
        ("llama.block_count", 3, "lacks 9 tensor"),
        ("llama.block_count", 1, "holds 9 tensor"),
        ("llama.attention.head_count_kv", 3, "multiple of"),
        ("llama.feed_forward_length", 500, "has the shape"),
        ("llama.rope.dimension_count", 32, "rope.dimension_count"),
        ("llama.context_length", 1 << 25, "llama.context_length' is 33554432; .* to 16,777,216"),
    ],
)
def test_what_does_not_fit_is_named(
    key: str, value: Any, words: str, gguf_case: Case, tmp_path: Path
) -> None:
    path = gguf_case(Kind.Q8_0).write(tmp_path / "model.gguf", lambda w: _set(w, key, value))
    with pytest.raises(UserError, match=words) as caught:
        load_gguf(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.scaling.type", "longrope"),
        ("llama.expert_count", 8),
        ("llama.logit_scale", 2.0),
    ],
)
def test_a_setting_that_changes_the_arithmetic_is_refused(
    key: str, value: Any, gguf_case: Case, tmp_path: Path
) -> None:
    add = {str: "add_string", int: "add_uint32", float: "add_float32"}[type(value)]
    path = gguf_case(Kind.Q8_0).write(
        tmp_path / "model.gguf", lambda w: getattr(w, add)(key, value)
    )
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        load_gguf(path)


@pytest.fixture(scope="module")
def sound(gguf_case: Case, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("sound")
    return gguf_case(Kind.Q4_1).write(folder / "model.gguf").read_bytes()


def open_bytes(data: bytes, folder: Path) -> GGUF:
    path = folder / "broken.gguf"
    path.write_bytes(data)
    return GGUF(path)


def header_end(data: bytes, folder: Path) -> int:
    return min(info.start for info in open_bytes(data, folder).tensors.values())


def test_a_file_cut_anywhere_is_refused(sound: bytes, tmp_path: Path) -> None:
    end = header_end(sound, tmp_path)
    last = max(i.start + i.size for i in open_bytes(sound, tmp_path).tensors.values())
    for size in [*range(0, end, 97), end, end + 1, last - 1]:
        with pytest.raises(UserError):
            open_bytes(sound[:size], tmp_path)
    open_bytes(sound[:last], tmp_path)  # what follows the last tensor is padding


@settings(max_examples=300)
@given(places=st.lists(st.tuples(st.integers(0, 12_000), st.integers(0, 255)), max_size=6))
def test_flipped_bytes_in_the_header_never_crash(
    places: list[tuple[int, int]], sound: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(sound)
    for place, value in places:
        data[place] = value
    folder = tmp_path_factory.getbasetemp()
    try:
        file = open_bytes(bytes(data), folder)
    except UserError:
        return
    for info in file.tensors.values():
        assert info.start >= 0 and info.start + info.size <= len(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "cannot be read"),
        (b"not a model at all, just some text", "does not begin with 'GGUF'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0), "announces 1099511627776 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 62), "metadata keys"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "bytes of text"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 99), "type 99"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 4, 1 << 50),
            "array elements",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 0),
            "array of the unknown type 9",
        ),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2) + b"\xff\xfe", "not UTF-8"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 32, 9, 0),
            "type number 9",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 33, 8, 0),
            "has the shape",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQIQ", 9, 1, 8, 0),
            "has 9 axes",
        ),
        (
            b"GGUF"
            + struct.pack("<IQQQ", 3, 1, 0, 1)
            + b"t"
            + struct.pack("<IQIQ", 1, 32, 8, 1 << 63),
            "is truncated",
        ),
    ],
)
def test_files_that_lie(data: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        open_bytes(data, tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no file"):
        GGUF(tmp_path / "none.gguf")


def test_version_2_is_read_like_version_3(sound: bytes, tmp_path: Path) -> None:
    old = sound[:4] + struct.pack("<I", 2) + sound[8:]
    first = open_bytes(old, tmp_path).read("output_norm.weight")
    second = open_bytes(sound, tmp_path).read("output_norm.weight")
    np.testing.assert_array_equal(first.numpy(), second.numpy())


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"GGUF", "ends at byte 4, inside"), (b"GGUF\3\0\0", "byte 7"), (b"GGU", "does not begin")],
)
def test_a_file_that_ends_at_once(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "short.gguf").write_bytes(content)
    with pytest.raises(UserError, match=words):
        GGUF(tmp_path / "short.gguf")
