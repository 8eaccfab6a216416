"""MeCab and the settings of Japanese BERTs: what is read, what is refused, what is missing."""

from __future__ import annotations

import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text import mecab
from llm_from_scratch.text.mecab import MeCab
from llm_from_scratch.text.stream import StreamDecoder
from llm_from_scratch.text.tokenizer import Tokenizer
from tests.text.families import BERT_TOKENS

CONFIG = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"}
WORDS = ["吾輩", "は", "猫", "で", "ある", "。", "##である", "人工", "##知能", "cat", "##s", "a"]


def folder_with(folder: Path, vocab: list[str] | None = None, **config: Any) -> Path:
    lines = BERT_TOKENS + (WORDS if vocab is None else vocab)
    (folder / "vocab.txt").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def test_words_first_then_their_pieces(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder_with(tmp_path))
    ids = tokenizer.encode("吾輩は猫である。ｃａｔｓ")  # full width: NFKC
    assert [tokenizer.tokens[i] for i in ids] == [
        "吾輩",
        "は",
        "猫",
        "で",
        "ある",
        "。",
        "cat",
        "##s",
    ]
    assert tokenizer.decode(ids) == "吾輩 は 猫 で ある 。 cats"
    assert (tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (2, 3, 4)
    assert tokenizer.kind == "wordpiece"
    stream = StreamDecoder(tokenizer)
    assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids)


def test_words_that_look_special_are_words(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder_with(tmp_path))
    special = set(tokenizer.special_tokens.values()) - {tokenizer.unk_id}
    for text in ("[MASK]", "猫[SEP]猫", "［ＭＡＳＫ］", "[ MASK ]"):
        assert special.isdisjoint(tokenizer.encode(text))
    mask = tokenizer.mask_id
    assert mask in tokenizer.encode("吾輩は[MASK]である。", special=True)
    (row,) = tokenizer.encode_inputs(["吾輩は[MASK]である。"], special=True).ids
    assert row.count(mask) == 1


def test_lower_case_comes_after_the_words(tmp_path: Path) -> None:
    lower = Tokenizer.load(folder_with(tmp_path, do_lower_case=True))
    assert lower.tokens[lower.encode("CAT")[0]] == "cat"
    plain = Tokenizer.load(folder_with(tmp_path))
    assert plain.encode("CAT") == [plain.unk_id]
    assert lower.fingerprint != plain.fingerprint


def test_characters(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(
        folder_with(tmp_path, list("吾輩は猫"), subword_tokenizer_type="character")
    )
    assert tokenizer.encode("吾輩は犬") == [5, 6, 7, tokenizer.unk_id]
    assert tokenizer.decode([5, 6, 7]) == "吾 輩 は"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"word_tokenizer_type": "sudachi"}, r"'word_tokenizer_type' is 'sudachi'; .*'mecab'"),
        ({"word_tokenizer_type": None}, "'word_tokenizer_type' is 'basic'"),
        ({"subword_tokenizer_type": "bpe"}, r"'subword_tokenizer_type' is 'bpe'; .*'character'"),
        ({"do_word_tokenize": False}, "'do_word_tokenize' is False"),
        ({"do_subword_tokenize": False}, "'do_subword_tokenize' is False"),
        ({"mecab_kwargs": {"mecab_dic": "unidick"}}, "Did you mean 'unidic'"),
        ({"mecab_kwargs": {"mecab_dic": None}}, "a dictionary of the machine"),
        ({"mecab_kwargs": {"mecab_option": "-d /etc"}}, "a dictionary of the machine"),
        ({"mecab_kwargs": {"dic": 1}}, "'mecab_kwargs' is {'dic': 1}; known are"),
        ({"unk_token": "<unk>"}, "no token '<unk>' for unknown words"),
        ({"subword_tokenizer_type": "sentencepiece"}, r"spiece\.model cannot be read"),
    ],
)
def test_settings_that_are_refused(config: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(folder_with(tmp_path, **config))
    assert "\n" not in str(caught.value)


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, install in (("fugashi", r"scratchlm\[ja\]"), ("unidic_lite", r"scratchlm\[ja\]")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(UserError, match=f"'{name}' is missing: pip install '{install}'"):
                Tokenizer.load(folder_with(tmp_path))
    with pytest.raises(UserError, match="'ipadic' is missing: pip install ipadic"):
        MeCab("ipadic")


def test_dictionaries_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import unidic_lite

    monkeypatch.setattr(unidic_lite, "DICDIR", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="run python -m unidic_lite download"):
        MeCab()
    monkeypatch.setattr(unidic_lite, "DICDIR", str(tmp_path))
    with pytest.raises(UserError, match="MeCab cannot open the dictionary 'unidic_lite' in"):
        MeCab()


def test_nothing_is_imported_before_it_is_needed() -> None:
    import subprocess

    code = (
        "import sys, llm_from_scratch.text.tokenizer; "
        "sys.exit('fugashi' in sys.modules or 'unidic_lite' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_long_texts_are_cut_at_line_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """MeCab breaks down on a text of a million characters."""
    tagger = MeCab()
    text = unicodedata.normalize("NFKC", "吾輩は猫である。\n名前はまだ無い。\n\n" * 9)
    whole = tagger.words(text)
    assert whole[:6] == ["吾輩", "は", "猫", "で", "ある", "。"]
    assert MeCab().words("吾輩は猫である。\n" * 60_000)[-1] == "。"
    for most in (10, 25, 40):
        monkeypatch.setattr(mecab, "MOST", most)
        assert tagger.words(text) == whole
        assert "".join(mecab._parts(text)) == text
        assert max(map(len, mecab._parts("猫" * 100 + text))) == most
