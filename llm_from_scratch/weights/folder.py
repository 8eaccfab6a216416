"""Model folders of the Hugging Face kind, read (`folder_write.py` writes them).

`config.json` says what the model is, `model.safetensors` (or numbered shards with an index) holds
its weights, `tokenizer.json` its vocabulary. Everything in the headers is checked before the first
weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.freed import give_back
from llm_from_scratch.core.json_files import read_json_object
from llm_from_scratch.model.config import EncoderDecoderConfig
from llm_from_scratch.model.heads import Head
from llm_from_scratch.text.checks import stop_ids
from llm_from_scratch.text.files import has_tokenizer
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.assemble import (
    Model,
    complete,
    empty_model,
    put,
    sparing,
    undisturbed,
)
from llm_from_scratch.weights.catalogue import Report, to_stderr
from llm_from_scratch.weights.families import AnyConfig, Entry, Family, read_config
from llm_from_scratch.weights.folder_checks import check_vocabularies, heads_of, is_model_folder
from llm_from_scratch.weights.folder_write import refuse_foreign_folder, save_folder
from llm_from_scratch.weights.generation_config import as_generated
from llm_from_scratch.weights.heads import (
    BACKBONE,
    Labels,
    fresh_entries,
    make_room,
    not_needed,
    start_fresh,
    stored_entries,
    tied_names,
    want,
    with_copies,
    with_pooler,
    without_head,
)  # fmt: skip
from llm_from_scratch.weights.layouts import stored_shape, take_apart
from llm_from_scratch.weights.packing import keep_codes, pack_the_rest
from llm_from_scratch.weights.quantized import QuantizedTensors, take_scheme
from llm_from_scratch.weights.stored import StoredTensors, open_tensors

__all__ = ["is_model_folder", "load_folder", "refuse_foreign_folder", "save_folder"]


def _their_names(family: Family, stored: Iterable[str], where: Path) -> dict[str, str]:
    """Full name -> stored name. A folder saved from the bare base model leaves the prefix out.

    Raises `UserError` where two stored tensors have the same full name.
    """
    names = [name for name in stored if not name.endswith(family.surplus)]
    full = {
        name: name.replace(".gamma", ".weight").replace(".beta", ".bias") for name in names
    }  # as the first BERTs called them
    for prefix in {head.prefix for head in family.heads.values() if head.prefix}:
        full = {name: new.removeprefix(prefix) for name, new in full.items()}
    bare = family.prefix and not any(name.startswith(family.prefix) for name in names)
    heads = tuple(name for name in family.head_names() if not name.startswith(family.prefix))
    found: dict[str, str] = {}
    for old, new in full.items():
        if bare and not new.startswith(heads):
            new = family.prefix + new
        if new in found:
            raise UserError(
                f"{where} holds the same tensor as '{found[new]}' and as '{old}'; its weights are "
                "those of two models, copy it anew."
            )
        found[new] = old
    return found


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
    packed: bool,
) -> None:
    """Read each stored tensor once, and let our parameters be copies of its parts.

    Copies, because the file may be replaced while the model lives; one tensor at a time, so that
    no more than it is in memory twice.
    """
    heads = heads_of(model.config)
    for entry in sparing(model, entries):
        codes = tensors.codes(names.get(entry.theirs, "")) if packed else None
        if codes is not None and keep_codes(model, entry, codes, heads):
            continue
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
    family: Family, copies: dict[str, str], tensors: StoredTensors, names: dict[str, str],
    where: Path,
) -> None:  # fmt: skip
    """A tied model may repeat its embedding as lm_head, but not contradict it."""
    always = {*family.copies, *(copy for head in family.heads.values() for copy in head.copies)}
    for copy, original in copies.items():
        if copy in names and original in names:
            second, first = (tensors.read(names[name]) for name in (copy, original))
            if second.shape == first.shape and torch.equal(second, first.to(second)):
                continue
            if copy in always or "tie_word_embeddings" not in family.defaults:
                raise UserError(
                    f"{where}: '{copy}' differs from '{original}', but in {family.name} the two "
                    "are one; copy the model anew."
                )
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
    packed: bool = False,
    report: Report = to_stderr,
) -> tuple[Model, Tokenizer | None]:
    """The model (in inference mode) and the tokenizer of a Hugging Face model folder.

    `dtype` None keeps the stored precision. What is quantised becomes numbers, or with `packed`
    (on the CPU) stays as it is. `head` None gives the class that `architectures` names,
    or an `Embedder` where there is a `modules.json`; another head (`heads.ASKED`) starts with what
    the folder has of it, and this is said once. The tokenizer is None where the folder has none.
    Raises `UserError` naming the file and field for anything that does not fit.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"There is no model folder {folder}.")
    values = read_json_object(folder / "config.json")
    scheme = take_scheme(values, str(folder / "config.json"))
    family, config = read_config(values, str(folder / "config.json"))
    config = as_generated(config, folder)
    wanted = want(family, values, head, labels, folder)
    tokenizer = Tokenizer.load(folder) if has_tokenizer(folder) else None
    check_vocabularies(config, tokenizer, folder)
    if tokenizer is not None:
        # Chat models often list their end-of-turn tokens here and not in the tokenizer's files.
        tokenizer.extra_stop_ids |= stop_ids(values, folder / "config.json")
    give_back()
    with open_tensors(folder) as stored:
        tensors = stored if scheme is None else QuantizedTensors(stored, scheme)
        names = _their_names(family, tensors.files, folder)
        if head is None:
            wanted = without_head(family, wanted, names)
        config = with_pooler(family, _as_stored(family, config, tensors, names), wanted, names)
        model = empty_model(config, wanted.head)
        names = with_copies(family, model, names)
        entries = stored_entries(family, model)
        fresh = fresh_entries(family, wanted, entries, names)
        entries = [entry for entry in entries if entry not in fresh]
        entries = tensors.outputs_first(entries, names)
        copies = _copies(family, model, entries)
        _check(model, entries, tensors, names, (*copies, *not_needed(family, model)), folder)
        _check_copies(family, copies, tensors, names, folder)
        _fill(model, entries, tensors, names, dtype, device, packed)
    make_room(model, fresh, device)
    complete(model, device)
    if packed:
        pack_the_rest(model)
    start_fresh(model, fresh, str(folder), report)
    return model, tokenizer
