"""The decoder-only transformer: every decoder family is this file under a different config.

Read it from top to bottom: a block mixes positions (attention) and then works on each of them alone
(feed-forward); a stack embeds tokens and runs the blocks; the decoder turns the last state into
logits. `encoder.py` and `encoder_decoder.py` build on the same stack.

Axes: b batch, t time, m features of the model, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.cache import KVCache, LayerCache
from llm_from_scratch.model.config import ModelConfig
from llm_from_scratch.model.layers import Attention, Linear, make_norm
from llm_from_scratch.model.parts import make_feed_forward, make_mixer
from llm_from_scratch.model.positions import (
    angles,
    relative_buckets,
    rope_frequencies,
    rope_loudness,
    sinusoidal_positions,
)
from llm_from_scratch.model.sight import Sight, look


class Block(nn.Module):
    """Attention, then (where there is a source) attention to it, then feed-forward.

    Each is a branch off the residual stream x. Where its norms stand is the config's `residual`:
    pre x + f(norm(x)), post norm(x + f(x)), branch_end x + norm(f(x)), sandwich
    x + norm(f(norm(x))) and parallel, which is pre with both branches taken off the same x.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.kind = config.residual
        self.has_source = config.cross_attention
        m = config.d_model
        if layer > 0 or config.first_norm:
            self.attention_norm = make_norm(config, m)
        else:
            self.attention_norm = nn.Identity()
        self.attention = make_mixer(config, layer)
        if config.cross_attention:
            self.cross_norm = make_norm(config, m)
            self.cross = Attention(config)
        self.feed_forward_norm = make_norm(config, m)
        self.feed_forward = make_feed_forward(config, layer)
        if self.kind == "sandwich":
            self.attention_end_norm = make_norm(config, m)
            self.feed_forward_end_norm = make_norm(config, m)

    def forward(self, x_btm: Tensor, sight: Sight, cache: LayerCache | None) -> Tensor:
        def attention(y: Tensor) -> Tensor:
            return self.attention(y, sight, cache)

        if self.kind == "parallel":
            y_btm = self.feed_forward(self.feed_forward_norm(x_btm))
            y_btm = F.dropout(y_btm, self.dropout, self.training)
            return self.branch(x_btm, "attention", attention) + y_btm
        x_btm = self.branch(x_btm, "attention", attention)
        if self.has_source:
            x_btm = self.branch(x_btm, "cross", lambda y: self.cross.look_across(y, sight, cache))
        return self.branch(x_btm, "feed_forward", self.feed_forward)

    def branch(self, x_btm: Tensor, name: str, run: Callable[[Tensor], Tensor]) -> Tensor:
        """x with what the branch adds to it."""
        norm: nn.Module = getattr(self, f"{name}_norm")
        if self.kind == "post":
            return norm(x_btm + F.dropout(run(x_btm), self.dropout, self.training))
        y_btm = norm(run(x_btm)) if self.kind == "branch_end" else run(norm(x_btm))
        if self.kind == "sandwich":
            y_btm = getattr(self, f"{name}_end_norm")(y_btm)
        return x_btm + F.dropout(y_btm, self.dropout, self.training)


