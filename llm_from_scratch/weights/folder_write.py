"""Model folders of the Hugging Face kind, written: each whole or not at all."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import folder_aside
from llm_from_scratch.model.adapters import merged
from llm_from_scratch.model.encoder import Encoder
from llm_from_scratch.model.heads import Embedder, Head
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.assemble import (
    Model,
    check_ties,
)
from llm_from_scratch.weights.families import (
    Family,
    config_fields,
    family_of,
)  # fmt: skip
from llm_from_scratch.weights.folder_checks import check_vocabularies, heads_of, is_model_folder
from llm_from_scratch.weights.generation_config import (
    generation_config_json,
    token_ids,
)
from llm_from_scratch.weights.heads import (
    class_of,
    head_fields,
    name_in_class,
    stored_entries,
)  # fmt: skip
from llm_from_scratch.weights.layouts import put_together
from llm_from_scratch.weights.packing import unpacked
from llm_from_scratch.weights.quantized import FIELD
from llm_from_scratch.weights.quantized_write import (
    Codes,
    codes_of,
    quantization_config,
    stored_codes,
)
from llm_from_scratch.weights.sentence_layout import write_layout
from llm_from_scratch.weights.stored import INDEX, WEIGHTS

SHARD_BYTES = 5_000_000_000
# What a model folder may hold: saving replaces it as a whole, and must not take more with it.
FOLDER_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model*", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "target_vocab.json", "merges.txt", "chat_template.*",
    "README.md", "LICENSE*", "vocab.txt", "*.spm", "*.model", "modules.json",
    "sentence_bert_config.json", "config_sentence_transformers.json",
)  # fmt: skip
FOLDER_FOLDERS = ("1_Pooling", "2_Normalize")  # with a config.json at most


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


def _their_tensors(
    model: Model, family: Family, codes: Mapping[str, Codes]
) -> Iterator[tuple[str, Tensor]]:
    parameters = dict(model.named_parameters())
    head = family.heads.get(model.head_config.kind) if isinstance(model, Head) else None
    copies = {original: copy for copy, original in head.copies.items()} if head is not None else {}
    for entry in stored_entries(family, model):
        if (quantised := codes_of(entry, codes, heads_of(model.config))) is not None:
            name = name_in_class(family, model, entry.theirs)
            yield from stored_codes(name, quantised, next(model.parameters()).dtype)
            continue
        parts = [parameters[name].detach() for name in entry.ours]
        stored = put_together(entry, parts, heads_of(model.config))
        yield name_in_class(family, model, entry.theirs), stored
        if entry.theirs in copies:
            yield copies[entry.theirs], stored.clone()


def _write_weights(
    model: Model, family: Family, folder: Path, limit: int, codes: Mapping[str, Codes]
) -> None:
    where: dict[str, int] = {}
    total = count = 0
    for shard in _shards(_their_tensors(model, family, codes), limit):
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


def config_json(model: Model, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The content of config.json; ids that the tokenizer lacks are null, not a class's default."""
    family = family_of(model.config)
    return {
        "architectures": [class_of(family, model)],
        "model_type": family.name,
        **_ids(model, tokenizer),
        **config_fields(family, model.config),
        **head_fields(family, model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "use_cache": True,
    }


def _ids(model: Model, tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """The special tokens' ids; a head remembers the padding where there is no tokenizer."""
    ids = token_ids(tokenizer)
    if isinstance(model, Head) and ids["pad_token_id"] is None:
        ids["pad_token_id"] = model.head_config.pad_id
    return ids


def save_folder(
    model: Model,
    tokenizer: Tokenizer | None,
    path: Path | str,
    generation_config: Mapping[str, Any] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    codes: Mapping[str, Codes] | None = None,
) -> None:
    """Write a folder that the class of the `transformers` library which it names loads.

    It appears under `path` whole or not at all, and replaces an earlier model folder there; any
    other folder with something in it is left alone (`UserError`). `generation_config` adds to
    generation_config.json, for example a temperature. Parameters that `codes` has in few bits are
    written so; what the model has packed is written as numbers, and adapters are merged.
    """
    folder = Path(path)
    model = unpacked(merged(model))
    refuse_foreign_folder(folder)
    family = family_of(model.config)
    check_vocabularies(model.config, tokenizer, folder)
    check_ties(model)
    with folder_aside(folder) as aside:
        described = config_json(model, tokenizer)
        if codes:
            described[FIELD] = quantization_config(model, codes)
        _write_json(aside / "config.json", described)
        _write_weights(model, family, aside, shard_bytes, codes or {})
        if not isinstance(model, Encoder | Head):
            generation = generation_config_json(model.config, tokenizer)
            _write_json(
                aside / "generation_config.json", {**generation, **(generation_config or {})}
            )
        if isinstance(model, Embedder):
            write_layout(model.head_config, model.stack.d_model, model.config.max_seq_len, aside)
        if tokenizer is not None:
            tokenizer.save(aside)


def _is_of_a_model(entry: Path) -> bool:
    if entry.is_dir():
        inside = {below.name for below in entry.iterdir()}
        return entry.name in FOLDER_FOLDERS and inside <= {"config.json"}
    return any(entry.match(name) for name in FOLDER_FILES)


def refuse_foreign_folder(folder: Path) -> None:
    """Raise `UserError` if writing a model to `folder` would delete something else."""
    if folder.is_dir():
        found = sorted(folder.iterdir())
        foreign = [entry.name for entry in found if not _is_of_a_model(entry)]
        if foreign:
            raise UserError(
                f"{folder} holds '{foreign[0]}', which is no part of a model; choose an empty or "
                "new folder."
            )
        if found and not is_model_folder(folder):
            raise UserError(
                f"{folder} holds '{found[0].name}' but no config.json, so it is no earlier model; "
                "choose an empty or new folder."
            )
    if folder.is_file():
        raise UserError(f"{folder} is a file; a model is saved as a folder. Choose another name.")
