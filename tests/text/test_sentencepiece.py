"""SentencePiece's files: read without protobuf, and encoded exactly as the package does."""

from __future__ import annotations

import base64
import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceNormalizer, SentencePieceProcessor, sentencepiece_model_pb2

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.charsmap import Charsmap
from llm_from_scratch.text.sentencepiece import SentencePiece
from llm_from_scratch.text.sentencepiece_model import (
    LARGEST_FILE,
    fields,
    parse_sentencepiece,
    read_sentencepiece,
)
from llm_from_scratch.text.tokenizer import Tokenizer
from tests.text.families import LLAMA_OPTIONS, ODD, T5_OPTIONS, TEXT, train_pieces
from tests.text.test_tokenizer_formats import texts_under

SOME = [TEXT, "Hello world, this is some more text to learn from. 世界人権宣言の前文である。"] * 4
LONG = [*ODD, TEXT, "-" * 500 + "ー" * 300 + " 99999999999 " + "ab" * 200, TEXT * 500]
MODELS: dict[str, dict[str, Any]] = {
    "unigram": {"model_type": "unigram"},
    "unigram-t5": T5_OPTIONS,
    "unigram-bytes": {"model_type": "unigram", "byte_fallback": True, "vocab_size": 700},
    "unigram-symbols": {
        "model_type": "unigram",
        "user_defined_symbols": ["the cat", "猫である", "ﬁ", "<sep>"],
        "control_symbols": ["<ctl>"],
    },
    "unigram-raw": {
        "model_type": "unigram",
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    },
    "unigram-suffix": {"model_type": "unigram", "treat_whitespace_as_suffix": True},
    "bpe": {"model_type": "bpe", "vocab_size": 400},
    "bpe-nfkc-cf": {
        "model_type": "bpe",
        "vocab_size": 400,
        "normalization_rule_name": "nmt_nfkc_cf",
    },
    "bpe-llama": {**LLAMA_OPTIONS, "vocab_size": 700},
}


