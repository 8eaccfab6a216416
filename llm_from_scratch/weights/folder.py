"""Model folders of the Hugging Face kind, in and out.

`config.json` says what the model is, `model.safetensors` (or numbered shards with an index) holds
its weights, `tokenizer.json` its vocabulary. Everything in the headers is checked before the first
weight is read. Pickles (`pytorch_model.bin`) are refused: opening one can run any program. Only
`pickles.py` looks into them.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import folder_aside
from llm_from_scratch.core.json_files import read_json_object
from llm_from_scratch.model.config import EncoderDecoderConfig
from llm_from_scratch.text.checks import stop_ids
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.assemble import Model, complete, empty_model, put, undisturbed
from llm_from_scratch.weights.families import (
    AnyConfig,
    Entry,
    Family,
    config_fields,
    family_of,
    read_config,
)  # fmt: skip
from llm_from_scratch.weights.layouts import put_together, stored_shape, take_apart

SHARD_BYTES = 5_000_000_000
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What a model folder may hold: saving replaces it as a whole, and must not take more with it.
FOLDER_NAMES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.*", "README.md", "LICENSE*", "vocab.txt", "*.spm", "*.model", "modules.json",
    "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling",
)  # fmt: skip
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def is_model_folder(path: Path) -> bool:
    """Whether `path` looks like a Hugging Face model folder, complete or not."""
    return (path / "config.json").is_file()


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


def _their_names(family: Family, stored: Iterable[str]) -> dict[str, str]:
    """Full name -> stored name. A folder saved from the bare base model leaves the prefix out."""
    names = [name for name in stored if not name.endswith(family.surplus)]
    full = {
        name: name.replace(".gamma", ".weight").replace(".beta", ".bias") for name in names
    }  # as the first BERTs called them
    bare = family.prefix and not any(name.startswith(family.prefix) for name in names)
    heads = tuple(
        rule.theirs for rule in family.tensors if not rule.theirs.startswith(family.prefix)
    )
    return {
        family.prefix + new if bare and not new.startswith(heads) else new: old
        for old, new in full.items()
    }


def _check(
    model: Model, entries: list[Entry], tensors: StoredTensors, names: dict[str, str],
    copies: Iterable[str], where: Path,
) -> None:  # fmt: skip
    """Nothing missing, nothing left over, every shape as the config says."""
    wanted = {entry.theirs for entry in entries}
    missing = sorted(wanted - names.keys())
    if missing:
        raise UserError(
            f"{where} lacks {len(missing)} tensor(s) that its config.json asks for, such as "
            f"'{missing[0]}'; the folder is incomplete or its config.json belongs to another model."
        )
    surplus = sorted(names.keys() - wanted - set(copies))
    if surplus:
        raise UserError(
            f"{where} holds {len(surplus)} tensor(s) that its config.json does not ask for, such "
            f"as '{surplus[0]}'; its config.json belongs to another model."
        )
    for entry in entries:
        shape = stored_shape(entry, [model.get_parameter(name).shape for name in entry.ours])
        found = tensors.shape(names[entry.theirs])
        if found != shape:
            raise UserError(
                f"{where}: tensor '{entry.theirs}' has the shape {found}, but config.json means "
                f"{shape}; its config.json belongs to another model."
            )


def _fill(
    model: Model,
    entries: list[Entry],
    tensors: StoredTensors,
    names: dict[str, str],
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    """Read each stored tensor once, and let our parameters be copies of its parts.

    Copies, because the file may be replaced while the model lives; one tensor at a time, so that
    no more than it is in memory twice.
    """
    heads = _heads(model.config)
    for entry in entries:
        stored = tensors.read(names[entry.theirs])
        dtype = dtype or stored.dtype  # None: as the first tensor, the embedding, is stored
        shapes = [model.get_parameter(name).shape for name in entry.ours]
        parts = take_apart(stored, entry, shapes, heads)
        for name, part, shape in zip(entry.ours, parts, shapes, strict=True):
            if entry.index is None:
                fresh = torch.empty(shape, dtype=dtype, device=device)
                put(model, name, fresh.copy_(part))
                continue
            if model.get_parameter(name).is_meta:
                put(model, name, torch.empty(shape, dtype=dtype, device=device))
            model.get_parameter(name)[entry.index].copy_(part)


def _heads(config: AnyConfig) -> int:
    stack = config.decoder if isinstance(config, EncoderDecoderConfig) else config
    return stack.n_heads


def _copies(family: Family, config: AnyConfig) -> dict[str, str]:
    """Tensors that may be stored a second time: their name -> the name of the original."""
    tied = (config.decoder if isinstance(config, EncoderDecoderConfig) else config).tie_embeddings
    head = [rule.theirs for rule in family.tensors if rule.ours == ("head",)]
    embedding = [rule.theirs for rule in family.tensors if rule.ours == ("embedding",)]
    pairs = {f"{name}.weight": f"{embedding[0]}.weight" for name in head if tied}
    return {**pairs, **family.copies}


def _check_copies(
    copies: dict[str, str], tensors: StoredTensors, names: dict[str, str], where: Path
) -> None:
    """A tied model may repeat its embedding as lm_head, but not contradict it."""
    for copy, original in copies.items():
        if copy in names and original in names:
            second, first = (tensors.read(names[name]) for name in (copy, original))
            if second.shape != first.shape or not torch.equal(second, first.to(second)):
                raise UserError(
                    f"{where}: config.json says 'tie_word_embeddings', but '{copy}' differs from "
                    f"the embedding '{original}'; set the field to false."
                )


@undisturbed()
@torch.no_grad()
def load_folder(
    path: Path | str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[Model, Tokenizer | None]:
    """The model (in inference mode) and the tokenizer of a Hugging Face model folder.

    `dtype` None keeps the stored precision. The tokenizer is None where the folder has no
    `tokenizer.json`. Raises `UserError` naming the file and field for anything that does not fit.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"There is no model folder {folder}.")
    values = read_json_object(folder / "config.json")
    family, config = read_config(values, str(folder / "config.json"))
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
    check_vocabulary(config.vocab_size, tokenizer, folder)
    if tokenizer is not None:
        # Chat models often list their end-of-turn tokens here and not in the tokenizer's files.
        tokenizer.extra_stop_ids |= stop_ids(values, folder / "config.json")
    with open_tensors(folder) as tensors:
        names = _their_names(family, tensors.files)
        model = empty_model(config)
        entries = list(family.entries(config, dict(model.named_parameters())))
        copies = _copies(family, config)
        _check(model, entries, tensors, names, copies, folder)
        _check_copies(copies, tensors, names, folder)
        _fill(model, entries, tensors, names, dtype, device)
    complete(model, device)
    return model, tokenizer


