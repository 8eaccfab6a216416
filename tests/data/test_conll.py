"""Columns of words and tags: the kinds that there are, and what may be wrong with them."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.conll import read_conll, read_tagged
from llm_from_scratch.data.records import BadRows, Row


def rows(path: Path, content: str | bytes) -> tuple[list[Row], list[str]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    bad = BadRows()
    return list(read_conll(path, bad)), bad.sentences


def entities(row: Row) -> list[tuple[str, str]]:
    return [(row.values["text"][a:b], kind) for a, b, kind in row.values["entities"]]


@pytest.mark.parametrize(
    "content",
    [
        "Ada\tB-PER\nLovelace\tI-PER\nsaw\tO\nParis\tB-LOC\n\nHi\tO\n",
        "\ufeffAda\tB-PER\r\nLovelace\tI-PER\r\nsaw\tO\r\nParis\tB-LOC\r\n\t\r\nHi\tO\r\n",
        "# id = 1\n# text = O\n1\tAda\tB-PER\t-\tx\n2\tLovelace\tI-PER\t-\tx\n2-3\t_\tO\t-\tx\n"
        "3\tsaw\tO\t-\t-\n4\tParis\tB-LOC\t-\tx\n\n1\tHi\tO\t-\t-\n",
        "-DOCSTART- -X- -X- O\n\nAda NNP B-NP I-PER\nLovelace NNP I-NP I-PER\nsaw VBD B-VP O\n"
        "Paris NNP B-NP I-LOC\n\nHi UH O O\n",
        "Ada B-PER\nLovelace E-PER\nsaw O\nParis S-LOC\n\nHi O",
    ],
    ids=["plain", "windows", "numbered", "conll2003", "bioes"],
)
def test_kinds(content: str, tmp_path: Path) -> None:
    found, bad = rows(tmp_path / "a.conll", content)
    assert not bad
    assert [row.values["text"] for row in found] == ["Ada Lovelace saw Paris", "Hi"]
    assert entities(found[0]) == [("Ada Lovelace", "PER"), ("Paris", "LOC")]
    assert found[0].values["words"] == [[0, 3], [4, 12], [13, 16], [17, 22]]


def test_a_place_is_the_line_and_a_word_may_be_a_hash(tmp_path: Path) -> None:
    found, bad = rows(tmp_path / "a.conll", "# about\n\n#\tO\n#tag\tB-X\n\n# x\ty\nb\tO\n")
    assert not bad
    assert [row.place.rpartition(":")[2] for row in found] == ["3", "7"]
    assert found[0].values["text"] == "# #tag"


def test_compressed(tmp_path: Path) -> None:
    path = tmp_path / "a.bio.gz"
    found, _ = rows(path, gzip.compress("東京\tB-地名\nだ\tO\n".encode()))
    assert entities(found[0]) == [("東京", "地名")]
    assert found[0].values["text"] == "東京だ"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=r"a\.bio\.gz"):
        list(read_conll(path, BadRows()))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"alone", "a.conll:3: has 1 column, the tag is in number 2"),
        (b"word\tPER", "a.conll:3: has the tag 'PER'; it must be O"),
        (b" \tO", "a.conll:3: has no word before its tag"),
        (b"\xff\tO", "a.conll:3: is not UTF-8"),
    ],
)
def test_broken_sentences_are_named_and_left_out(
    line: bytes, sentence: str, tmp_path: Path
) -> None:
    good = b"good\tB-X\nrow\tO\n"
    content = b"one\tO\ntwo\tO\n" + line + b"\n\n" + good * 10
    found, bad = rows(tmp_path / "a.conll", content)
    assert [row.values["text"][:8] for row in found] == ["good row"]
    assert len(bad) == 1
    assert sentence in bad[0]
    with pytest.raises(UserError, match=r"a\.conll:3"):
        list(read_conll(tmp_path / "a.conll", BadRows("stop")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no line with a word"),
        ("a\tb\nc\td\n", "no column holds tags"),
        ("text\n", "no column"),
    ],
)
def test_files_of_another_kind(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        rows(tmp_path / "a.conll", content)


SENTENCE = "{}\tB-PER\nsang\tO\n"


def tagged(path: Path) -> list[tuple[str, str]]:
    """(where, text) of each row, the folder left out."""
    bad = BadRows()
    found = [(row.place, str(row.values["text"])) for row in read_tagged(path, bad)]
    assert not bad.sentences
    return [(place.removeprefix(f"{path}").lstrip("/!"), text) for place, text in found]


def test_folders_and_archives_hold_sentences_and_tables(tmp_path: Path) -> None:
    folder = tmp_path / "names"
    (folder / "b").mkdir(parents=True)
    (folder / "a.tsv").write_text("\n" + SENTENCE.format("Ada"))
    (folder / "b" / "c.txt").write_text(SENTENCE.format("Bob").replace("\t", " "))
    (folder / "d.iob2.gz").write_bytes(gzip.compress(SENTENCE.format("Cy").encode()))
    row = {"text": "Di sang", "entities": [[0, 2, "PER"]]}
    (folder / "e.jsonl").write_text(json.dumps(row) + "\n")
    with zipfile.ZipFile(folder / "f.zip", "w") as archive:
        archive.writestr("g.txt", SENTENCE.format("Ed"))
        archive.writestr("LICENSE.txt", "You may do what you like.\nNo warranty.\n")
    (folder / "README.txt").write_text("Names in songs, collected by hand.\n\nSee LICENSE.\n")
    (folder / "notes.md").write_text("no rows\n")
    (folder / "empty.txt").write_text("")
    wanted = [
        ("a.tsv:2", "Ada sang"), ("b/c.txt:1", "Bob sang"), ("d.iob2.gz:1", "Cy sang"),
        ("e.jsonl:1", "Di sang"), ("f.zip!g.txt:1", "Ed sang"),
    ]  # fmt: skip
    assert tagged(folder) == wanted
    assert tagged(folder / "f.zip") == [("g.txt:1", "Ed sang")]
    assert tagged(folder / "b" / "c.txt") == [(":1", "Bob sang")]


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        # A table is no file of sentences, wherever it lies: named with its line.
        ({"a.tsv": "text\tlabel\nAda sang\tx\n", "b.bio": SENTENCE}, r"a\.tsv:1: no column holds"),
        ({"a.txt": "\nAda PER\nsang -\n", "b.bio": SENTENCE}, r"a\.txt:2: no column holds tags"),
        ({"README.txt": "Names in songs.\n"}, r"README\.txt:1: no column holds tags"),
        ({"notes.md": "x"}, r"no file in this folder ends in \.jsonl, .*\.conll, .* or \.txt"),
    ],
)
def test_folders_without_sentences(files: dict[str, str], sentence: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=sentence):
        list(read_tagged(tmp_path, BadRows()))


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(SENTENCE)
    with pytest.raises(UserError, match=r"its ending is none of \.jsonl, .*\.bio, .* and \.txt"):
        list(read_tagged(tmp_path / "a.md", BadRows()))
    with pytest.raises(UserError, match="does not exist"):
        list(read_tagged(tmp_path / "none", BadRows()))
    (tmp_path / "a.txt").write_text("Names in songs.\n")
    with pytest.raises(UserError, match=r"a\.txt:1: no column holds tags"):
        list(read_tagged(tmp_path / "a.txt", BadRows()))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        list(read_conll(tmp_path / "none.conll", BadRows()))


@pytest.mark.parametrize(
    ("name", "sentences", "words", "count"),
    [
        ("wnut17/train.conll", 3394, 62730, 1975),
        ("wnut17/test.conll", 1287, 23394, 1079),
        ("uner-ewt/en_ewt-ud-test.iob2", 2077, 25097, 1088),
        ("ud-ja-gsd-ner/dev.bio", 507, 12287, None),
    ],
)
def test_real_files(
    name: str, sentences: int, words: int, count: int | None, data_dir: Path
) -> None:
    bad = BadRows()
    found = list(read_conll(data_dir / name, bad))
    assert not bad.sentences
    assert len(found) == sentences
    assert sum(len(row.values["words"]) for row in found) == words
    kinds = Counter(kind for row in found for _, _, kind in row.values["entities"])
    assert count is None or kinds.total() == count