@pytest.fixture(scope="module")
def models() -> dict[str, bytes]:
    return {
        name: train_pieces(SOME, **{"vocab_size": 400, **options})
        for name, options in MODELS.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_what_the_file_says(name: str, models: dict[str, bytes]) -> None:
    proto = sentencepiece_model_pb2.ModelProto.FromString(models[name])
    model = parse_sentencepiece(models[name], "x.model")
    assert model.pieces == [piece.piece for piece in proto.pieces]
    assert model.scores == [piece.score for piece in proto.pieces]
    assert model.types == [piece.type for piece in proto.pieces]
    assert model.kind == {1: "unigram", 2: "bpe"}[proto.trainer_spec.model_type]
    spec, trainer = proto.normalizer_spec, proto.trainer_spec
    assert model.charsmap == spec.precompiled_charsmap
    assert model.add_dummy_prefix == spec.add_dummy_prefix
    assert model.remove_extra_whitespaces == spec.remove_extra_whitespaces
    assert model.escape_whitespaces == spec.escape_whitespaces
    assert model.space_after == trainer.treat_whitespace_as_suffix
    ids = (model.unk_id, model.bos_id, model.eos_id, model.pad_id)
    assert ids == (trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id)


@pytest.mark.parametrize("name", MODELS)
def test_pieces_and_ids(name: str, models: dict[str, bytes]) -> None:
    theirs = SentencePieceProcessor(model_proto=models[name])
    ours = SentencePiece(parse_sentencepiece(models[name], "x.model"))
    assert ours.encode_batch(LONG) == theirs.encode(LONG)
    assert ours.pieces_batch(LONG) == theirs.encode(LONG, out_type=str)


@pytest.mark.parametrize("name", ["unigram", "unigram-symbols", "bpe"])
def test_ids_on_every_text(name: str, models: dict[str, bytes], data_dir: Path) -> None:
    theirs = SentencePieceProcessor(model_proto=models[name])
    ours = SentencePiece(parse_sentencepiece(models[name], "x.model"))
    for file, text in texts_under(data_dir, 800):
        assert ours.encode_batch([text]) == [theirs.encode(text)], file


@pytest.mark.full
def test_ids_on_a_whole_library(data_dir: Path) -> None:
    """Three million characters in one text: sums of scores in 32 bits, begun anew in time."""
    with gzip.open(data_dir / "aozora" / "aozora_clean.jsonl.gz", "rt", encoding="utf-8") as file:
        text = "".join(json.loads(line)["text"] for line in file)
    data = train_pieces([text[:200_000]], model_type="unigram", vocab_size=4000)
    ours = SentencePiece(parse_sentencepiece(data, "x.model"))
    assert ours.encode_batch([text]) == [SentencePieceProcessor(model_proto=data).encode(text)]


# ------------------------------------------------------------------------- normalisation


@pytest.fixture(scope="module")
def charsmap(models: dict[str, bytes]) -> bytes:
    return parse_sentencepiece(models["unigram"], "x.model").charsmap


@pytest.fixture(scope="module")
def normaliser(models: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("model") / "x.model"
    path.write_bytes(models["unigram"])
    return SentencePieceNormalizer(
        model_file=str(path), add_dummy_prefix=False, remove_extra_whitespaces=False,
        escape_whitespaces=False,
    )  # fmt: skip


MARKS = "a\u0301\u0327\u0323か\u3099は\u309aｶﾞ\u1100\u1161\u11a8각①㌔ﬁﷺ 　\r\n\u200b\ufeffÅ\u030a猫é"


@settings(max_examples=300)
@given(text=st.text(max_size=20) | st.text(alphabet=MARKS, max_size=12))
def test_normalised_as_they_do(text: str, charsmap: bytes, normaliser: Any) -> None:
    assert Charsmap(charsmap).normalise(text) == normaliser.normalize(text)


def test_every_text_normalised(charsmap: bytes, normaliser: Any, data_dir: Path) -> None:
    ours = Charsmap(charsmap)
    for file, text in texts_under(data_dir, 800):
        assert ours.normalise(text) == normaliser.normalize(text), file


def test_rules_of_ones_own(tmp_path: Path) -> None:
    """Longer than a character, empty, and one the beginning of another."""
    rules = {"abc": "X", "ab": "Y", "q": "", "吾輩": "俺", "吾": "我"}
    lines = [
        " ".join(f"{ord(c):X}" for c in old) + "\t" + " ".join(f"{ord(c):X}" for c in new)
        for old, new in rules.items()
    ]
    (tmp_path / "rules.tsv").write_text("\n".join(lines) + "\n")
    data = train_pieces(
        SOME, model_type="unigram", vocab_size=300,
        normalization_rule_tsv=str(tmp_path / "rules.tsv"),
    )  # fmt: skip
    ours = Charsmap(parse_sentencepiece(data, "x").charsmap)
    assert ours.normalise("abcab abd qabq 吾輩は吾") == "XY Yd Y 俺は我"
    assert Charsmap.longest_rule(ours, "abd") == (2, "Y")
    assert Charsmap.longest_rule(ours, "b") == (0, "")


# ------------------------------------------------------------------------- files that lie


def refused(data: bytes) -> bool:
    """Whether the bytes are refused in a sentence; if not, all that is done with them works."""
    try:
        model = parse_sentencepiece(data, "x.model")
        SentencePiece(model).encode_batch(["Hello か\u3099 ① 世界 <s>", "x" * 50])
    except UserError as error:
        assert "\n" not in str(error)
        return True
    return False


@settings(max_examples=150)
@given(st.data())
def test_broken_bytes_are_refused(models: dict[str, bytes], data: st.DataObject) -> None:
    good = models["unigram-bytes"]
    broken = bytearray(good)
    for _ in range(data.draw(st.sampled_from([1, 3, 20]))):
        # Mostly among the pieces; the table of normalisation is far longer.
        place = data.draw(st.integers(0, min(len(good) - 1, 12_000)))
        broken[place] = data.draw(st.integers(0, 255))
    refused(bytes(broken[: data.draw(st.sampled_from([len(good), len(good) // 2, 40, 3]))]))


@settings(max_examples=150)
@given(st.data())
def test_broken_tables_are_refused(charsmap: bytes, data: st.DataObject) -> None:
    broken = bytearray(charsmap)
    for _ in range(data.draw(st.sampled_from([1, 50]))):
        place = data.draw(st.integers(0, len(charsmap) - 1))
        broken[place] = data.draw(st.integers(0, 255))
    try:
        Charsmap(bytes(broken)).normalise("".join(ODD) + MARKS)
    except UserError as error:
        assert "precompiled_charsmap" in str(error)


def test_no_panic_for_a_table_in_tokenizer_json(charsmap: bytes, tmp_path: Path) -> None:
    table = bytearray(charsmap)
    table[4:2000] = b"\xff" * 1996
    spec = {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {
                    "type": "Precompiled",
                    "precompiled_charsmap": base64.b64encode(table).decode(),
                }
            ],
        },
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]},
    }
    for value, words in ((None, "leads nowhere"), ("%", "is not base64"), ("AAAA", "too short")):
        if value is not None:
            spec["normalizer"]["normalizers"][0]["precompiled_charsmap"] = value
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        with pytest.raises(UserError, match=f"tokenizer.json: .*{words}"):
            Tokenizer.load(tmp_path)


def field(number: int, kind: int, value: bytes) -> bytes:
    return bytes([number << 3 | kind]) + value


def text_field(number: int, value: bytes) -> bytes:
    size = len(value)
    return field(number, 2, bytes([size & 127 | 128, size >> 7]) + value)


UNKNOWN = text_field(1, text_field(1, b"<unk>") + field(3, 0, b"\x02"))
PIECE = text_field(1, text_field(1, b"a") + field(2, 5, b"\0\0\x80\xbf"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it has no pieces"),
        (b"\x0a", "ends inside a number"),
        (b"\x0a\x05abc", "ends inside a field"),
        (b"\x0a" + b"\xff" * 12, "a number in it has no end"),
        (b"\x0b", "no field type 3"),
        (b"\x08\x01", "a text or a message is expected"),
        (PIECE, "no piece for what is unknown"),
        (UNKNOWN + PIECE + PIECE, "same piece twice"),
        (text_field(1, text_field(1, b"\xff")), "a piece is not UTF-8"),
        (text_field(1, text_field(1, b"")), "piece 0 is empty"),
        (text_field(1, text_field(1, b"x" * 257)), "longer than 256 bytes"),
        (
            UNKNOWN + text_field(1, text_field(1, b"abc") + field(3, 0, b"\x06")),
            "stands for a byte",
        ),
        (
            b"".join(text_field(1, text_field(1, b"%04d" % i + b"x" * 252)) for i in range(2050)),
            "pieces are far too long",
        ),
        (text_field(1, text_field(1, b"a") + field(2, 5, b"\0\0\xc0\x7f")), "no sound score"),
        (text_field(1, text_field(1, b"a") + field(2, 1, bytes(8))), "number of 4 bytes"),
        (text_field(1, text_field(1, b"a") + field(3, 0, b"\x63")), "no sound score or type"),
        (UNKNOWN + text_field(2, field(3, 0, b"\x07")), "no model type 7"),
        (UNKNOWN + text_field(2, field(3, 0, b"\x04")), "of the kind 'char'; unigram and bpe"),
        (UNKNOWN + text_field(2, text_field(3, b"x")), "a number is expected"),
    ],
)
def test_what_is_said(data: bytes, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        parse_sentencepiece(data, "some/x.model")
    assert str(caught.value).startswith("some/x.model is ")


def test_a_minimal_file() -> None:
    model = parse_sentencepiece(UNKNOWN + PIECE, "x")
    assert (model.pieces, model.scores, model.types) == (["<unk>", "a"], [0.0, -1.0], [2, 1])
    assert list(fields(memoryview(b"\x98\x01\xac\x02"))) == [(19, 300)]
    negative = UNKNOWN + text_field(2, field(5, 0, b"\x00") + b"\xd8\x02" + b"\xff" * 9 + b"\x01")
    assert parse_sentencepiece(negative, "x").pad_id == -1


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.model cannot be read \(No such file"):
        read_sentencepiece(tmp_path / "nothing.model")
    large = tmp_path / "tokenizer.model"
    with large.open("wb") as file:
        file.truncate(LARGEST_FILE + 1)  # a hole: takes no room
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="too large for a SentencePiece model"):
            Tokenizer.load(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
    large.write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(UserError, match=r"tiktoken rank file: read it with Tokenizer\.from_tik"):
        Tokenizer.load(large)


# ------------------------------------------------------------------------- as a tokenizer


def test_a_model_of_no_class(models: dict[str, bytes], tmp_path: Path) -> None:
    """Read as its own settings say, roles included."""
    for name in ("unigram", "bpe-llama"):
        path = tmp_path / f"{name}.model"
        path.write_bytes(models[name])
        ours, theirs = Tokenizer.load(path), SentencePieceProcessor(model_file=str(path))
        assert (ours.bos_id, ours.eos_id, ours.unk_id) == (1, 2, 0)
        assert ours.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
        for text in (TEXT, "Hello world", " two  spaces" if name == "bpe-llama" else "a b"):
            assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode("Hello world")) == "Hello world"


def test_scores_decide_what_is_joined_first(models: dict[str, bytes], tmp_path: Path) -> None:
    """Not the order of the ids: real models have pieces of spaces that come last."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(models["bpe-llama"])
    for piece in proto.pieces:
        if piece.piece == "▁▁":
            piece.score = -1e9
    path = tmp_path / "tokenizer.model"
    path.write_bytes(proto.SerializeToString())
    ours, theirs = Tokenizer.load(path), SentencePieceProcessor(model_file=str(path))
    before = SentencePieceProcessor(model_proto=models["bpe-llama"])
    assert theirs.encode(TEXT) != before.encode(TEXT)
    assert ours.encode(TEXT) == theirs.encode(TEXT)
