"""What of a model is fine-tuned: adapters on a frozen base, some of its layers, or all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.runlog import LiveLine
from llm_from_scratch.model.adapters import Freeze, freeze_layers
from llm_from_scratch.model.lora import LoraSettings, add_lora, switch_of
from llm_from_scratch.quant.base import pack_base
from llm_from_scratch.weights.adapters_write import save_adapter


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


def write_adapter(model: Any, folder: Path, base: str) -> None:
    """The run's adapter/, for PEFT and for further training, where there is an adapter.

    A base that is a folder is named by its full path: the adapter may be read from anywhere.
    """
    if switch_of(model) is None:
        return
    where = Path(base).expanduser()
    save_adapter(model, folder / "adapter", str(where.resolve()) if where.exists() else base)
