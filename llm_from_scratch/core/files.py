"""Files that are either whole or not there.

Everything this project writes goes through `write_aside` (one file) or `folder_aside` (a folder):
the bytes are written beside their destination, flushed to the disk and then moved into place, so
that a kill or a full disk never leaves half a file under the real name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llm_from_scratch.core.errors import RunError, UserError

ASIDE = ".aside-"  # the prefix of everything that is not yet in place
OLD = ".old-"  # between the name of a folder that is being replaced and the process that does it
UMASK = os.umask(0)  # can only be read by setting it
os.umask(UMASK)


def fsync_path(path: Path) -> None:
    """Flush a file or a folder entry to the disk; folders cannot be opened on Windows."""
    if path.is_dir() and os.name == "nt":
        return
    # Windows flushes only what is open for writing.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems refuse it for folders; renames stay atomic
            raise
    finally:
        os.close(handle)


def explain_os_error(error: OSError, path: Path | str) -> UserError | RunError:
    """An operating-system error as a sentence: a full disk and a forbidden folder above all."""
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(
            f"The disk is full: {path} could not be written. Free some space; what was complete "
            "before this write is still there."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"Cannot write to {path}: permission denied. Choose another folder.")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return UserError(f"Cannot write to {path}: a file is in the way. Choose another folder.")
    return RunError(f"Cannot write to {path}: {error.strerror or error}.")


@contextlib.contextmanager
def write_aside(path: Path | str, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file for writing that appears under `path` only when the block ends without error."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(prefix=ASIDE + path.name + ".", dir=path.parent)
    except OSError as error:
        raise explain_os_error(error, path) from error
    aside = Path(name)
    try:
        text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
        with os.fdopen(number, mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.chmod(0o666 & ~UMASK)  # mkstemp makes private files; these are ordinary ones
        aside.replace(path)
    except OSError as error:
        raise explain_os_error(error, path) from error
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_aside(path: Path | str) -> Iterator[Path]:
    """A fresh folder to fill; it takes the place of `path` when the block ends without error.

    A folder already at `path` is moved aside first and deleted last, so at every moment either
    the old or the new one is complete on the disk.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=ASIDE + path.name + ".", dir=path.parent))
    except OSError as error:
        raise explain_os_error(error, path) from error
    try:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~UMASK)  # safetensors makes private files, too
                fsync_path(file)
        aside.chmod(0o777 & ~UMASK)
        old = None
        try:
            if path.exists():
                old = path.with_name(f"{ASIDE}{path.name}{OLD}{os.getpid()}")
                path.replace(old)
            aside.replace(path)
        except BaseException:  # also a second Ctrl-C
            if old is not None and old.exists() and not path.exists():
                old.replace(path)
            raise
        fsync_path(path.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise explain_os_error(error, path) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_asides(folder: Path | str) -> None:
    """Delete what an earlier, killed process left unfinished in `folder`.

    Of a folder that was moved aside and whose successor never came, the old one is put back.
    """
    for entry in Path(folder).glob(ASIDE + "*"):
        name, replaced, _ = entry.name.removeprefix(ASIDE).rpartition(OLD)
        if replaced and not entry.with_name(name).exists():
            entry.replace(entry.with_name(name))
        elif entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def writable_folder(path: Path | str) -> Path:
    """`path` as a folder in which files can be written, or a `UserError`; nothing stays behind.

    It need not exist yet: it is made by what is written into it, when there is something to write.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, not a folder. Choose another --out.")
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise explain_os_error(error, path) from error
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
    return path


def refuse_existing(path: Path | str) -> None:
    """Raise `UserError` for an --out that is there already: no file is written over."""
    if Path(path).exists():
        raise UserError(f"{path} already exists. Choose another --out.")


def sha256_of(path: Path | str) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where downloads and compiled kernels live: `$SCRATCHLM_CACHE` or the system's cache place."""
    if value := os.environ.get("SCRATCHLM_CACHE"):
        return Path(value)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "scratchlm"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "scratchlm"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "scratchlm"


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
