"""Reading survives the real world, tells what it left out, and never mangles."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import sys
import zipfile
from pathlib import Path

import pytest

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data import archives
from llm_from_scratch.data.read import Document, ReadReport, read_documents

Files = dict[str, bytes]


def read(*paths: Path, **settings) -> tuple[list[Document], ReadReport]:
    report = ReadReport()
    return list(read_documents(paths, report=report, **settings)), report


def texts(*paths: Path, **settings) -> list[str]:
    return [document.text for document in read(*paths, **settings)[0]]


@pytest.fixture
def write(tmp_path: Path):
    def write_files(files: Files) -> Path:
        for name, data in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
        return tmp_path

    return write_files


def zipped(files: Files, **settings) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED, **settings) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return memory.getvalue()


# Plain text


def test_line_ends_and_byte_order_marks(write) -> None:
    folder = write(
        {
            "a.txt": b"one\r\ntwo\rthree\n",
            "b.txt": b"\xef\xbb\xbfmarked\r\n",
            "c.txt": "wide\r\n".encode("utf-16"),
            "d.txt": "日本語のテキストです。\r\n".encode("cp932"),
        }
    )
    assert texts(folder) == ["one\ntwo\nthree\n", "marked\n", "wide\n", "日本語のテキストです。\n"]
    assert "(1 in cp932, 1 in utf-16-le)" in read(folder)[1].summary()


def test_aozora_is_cleaned_inside_of_a_zip(write) -> None:
    text = "題\r\n名\r\n\r\n　本文《ほんぶん》だ。\r\n\r\n底本：「本」\r\n青空文庫作成ファイル\r\n"
    folder = write({"work.zip": zipped({"work.txt": text.encode("cp932")})})
    assert texts(folder / "work.zip") == ["　本文だ。\n"]


def test_stray_nul_bytes_are_removed_and_named(write) -> None:
    folder = write({"a.txt": b"word " * 500 + b"\x00" + b"word " * 500})
    documents, report = read(folder)
    assert documents[0].text == "word " * 1000
    assert report.bad == []
    assert report.notes == [f"{folder / 'a.txt'}: 1 NUL byte in the text, removed."]
    assert "1 repaired" in report.summary()
    with pytest.raises(UserError, match="1 NUL byte in the text; remove"):
        read(folder, on_bad="stop")


def test_broken_files_are_named_and_skipped_or_refused(write) -> None:
    folder = write(
        {
            "a.txt": "良い。".encode(),
            "b.txt": "切れた。".encode()[:-1],
            "c.txt": bytes(1000),
            "d.txt": "最後。".encode(),
        }
    )
    documents, report = read(folder)
    assert [d.text for d in documents] == ["良い。", "最後。"]
    assert (report.files, report.documents, report.characters) == (2, 2, 6)
    assert len(report.bad) == 2
    assert report.bad[0].startswith(f"{folder / 'b.txt'}: this is UTF-8 cut in the middle")
    assert "1,000 of 1,000 bytes are NUL" in report.bad[1]
    assert "2 broken and left out" in report.summary()
    with pytest.raises(UserError, match=r"b\.txt: this is UTF-8 cut"):
        read(folder, on_bad="stop")


def test_the_summary_is_one_line(write) -> None:
    folder = write({f"{n}.txt": b"\xff\x00\x00" for n in range(5)} | {"x.txt": b"text"})
    summary = read(folder)[1].summary()
    assert "\n" not in summary
    assert summary.startswith("1 file, 1 document, 4 characters; 5 broken and left out: ")
    assert summary.endswith("; and 2 more")


# Folders


def test_folders_are_read_in_order_without_hidden_and_binary_files(write) -> None:
    folder = write(
        {
            "b/2.txt": b"2",
            "b/10.weird": b"10",
            "a/z": b"z",
            "a.md": b"md",
            ".hidden": b"no",
            ".git/config": b"no",
            "picture.PNG": b"no",
            "empty.txt": b"",
            "blank.txt": b" \n",
        }
    )
    documents, report = read(folder)
    assert [d.text for d in documents] == ["md", "z", "10", "2"]
    assert documents[1].source == str(folder / "a" / "z")
    assert (report.empty, report.passed_over, report.bad) == (2, 1, [])
    assert "2 empty, 1 not text by their ending" in report.summary()


def test_paths_in_the_order_given(write) -> None:
    folder = write({"1": b"one", "2": b"two"})
    assert texts(folder / "2", folder / "1", str(folder / "2")) == ["two", "one", "two"]


def test_a_binary_file_that_is_named_is_not_passed_over_silently(write) -> None:
    folder = write({"a.pdf": b"%PDF-1.4\n" + bytes(range(256)), "b.txt": b"text", "c.pdf": b"text"})
    _, report = read(folder / "a.pdf", folder / "b.txt")
    assert len(report.bad) == 1
    assert texts(folder / "c.pdf") == ["text"]


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need rights there")
def test_an_unreadable_file(write) -> None:
    folder = write({"a.txt": b"text"})
    (folder / "b.txt").symlink_to(folder / "gone")
    assert read(folder)[1].bad == [
        f"{folder / 'b.txt'}: cannot be read (No such file or directory)."
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need rights there")
def test_links_to_folders_are_followed_once(write, tmp_path_factory) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "c.txt").write_bytes(b"linked")
    folder = write({"a.txt": b"text", "sub/b.txt": b"deeper"})
    (folder / "sub" / "circle").symlink_to(folder)
    (folder / "elsewhere").symlink_to(other)
    os.mkfifo(folder / "pipe")
    documents, report = read(folder)
    assert [d.text for d in documents] == ["text", "linked", "deeper"]
    assert (report.bad, report.passed_over) == ([], 1)


# What is asked wrongly


def test_wrong_paths_are_refused_before_reading(write) -> None:
    folder = write({"a.txt": b"text"})
    with pytest.raises(UserError, match=r"missing\.txt does not exist"):
        read_documents([folder / "a.txt", folder / "missing.txt"])
    with pytest.raises(UserError, match="No text was given"):
        read_documents([])
    with pytest.raises(UserError, match="'skip' or 'stop', not 'ignore'"):
        read_documents([folder], on_bad="ignore")


@pytest.mark.parametrize("files", [{}, {"a.txt": b""}, {"a.png": b"x"}, {"a.txt": b"\xff\xff"}])
def test_no_text_at_all(tmp_path: Path, write, files: Files) -> None:
    with pytest.raises(UserError, match="No text was found in"):
        read(write(files))


# Archives


def test_gzip(write) -> None:
    folder = write(
        {
            "a.txt.gz": gzip.compress("猫です。".encode("euc_jp")),
            "b.jsonl.gz": gzip.compress(b'{"text": "row"}\n'),
            "c.tar.gz": gzip.compress(b"no"),
        }
    )
    documents, report = read(folder)
    assert [d.text for d in documents] == ["猫です。", "row"]
    assert documents[1].source.endswith("b.jsonl.gz:1")
    assert report.passed_over == 1


def test_zip_members(write) -> None:
    members = {"b.txt": b"b", "a/1.jsonl": b'{"text": "one"}\n{"text": "two"}', "p.png": b"no"}
    hidden = {"__MACOSX/b.txt": b"no", ".DS_Store": b"no", "folder/": b""}
    folder = write({"x.zip": zipped(members | hidden)})
    documents, report = read(folder / "x.zip")
    assert [d.text for d in documents] == ["one", "two", "b"]
    assert documents[0].source == f"{folder / 'x.zip'}!a/1.jsonl:1"
    assert (report.files, report.passed_over) == (2, 1)


def test_japanese_member_names(write) -> None:
    """Archivers in Japan write Shift_JIS names, which Python takes for code page 437."""
    name = "吾輩は猫.txt".encode("cp932")
    data = zipped({"x" * len(name): b"text"}).replace(b"x" * len(name), name)
    folder = write({"x.zip": data})
    assert read(folder)[0] == [Document("text", f"{folder / 'x.zip'}!吾輩は猫.txt")]


def test_dangerous_and_unreadable_members(write) -> None:
    files = {
        "../up.txt": b"a",
        "/root.txt": b"b",
        "C:\\x.txt": b"c",
        "in.zip": b"d",
        "ok.txt": b"e",
    }
    folder = write({"x.zip": zipped(files)})
    documents, report = read(folder)
    assert [d.text for d in documents] == ["e"]
    assert sum("leads out of the archive" in sentence for sentence in report.bad) == 3
    assert sum("archive inside of an archive" in sentence for sentence in report.bad) == 1
    assert {path.name for path in folder.iterdir()} == {"x.zip"}


def test_an_encrypted_member(write) -> None:
    data = bytearray(zipped({"a.txt": b"secret"}))
    central = data.index(b"PK\x01\x02")
    data[central + 8] |= 1
    folder = write({"x.zip": bytes(data), "y.txt": b"text"})
    assert "is encrypted" in read(folder)[1].bad[0]


def test_damaged_archives(write) -> None:
    good_gzip = gzip.compress(random.Random(0).randbytes(5000).hex().encode())
    member = zipped({"a.txt": b"abc" * 100, "b.txt": b"fine"})
    flipped = bytearray(member)
    flipped[flipped.index(b"a.txt") + 8] ^= 0xFF
    folder = write(
        {
            "a.gz": good_gzip[:-200],
            "b.gz": b"not gzip at all",
            "c.zip": b"PK\x03\x04 not a zip",
            "d.zip": bytes(flipped),
        }
    )
    documents, report = read(folder)
    assert [d.text for d in documents] == ["fine"]
    assert len(report.bad) == 4
    assert all("damaged" in sentence or "unpacked" in sentence for sentence in report.bad)


def test_archives_made_to_fill_the_memory(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "ALWAYS_ALLOWED", 10_000)
    folder = write(
        {
            "a.gz": gzip.compress(b"a" * 3_000_000),
            "b.zip": zipped({"b.txt": b"b" * 3_000_000}),
            # Each member is small enough, all of them together are not.
            "c.zip": zipped({f"{n}.txt": b"c" * 300_000 for n in range(20)}),
            "d.txt.gz": gzip.compress(b"harmless"),
        }
    )
    documents, report = read(folder)
    assert documents[-1].text == "harmless"
    assert len(report.bad) == 3
    assert all("unpacks to more than" in sentence for sentence in report.bad)
    assert sum(len(d.text) for d in documents) < 2_000_000


# Tables


def test_jsonl_is_split_at_line_feeds_alone(write) -> None:
    rows = ["one\u0085two", "three\u2028four", "five\r\nsix"]
    data = b"".join(json.dumps({"text": r}, ensure_ascii=False).encode() + b"\r\n" for r in rows)
    folder = write({"a.jsonl": b"\xef\xbb\xbf" + data})
    documents, _ = read(folder)
    assert [d.text for d in documents] == ["one\u0085two", "three\u2028four", "five\nsix"]
    assert documents[2].source.endswith("a.jsonl:3")


def test_bad_rows_are_named_with_their_number(write) -> None:
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut',
        b"",
        b'{"title": "no text"}',
        b'{"text": 5}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b'"a bare text"',
    ]
    folder = write({"a.jsonl": b"\n".join(lines)})
    documents, report = read(folder)
    assert [d.text for d in documents] == ["good", "a bare text"]
    numbers = [sentence.split(": ")[0].rsplit(":", 1)[1] for sentence in report.bad]
    assert numbers == ["2", "4", "5", "6", "7"]
    assert "has no field 'text' but title" in report.bad[1]
    with pytest.raises(UserError, match=r"a\.jsonl:2: is not JSON"):
        read(folder, on_bad="stop")


def test_a_file_without_the_field_is_named_once(write) -> None:
    folder = write({"a.jsonl": b'{"texts": "x"}\n' * 100, "b.txt": b"text"})
    _, report = read(folder)
    assert len(report.bad) == 1
    assert "the first 20 rows have no text 'text' but texts (perhaps 'texts')" in report.bad[0]
    assert len(texts(folder / "a.jsonl", text_field="texts")) == 100


def test_json_lists_and_lines_under_the_wrong_name(write) -> None:
    folder = write(
        {
            "a.json": b'[{"text": "one"}, "two"]',
            "b.json": b'{"text": "three"}\n{"text": "four"}\n',
            "c.json": b"[1, 2",
        }
    )
    documents, report = read(folder)
    assert [d.text for d in documents] == ["one", "two", "three", "four"]
    assert len(report.bad) == 1
    assert "c.json: is not JSON" in report.bad[0]


def test_csv_and_tsv(write) -> None:
    folder = write(
        {
            "a.csv": '\ufeffid,text\r\n1,"two\r\nlines, one ""cell"""\r\n2\r\n3,ｶﾀｶﾅ\r\n'.encode(),
            "b.tsv": b'text\tlabel\nan "open quote\t1\nmore\t2\n',
            "c.tsv": b'label\ttext\n1\t"a\ttab"\n2\tplain\n',
        }
    )
    documents, report = read(folder)
    assert [d.text for d in documents] == [
        'two\nlines, one "cell"',
        "ｶﾀｶﾅ",
        'an "open quote',
        "more",
        "a\ttab",
        "plain",
    ]
    assert documents[1].source.endswith("a.csv:5")
    assert report.bad == [f"{folder / 'a.csv'}:4: has 1 columns, 'text' is number 2."]


