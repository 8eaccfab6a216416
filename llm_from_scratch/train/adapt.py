"""What of a model is fine-tuned: adapters on a frozen base, some of its layers, or all of it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from torch import nn

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.runlog import LiveLine
from llm_from_scratch.model.adapters import Freeze, freeze_layers
from llm_from_scratch.model.lora import LoraSettings, add_lora, switch_of
from llm_from_scratch.quant.base import pack_base
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.adapter_config import is_adapter_folder
from llm_from_scratch.weights.adapter_folder import about_adapter
from llm_from_scratch.weights.adapters_write import save_adapter
from llm_from_scratch.weights.sources import base_of, locate


def check_adaptation(lora: LoraSettings, freeze: Freeze) -> None:
    """Raise `UserError` for settings that contradict each other."""
    if lora.rank and (freeze.blocks or freeze.embeddings):
        raise UserError(
            "freeze.blocks and freeze.embeddings are for training the weights themselves; with "
            "lora.rank all of them are frozen already. Leave one of the two out."
        )


def adapt(
    model: nn.Module, lora: LoraSettings, freeze: Freeze, seed: int, line: LiveLine
) -> dict[str, Any]:
    """Prepare the model for its training; what is worth telling in summary.json."""
    check_adaptation(lora, freeze)
    if not lora.rank:
        if freeze.blocks or freeze.embeddings:
            freeze_layers(model, freeze)
        return {}
    told: dict[str, Any] = {}
    if lora.base is not None:
        packed = pack_base(model, lora.base)
        told = {"base_bytes": packed.bytes_after, "base_bytes_before": packed.bytes_before}
        line.say(
            f"Base: {packed.layers} layers in {lora.base}, {packed.bytes_after / 1e6:,.1f} MB "
            f"instead of {packed.bytes_before / 1e6:,.1f} MB."
        )
    add_lora(model, lora, seed)
    return told


def write_adapter(model: Any, folder: Path, base: str, tokenizer: Tokenizer) -> None:
    """The run's adapter/, for PEFT and for further training, where there is an adapter.

    A base that is a folder is named by its full path: the adapter may be read from anywhere. Where
    an adapter was trained on, its base stays what it is.
    """
    if switch_of(model) is None:
        return
    with contextlib.suppress(UserError):  # what is gone by now keeps its name
        place = locate(base)
        if place.is_dir() and is_adapter_folder(place):
            base = base_of(about_adapter(place))
    where = Path(base).expanduser()
    base = str(where.resolve()) if where.exists() else base
    save_adapter(model, folder / "adapter", base, tokenizer=tokenizer)
