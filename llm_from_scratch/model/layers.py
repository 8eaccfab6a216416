"""The parts of a block, smallest first: linear, norms, attention, feed-forward.

Axes: b batch, t time (queries), s source positions (keys), h query heads, k key-value heads,
d features of one head, m features of the model. `q_bhtd` is a tensor with these four axes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_from_scratch.model.attend import attend, attend_by_hand
from llm_from_scratch.model.cache import LayerCache
from llm_from_scratch.model.config import ModelConfig
from llm_from_scratch.model.mixed import product
from llm_from_scratch.model.positions import rotate
from llm_from_scratch.model.sight import Sight


class Linear(nn.Linear):
    """y = x W^T + b, computed in the dtype of x.

    Weights stay in the precision in which the optimiser needs them (fp32); the product runs in the
    precision of the activations. This one line replaces autocast.
    """

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in fp32 (Zhang & Sennrich, arXiv:1910.07467).

    With `plus_one` the factor is 1 + weight, so that weight decay pulls it towards one.
    """

    def __init__(self, width: int, eps: float, plus_one: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.plus_one = plus_one
        self.weight = nn.Parameter(torch.zeros(width) if plus_one else torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        weight = self.weight.float()
        return (x32 * (1.0 + weight if self.plus_one else weight)).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias over the last axis, in fp32 (arXiv:1607.06450)."""

    def __init__(self, width: int, eps: float, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        y = F.layer_norm(x.float(), self.weight.shape, self.weight.float(), bias, self.eps)
        return y.to(x.dtype)


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """The norm that the config names, over `width` features."""
    match config.norm:
        case "rms":
            return RMSNorm(width, config.norm_eps)
        case "rms_plus_one":
            return RMSNorm(width, config.norm_eps, plus_one=True)
    return LayerNorm(width, config.norm_eps, bias=config.norm == "layer")


class Attention(nn.Module):
    """Queries look at keys and take a weighted sum of values, in n_heads subspaces at once.

    `window` marks a layer that sees its neighbourhood only. Of every mixer of positions this is the
    signature: (x_btm, sight, this layer's part of the cache) -> y_btm.
    """

    def __init__(self, config: ModelConfig, window: bool = False) -> None:
        super().__init__()
        self.config = config
        self.window = window
        self.scale = (config.attention_width or config.head_dim) ** -0.5
        m, d, bias = config.d_model, config.head_dim, config.attention_bias
        self.q = Linear(m, config.n_heads * d, bias=bias)
        self.k = Linear(m, config.n_kv_heads * d, bias=bias)
        self.v = Linear(m, config.n_kv_heads * d, bias=bias)
        self.o = Linear(config.n_heads * d, m, bias=config.output_bias)
        if config.qk_norm is not None:
            whole = config.qk_norm == "all"
            self.q_norm = make_norm(config, config.n_heads * d if whole else d)
            self.k_norm = make_norm(config, config.n_kv_heads * d if whole else d)

    def split(self, x_btm: Tensor) -> Tensor:
        """(b, t, heads * d) -> (b, heads, t, d)."""
        b, t, width = x_btm.shape  # -1 for the heads would fail without rows
        d = self.config.head_dim
        return x_btm.view(b, t, width // d, d).transpose(1, 2)

    def queries_keys(self, x_btm: Tensor) -> tuple[Tensor, Tensor]:
        """(b, h, t, d) and (b, k, t, d), normed where the config says so."""
        q, k = self.q(x_btm), self.k(x_btm)
        match self.config.qk_norm:
            case "all":
                return self.split(self.q_norm(q)), self.split(self.k_norm(k))
            case "head":
                return self.q_norm(self.split(q)), self.k_norm(self.split(k))
        return self.split(q), self.split(k)

    def forward(self, x_btm: Tensor, sight: Sight, cache: LayerCache | None) -> Tensor:
        mask, causal, cos_sin = sight.of(self.window)
        q_bhtd, k_bktd = self.queries_keys(x_btm)
        v_bktd = self.split(self.v(x_btm))
        if cos_sin is not None:
            q_bhtd, k_bktd = rotate(q_bhtd, cos_sin), rotate(k_bktd, cos_sin)
        if cache is not None:
            k_bktd, v_bktd = cache.append(k_bktd, v_bktd)
        if sight.apart is not None:
            q, k, v = (sight.apart.split(x) for x in (q_bhtd, k_bktd, v_bktd))
            return self.o(sight.apart.join(self.weigh(q, k, v, mask, causal)))
        return self.mix(q_bhtd, k_bktd, v_bktd, mask, causal)

    def source_keys_values(self, source_bsm: Tensor) -> tuple[Tensor, Tensor]:
        """What the target looks at in an encoded source: (b, k, s, d) each."""
        return self.split(self.k(source_bsm)), self.split(self.v(source_bsm))

    def look_across(self, x_btm: Tensor, sight: Sight, cache: LayerCache | None) -> Tensor:
        """Attention of the target to the encoded source, whose keys the cache keeps."""

        def keys_values() -> tuple[Tensor, Tensor]:
            assert sight.source is not None
            return self.source_keys_values(sight.source)

        k_bksd, v_bksd = cache.look_across(keys_values) if cache is not None else keys_values()
        return self.mix(self.split(self.q(x_btm)), k_bksd, v_bksd, sight.source_mask, False)

    def mix(
        self, q_bhtd: Tensor, k_bksd: Tensor, v_bksd: Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:
        """The weighted sums of all heads, brought together: (b, t, m)."""
        return self.o(self.weigh(q_bhtd, k_bksd, v_bksd, mask, causal))

    def weigh(
        self, q_bhtd: Tensor, k_bksd: Tensor, v_bksd: Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:
        """Attention's weighted sums, side by side for all heads: (b, t, h * d)."""
        dropout = self.config.dropout if self.training else 0.0
        softcap = self.config.attention_softcap
        if softcap is None:
            y_bhtd = attend(
                q_bhtd, k_bksd, v_bksd, mask, causal=causal, scale=self.scale, dropout=dropout
            )
        else:  # no kernel caps the scores
            group = q_bhtd.shape[1] // k_bksd.shape[1]
            k_bksd, v_bksd = (x.repeat_interleave(group, dim=1) for x in (k_bksd, v_bksd))
            if causal:
                t = q_bhtd.shape[2]
                mask = torch.ones(t, t, dtype=torch.bool, device=q_bhtd.device).tril_()
            y_bhtd = attend_by_hand(
                q_bhtd, k_bksd, v_bksd, mask, scale=self.scale, softcap=softcap, dropout=dropout
            )
        return y_bhtd.transpose(1, 2).flatten(2)


def activate(x: Tensor, name: str) -> Tensor:
    """The activation between two matrices, by its name in a config."""
    match name:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "tanh":
            return x.tanh()
    return F.relu(x)


class FeedForward(nn.Module):
    """Each position on its own: widen, activate, narrow.

    Gated (SwiGLU and its kin, arXiv:2002.05202): down(activation(gate(x)) * up(x)); otherwise
    down(activation(up(x))).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        m, f, bias = config.d_model, config.d_ff, config.feed_forward_bias
        if config.gated:
            self.gate = Linear(m, f, bias=bias)
        self.up = Linear(m, f, bias=bias)
        self.down = Linear(f, m, bias=bias)

    def forward(self, x_btm: Tensor) -> Tensor:
        name = self.config.activation
        if self.config.gated:
            return self.down(activate(self.gate(x_btm), name) * self.up(x_btm))
        return self.down(activate(self.up(x_btm), name))
