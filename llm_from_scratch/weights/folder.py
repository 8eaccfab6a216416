"""Model folders of the Hugging Face kind, in and out.

`config.json` says what the model is, `model.safetensors` (or numbered shards with an index) holds
its weights, `tokenizer.json` its vocabulary. Everything in the headers is checked before the first
weight is read.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import folder_aside
from llm_from_scratch.core.json_files import read_json_object
from llm_from_scratch.model.config import EncoderDecoderConfig
from llm_from_scratch.model.encoder import Encoder
from llm_from_scratch.model.heads import Embedder, Head
from llm_from_scratch.text.checks import stop_ids
from llm_from_scratch.text.files import has_tokenizer
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.assemble import (
    Model,
    check_ties,
    complete,
    empty_model,
    give_back,
    put,
    undisturbed,
)
from llm_from_scratch.weights.families import (
    AnyConfig,
    Entry,
    Family,
    config_fields,
    family_of,
    read_config,
)  # fmt: skip
from llm_from_scratch.weights.generation_config import (
    as_generated,
    generation_config_json,
    token_ids,
)
from llm_from_scratch.weights.heads import (
    BACKBONE,
    Labels,
    class_of,
    fresh_entries,
    head_fields,
    make_room,
    name_in_class,
    not_needed,
    start_fresh,
    stored_entries,
    tied_names,
    want,
    with_copies,
    with_pooler,
    without_head,
)  # fmt: skip
from llm_from_scratch.weights.layouts import put_together, stored_shape, take_apart
from llm_from_scratch.weights.sentence_layout import write_layout
from llm_from_scratch.weights.stored import INDEX, WEIGHTS, StoredTensors, open_tensors

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


def is_model_folder(path: Path) -> bool:
    """Whether `path` looks like a Hugging Face model folder, complete or not."""
    return (path / "config.json").is_file()


def _their_names(family: Family, stored: Iterable[str]) -> dict[str, str]:
    """Full name -> stored name. A folder saved from the bare base model leaves the prefix out."""
    names = [name for name in stored if not name.endswith(family.surplus)]
    full = {
        name: name.replace(".gamma", ".weight").replace(".beta", ".bias") for name in names
    }  # as the first BERTs called them
    for prefix in {head.prefix for head in family.heads.values() if head.prefix}:
        full = {name: new.removeprefix(prefix) for name, new in full.items()}
    bare = family.prefix and not any(name.startswith(family.prefix) for name in names)
    heads = tuple(name for name in family.head_names() if not name.startswith(family.prefix))
    return {
        family.prefix + new if bare and not new.startswith(heads) else new: old
        for old, new in full.items()
    }


def _check(
    model: Model, entries: list[Entry], tensors: StoredTensors, names: dict[str, str],
    others: tuple[str, ...], where: Path,
) -> None:  # fmt: skip
    """Nothing missing, nothing left over, every shape as the config says.

    `others` are the beginnings of names that may be there without being asked for.
    """
    wanted = {entry.theirs for entry in entries}
    optional = {entry.theirs for entry in entries if entry.optional}
    missing = sorted(wanted - optional - names.keys())
    if missing:
        raise UserError(
            f"{where} lacks {len(missing)} tensor(s) that its config.json asks for, such as "
            f"'{missing[0]}'; the folder is incomplete or its config.json belongs to another model."
        )
    surplus = sorted(name for name in names.keys() - wanted if not name.startswith(others))
    if surplus:
        raise UserError(
            f"{where} holds {len(surplus)} tensor(s) that its config.json does not ask for, such "
            f"as '{surplus[0]}'; its config.json belongs to another model."
        )
    for entry in entries:
        if entry.theirs not in names:
            continue
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
        if entry.theirs not in names:  # optional
            for name in entry.ours:
                put(model, name, torch.zeros(model.get_parameter(name).shape, dtype=dtype))
            continue
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


def _copies(family: Family, model: Model, entries: list[Entry]) -> dict[str, str]:
    """Tensors that may be stored a second time: their name -> the name of the original."""
    stored = {entry.ours[0].removeprefix(BACKBONE): entry.theirs for entry in entries}
    embeddings = ("embedding.weight", "decoder.embedding.weight", "encoder.embedding.weight")
    tied = next(stored[name] for name in embeddings if name in stored)
    heads = [rule.theirs for rule in family.tensors if rule.ours[0] in ("head", "decoder.head")]
    if isinstance(model, Head):
        heads = []  # of another class, whatever its matrix is
    pairs = {f"{head}.weight": tied for head in heads} | family.copies | tied_names(family, model)
    wanted = set(stored.values())
    return {copy: original for copy, original in pairs.items() if copy not in wanted}


def _as_stored(
    family: Family, config: AnyConfig, tensors: StoredTensors, names: dict[str, str]
) -> AnyConfig:
    """T5's class has a head of its own exactly where one is stored that is not the embedding."""
    if not family.tied_as_stored or not isinstance(config, EncoderDecoderConfig):
        return config
    head, embedding = (
        next(f"{rule.theirs}.weight" for rule in family.tensors if rule.ours == (ours,))
        for ours in ("decoder.head", "encoder.embedding")
    )
    tied = head not in names or (
        config.decoder.tie_embeddings
        and embedding in names
        and torch.equal(tensors.read(names[head]), tensors.read(names[embedding]))
    )
    return replace(config, decoder=replace(config.decoder, tie_embeddings=tied))


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
    path: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    head: str | None = None,
    labels: Labels = None,
) -> tuple[Model, Tokenizer | None]:
    """The model (in inference mode) and the tokenizer of a Hugging Face model folder.

    `dtype` None keeps the stored precision. `head` None gives the class that `architectures` names,
    or an `Embedder` where there is a `modules.json`; another head (`heads.ASKED`) starts with what
    the folder has of it, and this is said once. The tokenizer is None where the folder has none.
    Raises `UserError` naming the file and field for anything that does not fit.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"There is no model folder {folder}.")
    values = read_json_object(folder / "config.json")
    family, config = read_config(values, str(folder / "config.json"))
    config = as_generated(config, folder)
    wanted = want(family, values, head, labels, folder)
    tokenizer = Tokenizer.load(folder) if has_tokenizer(folder) else None
    _check_vocabularies(config, tokenizer, folder)
    if tokenizer is not None:
        # Chat models often list their end-of-turn tokens here and not in the tokenizer's files.
        tokenizer.extra_stop_ids |= stop_ids(values, folder / "config.json")
    give_back()
    with open_tensors(folder) as tensors:
        names = _their_names(family, tensors.files)
        if head is None:
            wanted = without_head(family, wanted, names)
        config = with_pooler(family, _as_stored(family, config, tensors, names), wanted, names)
        model = empty_model(config, wanted.head)
        names = with_copies(family, model, names)
        entries = stored_entries(family, model)
        fresh = fresh_entries(family, wanted, entries, names)
        entries = [entry for entry in entries if entry not in fresh]
        copies = _copies(family, model, entries)
        _check(model, entries, tensors, names, (*copies, *not_needed(family, model)), folder)
        _check_copies(copies, tensors, names, folder)
        _fill(model, entries, tensors, names, dtype, device)
    make_room(model, fresh, device)
    complete(model, device)
    start_fresh(model, fresh, str(folder))
    return model, tokenizer


def _check_vocabularies(config: AnyConfig, tokenizer: Tokenizer | None, where: Path) -> None:
    """The same for each stack: encoder and decoder may have a vocabulary of their own."""
    if isinstance(config, EncoderDecoderConfig) and tokenizer is not None:
        check_vocabulary(config.encoder.vocab_size, tokenizer, where)
        tokenizer = tokenizer.target
    check_vocabulary(config.vocab_size, tokenizer, where)


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
    head = family.heads.get(model.head_config.kind) if isinstance(model, Head) else None
    copies = {original: copy for copy, original in head.copies.items()} if head is not None else {}
    for entry in stored_entries(family, model):
        parts = [parameters[name].detach() for name in entry.ours]
        stored = put_together(entry, parts, _heads(model.config))
        yield name_in_class(family, model, entry.theirs), stored
        if entry.theirs in copies:
            yield copies[entry.theirs], stored.clone()


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
) -> None:
    """Write a folder that the class of the `transformers` library which it names loads.

    It appears under `path` whole or not at all, and replaces an earlier model folder there; any
    other folder with something in it is left alone (`UserError`). `generation_config` adds to
    generation_config.json, for example a temperature.
    """
    folder = Path(path)
    refuse_foreign_folder(folder)
    family = family_of(model.config)
    _check_vocabularies(model.config, tokenizer, folder)
    check_ties(model)
    with folder_aside(folder) as aside:
        _write_json(aside / "config.json", config_json(model, tokenizer))
        _write_weights(model, family, aside, shard_bytes)
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
