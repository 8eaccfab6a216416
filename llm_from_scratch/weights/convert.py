"""A model in another format: Hugging Face folder, GGUF file, or out of an old pickle.

Whatever `load` reads can be converted, and pickles as well (`pickles.py`): those become a folder of
safetensors first, which then is read like any other: only what fits its config.json goes on.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.core.files import ASIDE, explain_os_error, folder_aside
from llm_from_scratch.core.json_files import read_json_object
from llm_from_scratch.model.adapters import merged
from llm_from_scratch.weights.adapter_config import is_adapter_folder
from llm_from_scratch.weights.adapter_folder import about_adapter
from llm_from_scratch.weights.catalogue import Report, to_stderr
from llm_from_scratch.weights.describe import describe_folder
from llm_from_scratch.weights.families import read_config
from llm_from_scratch.weights.folder import is_model_folder, refuse_foreign_folder, save_folder
from llm_from_scratch.weights.gguf import GGUF
from llm_from_scratch.weights.gguf_save import KINDS, check_description, save_gguf
from llm_from_scratch.weights.pickles import pickle_files, write_safetensors
from llm_from_scratch.weights.quantized_write import Codes
from llm_from_scratch.weights.sentence_layout import MODULES
from llm_from_scratch.weights.sources import DTYPES, STORED, base_of, load, locate

FORMATS = ("hf", "gguf")
HALVES = {"F16": "fp16", "BF16": "bf16"}
AS_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# What a model folder has beside config and weights, and keeps on its way into another folder.
CARD = "README.md"
SIDE_FILES: tuple[str, ...] = (
    CARD, "LICENSE*", "vocab.txt", "vocab.json", "merges.txt", "*.spm", "*.model",
    "special_tokens_map.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    "1_Pooling/config.json",
)  # fmt: skip
# What says how the model is built; it is written anew.
CONFIGS = (
    "config.json", "generation_config.json", "tokenizer*", "added_tokens.json", "*.jinja",
    "target_vocab.json", MODULES, "*/config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Converted:
    """What came out: `kind` is the precision, "float32" or "Q8_0"; `bytes` of all files."""

    path: str
    to: str
    kind: str
    parameters: int
    bytes: int


def convert(
    model: str | Path,
    to: str,
    out: str | Path,
    *,
    kind: str | None = None,
    dtype: str | None = None,
    report: Report = to_stderr,
) -> Converted:
    """Write `model` as a model folder (`to` "hf") or a GGUF file ("gguf").

    Args:
        model: anything that `load` takes; also a pickle such as pytorch_model.bin with its
            config.json beside it, or a folder that has its weights as pickles only. An adapter is
            merged into its base.
        out: the folder or .gguf file. An earlier model there is replaced; nothing else is.
        kind: of a GGUF's matrices: F32, F16, BF16, Q8_0 or Q4_0. None: the stored precision.
        dtype: of a folder's weights: "fp32", "bf16" or "fp16". None: the stored precision.
            Without either, what a GGUF has quantised becomes fp32, and so does a model with an
            adapter in it: half precision would swallow most of the adapter's small changes.

    Raises `UserError` for what does not fit together, for a family that llama.cpp has no
    architecture for, and for a pickle that holds anything but tensors.
    """
    _check(to, kind, dtype)
    if "" in (model, out):
        raise UserError("MODEL or --out is empty; name a model, and the folder or file to write.")
    source, out = Path(model).expanduser(), Path(out)
    pickles = pickle_files(source) if source.exists() else []
    if not pickles:
        source = locate(model, pickles=True)
        pickles = pickle_files(source) if source.is_dir() else []
    check_out(out, source, to)
    base = base_place(source)
    if to == "gguf" and base.is_dir() and is_model_folder(base):
        told = describe_folder(base)
        # What is in a pickle is not known yet: the head that config.json names may be missing.
        check_description(told.config, None if pickles else told.head)
    with ExitStack() as stack:
        report(f"Reading {model} ...")
        if pickles:
            place = stack.enter_context(_unpickled(source, pickles, out))
        else:
            place = source
        try:
            half = _half_of(place)
            if to == "hf":
                dtype = dtype or HALVES.get(half)
            loaded, tokenizer = load(place, dtype=dtype or STORED, device="cpu")
        except UserError as error:
            raise UserError(str(error).replace(str(place), str(source))) from error
        if base != source:
            loaded = merged(loaded)
            loaded = loaded if dtype is None else loaded.to(DTYPES[dtype])
        stored = next(loaded.parameters()).dtype
        report(f"Writing {out} ...")
        if to == "gguf":
            kind = kind or half or AS_STORED.get(stored, "F32")
            save_gguf(loaded, tokenizer, out, kind=kind)
        else:
            kind = str(stored).removeprefix("torch.")
            save_with_sides(loaded, tokenizer, place, out)
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    return Converted(
        path=str(out),
        to=to,
        kind=kind,
        parameters=sum(p.numel() for p in loaded.parameters()),
        bytes=sum(path.stat().st_size for path in files),
    )


def base_place(source: Path) -> Path:
    """Where the base of an adapter lies; of any other model the model itself."""
    if not (source.is_dir() and is_adapter_folder(source)):
        return source
    return locate(base_of(about_adapter(source)))


def _half_of(place: Path) -> str:
    """The kind F16 or BF16 where most of a GGUF file is stored so, else nothing."""
    most = GGUF(place).forms().most_common(1) if place.is_file() else []
    return most[0][0] if most and most[0][0] in HALVES else ""


def _check(to: str, kind: str | None, dtype: str | None) -> None:
    if to not in FORMATS:
        raise UserError(f"There is no format '{to}'; use hf or gguf.{nearest(to, FORMATS)}")
    if to == "gguf" and dtype is not None:
        raise UserError("A GGUF has a kind, not a dtype; say it with --kind.")
    if to == "hf" and kind is not None:
        raise UserError("A model folder has a dtype, not a kind; say it with --dtype.")
    if kind is not None and kind not in KINDS:
        near = nearest(kind.upper(), KINDS)
        raise UserError(f"There is no kind '{kind}'; use one of {', '.join(KINDS)}.{near}")
    if dtype is not None and dtype not in DTYPES:
        near = nearest(dtype, DTYPES)
        raise UserError(f"There is no dtype '{dtype}'; use fp32, bf16 or fp16.{near}")


def check_out(out: Path, source: Path, to: str) -> None:
    """Nothing but an earlier result is written over, and never what is being read."""
    for place in (source, base_place(source)):
        folder = place if place.is_dir() else place.parent
        if out.resolve() in (place.resolve(), folder.resolve()):
            raise UserError(f"{out} is where the model itself lies; choose another --out.")
    if to == "hf":
        refuse_foreign_folder(out)
        return
    if out.is_dir() or out.suffix != ".gguf":
        raise UserError(f"A GGUF is one file; give --out a name such as {out / 'model.gguf'}.")
    if out.is_file():
        with out.open("rb") as file:
            if file.read(4) not in (b"GGUF", b""):
                raise UserError(f"{out} exists and is no GGUF file; choose another --out.")


@contextmanager
def _unpickled(source: Path, pickles: list[Path], out: Path) -> Iterator[Path]:
    """A folder with the weights as safetensors, while the block runs; it lies on the disk of `out`.

    `source` is the pickle or its folder.
    """
    folder = source if source.is_dir() else source.parent
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{source} is weights alone: put the model's config.json and tokenizer files beside it."
        )
    parent = next(path for path in out.absolute().parents if path.is_dir())
    try:
        with tempfile.TemporaryDirectory(
            prefix=f"{ASIDE}{out.name}.", dir=parent, ignore_cleanup_errors=True
        ) as name:
            _copy(folder, Path(name), (*CONFIGS, *SIDE_FILES))
            # What is not known is said before a weight is read.
            read_config(read_json_object(folder / "config.json"), str(folder / "config.json"))
            write_safetensors(pickles, Path(name))
            yield Path(name)
    except OSError as error:
        raise explain_os_error(error, out) from error


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files that are not there yet."""
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            place = target / path.relative_to(source)
            if path.is_file() and not place.exists():
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, place)


def save_with_sides(
    model: Any, tokenizer: Any, source: Path, out: Path, codes: Mapping[str, Codes] | None = None
) -> None:
    """As `save_folder`, with what else the source has, such as a vocabulary's other files.

    Where the source is an adapter, what its base has comes along, but for the cards of the two,
    which speak of other models.
    """
    generation, patterns, base = _generation_of(source), SIDE_FILES, base_place(source)
    if base != source:
        ends = {name: value for name, value in generation.items() if name.endswith("_token_id")}
        usual = _generation_of(base).items()
        generation = {k: v for k, v in usual if not k.endswith("_token_id")} | ends
        patterns = tuple(name for name in SIDE_FILES if name != CARD)
    with folder_aside(out) as aside:
        inner = aside / "model"
        save_folder(model, tokenizer, inner, generation, codes=codes)
        for path in list(inner.iterdir()):
            path.rename(aside / path.name)
        inner.rmdir()
        for place in (source, base):
            if place.is_dir():
                _copy(place, aside, patterns)


def _generation_of(folder: Path) -> dict[str, Any]:
    """The content of a folder's generation_config.json, where there is one."""
    path = folder / "generation_config.json"
    return read_json_object(path) if path.is_file() else {}
