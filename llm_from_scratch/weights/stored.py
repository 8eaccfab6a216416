"""The tensors in a folder's safetensors files: names and shapes at once, values on demand.

Everything in the headers is checked before the first value is read. Pickles (`pytorch_model.bin`)
are refused: opening one can run any program. Only `pickles.py` looks into them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.json_files import read_json_object

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class StoredTensors:
    """The tensors of a folder's safetensors files: names and shapes now, values on demand."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.files: dict[str, Any] = {}  # tensor name -> open file
        self.paths: dict[str, Path] = {}
        for path in _weight_files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except FileNotFoundError:
                raise UserError(f"{folder / INDEX} names {path.name}, which is missing.") from None
            except (SafetensorError, OSError, ValueError) as error:
                raise UserError(
                    f"{path} is truncated or not a safetensors file ({error}); copy it anew."
                ) from error
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name in self.files:
                    raise UserError(f"{path} repeats the tensor '{name}' of another shard.")
                self.files[name] = file
                self.paths[name] = path

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        tensor = self.files[name].get_tensor(name)
        if not tensor.is_floating_point():
            raise UserError(
                f"{self.paths[name]}: '{name}' holds {tensor.dtype} numbers; quantised folders "
                "cannot be read. Take the original model or a GGUF file."
            )
        return tensor


@contextmanager
def open_tensors(folder: Path) -> Iterator[StoredTensors]:
    """The tensors of a folder while the block runs."""
    with ExitStack() as stack:
        yield StoredTensors(folder, stack)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        table = read_json_object(folder / INDEX).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise UserError(f"{folder / INDEX} has no 'weight_map'; copy the model anew.")
        names = sorted({str(name) for name in table.values()})
        for name in names:
            # An index must not lead out of its folder.
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(f"{folder / INDEX} names '{name}', which is not a shard's name.")
        return [folder / name for name in names]
    for name in PICKLES:
        if (folder / name).is_file():
            raise UserError(
                f"{folder} has its weights only as {name}, a pickle, which can run any program "
                "when it is opened; turn it into another folder once, which runs nothing: "
                f"scratchlm convert {folder} --to hf --out NEW"
            )
    raise UserError(f"{folder} has no {WEIGHTS}; the model folder is incomplete, copy it anew.")
