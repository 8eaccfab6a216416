"""Every value of a tokenizer's files, replaced by what does not belong there."""

from __future__ import annotations

import copy
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.checks import LARGEST_ID
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer

WRONG = (None, [], {}, "x", 7, -1, 4_000_000_000, 2.5, True, [{}], {"x": {}}, [["x", 1]], "\ud800")


def places(value: Any, path: tuple[Any, ...] = (), most: int = 3) -> Iterator[tuple[Any, ...]]:
    """Where the values of a JSON document are; of long lists and tables the first few."""
    yield path
    keys = list(value) if isinstance(value, dict) else range(len(value)) if is_list(value) else ()
    for key in list(keys)[:most] if len(list(keys)) > 40 else keys:
        yield from places(value[key], (*path, key), most)


def is_list(value: Any) -> bool:
    return isinstance(value, list)


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = replaced(value[path[0]], path[1:], new)
    return value


def use(folder: Path) -> None:
    """Everything that a caller may ask of a tokenizer; what cannot be loaded is named."""
    try:
        tokenizer = Tokenizer.load(folder)
    except UserError as error:
        assert str(folder) in str(error)
        raise
    ids = tokenizer.encode("a cat <|x|>") + tokenizer.encode("<|x|>", special=True)
    tokenizer.decode(ids)
    tokenizer.decode(ids, skip_special=True)
    assert tokenizer.vocab_size < 10_000_000
    assert all(isinstance(token, int) for token in tokenizer.stop_ids)
    for part in ("bos_id", "eos_id", "pad_id", "unk_id", "kind", "special_tokens", "fingerprint"):
        getattr(tokenizer, part)
    tokenizer.token_text(0)


def use_good(folder: Path, spec: Any) -> None:
    """The one to be broken is sound."""
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    use(folder)


def some_tokenizers() -> dict[str, Any]:
    bpe = train_tokenizer(["a cat sat on a mat " * 9], vocab_size=262, special=["<|x|>"])
    unigram = {
        **copy.deepcopy(bpe.spec),
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "Unigram", "unk_id": 0, "byte_fallback": False,
            "vocab": [["<unk>", 0.0], ["▁", -1.0], ["a", -2.0], ["▁cat", -3.0]],
        },
        "added_tokens": [],
    }  # fmt: skip
    return {"bpe": bpe.spec, "unigram": unigram}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_any_wrong_value_in_tokenizer_json(kind: str, tmp_path: Path) -> None:
    spec = some_tokenizers()[kind]
    path = tmp_path / "tokenizer.json"
    use_good(tmp_path, spec)
    refused = 0
    for place in places(spec):
        for wrong in WRONG:
            path.write_text(json.dumps(replaced(spec, place, wrong)), encoding="utf-8")
            try:
                use(tmp_path)
            except UserError:
                refused += 1
            except Exception as error:
                raise AssertionError(f"{place} = {wrong!r}") from error
    assert refused > 100


CONFIG = {
    "bos_token": "<|x|>",
    "eos_token": {"content": "<|x|>", "special": True},
    "additional_special_tokens": ["<|x|>", {"content": "<|x|>"}],
    "added_tokens_decoder": {"0": {"content": "<|x|>", "special": True}},
    "chat_template": [{"name": "default", "template": "{{ messages }}"}],
    "add_prefix_space": False,
}
FILES = {
    "tokenizer_config.json": CONFIG,
    "special_tokens_map.json": {"bos_token": {"content": "<|x|>"}, "pad_token": "<|x|>"},
    "added_tokens.json": {"<|x|>": 0},
    "generation_config.json": {"eos_token_id": [0, 1]},
    "chat_template.json": {"chat_template": "{{ messages }}"},
}


@pytest.mark.parametrize("layout", ["new", "old"])
@pytest.mark.parametrize("name", FILES)
def test_any_wrong_value_beside_it(name: str, layout: str, tmp_path: Path) -> None:
    spec = some_tokenizers()["bpe"]
    if layout == "new":
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    else:
        model = spec["model"]
        (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
        merges = "\n".join(m if isinstance(m, str) else " ".join(m) for m in model["merges"])
        (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    path = tmp_path / name
    for place in places(FILES[name]):
        for wrong in WRONG:
            path.write_text(json.dumps(replaced(FILES[name], place, wrong)), encoding="utf-8")
            try:
                use(tmp_path)
            except UserError:
                pass
            except Exception as error:
                raise AssertionError(f"{place} = {wrong!r}") from error


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("generation_config.json", b"[]", "must hold a JSON object, not a list"),
        ("generation_config.json", b'{"eos_token_id": {"a": 1}}', "eos_token_id' is {'a': 1}; it"),
        ("generation_config.json", b'{"eos_token_id": [1, null]}', "a token's id or a list of ids"),
        ("chat_template.jinja", b"\xff\xfe", r"chat_template\.jinja is not UTF-8 text \(byte 0\)"),
        (
            "tokenizer_config.json",
            b'{"chat_template": [{}]}',
            "chat_template' is .*list of tables",
        ),
        ("tokenizer_config.json", b"[" * 200_000, "nested too deeply"),
        ("tokenizer.json", b"[" * 200_000, "nested too deeply"),
        ("tokenizer_config.json", b'{"eos_token": 7}', "'eos_token' is 7; it must be a token's"),
    ],
)
def test_what_is_said(name: str, data: bytes, words: str, tmp_path: Path) -> None:
    train_tokenizer(["a cat sat on a mat " * 9], vocab_size=262).save(tmp_path)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("number", [LARGEST_ID + 1, 4_000_000_000, -1, 1.5, True])
def test_one_enormous_id_makes_no_enormous_list(number: Any) -> None:
    spec = copy.deepcopy(train_tokenizer(["a cat sat"], vocab_size=260).spec)
    spec["added_tokens"][0]["id"] = number
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"The token .* has the id .*; ids are"):
            _ = Tokenizer.from_spec(spec).tokens
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
