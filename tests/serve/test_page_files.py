"""The page's files: small, of plain modules, with nothing from elsewhere."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

import llm_from_scratch

PAGE = Path(llm_from_scratch.__file__).parent / "serve" / "page"
MOST_LINES, MOST_COLUMNS = 2500, 120
SOURCES = sorted(path for path in PAGE.rglob("*") if path.suffix in (".html", ".css", ".js"))
OTHER = {".svg", ".png", ".ico", ".webmanifest"}

# What would let a model's text become a program, or the browser fetch from elsewhere.
FORBIDDEN = {
    "HTML made of text": r"\b(innerHTML|outerHTML|insertAdjacentHTML|srcdoc)\b|document\.write|"
    r"createContextualFragment|DOMParser|setHTMLUnsafe",
    "text run as a program": r"\beval\b|new Function\b|javascript:|"
    r"set(Timeout|Interval)\(\s*[\"'`]",
    "another origin": r"(https?:)?//(?!www\.w3\.org/(2000/svg|1999/xhtml)\b)[\w-]+\.\w",
    "another way out": r"\b(WebSocket|EventSource|sendBeacon|RTCPeerConnection|importScripts)\b",
    "what the content policy blocks": r"<style|\sstyle=|\son\w+=\"|<script(?![^>]*\ssrc=)",
}


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def without_comments(path: Path) -> str:
    """The source without its comments, where prose may speak of anything."""
    marks = {
        ".html": r"<!--.*?-->",
        ".css": r"/\*.*?\*/",
        ".js": r"/\*.*?\*/|^\s*//[^\n]*| // [^\n]*",
    }
    return re.sub(marks[path.suffix], "", text_of(path), flags=re.S | re.M)


def test_the_page_is_small() -> None:
    lines = {path.name: text_of(path).count("\n") for path in SOURCES}
    assert {"index.html"} < set(lines)
    assert sum(lines.values()) <= MOST_LINES, lines
    wide = [
        f"{path.name}:{number}"
        for path in SOURCES
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if len(line) > MOST_COLUMNS
    ]
    assert not wide
    others = [path for path in PAGE.rglob("*") if path.is_file() and path not in SOURCES]
    assert all(path.suffix in OTHER and path.stat().st_size < 20_000 for path in others), others


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_dangerous_and_nothing_from_elsewhere(path: Path) -> None:
    source = without_comments(path)
    found = {what: re.search(pattern, source) for what, pattern in FORBIDDEN.items()}
    assert not {what: match[0] for what, match in found.items() if match}
