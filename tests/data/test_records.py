"""Whole rows of labelled data: every kind of table, the traps of real ones, what is said of bad."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.records import BadRows, Row, read_rows, stored_rows, write_rows


def read(path: Path, columns: str = "") -> tuple[list[dict[str, Any]], list[str]]:
    """The rows, and the sentences about bad ones without the folder."""
    bad = BadRows()
    rows = [row.values for row in read_rows(path, bad, columns.split())]
    return rows, [sentence.replace(f"{path.parent}/", "") for sentence in bad.sentences]


def put(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


ROWS = [{"label": "ham", "text": 'say "hi"'}, {"label": "迷惑", "text": "a\u0085b\u2028c"}]


def as_table(rows: list[dict[str, str]], **settings: Any) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, **settings)
    writer.writerows([list(rows[0]), *(row.values() for row in rows)])
    return file.getvalue().encode()


def test_every_kind_of_table(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS)
    tabs = "label\ttext\r\n" + "".join("\t".join(row.values()) + "\r\n" for row in ROWS)
    mail = [ROWS[0], {"label": "迷惑", "text": "メールです"}]
    files = {
        "a.jsonl": b"\xef\xbb\xbf" + lines.encode(),
        "lines.json": lines.encode(),
        "list.json": json.dumps(ROWS).encode(),
        "inside.json": json.dumps({"canary": "x", "examples": ROWS}).encode(),
        "a.csv": b"\xef\xbb\xbf" + as_table(ROWS),
        "quoted.tsv": as_table(ROWS, delimiter="\t", quoting=csv.QUOTE_ALL),
        "plain.tsv": tabs.encode(),
        "sjis.csv": as_table(mail).decode().encode("cp932"),
        "a.parquet": (tmp_path / "a.parquet").read_bytes(),
    }  # fmt: skip
    for name, data in files.items():
        wanted = mail if name == "sjis.csv" else ROWS
        assert read(put(tmp_path, name, data)) == (wanted, []), name
        assert read(put(tmp_path, f"{name}.gz", gzip.compress(data))) == (wanted, []), name


def test_quotes_of_tab_separated_values(tmp_path: Path) -> None:
    quoted = 'label\ttext\nham\t"two\nlines"\nspam\t"a\ttab"\n'
    rows, bad = read(put(tmp_path, "a.tsv", quoted))
    assert (rows[0]["text"], rows[1]["text"], bad) == ("two\nlines", "a\ttab", [])
    # One row too long, and quotes that are letters: nothing may be swallowed.
    letters = 'label\ttext\nham\t"open\nham\tsays "yes" to all\nham\tone\ttoo many\nham\tlast\n'
    rows, bad = read(put(tmp_path, "b.tsv", letters))
    assert [row["text"] for row in rows] == ['"open', 'says "yes" to all', "last"]
    assert len(bad) == 1 and bad[0].startswith("b.tsv:4: has 3 columns, the header has 2;")


def test_tables_without_a_header(tmp_path: Path) -> None:
    path = put(tmp_path, "a.tsv", "ham\tone\r\nspam\ttwo\textra\r\nham\tthree\t\r\n")
    rows, bad = read(path, "label text")
    assert rows == [{"label": "ham", "text": "one"}, {"label": "ham", "text": "three"}]
    assert bad == [
        "a.tsv:2: has 3 columns, --data.columns names 2; look for a separator or a quotation mark "
        "too many or too few."
    ]
    path = put(tmp_path, "b.csv", "label,text\nham,one\n")
    assert read(path, "label text")[0] == [{"label": "ham", "text": "one"}]  # there was a header
    with pytest.raises(UserError, match=r"c\.csv:1: the header names 'x' twice; .*--data\.columns"):
        read(put(tmp_path, "c.csv", "x,x\n1,2\n"))


def test_broken_utf8_is_named_by_its_row(tmp_path: Path) -> None:
    good = "日本語の文です。" * 9
    torn = b"\xe6\x97\xff"
    pieces = (b"label,text\nham,", torn, f"\nspam,{good}\n".encode())
    rows, bad = read(put(tmp_path, "a.csv", b"".join(pieces)))
    assert [row["text"] for row in rows] == [good]
    assert bad == [
        "a.csv:2: has the byte E6 (or half a surrogate pair), which is not UTF-8; mend the row."
    ]
    rows, bad = read(put(tmp_path, "a.jsonl", b'{"t": "' + torn + b'"}\n{"t": "x"}\n'))
    assert rows == [{"t": "x"}] and "a.jsonl:1: byte 7 of the line is not UTF-8" in bad[0]
    data = b'[{"t": "' + torn + b'"}, {"t": "' + good.encode() + b'"}]'
    rows, bad = read(put(tmp_path, "a.json", data))
    assert rows == [{"t": good}] and bad[0].startswith("a.json:1: has the byte E6")
    rows, bad = read(put(tmp_path, "a.txt", f"{good}\n".encode() + torn + b"\r\nx\r\n"))
    assert [row["text"] for row in rows] == [good, "x"]
    assert bad == ["a.txt:2: has a byte that is not UTF-8; mend the row."]


def test_rows_that_are_no_records(tmp_path: Path) -> None:
    text = '{"a": 1}\n[1]\n"text"\n{"a":\n\n{"a": "\\ud800"}\n'
    rows, bad = read(put(tmp_path, "a.jsonl", text))
    assert rows == [{"a": 1}]
    assert [sentence.split(": ")[0] for sentence in bad] == [f"a.jsonl:{n}" for n in (2, 3, 4, 6)]
    assert bad[0] == "a.jsonl:2: is no object with named fields."
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        list(read_rows(tmp_path / "a.jsonl", BadRows("stop")))


def test_folders_archives_and_other_files(tmp_path: Path) -> None:
    put(tmp_path, "d/b/two.csv", "x\n2\n")
    put(tmp_path, "d/a/one.jsonl", '{"x": "1"}\n')
    put(tmp_path, "d/.hidden.csv", "x\n9\n")
    put(tmp_path, "d/README.txt", "no table\n")
    put(tmp_path, "d/picture.png", b"\x89PNG")
    with zipfile.ZipFile(tmp_path / "d/z.zip", "w") as archive:
        archive.writestr("three.csv", "x\n3\n")
    rows = list(read_rows(tmp_path / "d", BadRows()))
    assert [row.values["x"] for row in rows] == ["1", "2", "3"]
    assert rows[1].place == f"{tmp_path}/d/b/two.csv:2"
    assert rows[2].place == f"{tmp_path}/d/z.zip!three.csv:2"
    put(tmp_path, "texts/pos.txt", "good\n\nfine\n")
    put(tmp_path, "texts/neg.txt", "bad\n")
    assert [row.values for row in read_rows(tmp_path / "texts", BadRows())] == [
        {"text": "bad", "file": "neg"}, {"text": "good", "file": "pos"},
        {"text": "fine", "file": "pos"},
    ]  # fmt: skip
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "nowhere.csv")
    put(tmp_path, "notes/a.conll", "Ada B-PER\n")
    with pytest.raises(UserError, match=r"no file in this folder ends in \.jsonl"):
        read(tmp_path / "notes")
    with pytest.raises(UserError, match=r"its ending is none of \.jsonl"):
        read(put(tmp_path, "a.xlsx", b"PK"))
    with pytest.raises(UserError, match="is not JSON"):
        read(put(tmp_path, "a.json", "[1,"))


@given(
    st.lists(
        st.dictionaries(
            st.text(max_size=4).filter(lambda name: name != "place"),
            st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text()),
        ),
        max_size=5,
    )
)
def test_rows_are_stored_exactly(values: list[dict[str, Any]]) -> None:
    import tempfile

    rows = [Row(one, f"a.jsonl:{number}") for number, one in enumerate(values)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return
        write_rows(path, rows)
        assert stored_rows(path) == rows


REAL = {  # file: (columns, rows, fields)
    "sms-spam/SMSSpamCollection.tsv": ("label text", 5574, "label text"),
    "imdb-subset/test.jsonl.gz": ("", 2000, "id label rating text"),
    "rt-polarity/rt-polarity.pos.txt": ("", 5331, "text file"),
    "rt-polarity/rt-polarity.neg.txt": ("", 5331, "text file"),
    "sst2/train.tsv": ("text label", 6920, "text label"),
    "sst2/dev.tsv": ("text label", 872, "text label"),
    "sst2/test.tsv": ("text label", 1821, "text label"),
    "ag-news/test_first6000.csv": ("class title text", 6000, "class title text"),
    "jrte-pn/pn_train_dev.tsv": (
        "id label text judges usage", 5000, "id label text judges usage",
    ),
    "commonsense-moral-ja/data_val.csv": ("", 1996, " sent label"),
    "jcola/in_domain_valid-v1.0.json": ("", 865, None),
    "stockmark-ner-ja/ner_shared.json.gz": ("", 4234, "curid text entities"),
    "jglue-jsts/valid-v1.3.jsonl": ("", 1457, None),
    "jglue-jnli/valid-v1.3.jsonl": ("", 2434, None),
    "stsb-en-ja/stsb-en-test.csv": ("a b score", 1379, "a b score"),
    "stsb-en-ja/stsb-ja-train.csv": ("a b score", 5749, "a b score"),
    "jsick/train.tsv": ("", 5000, None),
    "janli/janli.tsv.gz": ("", 14400, None),
    "instruction-data/instruction-data.json": ("", 1100, "instruction input output"),
    "instruction-preference/instruction-data-with-preference.json": (
        "", 1100, "instruction input output chosen rejected",
    ),
    "hh-rlhf/harmless-base-test_first1500.jsonl.gz": ("", 1500, "chosen rejected"),
    "stackexchange-paired-tiny/stack_exchange_paired_tiny.json": (
        "", 25, "question response_j response_k",
    ),
    "jmmlu": ("question A B C D answer", 5607, "question A B C D answer"),
    "alpaca-tiny/alpaca_tiny.json": ("", 100, "instruction input output text"),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_labelled_data(data_dir: Path, name: str) -> None:
    columns, count, fields = REAL[name]
    rows, bad = read(data_dir / name, columns)
    assert (len(rows), bad) == (count, [])
    if fields is not None:
        assert list(rows[-1]) == fields.split(" ")
    assert len({frozenset(row) for row in rows}) == 1  # every row has the same fields
