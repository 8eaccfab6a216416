"""The page's texts: every key in English and in Japanese, every one used, none missing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import llm_from_scratch

PAGE = Path(llm_from_scratch.__file__).parent / "serve" / "page"
JAPANESE = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")
SAME = {"set.top_p", "set.top_k", "set.min_p"}  # are called the same in Japanese
BOTH = {"language.other", "inside.example"}  # speak both languages


@pytest.fixture
def strings(page: Any) -> dict[str, dict[str, str]]:
    """Language -> key -> text, as the modules give them."""
    both: dict[str, dict[str, str]] = {"en": {}, "ja": {}}
    for path in sorted(PAGE.glob("strings*.js")):
        found = page.evaluate(f"async () => (await import('/page/{path.name}')).strings")
        for language, texts in found.items():
            assert not both[language].keys() & texts.keys(), "one key, two texts"
            both[language] |= texts
    return both


def test_both_languages_have_every_text(strings: dict[str, dict[str, str]]) -> None:
    english, japanese = strings["en"], strings["ja"]
    assert len(english) > 100 and english.keys() == japanese.keys()
    for key, text in english.items():
        holes = [sorted(re.findall(r"\{\w+\}", one)) for one in (text, japanese[key])]
        assert holes[0] == holes[1], key
        if key not in BOTH:
            assert not JAPANESE.search(text), key
            words = re.sub(r"\{\w+\}", "", japanese[key])
            assert key in SAME or JAPANESE.search(words) or not re.search("[a-z]{2}", words), key


def test_every_text_is_used_and_none_is_missing(strings: dict[str, dict[str, str]]) -> None:
    known = strings["en"].keys()
    paths = [path for path in PAGE.iterdir() if path.suffix in (".js", ".html")]
    source = "\n".join(p.read_text() for p in paths if not p.name.startswith("strings"))
    named = set(re.findall(r"\bt\(\"([^\"]+)\"", source))
    named |= set(re.findall(r"data-t(?:-label|-placeholder)?=\"([^\"]+)\"", source))
    assert not named - known
    templates = [text for text in re.findall(r"`([\w.${}]*)`", source) if "." in text]
    built = [re.compile(re.sub(r"\$\{[\w.]+\}", r"[\\w.]+", text)) for text in templates]
    unused = {
        key
        for key in known
        if f'"{key}"' not in source and not any(pattern.fullmatch(key) for pattern in built)
    }
    assert not unused
