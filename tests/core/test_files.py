"""Files are whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from llm_from_scratch.core.errors import RunError, UserError
from llm_from_scratch.core.files import (
    ASIDE,
    cache_folder,
    explain_os_error,
    folder_aside,
    human_bytes,
    remove_asides,
    sha256_of,
    writable_folder,
    write_aside,
)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "file.txt"
    with write_aside(path) as file:
        file.write("old\n")
    with pytest.raises(RuntimeError), write_aside(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_bytes() == b"old\n"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_failed_folder_leaves_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for content in ("one", "two"):
        with folder_aside(path) as aside:
            (aside / "x").write_text(content)
            assert not path.exists() or (path / "x").read_text() == "one"
    with pytest.raises(RuntimeError), folder_aside(path) as aside:
        (aside / "x").write_text("half")
        raise RuntimeError
    assert (path / "x").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights")
def test_files_have_ordinary_rights(tmp_path: Path) -> None:
    """Whatever made them: some libraries write files that only their owner can read."""
    (tmp_path / "ordinary").touch()
    (tmp_path / "ordinary-folder").mkdir()
    with write_aside(tmp_path / "file") as file:
        file.write("x")
    with folder_aside(tmp_path / "folder") as aside:
        (aside / "private").touch(mode=0o600)
    rights = [(tmp_path / name).stat().st_mode for name in ("ordinary", "file", "folder/private")]
    assert len(set(rights)) == 1
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "ordinary-folder").stat().st_mode


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "x").write_text("old")
    real = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if Path(target) == path and ".old-" not in self.name:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(KeyboardInterrupt), folder_aside(path) as aside:
        (aside / "x").write_text("new")
    assert (path / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / f"{ASIDE}step-3.abc").mkdir()
    (tmp_path / f"{ASIDE}file").write_text("x")
    (tmp_path / "keep").write_text("x")
    remove_asides(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["keep"]


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="Choose another"):
            writable_folder(path)


def test_operating_system_errors_become_sentences() -> None:
    full = explain_os_error(OSError(errno.ENOSPC, "x"), "p")
    assert isinstance(full, RunError)
    assert "The disk is full" in str(full)
    denied = explain_os_error(OSError(errno.EACCES, "x"), "p")
    assert isinstance(denied, UserError)
    assert "permission denied" in str(denied)


def test_small_helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_of(tmp_path / "f").startswith("ba7816bf8f01cfea")
    assert human_bytes(1536) == "1.5 KiB"
    assert human_bytes(3 * 1024**4) == "3.0 TiB"
    monkeypatch.setenv("SCRATCHLM_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
