"""Where an adapter is, what it was made for, and which head and tokenizer belong to it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from llm_from_scratch.core.errors import UserError, shown
from llm_from_scratch.core.json_files import read_json_object
from llm_from_scratch.model.config import EncoderDecoderConfig
from llm_from_scratch.model.heads import HEADS, PROBLEMS, Head
from llm_from_scratch.text.files import has_tokenizer, read_config
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.adapter_config import (
    HEAD,
    TASKS,
    TENSORS,
    is_adapter_folder,
    read_adapter_config,
)
from llm_from_scratch.weights.assemble import Model


@dataclass(frozen=True)
class AboutAdapter:
    """What a folder says before any weight is read.

    `head` and `labels` are what `load` is to be asked for: None where the base has it already.
    """

    folder: Path
    base: str | None
    head: str | None
    labels: tuple[str, ...] | int | None
    problem_type: str | None = None


def find_adapter(path: Path | str) -> Path:
    """The folder of an adapter: itself, or the one in a run folder."""
    folder = Path(path).expanduser()
    for one in (folder, folder / "adapter"):
        if is_adapter_folder(one):
            return one
    raise UserError(
        f"{path} is no adapter: it has no adapter_config.json. Name the folder of an adapter, or "
        "of a run that trained one (--lora.rank)."
    )


def about_adapter(folder: Path) -> AboutAdapter:
    """What the adapter in a folder is for; `UserError` for broken files."""
    config = read_adapter_config(folder)
    if (folder / HEAD).is_file():
        return _from_head_json(folder, config.base)
    kind = next((kind for kind, task in TASKS.items() if task == config.task), None)
    if kind is None or kind == "embedding":
        return AboutAdapter(folder, config.base, None, None)
    return AboutAdapter(folder, config.base, kind, _count_labels(folder))


def _from_head_json(folder: Path, base: str | None) -> AboutAdapter:
    path = folder / HEAD
    values = read_json_object(path)
    kind, labels, problem = (values.get(name) for name in ("kind", "labels", "problem_type"))
    if kind not in HEADS:
        raise UserError(f"{path}: 'kind' is {shown(kind)}; it must be one of {', '.join(HEADS)}.")
    if not isinstance(labels, list) or any(not isinstance(name, str) for name in labels):
        raise UserError(f"{path}: 'labels' is {shown(labels)}; it must be a list of names.")
    if problem is not None and problem not in PROBLEMS:
        raise UserError(
            f"{path}: 'problem_type' is {shown(problem)}; it must be one of {', '.join(PROBLEMS)}."
        )
    head = None if kind in ("embedding", "masked_lm") else str(kind)
    return AboutAdapter(folder, base, head, tuple(labels) or None, problem)


def _count_labels(folder: Path) -> int | None:
    """How many labels the classifier in the folder has; None where there is none."""
    try:
        with safe_open(folder / TENSORS, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                last = name.removesuffix(".weight").rpartition(".")[2]
                shape = file.get_slice(name).get_shape()
                if last in ("score", "classifier", "out_proj") and len(shape) == 2:
                    return int(shape[0])
    except (SafetensorError, OSError, ValueError):
        pass  # said when it is loaded
    return None


def with_problem(model: Model, about: AboutAdapter) -> None:
    """Let a head know what its labels are."""
    if isinstance(model, Head) and about.problem_type is not None:
        model.head_config = replace(model.head_config, problem_type=about.problem_type)


def tokenizer_with(folder: Path, base: Tokenizer, model: Model) -> Tokenizer:
    """The tokenizer with which the adapter in a folder was trained, for a model on its base.

    PEFT's users keep it beside the adapter: its chat template may be another than the base's. Where
    the folder says nothing, the base's counts; so it does where the vocabulary beside the adapter
    is larger than the model's (a token to pad with, say, which no model ever reads), but for the
    chat template and where texts end. Raises `UserError` for broken files.
    """
    config = model.config
    rows = config.encoder.vocab_size if isinstance(config, EncoderDecoderConfig) else 0
    own = Tokenizer.load(folder) if has_tokenizer(folder) else None
    if own is not None and own.vocab_size <= (rows or config.vocab_size):
        own.chat_template = own.chat_template or base.chat_template
        own.extra_stop_ids |= base.extra_stop_ids
        return own
    template = read_config(folder).get("chat_template") if own is None else own.chat_template
    if template is None:
        return base
    found = copy.copy(base)
    found.config = {**base.config, "chat_template": template}
    ends = set() if own is None else {i for i in own.stop_ids if i < base.vocab_size}
    found.extra_stop_ids = base.extra_stop_ids | ends
    return found
