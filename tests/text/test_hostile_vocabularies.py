"""Folders with a vocabulary in its own files: broken ones, and every wrong value beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.checks import LARGEST_ID
from llm_from_scratch.text.tokenizer import Tokenizer
from tests.text.families import BERT_TOKENS, TEXT, train_pieces
from tests.text.test_hostile_tokenizers import WRONG, places, replaced, use

ADDED = {"content": "<new>", "special": True, "lstrip": True, "normalized": False}
MANY = {"additional_special_tokens": ["<new>"], "added_tokens_decoder": {"40": ADDED}}
CONFIGS: dict[str, dict[str, Any]] = {
    "words": {
        "tokenizer_class": "BertTokenizer", "do_lower_case": True, "strip_accents": None,
        "tokenize_chinese_chars": True, "cls_token": {"content": "[CLS]", "lstrip": False},
        "mask_token": "[MASK]", "unk_token": "[UNK]", **MANY,
    },
    "pieces": {
        "tokenizer_class": "T5Tokenizer", "extra_ids": 3, "eos_token": "</s>",
        "extra_special_tokens": {"image_token": "<new>"}, **MANY,
    },
    "llama": {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False,
        "add_prefix_space": None, "padding_side": "left", "extra_special_tokens": ["<new>"],
    },
    "japanese": {
        "tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab",
        "subword_tokenizer_type": "wordpiece", "do_lower_case": False,
        "mecab_kwargs": {"mecab_dic": "unidic_lite", "normalize_text": True}, **MANY,
    },
    "marian": {"tokenizer_class": "MarianTokenizer", "unk_token": "<unk>", **MANY},
}  # fmt: skip


@pytest.fixture(scope="module")
def unigram() -> bytes:
    return train_pieces([TEXT] * 4, model_type="unigram", vocab_size=300)


@pytest.fixture
def make(tmp_path: Path, unigram: bytes) -> Any:
    def folder(kind: str, config: Any = None) -> Path:
        if kind in ("words", "japanese"):
            (tmp_path / "vocab.txt").write_text("\n".join([*BERT_TOKENS, "a", "cat", "##s", ""]))
        elif kind == "marian":
            for name in ("source.spm", "target.spm"):
                (tmp_path / name).write_bytes(unigram)
            table = {"</s>": 0, "<unk>": 1, "▁a": 2, "<pad>": 3}
            (tmp_path / "vocab.json").write_text(json.dumps(table))
        else:
            name = {"pieces": "spiece.model", "llama": "tokenizer.model"}[kind]
            (tmp_path / name).write_bytes(unigram)
        value = CONFIGS[kind] if config is None else config
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(value))
        return tmp_path

    return folder


@pytest.mark.parametrize("kind", CONFIGS)
def test_any_wrong_value_in_the_config(kind: str, make: Any) -> None:
    folder = make(kind)
    use(folder)
    for place in places(CONFIGS[kind]):
        for wrong in WRONG:
            make(kind, replaced(CONFIGS[kind], place, wrong))
            try:
                use(folder)
                Tokenizer.load(folder).encode_inputs(["a cat"], ["a"])
            except UserError:
                pass
            except Exception as error:
                raise AssertionError(f"{place} = {wrong!r}") from error


@pytest.mark.parametrize(
    ("kind", "name", "data", "words"),
    [
        ("words", "vocab.txt", b"", r"vocab\.txt is empty"),
        ("words", "vocab.txt", b"[UNK]\n\xff\n", r"vocab\.txt is not UTF-8 text \(byte 6\)"),
        ("words", "vocab.txt", b"a\nb\n", r"no token '\[UNK\]' for unknown words"),
        ("pieces", "spiece.model", b"\x0a\x05", r"spiece\.model is not a SentencePiece model"),
        ("pieces", "config.json", b"[]", r"config\.json must hold a JSON object"),
        ("pieces", "tokenizer_config.json", b'{"extra_ids": -1}', None),
        ("marian", "vocab.json", b'{"<unk>": 5}', "must give the ids from 0 to 0, once each"),
        ("marian", "vocab.json", b'{"a": 0, "b": 0}', "must give the ids from 0 to 1, once each"),
        ("marian", "vocab.json", b'{"a": 0}', "has no token '<unk>' for the unknown"),
        ("marian", "vocab.json", b"[]", r"vocab\.json must hold a JSON object"),
        ("marian", "source.spm", b"x", r"source\.spm is not a SentencePiece model"),
        ("marian", "target.spm", b"", None),
        ("japanese", "vocab.txt", b"[UNK]\na", None),
    ],
)
def test_what_is_said(kind: str, name: str, data: bytes, words: str | None, make: Any) -> None:
    folder = make(kind)
    (folder / name).write_bytes(data)
    if words is None:
        use(folder)
        return
    with pytest.raises(UserError, match=words) as caught:
        use(folder)
    assert str(folder) in str(caught.value)


def test_huge_numbers_are_no_huge_lists(make: Any) -> None:
    for number in (10_001, 10**12):
        with pytest.raises(UserError, match=f"'extra_ids' is {number}; it must be"):
            Tokenizer.load(make("pieces", {**CONFIGS["pieces"], "extra_ids": number}))
    added = {**CONFIGS["words"], "added_tokens_decoder": {"99999999": ADDED}}
    with pytest.raises(UserError, match=f"has the id 99999999; ids are .* {LARGEST_ID:,}"):
        Tokenizer.load(make("words", added))


def test_a_vocab_json_needs_its_merges(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no tokenizer\.json.* \(it has vocab\.json\)"):
        Tokenizer.load(tmp_path)


def test_lines_end_with_a_newline_only(tmp_path: Path) -> None:
    """Vocabularies hold separators of other kinds as tokens; Windows ends lines with two."""
    tokens = [*BERT_TOKENS, "a", "\u2028", "b\x85", "\u3000"]
    (tmp_path / "vocab.txt").write_bytes("\r\n".join(tokens).encode())
    assert Tokenizer.load(tmp_path).tokens == tokens


def test_tokens_that_no_vocab_txt_can_hold(tmp_path: Path) -> None:
    from llm_from_scratch.text.wordpiece_spec import write_vocab_txt

    assert write_vocab_txt(["a", None, "b"]) == "a\n[unused1]\nb\n"
    with pytest.raises(UserError, match=r"The token 'x\\n' holds a line end"):
        write_vocab_txt(["x\n"])
