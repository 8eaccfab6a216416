"""The sizes of a GPT and the settings of its training, as one object."""

from __future__ import annotations

import dataclasses
from typing import Any

from llm_from_scratch.core.errors import UserError, nearest

SIZES = ("vocab_size", "n_embd", "n_layer", "n_head", "block_size", "dropout")


@dataclasses.dataclass(init=False)
class GPTConfig:
    """`GPTConfig(n_layer=6, n_head=6)`: what is not given keeps its default, GPT-2's sizes.

    `GPT.from_config` takes the sizes, `GPTTrainer.from_config` the rest; `block_size` and
    `batch_size` go to `create_dataloaders`. A name that is none of these is a `UserError`.
    """

    vocab_size: int = 50257
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    block_size: int = 1024
    dropout: float = 0.1
    batch_size: int = 8
    learning_rate: float = 6e-4
    weight_decay: float = 0.1
    max_steps: int = 100_000
    warmup_steps: int = 2000
    gradient_accumulation_steps: int = 4
    grad_clip: float = 1.0
    use_amp: bool = True
    eval_interval: int = 500
    eval_steps: int = 50
    save_interval: int = 5000

    def __init__(self, **kwargs: Any) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in kwargs:
            if name not in defaults:
                raise UserError(f"GPTConfig has no setting '{name}'.{nearest(name, defaults)}")
        for name, value in {**defaults, **kwargs}.items():
            setattr(self, name, value)

    def get_model_size(self) -> float:
        """Parameters of this GPT in millions, exactly: every embedding, norm and bias counted."""
        n = self.n_embd
        attention = 4 * (n * n + n)  # q, k, v of all heads together, and the output: each n x n
        mlp = (4 * n * n + 4 * n) + (4 * n * n + n)
        norms = 2 * 2 * n
        embeddings = self.vocab_size * n + self.block_size * n
        head = n * self.vocab_size
        return (embeddings + self.n_layer * (attention + mlp + norms) + 2 * n + head) / 1e6
