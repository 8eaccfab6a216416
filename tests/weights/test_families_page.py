"""A family is one short table; the documentation lists how long each is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llm_from_scratch.weights.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "llm_from_scratch" / "weights" / "families"
ROW = re.compile(
    r"\| \[`([\w-]+)`\]\(\.\./\.\./llm_from_scratch/weights/families/(\w+\.py)\) \| (\d+) \|"
)
SHARED = {"__init__.py", "table.py", "settings.py", "rotary.py", "pairs.py"}


def lines_of(name: str) -> int:
    return (TABLES / name).read_text(encoding="utf-8").count("\n")


def test_no_table_is_long() -> None:
    too_long = {
        path.name: lines_of(path.name)
        for path in TABLES.glob("*.py")
        if path.name not in SHARED and lines_of(path.name) > 60
    }
    assert too_long == {}


@pytest.mark.parametrize("language", ["en", "ja"])
def test_the_page_lists_every_table_with_its_lines(language: str) -> None:
    page = (ROOT / "docs" / language / "families.md").read_text(encoding="utf-8")
    listed = {name: (file, int(lines)) for name, file, lines in ROW.findall(page)}
    assert set(listed) == set(FAMILIES)
    assert {name: lines for name, (_, lines) in listed.items()} == {
        name: lines_of(file) for name, (file, _) in listed.items()
    }
    files = {path.name for path in TABLES.glob("*.py")} - SHARED
    assert {file for file, _ in listed.values()} == files
