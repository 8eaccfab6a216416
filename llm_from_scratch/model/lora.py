"""Low-rank adapters (LoRA, arXiv:2106.09685): a frozen layer and a small, trained detour."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class LoraSettings:
    """Which layers get an adapter, and of which kind; rank 0 trains the model itself."""

    rank: int = 0
    """The adapters' rank; 0 trains the weights themselves."""
    alpha: float = 16.0
    """What the detour is multiplied by, before the division by the rank."""
    dropout: float = 0.0
    """Share of the detour's inputs dropped while training."""
    kind: str = "lora"
    """lora, rslora (divides by the root of the rank) or dora (learns the lengths apart)."""
    targets: tuple[str, ...] = ()
    """Names of the layers that get one; default all linear layers in the blocks."""
    base: str | None = None
    """nf4, int4 or int8: keep the frozen base in so many bits (QLoRA)."""


def add_lora(model: nn.Module, settings: LoraSettings, seed: int) -> None:
    """Freeze the model and put adapters around its layers."""
    raise NotImplementedError
