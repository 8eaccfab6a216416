"""A GPT to be read: token and position embeddings, blocks of attention and MLP, a head.

Attention is `llm_from_scratch.transformer`'s, head by head, under a causal mask. The same network
made fast is `llm_from_scratch.model.Decoder`; `llm_from_scratch.gpt.to_decoder` carries trained
weights over, and a test holds the two to the same logits.

Axes: b batch, t time, n features of the model (`n_embd`), v vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.sampling import SamplingSettings, choose, make_generator
from llm_from_scratch.gpt.config import SIZES, GPTConfig
from llm_from_scratch.transformer.attention import MultiHeadAttention
from llm_from_scratch.transformer.utils import create_subsequent_mask


class GPTMultiHeadAttention(nn.Module):
    """Multi-head self-attention in which no position sees a later one."""

    mask: Tensor

    def __init__(self, n_embd: int, n_head: int, dropout: float = 0.1) -> None:
        super().__init__()
        if n_embd % n_head:
            raise UserError(
                f"n_embd ({n_embd}) is not a multiple of n_head ({n_head}): each head gets an "
                "equal share of the features."
            )
        self.attention = MultiHeadAttention(n_head, n_embd // n_head, n_embd // n_head, n_embd)
        self.dropout = nn.Dropout(dropout)
        # Kept from call to call and made longer when needed; not a weight, so never saved.
        self.register_buffer("mask", create_subsequent_mask(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, n) -> (b, t, n)."""
        t = x.shape[1]
        if t > self.mask.shape[1]:
            self.mask = create_subsequent_mask(t, x.device)
        return self.dropout(self.attention(x, x, x, self.mask[:, :t, :t]))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): norms come first (GPT-2's "pre-norm")."""

    def __init__(self, n_embd: int, n_head: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = GPTMultiHeadAttention(n_embd, n_head, dropout)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd),
            nn.GELU(),
            nn.Linear(4 * n_embd, n_embd),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, n) -> (b, t, n)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A decoder-only transformer (Radford et al. 2019): each position predicts the next token.

    `sizes` holds the arguments it was made with: `GPT(**model.sizes)` is another of its shape.
    Raises `UserError` for sizes that cannot be.
    """

    def __init__(
        self,
        vocab_size: int,
        n_embd: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        block_size: int = 1024,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        values = (vocab_size, n_embd, n_layer, n_head, block_size, dropout)
        self.sizes: dict[str, int | float] = dict(zip(SIZES, values, strict=True))
        for name, value in self.sizes.items():
            if name != "dropout" and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")
        if not 0.0 <= dropout < 1.0:
            raise UserError(f"dropout is {dropout}; it must be at least 0 and below 1.")
        self.block_size = block_size
        self.n_embd = n_embd
        self.token_embedding = nn.Embedding(vocab_size, n_embd)
        self.position_embedding = nn.Embedding(block_size, n_embd)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(TransformerBlock(n_embd, n_head, dropout) for _ in range(n_layer))
        )
        self.ln_f = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        self.apply(self._init_weights)

    @classmethod
    def from_config(cls, config: GPTConfig) -> GPT:
        """The GPT of a config's sizes."""
        return cls(**{name: getattr(config, name) for name in SIZES})

    def _init_weights(self, module: nn.Module) -> None:
        """Small normal weights, zero biases; norms keep PyTorch's ones and zeros."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """idx (b, t) token ids -> (logits, loss).

        Without targets: logits (b, t, v) and None. With targets (b, t): the logits flattened to
        (b * t, v), and the mean cross-entropy in nats over the targets that are not -100.
        Raises `UserError` if t is more than `block_size`.
        """
        t = idx.shape[1]
        if t > self.block_size:
            raise UserError(
                f"{t} tokens were given, but the model's block_size is {self.block_size}: give "
                f"the last {self.block_size} only."
            )
        positions = torch.arange(t, device=idx.device)
        x = self.drop(self.token_embedding(idx) + self.position_embedding(positions))
        logits = self.head(self.ln_f(self.blocks(x)))
        if targets is None:
            return logits, None
        logits = logits.flatten(0, 1)
        return logits, F.cross_entropy(logits, targets.flatten(), ignore_index=-100)

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> Tensor:
        """Go on writing: (b, t) ids -> (b, t + max_new_tokens) ids, the prompt included.

        `temperature` 0 always takes the likeliest token; `top_k` keeps only the k likeliest. Draws
        follow `torch.manual_seed`. Dropout is off meanwhile. The last `block_size` tokens are what
        the model sees.
        """
        if idx.shape[1] == 0:
            raise UserError("There is no prompt: give at least one token to go on from.")
        settings = SamplingSettings(temperature=temperature, top_k=top_k or 0)
        seeds = torch.randint(2**62, (idx.shape[0],)).tolist()
        generators = [make_generator(seed) for seed in seeds]
        was_training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                logits, _ = self(idx[:, -self.block_size :])
                chosen = choose(logits[:, -1], settings, generators)
                idx = torch.cat([idx, chosen[:, None]], dim=1)
        finally:
            self.train(was_training)
        return idx
