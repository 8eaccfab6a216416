"""Counting what tokenizers make of a text."""

from __future__ import annotations

import html.parser

import pytest

from llm_from_scratch.text import compare as module
from llm_from_scratch.text.compare import Comparison, chunks, compare, page, pieces, short_names
from llm_from_scratch.text.training import train_tokenizer

JAPANESE = "吾輩は猫である。"
BPE = train_tokenizer([JAPANESE * 9, "the cat " * 9], vocab_size=300)
CHARACTERS = train_tokenizer([JAPANESE, "the cat"], kind="char", special=["<|x|>"])


def test_what_is_counted() -> None:
    text = f"the cat {JAPANESE}\n"
    found = compare("bpe", BPE, text)
    ids = BPE.encode(text)
    assert found == Comparison(
        name="bpe",
        kind="bpe",
        vocab_size=BPE.vocab_size,
        tokens=len(ids),
        bytes_per_token=len(text.encode()) / len(ids),
        characters_per_token=len(text) / len(ids),
        unknown=0,
        tokens_per_japanese_character=len(BPE.encode(JAPANESE)) / 8,
        round_trip=True,
    )
    lost = compare("char", CHARACTERS, "the dog; 犬 <|x|>")
    assert lost.tokens == 16
    assert lost.unknown == 10  # d o g ; 犬 < | x | >
    assert not lost.round_trip
    assert lost.tokens_per_japanese_character == 1
    english = compare("bpe", BPE, "the cat")
    assert english.tokens_per_japanese_character is None
    assert english.row()[6:] == ["-", "yes"]
    assert compare("bpe", BPE, "").tokens == 0


def test_a_long_text_is_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"the cat {JAPANESE}{i}\n" for i in range(40)) + "x" * 300 + "\n"
    whole = compare("a", BPE, text)
    monkeypatch.setattr(module, "CHUNK", 100)
    assert "".join(chunks(text)) == text
    assert max(map(len, chunks(text))) <= 100
    said: list[tuple[int, int]] = []
    again = compare("a", BPE, text, progress=lambda *what: said.append(what))
    assert again.round_trip
    assert abs(again.tokens - whole.tokens) <= 5
    assert said == sorted(said)
    assert said[-1][0] == said[-1][1]


def test_names_are_short_where_they_stay_different() -> None:
    assert short_names(["a/b", "c/d/", "e"]) == ["b", "d", "e"]
    assert short_names(["runs/a/model", "runs/b/model"]) == ["runs/a/model", "runs/b/model"]
    assert short_names(["x", "x"]) == ["x", "x"]


def test_the_page_escapes_what_it_shows() -> None:
    text = '<script>alert("x")</script>&amp;\n'
    shown = page("<title>", [compare("<b>", BPE, text)], [pieces(BPE, text)])
    tags: list[str] = []
    said: list[str] = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)  # type: ignore[method-assign]
    parser.handle_data = said.append  # type: ignore[method-assign]
    parser.feed(shown)
    assert set(tags) == {
        "html", "meta", "title", "style", "h1", "div", "table", "tr", "th", "td", "h2", "p", "span",
        "wbr", "br",
    }  # fmt: skip
    assert '<script>alert("x")</script>&amp;\\n' in "".join(said)
    assert tags.count("span") == len(BPE.encode(text))
