"""Words: nothing is lost, and Python and the `tokenizers` package cut alike."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text import pretokenize
from llm_from_scratch.text.pretokenize import (
    GPT2_PATTERN,
    JAPANESE_PATTERN,
    PATTERNS,
    byte_letters,
    count_words,
    from_letters,
    pattern_for,
    special_splitter,
    split_words,
    to_letters,
)

texts = st.text(
    alphabet=st.sampled_from("ab'stre 12½\n\t\r\u3000\x00\x85\u200déñ́😀👨👧")
    | st.sampled_from("。、「」漢字〆々ひらゝがーカタヽｶﾅｰ〳〵")
    | st.characters(exclude_categories=["Cs", "Cn"]),
    max_size=40,
)


@settings(max_examples=300)
@given(texts, st.sampled_from(sorted(PATTERNS)))
def test_words_are_the_text_and_those_of_the_tokenizers_package(text, language):
    pattern = PATTERNS[language]
    words = split_words(text, pattern)
    assert "".join(words) == text
    assert pretokenize.compiled(pattern).findall(text) == words
    rust = pre_tokenizers.Split(Regex(pattern), "isolated")
    if text:
        assert [word for word, _ in rust.pre_tokenize_str(text)] == words


def test_english_and_japanese_words():
    assert split_words("I'm  two dogs, 2023!") == [
        "I", "'m", " ", " two", " dogs", ",", " 2023", "!",
    ]  # fmt: skip
    text = "吾輩は猫である。名前はまだ無い。コーヒーを2杯。"
    assert split_words(text, GPT2_PATTERN)[0] == "吾輩は猫である"
    assert split_words(text, JAPANESE_PATTERN) == [
        "吾輩は", "猫である。", "名前はまだ", "無い。", "コーヒーを", "2", "杯。",
    ]  # fmt: skip


def test_a_pattern_that_does_not_match_everything_loses_nothing():
    assert split_words("a1b22", r"\d") == ["a", "1", "b", "2", "2"]
    assert "".join(split_words("ab", r"x*")) == "ab"
    assert count_words(["a1b1"], pattern=r"(\d)") == Counter({"1": 2, "a": 1, "b": 1})


def test_special_tokens_are_not_counted():
    words = count_words(["one<|end|>two<|end|><|end|>x"], special=["<|end|>", "<|end|><|end|>"])
    assert words == Counter(["one", "two", "x"])
    assert special_splitter(["a", "ab"])("xaby") == ["x", "ab", "y"]


def test_long_texts_are_counted_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch):
    text = "The first line.  \n\n  The second 2nd.\n" * 50
    whole = count_words([text])
    monkeypatch.setattr(pretokenize, "_PIECE", 10)
    assert len(list(pretokenize._pieces(text))) > 20
    assert "".join(pretokenize._pieces(text)) == text
    assert count_words([text]) == whole


@given(st.binary())
def test_letters_and_bytes_are_inverse(data):
    assert from_letters(to_letters(data)) == data


def test_the_letters_are_those_of_the_tokenizers_package():
    assert sorted(byte_letters()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert to_letters(b" a\n") == "ĠaĊ"


def test_bad_patterns_and_languages_are_named():
    with pytest.raises(UserError, match="not valid"):
        split_words("a", "(")
    with pytest.raises(UserError, match="choose one of en, ja"):
        pattern_for("de")
