"""What a transformer needs besides attention: normalisation, positions and masks."""

import math

import torch
from torch import Tensor, nn

from llm_from_scratch.core.errors import UserError


def layer_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """(x - mean) / (std + eps) over the last axis, with the population's standard deviation.

    PyTorch's own layer norm divides by sqrt(variance + eps) instead (arXiv:1607.06450).
    """
    std = x.std(dim=-1, keepdim=True, unbiased=False)
    return (x - x.mean(dim=-1, keepdim=True)) / (std + eps)


class LayerNorm(nn.Module):
    """`layer_norm` followed by a learned stretch `gamma` and shift `beta` of each feature."""

    def __init__(self, d_model: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(d_model))
        self.beta = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * layer_norm(x, self.eps) + self.beta


def sinusoidal_position_encoding(d_model: int, sequence_length: int) -> Tensor:
    """(1, sequence_length, d_model): sin and cos of position / 10000^(2i / d_model), in turn."""
    rate = 10_000.0 ** (-torch.arange(0, d_model, 2).double() / d_model)
    angle = torch.arange(sequence_length)[:, None] * rate
    in_turn = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
    return in_turn[None, :, :d_model].float()


class PositionalEncoding(nn.Module):
    """x * sqrt(d_model) + table: without it, attention would see a bag of words."""

    pe: Tensor

    def __init__(self, d_model: int, max_sequence_length: int) -> None:
        super().__init__()
        self.scale = math.sqrt(d_model)
        self.register_buffer("pe", sinusoidal_position_encoding(d_model, max_sequence_length))

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, d_model) -> the same shape; raises `UserError` if t exceeds the table."""
        t, limit = x.shape[1], self.pe.shape[1]
        if t > limit:
            raise UserError(f"{t} tokens are too many: give at most max_sequence_len, {limit}.")
        return x * self.scale + self.pe[:, :t]


def create_padding_mask(tokens: Tensor, pad_token: int) -> Tensor:
    """(b, t) token ids -> (b, 1, t), True where there is only padding, for every query alike."""
    return (tokens == pad_token)[:, None, :]


def create_subsequent_mask(length: int, device: torch.device | str | None = None) -> Tensor:
    """The causal mask (1, length, length): True in the future. Join it to others with `|`."""
    return torch.ones(1, length, length, dtype=torch.bool, device=device).triu(diagonal=1)
