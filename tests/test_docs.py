"""The documentation is true: its code runs, its links lead somewhere, both languages agree."""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "en").rglob("*.md"))
TWINS = [
    (page, ROOT / "docs" / "ja" / page.relative_to(ROOT / "docs" / "en")) for page in PAGES
] + [(ROOT / "README.md", ROOT / "README.ja.md")]
ALL = [path for pair in TWINS for path in pair if path.is_file()]
FENCE = re.compile(r"^(\s*)(`{3,})(.*)$")


@dataclass(frozen=True)
class Block:
    """A fenced block: its info string ("python", "bash run", ...), text and first line's number."""

    info: str
    text: str
    line: int


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page; raises for one that is never closed."""
    found: list[Block] = []
    opened: tuple[str, str, int] | None = None
    text: list[str] = []
    for number, line in enumerate(page.split("\n"), 1):
        fence = FENCE.match(line)
        if opened is None and fence:
            opened, text = (fence[2], fence[3].strip(), number + 1), []
        elif opened is not None and fence and fence[2] >= opened[0] and not fence[3].strip():
            found.append(Block(opened[1], "\n".join(text) + "\n", opened[2]))
            opened = None
        elif opened is not None:
            text.append(line)
    assert opened is None, f"the block in line {opened and opened[2] - 1} is never closed"
    return found


def links_of(page: str) -> list[str]:
    """What the page's links and pictures point at, code left out."""
    prose, fenced = [], False
    for line in page.split("\n"):
        if FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            prose.append(re.sub(r"`[^`]*`", "``", line))
    found = re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", "\n".join(prose))
    return found + re.findall(r"<img[^>]+src=\"([^\"]+)\"", "\n".join(prose))


def broken_links(page: str, folder: Path) -> list[str]:
    """The links to files that are not there."""
    return [
        link
        for link in links_of(page)
        if not re.match(r"[a-z]+:|#", link) and not (folder / link.partition("#")[0]).exists()
    ]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def refuse(*args: Any) -> None:
    raise OSError("the documentation's code must not need the network")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SCRATCHLM_CACHE", str(tmp_path / ".cache"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    # `scratchlm` in a bash block is this checkout's, whatever is installed.
    scripts = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{scripts}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def as_module(
    page: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[ModuleType, list[Block]]:
    """An importable module whose file holds the page's Python on the page's lines.

    What a page defines must look as if it stood in a file: dataclasses look up their module, and
    some of our code reads its own source.
    """
    blocks = blocks_of(page)
    lines = [""] * (page.count("\n") + 1)
    for block in blocks:
        if block.info == "python":
            text = block.text.split("\n")[:-1]
            lines[block.line - 1 : block.line - 1 + len(text)] = text
    module = ModuleType("page")
    module.__file__ = str(folder / "page.py")
    Path(module.__file__).write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setitem(sys.modules, "page", module)
    return module, blocks


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_the_code_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = path.read_text(encoding="utf-8")
    module, blocks = as_module(page, tmp_path, monkeypatch)
    before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
    try:
        for block in blocks:
            if block.info == "python":
                # The empty lines make a traceback name the line of the page.
                code = compile("\n" * (block.line - 1) + block.text, str(module.__file__), "exec")
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(code, vars(module))
            elif block.info == "bash run":
                done = subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", block.text],
                    capture_output=True,
                    text=True,
                    timeout=300,
                )
                assert done.returncode == 0, f"line {block.line}: {done.stderr[-2000:]}"
    finally:
        torch.set_rng_state(before[0])
        torch.set_num_threads(before[1])
        torch.set_default_dtype(before[2])


@pytest.mark.parametrize(("english", "japanese"), TWINS, ids=lambda path: name_of(path))
def test_both_languages_have_the_same_code(english: Path, japanese: Path) -> None:
    if not english.is_file() and not japanese.is_file():
        pytest.skip("there is no such page yet")
    ours, theirs = (
        [(b.info, b.text) for b in blocks_of(path.read_text(encoding="utf-8"))]
        for path in (english, japanese)
    )
    assert ours == theirs


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path.read_text(encoding="utf-8"), path.parent) == []


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_info_strings_are_known(path: Path) -> None:
    """A block with a misspelt info string would silently not be run."""
    known = {
        "python", "python no-run", "bash", "bash run", "text", "yaml", "json", "toml", "markdown",
        "jsonl", "", "powershell", "html", "jinja",
    }  # fmt: skip
    assert {block.info for block in blocks_of(path.read_text(encoding="utf-8"))} <= known


def test_the_checks_can_fail(tmp_path: Path) -> None:
    page = "[a](gone.md) ![b](here.md)\n```python\n[c](also-gone)\n```\n`[d](code)` [e](#f)\n"
    (tmp_path / "here.md").touch()
    assert broken_links(page, tmp_path) == ["gone.md"]
    assert blocks_of(page) == [Block("python", "[c](also-gone)\n", 3)]
    with pytest.raises(AssertionError, match="never closed"):
        blocks_of("```python\n1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        exec(compile(blocks_of("```python\n1 / 0\n```\n")[0].text, "page", "exec"), {})
