"""Heads in model folders: which one config.json names, what it says of it, where its tensors are.

A folder says by the class in `architectures` what stands on top of its backbone. Another head can
be asked for: then the backbone is taken, and of the head whatever is there under its names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llm_from_scratch.core.errors import UserError, nearest, shown
from llm_from_scratch.model.config import EncoderDecoderConfig, ModelConfig
from llm_from_scratch.model.encoder import Encoder
from llm_from_scratch.model.heads import (
    HEADS,
    LABELLED,
    PROBLEMS,
    Backbone,
    Embedder,
    Head,
    HeadConfig,
    HeadStyle,
    MaskedLM,
    ScoringHead,
    make_head,
)
from llm_from_scratch.weights.assemble import Model, put
from llm_from_scratch.weights.catalogue import Report, to_stderr
from llm_from_scratch.weights.config_json import LARGEST, Fields
from llm_from_scratch.weights.families import FAMILIES, AnyConfig, Entry, Family, family_of
from llm_from_scratch.weights.sentence_layout import is_embedder, read_layout

ASKED = (
    "classification", "regression", "token_classification", "multiple_choice", "masked_lm",
    "embedding", "none",
)  # fmt: skip
BACKBONE = "backbone."  # before the names of a wrapped model's parameters
Labels = int | Sequence[str] | None


@dataclass(frozen=True)
class Wanted:
    """What stands on top of the backbone, and how much of it a folder must bring.

    Attributes:
        head: None for a plain model.
        stored: the kind that the folder's class is: "lm", "base", a head's, or "other".
        complete: whether the folder is of just this class, so that nothing may be missing.
        relabelled: whether it has another number of labels, so that the last matrix is of no use.
    """

    head: HeadConfig | None
    stored: str
    complete: bool = True
    relabelled: bool = False


def want(
    family: Family,
    values: Mapping[str, Any],
    asked: str | None,
    labels: Labels,
    folder: Path | None = None,
) -> Wanted:
    """What is asked for, in the style of the family, given the content of the folder's config.json.

    `asked` is one of `ASKED`, or None for what the folder is: an embedder where its `modules.json`
    says so (whatever class the backbone was made from), else its class.
    """
    where = str(folder / "config.json") if folder is not None else family.name
    stored = _stored_kind(family, values, where)
    if asked is None and stored not in LABELLED and is_embedder(folder):
        asked = "embedding"
    if asked is None:
        if stored == "other":
            raise UserError(
                f"{where}: 'architectures' is {shown(values['architectures'])}, which is not "
                f"supported for {family.name}; ask for another head, or for the model alone with "
                "head='none'."
            )
        asked = stored if stored in HEADS else "none"
    if asked not in ASKED:
        raise UserError(
            f"There is no head '{asked}'; use one of {', '.join(ASKED)}." + nearest(asked, ASKED)
        )
    if asked not in ("classification", "regression", "token_classification") and labels is not None:
        raise UserError(f"Labels were given, but the head '{asked}' has none; leave them out.")
    if asked == "none":
        return Wanted(None, stored)
    kind = "classification" if asked == "regression" else asked
    if asked == "embedding":
        refuse_unknown(family, kind)
        return Wanted(_embedder(family, folder), stored)
    return _scoring(family, values, asked, kind, stored, labels, where)


def without_head(family: Family, wanted: Wanted, names: Mapping[str, str]) -> Wanted:
    """The model alone, if the folder names a masked language model but holds nothing of its head.

    Published embedding models often carry the class that they were made from. Any other head that
    is missing is refused, tensor by tensor: a classifier without one would be another model.
    """
    if wanted.head is None or wanted.head.kind != "masked_lm":
        return wanted
    theirs = tuple(f"{rule.theirs}." for rule in family.heads["masked_lm"].tensors)
    if any(name.startswith(theirs) for name in names):
        return wanted
    return Wanted(None, "base")


def _scoring(
    family: Family, values: Mapping[str, Any], asked: str, kind: str, stored: str, labels: Labels,
    where: str,
) -> Wanted:  # fmt: skip
    head = HeadConfig(
        kind,
        style=read_style(family, kind, values, where),
        labels=read_labels(values, where) if kind in LABELLED else (),
        problem_type=_problem_type(values, where),
        pad_id=Fields(values, {}, where).maybe_token_id("pad_token_id"),
    )
    same, count = stored == kind, len(head.labels)
    if labels is not None:
        head = replace(head, labels=names_of(labels))
    elif asked == "regression" and head.problem_type != "regression" and count != 1:
        head = replace(head, labels=names_of(1))
    relabelled = same and len(head.labels) != count
    if asked == "regression":
        head = replace(head, problem_type="regression")
    elif relabelled or not same:
        head = replace(head, problem_type=None)
    return Wanted(head, stored, same and not relabelled, relabelled)


def _problem_type(values: Mapping[str, Any], where: str) -> str | None:
    given = values.get("problem_type")
    if given is not None and given not in PROBLEMS:
        raise Fields(values, {}, where).refuse("problem_type", f"one of {', '.join(PROBLEMS)}")
    return given


def _stored_kind(family: Family, values: Mapping[str, Any], where: str) -> str:
    """The kind of model that `architectures` names."""
    listed = values.get("architectures") or []
    if not isinstance(listed, list) or any(not isinstance(name, str) for name in listed):
        raise UserError(f"{where}: 'architectures' is {shown(listed)}; it must be a list of names.")
    kinds = {name: kind for kind, name in family.classes.items()}
    for name in listed[:1]:
        if name.endswith("ForPreTraining") and "masked_lm" in family.classes:
            return "masked_lm"
        return kinds.get(name, "other" if family.kind == "encoder" else "lm")
    return "base" if family.kind == "encoder" else "lm"


def refuse_unknown(family: Family, kind: str) -> None:
    """Raise `UserError` for a head that no class of the family has."""
    own = {"embedding": "encoder" if family.kind == "encoder-decoder" else "base"}
    if own.get(kind, kind) not in family.classes:
        have = [name for name in HEADS if own.get(name, name) in family.classes]
        raise UserError(
            f"There is no class of {family.name} with a head for {kind}; there are "
            f"{', '.join(have) or 'none'}."
        )


def read_style(family: Family, kind: str, values: Mapping[str, Any], where: str) -> HeadStyle:
    """The style of the family's head, as config.json's fields change it."""
    refuse_unknown(family, kind)
    table = family.heads[kind]
    fields = Fields(values, table.defaults, where)
    changes: dict[str, Any] = {}
    for group in table.settings:
        changes |= group.read(fields, changes)
    return replace(table.style, **changes)


def names_of(labels: int | Sequence[str]) -> tuple[str, ...]:
    """The labels' names, or as many that only count."""
    if isinstance(labels, int):
        if not 1 <= labels <= LARGEST:
            raise UserError(f"labels is {labels}; there must be at least 1.")
        return tuple(f"LABEL_{number}" for number in range(labels))
    names = (labels,) if isinstance(labels, str) else tuple(labels)
    if not names or len({*names}) != len(names) or any(not isinstance(n, str) for n in names):
        raise UserError("labels must be a number or different names, at least one.")
    return names


