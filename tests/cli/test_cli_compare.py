"""`scratchlm tokenizer compare`: tokens, a table, JSON and a page."""

from __future__ import annotations

import gzip
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.cli import tokenizer as verb
from llm_from_scratch.cli.main import run
from llm_from_scratch.text.training import train_tokenizer
from tests.text.families import TEXT, train_pieces

JAPANESE = "吾輩は猫である。\n"
ENGLISH = "the cat sat on the mat\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    train_tokenizer([JAPANESE * 9 + ENGLISH * 9], vocab_size=320).save("books/bpe")
    train_tokenizer([ENGLISH], kind="char").save("char")
    Path("text.txt").write_text(JAPANESE + ENGLISH + "<|endoftext|>\n", "utf-8")
    return tmp_path


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    assert run(["tokenizer", "compare", *words]) == 0
    said = capsys.readouterr()
    return said.out, said.err


def test_tokens_and_a_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = asked(capsys, "books/bpe", "char", "--text", "text.txt", "--characters", "9")
    assert err == ""
    shown, _, table = out.partition("tokenizer")
    assert shown.startswith("books/bpe\n[")
    assert "[t][h][e][ ][c]" not in shown  # of the beginning only
    assert "[<|unk|>][<|unk|>]" in shown.partition("\nchar\n")[2]
    rows = {line.split()[0]: line.split() for line in table.split("\n") if len(line.split()) == 8}
    assert set(rows) >= {"bpe", "char"}
    assert rows["bpe"][5:] == ["0", rows["bpe"][6], "yes"]
    assert rows["char"][3:5] != ["0.00", "0.00"]
    assert int(rows["char"][5]) > 8
    assert rows["char"][6:] == ["1.00", "no"]
    assert max(map(len, table.split("\n"))) <= 80


def test_colours_alternate(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out, _ = asked(capsys, "char", "--text", "text.txt", "--characters", "30")
    grounds = [part.split("m")[0] for part in out.split("\x1b[") if "48;2;" in part]
    assert len(set(grounds)) == 4
    assert all(a != b for a, b in itertools.pairwise(grounds))
    assert "[t]" not in out  # no brackets where there are colours


def test_json_and_a_page(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = asked(capsys, "books/bpe", "--text", "text.txt", "--json", "--html", "out/page.html")
    assert err == ""
    value = json.loads(out)
    text = Path("text.txt").read_text("utf-8")
    assert (value["text"], value["characters"]) == ("text.txt", len(text))
    assert value["bytes"] == len(text.encode())
    (one,) = value["tokenizers"]
    assert (one["name"], one["unknown"], one["round_trip"]) == ("books/bpe", 0, True)
    assert one["tokens"] == len(one["excerpt"])
    said = "".join(token["text"] for token in one["excerpt"])
    assert said == text.replace("\n", "\\n")
    page = Path("out/page.html").read_text("utf-8")
    assert "<|endoftext|>" not in page  # what looks like a tag is not one
    assert "&lt;" in page
    assert "<td>books/bpe</td>" in page


def test_other_texts_and_other_tokenizers(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare model file; a compressed table; standard input."""
    Path("spiece.model").write_bytes(train_pieces([TEXT] * 4, model_type="unigram", vocab_size=300))
    rows = gzip.compress(b'{"text": "the cat"}\n{"text": "the mat"}\n')
    Path("rows.jsonl.gz").write_bytes(rows)
    out, _ = asked(capsys, "spiece.model", "--text", "rows.jsonl.gz", "--json")
    value = json.loads(out)
    assert value["characters"] == len("the cat\nthe mat")
    assert value["tokenizers"][0]["kind"] == "unigram"

    class Stdin:
        buffer = io.BytesIO(JAPANESE.encode())

    monkeypatch.setattr("sys.stdin", Stdin())
    out, _ = asked(capsys, "char", "--text", "-", "--json")
    assert json.loads(out)["characters"] == len(JAPANESE)


def test_progress_is_told_after_two_seconds(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(float(i) for i in range(10**6))
    monkeypatch.setattr(verb.time, "perf_counter", lambda: next(clock))
    monkeypatch.setenv("SCRATCHLM_QUIET", "")
    _, err = asked(capsys, "books/bpe", "char", "char", "--text", "text.txt")
    assert "char: " in err
    assert "characters" in err
    said: Any = asked(capsys, "char", "--text", "text.txt", "--json")[1]
    assert said == ""