def test_a_field_as_long_as_a_book(write) -> None:
    book = b"word " * 100_000
    folder = write({"a.tsv": b"text\n" + book + b'"\n', "b.csv": b'text\n"' + book + b'"\n'})
    assert [len(text) for text in texts(folder)] == [500_001, 500_000]


def test_a_table_without_the_column(write) -> None:
    folder = write({"a.csv": b"id,texte\n1,x\n"})
    with pytest.raises(UserError, match=r"no column 'text' but id, texte \(perhaps 'texte'\)"):
        read(folder, on_bad="stop")


def test_parquet(write, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["one", None, "three"], "n": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    folder = write(
        {
            "b.parquet.gz": gzip.compress(data),
            "c.zip": zipped({"c.parquet": data}),
            "d.parquet": data[:-20],
        }
    )
    documents, report = read(folder)
    assert [d.text for d in documents] == ["one", "three"] * 3
    assert documents[1].source.endswith("a.parquet:3")
    assert sum("'text' is not a text" in sentence for sentence in report.bad) == 3
    assert sum("is not parquet, or damaged" in sentence for sentence in report.bad) == 1
    with pytest.raises(UserError, match="has no column 'body' but text, n"):
        read(tmp_path / "a.parquet", on_bad="stop", text_field="body")


def test_parquet_without_pyarrow(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    folder = write({"a.parquet": b"PAR1"})
    with pytest.raises(UserError, match=r'pip install "scratchlm\[eval\]"'):
        read(folder, on_bad="stop")


# Real data


def test_real_aozora_files_and_zips(data_dir: Path) -> None:
    raw, report = read(data_dir / "aozora/raw_sjis")
    assert (len(raw), report.bad, report.notes) == (50, [], [])
    by_name = {Path(d.source).stem: d.text for d in raw}
    zips, _ = read(data_dir / "aozora/raw_zip")
    assert len(zips) == 8
    for document in zips:
        name = Path(document.source.split("!")[0]).stem
        if name in by_name:
            assert document.text == by_name[name]


def test_real_broken_file_is_named(data_dir: Path) -> None:
    documents, report = read(data_dir / "udhr-encodings")
    assert (len(documents), len(report.bad)) == (6, 1)
    assert "Japanese_Nihongo-JIS" in report.bad[0]
    with pytest.raises(UserError, match=r"at byte 9,999"):
        read(data_dir / "udhr-encodings", on_bad="stop")


def test_real_jsonl(data_dir: Path) -> None:
    documents, report = read(data_dir / "imdb-subset")
    assert len(documents) == 5000
    assert any("\u0085" in d.text for d in documents)
    assert report.bad == []
    assert len(read(data_dir / "aozora/aozora_clean.jsonl.gz")[0]) == 425


def test_all_of_the_real_data_is_read_or_named(data_dir: Path) -> None:
    """A folder of everything: no file makes reading fail."""
    documents, report = read(data_dir)
    assert len(documents) > 10_000
    assert report.characters == sum(len(d.text) for d in documents)
    assert all("\r" not in d.text and "\0" not in d.text for d in documents)
