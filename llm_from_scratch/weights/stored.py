"""The tensors in a folder's safetensors files: names and shapes at once, values on demand.

Everything in the headers is checked before the first value is read. Pickles (`pytorch_model.bin`)
are refused: opening one can run any program. Only `pickles.py` looks into them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_from_scratch.core.errors import UserError, shown
from llm_from_scratch.core.json_files import read_json_object
from llm_from_scratch.weights.families.table import Entry

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PRECISE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class StoredTensors:
    """The tensors of a folder's safetensors files: names and shapes now, values on demand."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.files: dict[str, Any] = {}  # tensor name -> open file
        self.paths: dict[str, Path] = {}
        paths, table = _weight_files(folder)
        for path in paths:
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError, ValueError) as error:
                raise UserError(
                    f"{path} is truncated or not a safetensors file ({error}); copy it anew."
                ) from error
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name in self.files:
                    raise UserError(f"{path} repeats the tensor '{name}' of another shard.")
                self.files[name] = file
                self.paths[name] = path
        for name, shard in table.items():
            if name not in self.paths or self.paths[name].name != shard:
                raise misplaced(folder / INDEX, name, shard)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(name).get_shape())

    def codes(self, name: str) -> Any:
        """A matrix in few bits as it is stored: here there is none (see quantized.py)."""
        return None

    def outputs_first(self, entries: list[Entry], names: Mapping[str, str]) -> list[Entry]:
        """The entries as this folder stores them: quantised matrices always outputs first."""
        return entries

    def read(self, name: str) -> Tensor:
        tensor = self.files[name].get_tensor(name)
        if tensor.dtype not in PRECISE:
            raise UserError(
                f"{self.paths[name]}: '{name}' holds {tensor.dtype} numbers, of which its "
                "config.json says nothing. Take the original model or a GGUF file."
            )
        return tensor


@contextmanager
def open_tensors(folder: Path) -> Iterator[StoredTensors]:
    """The tensors of a folder while the block runs."""
    with ExitStack() as stack:
        yield StoredTensors(folder, stack)


def is_name(name: object) -> bool:
    """Whether `name` is that of something directly in a folder, and does not lead out of it."""
    return isinstance(name, str) and name not in ("", "..") and Path(name).name == name


def shard_files(index: Path, suffix: str) -> list[Path]:
    """The files that an index of shards names; `UserError` for a broken index or a missing file."""
    return [index.parent / name for name in sorted({*shard_table(index, suffix).values()})]


def shard_table(index: Path, suffix: str) -> dict[str, str]:
    """Tensor name -> file name, as an index of shards has it; `UserError` as in `shard_files`."""
    table = read_json_object(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise UserError(f"{index} has no 'weight_map'; copy the model anew.")
    names = sorted({str(name) for name in table.values()})
    for name in names:
        if not is_name(name) or not name.endswith(suffix):
            raise UserError(f"{index} names {shown(name)}, which is not a shard's name.")
        if not (index.parent / name).is_file():
            raise UserError(f"{index} names {shown(name)}, which is missing.")
    return {name: str(shard) for name, shard in table.items()}


def misplaced(index: Path, name: str, shard: str) -> UserError:
    """What is said of an index of shards that contradicts them."""
    return UserError(
        f"{index} says that the tensor {shown(name)} is in {shown(shard)}, where it is not; copy "
        "the model anew."
    )


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files with weights, and where their index says that each tensor is."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS], {}
    if (folder / INDEX).is_file():
        table = shard_table(folder / INDEX, ".safetensors")
        return [folder / name for name in sorted({*table.values()})], table
    for name in PICKLES:
        if (folder / name).is_file():
            raise UserError(
                f"{folder} has its weights only as {name}, a pickle, which can run any program "
                "when it is opened; turn it into another folder once, which runs nothing: "
                f"scratchlm convert {folder} --to hf --out NEW"
            )
    raise UserError(f"{folder} has no {WEIGHTS}; the model folder is incomplete, copy it anew.")