class Stack(nn.Module):
    """Embedded tokens and a pile of blocks: what decoder and encoder have in common.

    `compute_dtype` is the precision of the activations; None means that of the weights. Training
    keeps fp32 weights and computes in bf16 where that is faster. With `recompute`, training keeps
    what enters each block alone and computes the rest again for the gradients.
    """

    compute_dtype: torch.dtype | None = None
    recompute: bool = False
    frequencies: Tensor
    local_frequencies: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        m = config.d_model
        self.embedding = nn.Embedding(config.vocab_size, m)
        if config.position == "learned":
            self.positions = nn.Embedding(config.max_seq_len + config.position_offset, m)
        if config.n_segments:
            self.segments = nn.Embedding(config.n_segments, m)
        if config.embedding_norm:
            self.embedding_norm = make_norm(config, m)
        if config.relative_buckets:
            self.relative_bias = nn.Embedding(config.relative_buckets, config.n_heads)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = make_norm(config, m) if config.final_norm else nn.Identity()
        if not self.embedding.weight.is_meta:  # else whoever brings the weights calls it
            self.make_frequencies()

    @property
    def activation_dtype(self) -> torch.dtype:
        """The precision in which a pass computes."""
        table: Any = getattr(self.embedding, "weight", self.embedding)  # packed ones say it, too
        dtype: torch.dtype = self.compute_dtype or table.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def make_frequencies(self) -> None:
        """(Re)compute the rotary frequencies, which are no weights and are never saved."""
        config, plain, local = self.config, None, None
        if config.position == "rope":
            plain = rope_frequencies(config.rope_dim, config.rope_theta, config.rope_scaling)
            if config.local_rope_theta is not None:
                local = rope_frequencies(config.rope_dim, config.local_rope_theta, None)
        self.register_buffer("frequencies", plain, persistent=False)
        self.register_buffer("local_frequencies", local, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Stack:
        """What `.to`, `.bfloat16` and their kin do; frequencies move along, but stay in fp32.

        Rounded to bf16 they would be wrong by whole turns some hundred positions on.
        """
        old = {name: self._buffers.get(name) for name in ("frequencies", "local_frequencies")}
        super()._apply(fn, recurse)
        for name, exact in old.items():
            moved = self._buffers.get(name)
            if exact is not None and moved is not None and moved.itemsize < exact.itemsize:
                self._buffers[name] = exact.to(moved.device)
        return self

    def embed(self, tokens_bt: Tensor, positions: Tensor, segments_bt: Tensor | None) -> Tensor:
        """What enters the first block: (b, t, m)."""
        config = self.config
        x_btm = self.embedding(tokens_bt)
        if config.scale_embedding:
            x_btm = x_btm * math.sqrt(config.d_model)
        if config.n_segments:
            zero = tokens_bt.new_zeros(())
            x_btm = x_btm + self.segments(zero if segments_bt is None else segments_bt)
        if config.position == "learned":
            x_btm = x_btm + self.positions(positions + config.position_offset)
        elif config.position == "sinusoidal":
            x_btm = x_btm + sinusoidal_positions(positions, config.d_model).to(x_btm.dtype)
        if config.embedding_norm:
            x_btm = self.embedding_norm(x_btm)
        x_btm = x_btm.to(self.compute_dtype or x_btm.dtype)
        return F.dropout(x_btm, config.dropout, self.training)

    def sight(self, tokens_bt: Tensor, documents_bt: Tensor | None, cache: KVCache | None) -> Sight:
        """Who looks at whom, and from where."""
        config = self.config
        sight = look(config, tokens_bt, documents_bt, cache)
        if config.position == "rope":
            loudness = rope_loudness(config.rope_scaling)
            sight.angles = angles(sight.positions, self.frequencies, loudness)
            if self.local_frequencies is not None:
                sight.window_angles = angles(sight.positions, self.local_frequencies)
        if config.relative_buckets:
            keys = sight.positions
            if cache is not None:
                keys = torch.arange(cache.longest + tokens_bt.shape[1], device=keys.device)
            buckets = relative_buckets(keys[..., None, :] - sight.positions[..., None], config)
            bias = self.relative_bias(buckets).movedim(-1, -3)  # (h, t, s) or (b, h, t, s)
            sight.bias = bias if bias.dim() == 4 else bias[None]
        return sight

    def run(self, x_btm: Tensor, sight: Sight, cache: KVCache | None) -> Tensor:
        """Through all blocks and the last norm: (b, t, m)."""
        again = self.recompute and self.training and torch.is_grad_enabled() and cache is None
        for layer, block in enumerate(self.blocks):
            if again:
                x_btm = checkpoint(block, x_btm, sight, None, use_reentrant=False)
                continue
            x_btm = block(x_btm, sight, cache.layer(layer) if cache is not None else None)
        return self.final_norm(x_btm)

    def check_length(self, t: int) -> None:
        if t > self.config.max_seq_len:
            raise UserError(
                f"{t} tokens were given, but the model's context is {self.config.max_seq_len} "
                "tokens. Give a shorter text."
            )

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw fresh weights: normal(0, init_std), and less for what writes into the residual.

        The 2 * n_layers residual writes (3 * n_layers with cross-attention) add up, so their
        variance is divided by that number (Radford et al. 2019). Norms start at one, biases at
        zero.
        """
        writes = (3 if self.config.cross_attention else 2) * self.config.n_layers
        last = ("attention.o.weight", "cross.o.weight", "down.weight", "feed_forward.down")
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                one = name.endswith("norm.weight") and self.config.norm != "rms_plus_one"
                parameter.fill_(1.0 if one else 0.0)
                continue
            std = self.config.init_std
            if name.endswith(last):
                std /= math.sqrt(writes)
            drawn = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
            parameter.copy_(drawn)


class Decoder(Stack):
    """Token ids in, next-token logits out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens_bt: Tensor,
        *,
        document_ids_bt: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (b, t, v) of the token that follows each position."""
        return self.logits(self.hidden(tokens_bt, document_ids_bt=document_ids_bt, cache=cache))

    def logits(self, hidden_btm: Tensor) -> Tensor:
        """Scores of every vocabulary entry: (..., m) -> (..., v)."""
        if self.config.scale_logits:
            hidden_btm = hidden_btm * self.config.d_model**-0.5
        logits = self.head(hidden_btm)
        softcap = self.config.logit_softcap
        return logits if softcap is None else (logits / softcap).tanh() * softcap

    def hidden(
        self,
        tokens_bt: Tensor,
        *,
        document_ids_bt: Tensor | None = None,
        cache: KVCache | None = None,
        source_bsm: Tensor | None = None,
        source_mask_bs: Tensor | None = None,
    ) -> Tensor:
        """The final, normed state of each position: (b, t, m).

        `document_ids_bt` numbers the documents packed into each row: tokens see only their own
        document, whose positions count from 0. An attention mask (1 text, 0 padding) is such a
        numbering. With a `cache`, tokens continue what it holds. `source_bsm` is what an encoder
        made of the source, `source_mask_bs` is 1 where that is no padding.
        """
        if cache is not None:
            cache.start(tokens_bt.shape[1])
        elif document_ids_bt is None:
            self.check_length(tokens_bt.shape[1])
        sight = self.sight(tokens_bt, document_ids_bt, cache)
        if document_ids_bt is not None:
            self.check_length(sight.longest)
        sight.look_across(source_bsm, source_mask_bs, cache)
        x_btm = self.run(self.embed(tokens_bt, sight.positions, None), sight, cache)
        if cache is not None:
            cache.finish()
        return x_btm