def read_labels(values: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The names of the labels in config.json; the class's own two where it says nothing."""
    table = values.get("id2label")
    if table is None:
        own = {"num_labels": values.get("_num_labels") or 2}
        return names_of(Fields(values, own, where).integer("num_labels", 1 << 20))
    try:
        names = {int(number): name for number, name in table.items()}
    except (AttributeError, ValueError, TypeError):
        names = {}
    if (
        not names
        or {*names} != {*range(len(names))}
        or any(not isinstance(name, str) for name in names.values())
    ):
        raise UserError(f"{where}: 'id2label' must give each number from 0 on a name.")
    return tuple(names[number] for number in range(len(names)))


def _embedder(family: Family, folder: Path | None) -> HeadConfig:
    found = read_layout(folder) if folder is not None else None
    if found is not None:
        return found
    pooling = "last" if family.kind == "decoder" else "mean"
    return HeadConfig("embedding", HeadStyle(pooling=pooling))


def with_pooler(
    family: Family, config: AnyConfig, wanted: Wanted, names: Iterable[str]
) -> AnyConfig:
    """The config with BERT's pooler where the head stands on it, or where one is stored."""
    rule = next((rule.theirs for rule in family.tensors if rule.ours == ("pooler",)), None)
    if rule is None or not isinstance(config, ModelConfig):
        return config
    if wanted.head is None or wanted.head.kind == "embedding":
        pooler = any(name.startswith(f"{rule}.") for name in names)
    else:
        pooler = wanted.head.style.pooling == "pooler"
    return replace(config, pooler=pooler)


def stored_entries(family: Family, model: Model) -> list[Entry]:
    """Every stored tensor of a model, with a head or without, by the family's full names."""
    if not isinstance(model, Head):
        return list(family.entries(model.config, dict(model.named_parameters())))
    inner = dict(model.backbone.named_parameters())
    entries = [
        replace(entry, ours=tuple(BACKBONE + name for name in entry.ours))
        for entry in family.entries(model.config, inner)
    ]
    outer = {name for name, _ in model.named_parameters()}
    table = family.heads.get(model.head_config.kind)
    for rule in table.tensors if table is not None else ():
        entries += rule.entries(outer, 1, 1)
    return entries


def fresh_entries(
    family: Family, wanted: Wanted, entries: list[Entry], names: Mapping[str, str]
) -> list[Entry]:
    """The head's tensors that the folder does not have, or has for another purpose."""
    if wanted.head is None or wanted.complete:
        return []
    other = family.heads.get(wanted.stored) if wanted.stored != wanted.head.kind else None
    foreign = tuple(f"{rule.theirs}." for rule in other.tensors) if other is not None else ()
    fresh = []
    for entry in entries:
        ours = entry.ours[0]
        useless = ours.startswith("out.") and (
            wanted.relabelled or entry.theirs.startswith(foreign)
        )
        own = not ours.startswith(BACKBONE) or ours.startswith(f"{BACKBONE}pooler.")
        if own and (useless or entry.theirs not in names):
            fresh.append(entry)
    return fresh


def start_fresh(
    model: Model, fresh: list[Entry], where: str, report: Report = to_stderr, seed: int = 0
) -> None:
    """Draw the weights of a head that is not stored, and say so once."""
    if not fresh:
        return
    assert isinstance(model, ScoringHead)
    model.initialise(seed, [name for entry in fresh for name in entry.ours])
    parts = sorted({entry.theirs.rpartition(".")[0] for entry in fresh})
    labels = len(model.head_config.labels)
    outputs = f" with {labels} label{'s' * (labels > 1)}" if labels else ""
    report(
        f"{where} has no head for {model.head_config.kind}{outputs}: {', '.join(parts)} "
        f"{'start' if len(parts) > 1 else 'starts'} with random weights and must be trained."
    )


def make_room(model: Model, fresh: list[Entry], device: torch.device | str) -> None:
    """Give parameters that are not stored a place, in the precision of the others."""
    dtype = next(p.dtype for p in model.parameters() if not p.is_meta)
    for entry in fresh:
        for name in entry.ours:
            shape = model.get_parameter(name).shape
            put(model, name, torch.empty(shape, dtype=dtype, device=device))


def add_head(backbone: Backbone, head: str, labels: Labels = None, *, seed: int = 0) -> Head:
    """A fresh head in the style of the backbone's family, with random weights from `seed`.

    Args:
        backbone: the model to stand on; its own output matrix is dropped (see `Head`).
        head: classification, regression, token_classification, multiple_choice, masked_lm or
            embedding.
        labels: the names of the labels or their number, for the heads that have any.
    """
    family = FAMILIES.get(backbone.config.family) or family_of(backbone.config)
    wanted = want(family, {}, head, labels)
    if wanted.head is None:
        raise UserError("head='none' adds nothing; take the model as it is.")
    if isinstance(backbone, Encoder) and wanted.head.style.pooling == "pooler":
        backbone.add_pooler(seed)
    model = make_head(backbone, wanted.head)
    first = next(backbone.parameters())
    for name, part in model.named_children():
        if name != "backbone":
            part.to(device=first.device, dtype=first.dtype)
    if isinstance(model, ScoringHead):
        model.initialise(seed)
    return model.train(backbone.training)


def head_fields(family: Family, model: Model) -> dict[str, Any]:
    """config.json's fields that say what stands on top of the backbone."""
    if not isinstance(model, Head):
        return {}
    head = model.head_config
    values: dict[str, Any] = {}
    if head.kind in family.heads:
        for group in family.heads[head.kind].settings:
            values |= group.write(head.style)  # type: ignore[arg-type]
        back = read_style(family, head.kind, values, "config.json")
        if replace(back, dropout=head.style.dropout) != head.style:
            raise UserError(
                f"{class_of(family, model)} cannot express this head; its style would be {back}."
            )
    if head.labels:
        values["id2label"] = {str(number): name for number, name in enumerate(head.labels)}
        values["label2id"] = {name: number for number, name in enumerate(head.labels)}
    if head.problem_type is not None:
        values["problem_type"] = head.problem_type
    return values


def class_of(family: Family, model: Model) -> str:
    """The class that has such a head; `UserError` where there is none."""
    if isinstance(model, Encoder):
        return family.classes["base"]
    if not isinstance(model, Head):
        return family.classes["lm"]
    kind = model.head_config.kind
    refuse_unknown(family, kind)
    if kind == "embedding":
        return family.classes["encoder" if family.kind == "encoder-decoder" else "base"]
    return family.classes[kind]


def name_in_class(family: Family, model: Model, name: str) -> str:
    """How the class calls a tensor that has this full name in the family's table.

    A class without a head leaves the prefix out; under some heads there is another one.
    """
    if isinstance(model, Encoder | Embedder):
        return name.removeprefix(family.prefix)
    if isinstance(model, Head) and isinstance(model.config, EncoderDecoderConfig):
        table = family.heads[model.head_config.kind]
        own = tuple(f"{rule.theirs}." for rule in table.tensors)
        return name if name.startswith(own) else table.prefix + name
    return name


def with_copies(family: Family, model: Model, names: Mapping[str, str]) -> dict[str, str]:
    """The stored names, a tensor that is there only under its second name under its first too."""
    head = family.heads.get(model.head_config.kind) if isinstance(model, Head) else None
    found = dict(names)
    for copy, original in head.copies.items() if head is not None else ():
        if copy in found and original not in found:
            found[original] = found[copy]
    return found


def not_needed(family: Family, model: Model) -> tuple[str, ...]:
    """What the names of tensors begin with that the folder of this model may hold besides.

    These are other heads, and the decoder where the head looks at the source alone.
    """
    alone = isinstance(model, Head) and model.source_only
    decoder = (rule.theirs for rule in family.tensors if rule.ours[0].startswith("decoder."))
    return (*family.head_names(), *(name.partition("{")[0] for name in decoder if alone))


def tied_names(family: Family, model: Model) -> dict[str, str]:
    """What a head stores a second time: its name -> the name of what it must be equal to."""
    if not isinstance(model, MaskedLM) or "out.weight" in dict(model.named_parameters()):
        return {}
    table = family.heads["masked_lm"]
    out = next(rule.theirs for rule in table.tensors if rule.ours == ("out",))
    embedding = next(rule.theirs for rule in family.tensors if rule.ours == ("embedding",))
    return {f"{out}.weight": f"{embedding}.weight", **table.copies}
