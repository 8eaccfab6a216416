"""Every row of docs/*/errors.md: typed as it stands there, answered as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llm_from_scratch.cli.main import main
from llm_from_scratch.core.files import ASIDE
from tests.cli.bad_files import long_text, prepare

DOCS = Path(__file__).resolve().parents[2] / "docs"
CELL = r"(`` .+? ``|`[^`]+`)"
ROW = re.compile(rf"\| {CELL} \| {CELL} \| (.+) \|")
PREFIX = "scratchlm: "


def rows_of(language: str) -> list[tuple[str, str, str]]:
    """(command, sentence, explanation) of each row of a page."""
    text = (DOCS / language / "errors.md").read_text(encoding="utf-8")
    found = [ROW.fullmatch(line) for line in text.split("\n")]
    cells = [
        [cell.strip("`").strip().replace("\\|", "|") for cell in m.groups()] for m in found if m
    ]
    return [(c, s, e) for c, s, e in cells if c.startswith("scratchlm ")]


ROWS = rows_of("en")
# As processes of their own, too: one for each of the ways in which a command line is read.
PROCESSES = [
    "scratchlm pretain --data corpus.txt --out new",
    "scratchlm generate model",
    "scratchlm pretrain --data corpus.txt --out new --train.max_step 20",
    "scratchlm pretrain --data short.txt --out new",
    "scratchlm generate cut-model Hello",
]


def words_of(command: str) -> list[str]:
    """The command line without the program's name."""
    return shlex.split(command.replace("{long_text}", long_text()))[1:]


def as_pattern(sentence: str) -> str:
    """A documented sentence as a regular expression; {placeholders} stand for any words."""
    return r"[^\n]+?".join(map(re.escape, re.split(r"\{[a-z]+\}", sentence)))


def assert_says(said: str, sentence: str) -> None:
    """Standard error is exactly the one documented line."""
    assert said.startswith(PREFIX), said
    assert re.fullmatch(as_pattern(sentence) + "\n", said.removeprefix(PREFIX)), said
    assert "Traceback" not in said


def tree(folder: Path) -> dict[str, int]:
    """Every file and folder below, with its size."""
    found = {}
    for path in folder.rglob("*"):
        found[str(path.relative_to(folder))] = path.stat().st_size if path.is_file() else -1
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("bad")
    prepare(folder)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SCRATCHLM_QUIET", "1")
    monkeypatch.setenv("SCRATCHLM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("command", "sentence"), [row[:2] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_bad_input_is_answered_as_documented(
    command: str,
    sentence: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["scratchlm", *words_of(command)])
    before = tree(place)
    with pytest.raises(SystemExit) as exit_code:
        main()
    assert exit_code.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert_says(said.err, sentence)
    assert tree(place) == before
    assert not [name for name in before if ASIDE in name]


@pytest.mark.parametrize("command", PROCESSES)
def test_the_same_as_a_process(command: str, place: Path) -> None:
    (sentence,) = [row[1] for row in ROWS if row[0] == command]
    done = subprocess.run(
        [sys.executable, "-m", "llm_from_scratch", *words_of(command)],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert_says(done.stderr, sentence)


def test_both_pages_have_the_same_rows() -> None:
    japanese = rows_of("ja")
    assert [row[:2] for row in japanese] == [row[:2] for row in ROWS]
    assert all(re.search(r"[ぁ-ん]", row[2]) for row in japanese)
    assert all(row[2].endswith(".") for row in ROWS)


def test_the_table_is_long_and_knows_every_door() -> None:
    commands = [row[0] for row in ROWS]
    assert len(set(commands)) == len(commands) >= 40
    doors = {word for command in commands for word in shlex.split(command)[1:2]}
    assert doors >= {
        "quickstart", "tokenizer", "pretrain", "finetune", "dedup", "generate", "chat", "models",
        "pull", "info", "convert", "doctor",
    }  # fmt: skip


def test_another_sentence_is_noticed() -> None:
    assert_says("scratchlm: x is 3, not y.\n", "x is {number}, not y.")
    for said in (
        "scratchlm: x is 3, not z.\n",
        "x is 3, not y.\n",
        "scratchlm: x is 3, not y.\n\n",
    ):
        with pytest.raises(AssertionError):
            assert_says(said, "x is {number}, not y.")
