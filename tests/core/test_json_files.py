"""Reading JSON that others have written."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.json_files import read_json, read_json_object


def test_values_and_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[1, "é"]', encoding="utf-8-sig")
    assert read_json(path) == [1, "é"]
    with pytest.raises(UserError, match=r"a\.json must hold a JSON object, not a list; copy"):
        read_json_object(path)
    path.write_text('{"a": 1}', encoding="utf-8")
    assert read_json_object(str(path)) == {"a": 1}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"a": 1,\n oops}', "line 2 is not valid JSON"),
        (b"", "line 1 is not valid JSON"),
        (b'{"a": "\xff"}', r"is not UTF-8 text \(byte 7\)"),
        (b"[" * 200_000, "is nested too deeply"),
        (b'{"a":' * 200_000, "is nested too deeply"),
        (b"9" * 5000, "cannot be read as JSON"),
        (b"null", "must hold a JSON object, not null"),
        (b'"text"', "must hold a JSON object, not a text"),
        (b"7", "must hold a JSON object, not 7"),
    ],
)
def test_everything_else_is_a_sentence(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=words) as caught:
        read_json_object(path, "get it from Ann")
    said = str(caught.value)
    assert said.startswith(str(path))
    assert said.endswith("; get it from Ann.")
    assert "\n" not in said


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no file .*x\.json; copy it anew\."):
        read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)
