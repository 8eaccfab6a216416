"""The layout of sentence embedding models: how an encoder's states become one vector.

Beside the encoder's own files lie `modules.json`, which lists the steps, `1_Pooling/config.json`,
which says how states are pooled, and `sentence_bert_config.json`, which has the longest text. This
is the layout of the sentence-transformers library (arXiv:1908.10084), which reads what is written
here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.json_files import read_json, read_json_object
from llm_from_scratch.model.heads import HeadConfig, HeadStyle
from llm_from_scratch.weights.config_json import Fields
from llm_from_scratch.weights.stored import is_name

MODULES = "modules.json"
LENGTH = "sentence_bert_config.json"
POOLING = "1_Pooling"
# Their names of the ways to pool: as flags (which every version reads), and as one field.
FLAGS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "last": "pooling_mode_lasttoken",
    "max": "pooling_mode_max_tokens",
    "root": "pooling_mode_mean_sqrt_len_tokens",
    "weighted": "pooling_mode_weightedmean_tokens",
}
ONE_FIELD = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
TYPE = "sentence_transformers.models."


def is_embedder(folder: Path | None) -> bool:
    """Whether the folder says how its states become one vector."""
    return folder is not None and (folder / MODULES).is_file()


def read_layout(folder: Path) -> HeadConfig | None:
    """The embedder that the folder describes; None where it has no `modules.json`.

    Raises `UserError` for a step that we do not have, such as a dense layer behind the pooling.
    """
    path = folder / MODULES
    if not path.is_file():
        return None
    steps = read_json(path)
    if not isinstance(steps, list) or any(not isinstance(step, dict) for step in steps):
        raise UserError(f"{path} is not a list of steps; copy the model anew.")
    kinds = [str(step.get("type")).rpartition(".")[2] for step in steps]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UserError(
            f"{path} has the steps {', '.join(kinds):.200}; supported are Transformer, Pooling "
            "and, after them, Normalize. head='none' gives the model alone."
        )
    inner, place = (steps[i].get("path") for i in (0, 1))
    if inner not in ("", None) or not is_name(place):
        raise UserError(
            f"{path}: the encoder must lie in the folder itself, and its pooling below."
        )
    length = None
    if (folder / LENGTH).is_file():
        table = read_json_object(folder / LENGTH)
        if table.get("do_lower_case"):
            raise UserError(f"{folder / LENGTH}: 'do_lower_case' is true, which is not supported.")
        if table.get("max_seq_length") is not None:
            length = Fields(table, {}, str(folder / LENGTH)).integer("max_seq_length")
    return HeadConfig(
        "embedding",
        HeadStyle(pooling=_pooling(folder / place / "config.json")),
        normalise=len(kinds) == 3,
        max_length=length,
    )


def _pooling(path: Path) -> str:
    table = read_json_object(path)
    found = [name for name, flag in FLAGS.items() if table.get(flag)]
    given = table.get("pooling_mode")
    if given is not None:
        listed = given if isinstance(given, list) else [given]
        found = [ONE_FIELD.get(str(name), str(name)) for name in listed]
    elif not found:
        found = ["mean"]
    if len(found) != 1 or found[0] not in ONE_FIELD.values():
        raise UserError(
            f"{path} pools by {', '.join(found):.200}; supported is one of {', '.join(ONE_FIELD)}."
        )
    return found[0]


def layout_files(head: HeadConfig, d_model: int, max_seq_len: int) -> dict[str, Any]:
    """The files of the layout: their name in the folder -> their content."""
    pooling = head.style.pooling
    if pooling not in ONE_FIELD.values():
        raise UserError(
            f"An embedder that pools by '{pooling}' cannot be saved; use cls, mean or last."
        )
    steps = ["Transformer", "Pooling", *(["Normalize"] if head.normalise else [])]
    places = ["", POOLING, "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": places[i], "type": TYPE + step}
        for i, step in enumerate(steps)
    ]
    flags = {flag: name == pooling for name, flag in FLAGS.items()}
    return {
        MODULES: modules,
        LENGTH: {"max_seq_length": head.max_length or max_seq_len, "do_lower_case": False},
        f"{POOLING}/config.json": {"word_embedding_dimension": d_model, **flags},
    }


def write_layout(head: HeadConfig, d_model: int, max_seq_len: int, folder: Path) -> None:
    """Write the layout's files beside those of the encoder."""
    for name, content in layout_files(head, d_model, max_seq_len).items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