def check_vocabulary(vocab_size: int, tokenizer: Tokenizer | None, where: Path | str) -> None:
    """Refuse a tokenizer whose ids the model has no embedding for."""
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} entries, but the model only "
            f"{vocab_size}; they do not belong together."
        )


def _shards(tensors: Iterator[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _their_tensors(model: Model, family: Family) -> Iterator[tuple[str, Tensor]]:
    parameters = dict(model.named_parameters())
    for entry in family.entries(model.config, parameters):
        parts = [parameters[name].detach() for name in entry.ours]
        yield entry.theirs, put_together(entry, parts, _heads(model.config))


def _write_weights(model: Model, family: Family, folder: Path, limit: int) -> None:
    where: dict[str, int] = {}
    total = count = 0
    for shard in _shards(_their_tensors(model, family), limit):
        count += 1
        _save(shard, folder / f"{count}.safetensors")
        where.update(dict.fromkeys(shard, count))
        total += sum(tensor.nbytes for tensor in shard.values())
    if count == 1:
        (folder / "1.safetensors").rename(folder / WEIGHTS)
        return
    for number in range(1, count + 1):
        name = f"model-{number:05}-of-{count:05}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / name)
    table = {name: f"model-{n:05}-of-{count:05}.safetensors" for name, n in where.items()}
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": table})


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library wraps the system's errors in its own; a full disk is worth its sentence.
        number = errno.ENOSPC if "os error 28" in str(error) else errno.EIO
        raise OSError(number, str(error)) from error


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    names = ("bos_id", "eos_id", "pad_id")
    return {name[:3] + "_token_id": getattr(tokenizer, name, None) for name in names}


def config_json(model: Model, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The content of config.json; ids that the tokenizer lacks are null, not a class's default."""
    family = family_of(model.config)
    return {
        "architectures": [family.classes["lm"]],
        "model_type": family.name,
        **config_fields(family, model.config),
        **_token_ids(tokenizer),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "use_cache": True,
    }


def generation_config_json(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The content of generation_config.json: where generation starts and ends."""
    values: dict[str, Any] = {k: v for k, v in _token_ids(tokenizer).items() if v is not None}
    stops = sorted(tokenizer.stop_ids) if tokenizer is not None else []
    if stops:
        values["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    return values


def save_folder(
    model: Model,
    tokenizer: Tokenizer | None,
    path: Path | str,
    generation_config: Mapping[str, Any] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    It appears under `path` whole or not at all, and replaces an earlier model folder there; any
    other folder with something in it is left alone (`UserError`). `generation_config` adds to
    generation_config.json, for example a temperature.
    """
    folder = Path(path)
    refuse_foreign_folder(folder)
    family = family_of(model.config)
    check_vocabulary(model.config.vocab_size, tokenizer, folder)
    with folder_aside(folder) as aside:
        _write_weights(model, family, aside, shard_bytes)
        _write_json(aside / "config.json", config_json(model, tokenizer))
        generation = {**generation_config_json(tokenizer), **(generation_config or {})}
        _write_json(aside / "generation_config.json", generation)
        if tokenizer is not None:
            tokenizer.save(aside)


def refuse_foreign_folder(folder: Path) -> None:
    """Raise `UserError` if writing a model to `folder` would delete something else."""
    if folder.is_dir():
        foreign = [e.name for e in folder.iterdir() if not any(e.match(n) for n in FOLDER_NAMES)]
        if foreign:
            raise UserError(
                f"{folder} holds '{min(foreign)}', which is no part of a model; choose an empty or "
                "new folder."
            )
    if folder.is_file():
        raise UserError(f"{folder} is a file; a model is saved as a folder. Choose another name.")
