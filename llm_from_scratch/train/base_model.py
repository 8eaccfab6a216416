"""Which model a run began with: a hash of its files, so that none goes on with another one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import sha256_of
from llm_from_scratch.weights.adapter_config import CONFIG, HEAD, TOKENIZER, is_adapter_folder
from llm_from_scratch.weights.adapter_folder import about_adapter
from llm_from_scratch.weights.sources import base_of, locate

# Of a folder what decides what the model computes and reads; a README may change.
FILES = ("config.json", "*.safetensors", CONFIG, HEAD, *TOKENIZER)


def model_hash(model: str) -> str:
    """SHA-256 over the files of MODEL: settings, weights and tokenizer; of an adapter, its base's.

    Wherever they lie: a copy has the same. It takes as long as reading the files (100 MB in a tenth
    of a second from the memory). Raises `UserError` for a file that cannot be read.
    """
    path = locate(model)
    try:
        if path.is_file():
            return sha256_of(path)
        found = {file for pattern in FILES for file in path.glob(pattern) if file.is_file()}
        hashes = [f"{file.name} {sha256_of(file)}" for file in sorted(found)]
    except OSError as error:
        where = error.filename or path
        raise UserError(f"{where} cannot be read ({error.strerror or error}).") from error
    if is_adapter_folder(path):
        hashes.append(f"base {model_hash(base_of(about_adapter(path)))}")
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def refuse_other_model(model: str, known: str | None, folder: Path) -> None:
    """Raise `UserError` where MODEL is no more what it was; runs of old kept no hash."""
    if known is not None and model_hash(model) != known:
        raise UserError(
            f"The model {model} has changed since the run in {folder} began: put back the one that "
            "it began with, or start a new run."
        )
