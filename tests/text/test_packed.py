"""The vocabulary stays packed until it is needed, and comes back as it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.formats import added_token, bpe_spec
from llm_from_scratch.text.packed import BLOCK, PackedModel
from llm_from_scratch.text.pretokenize import byte_letters
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer

TEXTS = ["a cat sat on a mat, 吾輩は猫である。\n" * 9]
BPE = train_tokenizer(TEXTS, vocab_size=300, special=["<|endoftext|>"])
KINDS = {
    "bpe": BPE,
    "unigram": train_tokenizer(TEXTS, kind="unigram", vocab_size=300),
    "wordpiece": train_tokenizer(TEXTS, kind="wordpiece", vocab_size=90),
    "char": train_tokenizer(TEXTS, kind="char"),
}


def model_of(**changes: Any) -> dict[str, Any]:
    return {**BPE.spec["model"], **changes}


def is_open(tokenizer: Tokenizer) -> bool:
    return "_plain" in vars(tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_specification_comes_back_as_it_was(kind: str) -> None:
    spec = json.loads(json.dumps(KINDS[kind].spec))
    again = Tokenizer.from_spec(copy.deepcopy(spec)).spec
    assert json.dumps(again) == json.dumps(spec)  # the order of the fields, too


@pytest.mark.parametrize(
    "model",
    [
        {"type": "BPE", "merges": ["#version: 0.2", "a b", "\n \n"], "vocab":
            {"a": 3, "b": 0, "ab": 1, "\n": 2, "\n\n": 9}},
        {"vocab": {"a": 0, "b": 0}, "type": "WordLevel", "unk_token": "a"},
        {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1], ["b", -0.1], ["c", 1e-300]]},
        {"type": "Unigram", "vocab": [], "unk_id": None},
        {"type": "BPE", "vocab": {}, "merges": []},
    ],
)  # fmt: skip
def test_so_do_odd_models(model: dict[str, Any]) -> None:
    packed = PackedModel(model)
    assert json.dumps(packed.whole()) == json.dumps(model)
    assert json.loads(packed.text({"model": "left out"})) == {"model": model}


def test_longer_ones_than_a_block() -> None:
    words = {f"{i}": i for i in range(2 * BLOCK + 5)}
    merges = [["1", f"{i}"] for i in range(BLOCK + 3)]
    words |= {f"1{i}": 10**6 + i for i in range(BLOCK + 3)}
    model = {"vocab": words, "merges": merges}
    packed = PackedModel(model)
    assert packed.whole() == model
    assert dict(packed.tokens()) == words
    assert (packed.size, packed.merges) == (len(words), len(merges))
    merges[BLOCK + 1] = ["1", "x"]
    with pytest.raises(UserError, match="The merge '1 x' does not fit the vocabulary"):
        PackedModel(model)


def test_the_library_gets_it_when_a_text_is_encoded(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.kind) == (BPE.vocab_size, "bpe")
    assert tokenizer.bos_id == tokenizer.eos_id == BPE.eos_id is not None
    assert tokenizer.stop_ids == BPE.stop_ids
    assert tokenizer.tokens == BPE.tokens
    assert tokenizer.fingerprint == BPE.fingerprint
    tokenizer.save(tmp_path / "again")
    assert not is_open(tokenizer)
    assert tokenizer.encode("a cat") == BPE.encode("a cat")
    assert is_open(tokenizer)


def test_a_few_tokens_do_not_unpack_the_vocabulary() -> None:
    tokenizer = Tokenizer.from_spec(BPE.spec)
    texts = [tokenizer.token_text(i) for i in range(-1, tokenizer.vocab_size + 1)]
    assert "tokens" not in vars(tokenizer)
    _ = tokenizer.tokens
    tokenizer._bytes_of.clear()
    assert texts == [tokenizer.token_text(i) for i in range(-1, tokenizer.vocab_size + 1)]


def test_of_tokens_with_one_id_the_last_one_is_decoded() -> None:
    vocab = {"<u>": 0, **{f"w{i}": 1 for i in range(9)}}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<u>"}
    fuse = {"type": "Fuse"}
    tokenizer = Tokenizer.from_spec({"model": model, "added_tokens": [], "decoder": fuse})
    assert tokenizer.decode([1]) == tokenizer.tokens[1] == "w8"


@pytest.mark.parametrize(
    "added",
    [
        [("a", 97), ("<x>", 256), ("<y>", 257)],
        [("a", 3), ("<x>", 256)],  # the vocabulary says something else
        [("<y>", 257), ("<x>", 256)],
        [("<x>", 300)],  # a gap
        [("<x>", 256), ("<x>", 256)],
        [("", 256), ("<x>", 257)],
    ],
)
def test_ids_of_added_tokens_are_those_that_texts_get(added: list[tuple[str, int]]) -> None:
    letters = sorted(byte_letters())
    spec = bpe_spec(letters, [])
    spec["added_tokens"] = [added_token(token, i, special=True) for token, i in added]
    tokenizer = Tokenizer.from_spec(spec)
    found = [tokenizer.token_id(token) for token, _ in added]
    assert found == [tokenizer._plain.token_to_id(token) for token, _ in added]
    for (token, _), number in zip(added, found, strict=True):
        assert not token or tokenizer.encode(token, special=True) == [number]


@pytest.mark.parametrize(
    ("merge", "words"),
    [
        ("a z", "The merge 'a z' does not fit the vocabulary"),
        ("a  t", "'a  t' is no merge of two tokens"),
        (["a", "z"], "The merge 'a z' does not fit the vocabulary"),
        (["a", "t", ""], "is no merge of two tokens"),
        (["a", 7], "is no merge of two tokens"),
        ({"a": 1, "t": 2}, "is no merge of two tokens"),
        (None, "None is no merge of two tokens"),
    ],
)
def test_merges_that_are_none_are_refused_at_once(merge: Any, words: str) -> None:
    merges = [m if isinstance(merge, str) else m.split(" ") for m in as_texts()]
    with pytest.raises(UserError, match=words):
        Tokenizer.from_spec({**BPE.spec, "model": model_of(merges=[*merges, merge])})


def as_texts() -> list[str]:
    return [m if isinstance(m, str) else " ".join(m) for m in BPE.spec["model"]["merges"]]


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Magic"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}}},
        {"model": model_of(dropout=7)},
        {"model": model_of(type="Magic")},
        {"model": {"type": "Unigram", "unk_id": 4, "vocab": [["a", 0.0]]}},
        {"model": {"type": "Unigram", "unk_id": "x", "vocab": [["a", 0.0]]}},
        {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", True]]}},
        {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0], ["b"]]}},
        {"model": model_of(vocab={"\ud800": 0}, merges=[])},
    ],
)
def test_what_the_library_would_refuse_is_refused_at_once(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"This tokenizer\.json cannot be used: "):
        Tokenizer.from_spec({**BPE.spec, **changes})


def test_what_is_found_out_late_names_the_file(tmp_path: Path) -> None:
    """Merges are pairs or texts, not both: the library alone minds."""
    first, *rest = as_texts()
    spec = {**BPE.spec, "model": model_of(merges=[first.split(" "), *rest])}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    for _ in range(2):
        with pytest.raises(UserError, match="cannot be used") as caught:
            tokenizer.encode("a cat")
        assert str(caught.value).startswith(str(tmp_path / "tokenizer.json"))
