"""The one door for old pickles: `pytorch_model.bin` becomes safetensors, and nothing in it is run.

A pickle is a little program: whoever opens it with Python's own reader runs what its author wrote.
PyTorch's `weights_only=True` knows tensors and containers alone. Before it is called, the file is
looked through: it may name nothing but what tensors are made of, and it may not unpack to more than
it holds, so that a file made to fill the memory is refused, too.

Only `scratchlm convert` comes here; everything else refuses pickles.
"""

from __future__ import annotations

import io
import json
import pickletools
import re
import tarfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.weights.stored import misplaced, shard_files, shard_table

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS = "pytorch_model.bin"
INDEX = WEIGHTS + ".index.json"
# What a pickle may name: tensors, their storages, and the containers that hold them.
HARMLESS = re.compile(
    r"collections OrderedDict|torch Size|torch \w+Storage|torch\._utils _rebuild_tensor(_v2)?"
    r"|torch\._utils _rebuild_parameter|torch\.nn\.parameter Parameter"
)
STATE_DICTS = ("state_dict", "model_state_dict", "model")  # where training scripts put the weights
# The files of PyTorch before 1.6 begin with this number, pickled.
OLD_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
OLD_PICKLES = 5  # number, protocol, system, the object, the names of its storages
PICKLE_BYTES = 4 << 20  # names and shapes; the numbers lie outside of the pickle
COPIES = 8  # a tied embedding may be named several times; each name is written
SHARD_BYTES = 256 << 20  # what is in memory at once
DTYPES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip


def pickle_files(path: Path) -> list[Path]:
    """The pickles that hold a model's weights: `path` itself, or those of a folder without others.

    Empty where there is nothing to open here. Raises `UserError` for a broken index.
    """
    if path.is_file():
        return [path] if path.suffix in SUFFIXES else []
    if any(path.glob("*.safetensors")):
        return []
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    return shard_files(path / INDEX, ".bin") if (path / INDEX).is_file() else []


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, memory-mapped where the file allows it.

    Raises `UserError` for a file that names anything but tensors, holds something else, or is
    broken; no code of the file is run.
    """
    mapped = _look_through(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a broken file can fail anywhere in the reader
        # PyTorch's own words recommend to open such a file without its protection.
        raise UserError(
            f"{path} is damaged, or holds more than tensors; copy it anew, or take the model as "
            "safetensors or GGUF."
        ) from error
    return _tensors(loaded, path)


def write_safetensors(files: Sequence[Path], folder: Path) -> None:
    """Write what the pickles hold into `folder`, as shards with an index; one shard in memory."""
    table: dict[str, str] = {}
    announced = _announced(files)
    left = COPIES * sum(path.stat().st_size for path in files)
    for path in files:
        tensors = read_pickle(path)
        for name in sorted(announced.get(path.name, set()) - tensors.keys()):
            raise misplaced(path.parent / INDEX, name, path.name)
        left -= sum(tensor.nbytes for tensor in tensors.values())
        if left < 0:
            raise UserError(f"{path} unpacks to far more than it holds; copy the model anew.")
        for shard in _shards(tensors):
            name = f"model-{len(set(table.values())) + 1:05}.safetensors"
            twice = shard.keys() & table.keys()
            if twice:
                raise UserError(f"{path} repeats the tensor '{min(twice)}' of another shard.")
            save_file(shard, folder / name, metadata={"format": "pt"})
            table.update(dict.fromkeys(shard, name))
    index = json.dumps({"metadata": {}, "weight_map": table})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def _announced(files: Sequence[Path]) -> dict[str, set[str]]:
    """File name -> the tensors that the index beside the files says are in it.

    Empty where there is no index, or where it is not of just these files.
    """
    found: dict[str, set[str]] = {}
    index = files[0].parent / INDEX
    if index.is_file():
        for name, shard in shard_table(index, ".bin").items():
            found.setdefault(shard, set()).add(name)
    return found if found.keys() == {path.name for path in files} else {}


def _shards(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    storages: set[int] = set()
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, storages, size = {}, set(), 0
        storage = tensor.untyped_storage().data_ptr()
        # safetensors knows no tensors that share their memory.
        shard[name] = tensor.clone() if storage in storages else tensor.contiguous()
        storages.add(storage)
        size += tensor.nbytes
    yield shard


def _tensors(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what a file holds, each tensor an ordinary one on the CPU."""
    places = [loaded[name] for name in STATE_DICTS if isinstance(loaded, dict) and name in loaded]
    # The whole comes last: beside its weights, a checkpoint may hold other tensors of training.
    for place in (*places, loaded):
        found = {
            name: tensor.detach()
            for name, tensor in (place.items() if isinstance(place, dict) else ())
            if isinstance(name, str) and isinstance(tensor, Tensor)
        }
        for name, tensor in found.items():
            plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
            # A tensor expanded from one number would fill the memory when it is written out.
            if (
                not plain
                or tensor.dtype not in DTYPES
                or tensor.nbytes > tensor.untyped_storage().nbytes()
            ):
                raise UserError(
                    f"{path}: '{name}' is not an ordinary tensor of numbers; take the model as "
                    "safetensors or GGUF."
                )
        if found:
            return found
    raise UserError(f"{path} holds no tensors with names; it is not the weights of a model.")


def _look_through(path: Path) -> bool:
    """Refuse what names more than tensors or unpacks to more than it holds.

    Returns whether the file can be mapped into memory.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(len(OLD_MAGIC))
            file.seek(0)
            if begin.startswith(b"PK\x03\x04"):
                _look_at(io.BytesIO(_pickle_of_zip(path)), path)
                return True
            if begin == OLD_MAGIC and not tarfile.is_tarfile(path):
                stream = cast("IO[bytes]", _Limited(file))
                for _ in range(OLD_PICKLES):
                    _look_at(stream, path)
                return False
    except UserError:
        raise
    except (zipfile.BadZipFile, ValueError, EOFError, MemoryError, NotImplementedError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); copy it anew.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error
    raise UserError(f"{path} was not written by PyTorch; it is not the weights of a model.")


def _pickle_of_zip(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        stored = sum(member.file_size for member in members)
        pickles = [m for m in members if m.filename.rpartition("/")[2] == "data.pkl"]
        if packed or stored > path.stat().st_size or len(set(names)) < len(names):
            raise UserError(f"{path} is an archive that PyTorch did not write; it is not opened.")
        if len(pickles) != 1 or pickles[0].file_size > PICKLE_BYTES:
            raise UserError(f"{path} was not written by PyTorch; it is not the weights of a model.")
        return archive.read(pickles[0])


class _Limited:
    """As much of a stream as a pickle may take; the file's numbers follow behind."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.left = PICKLE_BYTES

    def _take(self, data: bytes) -> bytes:
        self.left -= len(data)
        return data

    def read(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError(f"its pickle is longer than {PICKLE_BYTES >> 20} MiB")
        return self._take(self.stream.read(count))

    def readline(self) -> bytes:
        return self._take(self.stream.readline(self.left))


def _look_at(stream: IO[bytes], path: Path) -> None:
    """Read one pickle's operations, without doing any of them."""
    for operation, argument, _ in pickletools.genops(stream):
        known = operation.name == "GLOBAL" and HARMLESS.fullmatch(str(argument))
        if operation.name in ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            if known:
                continue
            what = f"names {str(argument).replace(' ', '.')}" if argument else "makes objects"
            raise UserError(
                f"{path} is a pickle that {what[:80]}, which is no tensor and could run a program; "
                "it is not opened. Take the model as safetensors or GGUF."
            )
