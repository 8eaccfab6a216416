"""Building kernels.cpp on first use: one compiler call, kept in the user's cache.

The library's name is a hash of the source, the compiler, its flags and the processor's abilities:
a change of any builds anew, and a home folder shared by unlike machines holds one for each. What
was not used for the longest time is dropped.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from llm_from_scratch.core.device import processor_name
from llm_from_scratch.core.files import ASIDE, cache_folder, fsync_path

SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=gnu++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread", "-w")
NATIVE = (("-march=native",), ("-mcpu=native",), ())  # the last where the others are unknown
TIME_LIMIT = 300  # seconds
KEPT = 16  # libraries: some versions of this package, on some machines


class NoKernels(Exception):
    """The kernels cannot be used here; the message is a clause that says why."""


def find_compiler() -> str:
    """The C++ compiler to use: `$CXX`, else the first that is installed."""
    named = os.environ.get("CXX")
    for name in (named,) if named else COMPILERS:
        if path := shutil.which(name):
            return path
    raise NoKernels(
        f"$CXX names {named}, which is not there"
        if named
        else "no C++ compiler was found (install g++ or clang++)"
    )


@functools.cache
def processor() -> str:
    """What decides which instructions exist here."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except (OSError, ValueError):
        text = ""
    abilities = [line for line in text.split("\n") if line.startswith(("flags", "Features"))][:1]
    return " ".join([platform.machine(), processor_name(), *abilities])


def library_path(compiler: str, extra: Sequence[str] = ()) -> Path:
    """Where the library for this source, compiler and processor lies, built or not."""
    stat = Path(compiler).resolve().stat()
    about = (compiler, stat.st_size, stat.st_mtime_ns, FLAGS, tuple(extra), processor())
    digest = hashlib.sha256(SOURCE.read_bytes() + repr(about).encode()).hexdigest()
    return cache_folder() / "kernels" / f"{digest[:32]}.so"


def compile_to(path: Path, compiler: str, extra: Sequence[str] = ()) -> None:
    """Build the library under `path`; whole or not at all. Raises `NoKernels`."""
    import subprocess

    if not os.environ.get("SCRATCHLM_QUIET"):
        print(
            "Compiling the kernels for this processor; this happens once ...",
            file=sys.stderr,
            flush=True,
        )
    with tempfile.TemporaryDirectory(prefix=ASIDE, dir=path.parent) as folder:
        made = Path(folder) / path.name
        said = ""
        for native in NATIVE:
            command = [compiler, *FLAGS, *native, *extra, "-o", str(made), str(SOURCE)]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, errors="replace", timeout=TIME_LIMIT
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise NoKernels(f"{compiler} could not be run ({error})") from error
            if done.returncode == 0:
                made.chmod(0o700)
                fsync_path(made)  # one that is cut short may only show it when it runs
                made.replace(path)
                drop_old(path.parent)
                return
            said = done.stderr or done.stdout
    first = next((line for line in said.split("\n") if "error" in line), said[:200].strip())
    raise NoKernels(
        f"{compiler} could not compile them ({first or 'it says nothing'}; name another as $CXX)"
    )


def drop_old(folder: Path) -> None:
    """Keep the libraries that were used last; also drop what killed builds left behind."""

    def age(path: Path) -> float:
        with contextlib.suppress(OSError):  # another process has dropped it
            return time.time() - path.stat().st_mtime
        return math.inf

    for path in sorted(folder.glob("*.so"), key=age)[KEPT:]:
        with contextlib.suppress(OSError):  # in use, on Windows
            path.unlink()
    for path in folder.glob(ASIDE + "*"):
        if age(path) > 2 * len(NATIVE) * TIME_LIMIT:
            shutil.rmtree(path, ignore_errors=True)


def only_ours(path: Path) -> bool:
    """Whether nobody else can have written it: what lies there is run."""
    if os.name == "nt":
        return True
    stat = path.stat()
    return stat.st_uid in (0, os.getuid()) and not stat.st_mode & 0o022


def make_folder(folder: Path) -> None:
    """The folder for libraries, which belongs to us alone. Raises `NoKernels` if it does not."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not only_ours(folder):
        raise NoKernels(
            f"others may write to {folder}, and what lies there is run; take their right away "
            "(chmod 700) or name another place as $SCRATCHLM_CACHE"
        )


def load(extra: Sequence[str] = ()) -> ctypes.CDLL:
    """The library, built if it is not there yet. Raises `NoKernels`."""
    if sys.byteorder != "little":
        raise NoKernels("this processor is big-endian")
    compiler = find_compiler()
    try:
        path = library_path(compiler, extra)
        make_folder(path.parent)
        if not path.exists() or not only_ours(path):
            compile_to(path, compiler, extra)
        else:
            with contextlib.suppress(OSError):  # it may be another's, and be read only
                os.utime(path)  # used now
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # cut short or of another system: build it anew
            compile_to(path, compiler, extra)
            return ctypes.CDLL(str(path))
    except OSError as error:
        raise NoKernels(
            f"the library could not be kept or loaded ({error}; $SCRATCHLM_CACHE may name another "
            "folder)"
        ) from error
