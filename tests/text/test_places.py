"""Where tokens stand in a text: for the vocabularies of every family, and for odd texts."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.places import encode_with_places
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer
from tests.text.families import KINDS, ODD, TEXT

JAPANESE = "ＡＢＣの㌔と東京タワーへ、 New York から行った。ｶﾞ"


@pytest.mark.parametrize("kind", [name for name in KINDS if "marian" not in name])
def test_ids_are_those_of_encode_and_places_cover_the_text(kind: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(KINDS[kind].make(tmp_path / kind, [TEXT, JAPANESE]))
    # Of what a vocabulary does not have, its family may make nothing at all: not so of these.
    plain = "The cat sat on the mat; 東京 で 吾輩は猫である。"
    for text in [*ODD, TEXT, JAPANESE, plain]:
        (row,) = encode_with_places(tokenizer, [text])
        assert [token for token, _, _ in row] == tokenizer.encode(text), text
        before = 0
        for _, begin, end in row:
            assert 0 <= begin <= end <= len(text)
            if begin < end:
                assert not text[begin].isspace()
                assert not text[end - 1].isspace()
                assert begin >= before - 1  # tokens of one character share it
                before = begin
        if text == plain:
            covered = {place for _, begin, end in row for place in range(begin, end)}
            letters = {place for place, letter in enumerate(text) if not letter.isspace()}
            assert covered >= letters


def test_marian_does_not_tell(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(KINDS["marian"].make(tmp_path / "marian", [TEXT, JAPANESE]))
    with pytest.raises(UserError, match="does not tell where"):
        encode_with_places(tokenizer, ["Hello"])


def test_bytes_of_one_character_share_its_place() -> None:
    tokenizer = train_tokenizer(["abc "], vocab_size=257)
    (row,) = encode_with_places(tokenizer, ["a東 b"])
    assert [(begin, end) for _, begin, end in row] == [
        (0, 1), (1, 2), (1, 2), (1, 2), (3, 3), (3, 4)
    ]  # fmt: skip


def test_japanese_words_are_found_in_the_text_as_it_was_written(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(KINDS["japanese"].make(tmp_path / "ja", [TEXT, JAPANESE]))
    (row,) = encode_with_places(tokenizer, [JAPANESE])
    pieces = [JAPANESE[begin:end] for _, begin, end in row]
    # NFKC changes these, and MeCab sees them changed; ㌔ becomes two letters that share it.
    assert pieces[0].startswith("Ａ")
    assert "㌔" in pieces
    assert pieces[-1] == "ｶﾞ"
    assert "".join(dict.fromkeys(pieces)).replace(" ", "").startswith("ＡＢＣの㌔と")


def test_special_tokens_in_a_text_are_text() -> None:
    tokenizer = train_tokenizer(["some text <|endoftext|> "] * 3, vocab_size=280)
    text = "a <|endoftext|> b\ud800c"
    (row,) = encode_with_places(tokenizer, [text])
    assert tokenizer.eos_id not in [token for token, _, _ in row]
    assert row[-1][1:] == (len(text) - 1, len(text))


@cache
def trained() -> Tokenizer:
    return train_tokenizer([TEXT, JAPANESE] * 3, vocab_size=400)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_byte_level_tokens_say_what_stands_in_their_place(text: str) -> None:
    tokenizer = trained()
    (row,) = encode_with_places(tokenizer, [text])
    for token, begin, end in row:
        data = tokenizer.token_bytes(token).strip()
        if b"\x85" not in data and b"\xa0" not in data:  # bytes that are white space elsewhere
            assert data in text[begin:end].encode() or begin == end
