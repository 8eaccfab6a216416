"""File names that are not UTF-8, and archives that this Python cannot unpack."""

from __future__ import annotations

import gzip
import io
import random
import sys
import zipfile
from pathlib import Path

import pytest

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.read import Document, ReadReport, read_documents


def read(*paths: Path, **settings: str) -> tuple[list[Document], ReadReport]:
    report = ReadReport()
    return list(read_documents(paths, report=report, **settings)), report


def zipped(files: dict[str, bytes], kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", kind) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return memory.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are UTF-8 there")
def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "caf\udce9"  # the byte E9, as Python has it in names
    folder.mkdir()
    files = {
        "a.txt": b"words\n",
        "b\udcff.jsonl": b'{"text": "a row"}\n{"text": 7}\n',
        "c\udcff.gz": gzip.compress(b"zipped"),
        "d\udcff.zip": zipped({"x.txt": b"member"}),
        "e\udcff.zip": b"PK\x03\x04 not a zip",
        "f\udcff.txt": b"\xe5\x90\x8d\xe5" * 9,
    }
    write(folder, files)
    (folder / "g\udcff").symlink_to("nowhere")
    documents, report = read(folder)
    assert [document.text for document in documents] == ["words\n", "a row", "zipped", "member"]
    for text in [*(document.source for document in documents), *report.bad, report.summary()]:
        text.encode()  # can be printed, hashed and logged
    assert documents[1].source == f"{tmp_path}/caf\\xe9/b\\xff.jsonl:1"
    assert documents[3].source == f"{tmp_path}/caf\\xe9/d\\xff.zip!x.txt"
    assert len(report.bad) == 4
    for path in (folder / "nowhere", folder / "e\udcff.zip"):
        with pytest.raises(UserError) as caught:
            read(path)
        str(caught.value).encode()


def test_the_embedded_corpus_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path, {"a.txt": b"words"}))
    with pytest.raises(UserError, match="The corpus python stands alone"):
        read(Path("python"), Path("a.txt"))
    write(tmp_path, {"python": b"a file of that name"})
    documents, _ = read(Path("python"), Path("a.txt"))
    assert [document.text for document in documents] == ["a file of that name", "words"]


def test_archives_for_newer_unpackers_are_named(tmp_path: Path) -> None:
    newer = bytearray(zipped({"a.txt": b"text"}))
    newer[newer.index(b"PK\x01\x02") + 6] = 99  # version needed, in the directory
    method = bytearray(zipped({"a.txt": b"text", "b.txt": b"fine"}))
    for mark, place in ((b"PK\x01\x02", 10), (b"PK\x03\x04", 8)):
        method[method.index(mark) + place] = 77  # a way to compress that nobody knows
    name = zipped({"日本.txt": b"text"})
    torn = name.replace("日".encode(), b"\xe6\x97\xff", 1)  # in the file, not in the directory
    folder = write(
        tmp_path, {"a.zip": bytes(newer), "b.zip": bytes(method), "c.zip": torn, "d.txt": b"text"}
    )
    documents, report = read(folder)
    assert [document.text for document in documents] == ["fine", "text"]
    assert [sentence.partition(": ")[0] for sentence in report.bad] == [
        f"{folder}/a.zip", f"{folder}/b.zip!a.txt", f"{folder}/c.zip!日本.txt",
    ]  # fmt: skip
    assert "needs a newer unpacker (zip file version 9.9)" in report.bad[0]
    with pytest.raises(UserError, match="newer unpacker"):
        read(folder / "a.zip", on_bad="stop")


def test_a_bzip2_member_that_is_damaged(tmp_path: Path) -> None:
    noise = random.Random(0).randbytes(3000).hex().encode()
    data = bytearray(zipped({"a.txt": noise, "b.txt": b"fine"}, zipfile.ZIP_BZIP2))
    data[60] ^= 0xFF
    documents, report = read(write(tmp_path, {"x.zip": bytes(data)}))
    assert [document.text for document in documents] == ["fine"]
    assert len(report.bad) == 1 and "damaged" in report.bad[0]
