"""A pass of the model as a list of kernel calls: the fast twin of `runner.PlainRunner`.

What costs time when a single token goes through a small model is less the arithmetic than the way
there: PyTorch is asked a thousand times for something that takes a microsecond. Here the first pass
of a shape is recorded, kernel call by kernel call, over fixed buffers; a later one fills in tokens,
positions and pages, and replays the record in one go. The tokens of all texts lie one behind the
other, whatever their lengths, so nothing is padded.

It does what `Decoder` does, in the same order: read `_attend` and `_after_attention` beside
`Block.forward`.

Letters: n tokens of a pass, w of them whose logits are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from typing import Any

import torch
from torch import Tensor, nn

from llm_from_scratch.generate.requests import Feed, Sequence, Writer
from llm_from_scratch.generate.runner import PlainRunner, Runner
from llm_from_scratch.model.cache import PagePool
from llm_from_scratch.model.config import ModelConfig
from llm_from_scratch.model.decoder import Block, Decoder
from llm_from_scratch.model.layers import Attention, FeedForward, RMSNorm
from llm_from_scratch.model.lora import switch_of
from llm_from_scratch.model.positions import rope_loudness
from llm_from_scratch.quant import kernels
from llm_from_scratch.quant.linear import QuantLinear
from llm_from_scratch.quant.packed import PackedWeight

KEPT = 8  # programs: of the last numbers of tokens that a pass had


def make_runner(model: Writer, pool: PagePool) -> Runner:
    """The fastest runner for a model that this machine has."""
    if isinstance(model, Decoder) and why_plain(model, pool) is None:
        return KernelRunner(model, pool)
    return PlainRunner(model, pool)


def why_plain(model: Decoder, pool: PagePool) -> str | None:
    """Why a decoder goes through PyTorch; None where the kernels can run it."""
    config = model.config
    if switch_of(model) is not None:
        return "it has adapters, which may differ from text to text"
    known = pool.keys.dtype in kernels.POOL_TYPES and pool.page_size == kernels.PAGE
    if pool.keys.device.type != "cpu" or not known:
        return "its cache is not one of the kernels'"
    if (
        not config.norm.startswith("rms")
        or config.residual not in ("pre", "sandwich", "branch_end")
        or config.position != "rope"
        or not config.causal
        or not config.final_norm
        or config.n_segments
        or config.embedding_norm
        or config.relative_buckets
        or config.cross_attention
        or config.activation not in ("silu", "gelu_tanh")
    ):
        return "it is built in another way than Llama"
    for block in model.blocks:
        assert isinstance(block, Block)
        if type(block.attention) is not Attention or type(block.feed_forward) is not FeedForward:
            return "it has other layers than attention and feed-forward"
        if not config.gated:
            return "its feed-forward has no gate"
        a, f = block.attention, block.feed_forward
        for layer in (a.q, a.k, a.v, a.o, f.gate, f.up, f.down):
            if not isinstance(layer, QuantLinear):
                return "not all of its matrices are packed"
            if layer.bias is not None and layer.bias.dtype != torch.float32:
                return "its biases are in less than fp32"
    return None if kernels.available() else "there are no compiled kernels"


def spaced(rows: int, width: int) -> Tensor:
    """(rows, width) numbers whose rows do not begin a multiple of 1,024 bytes apart.

    A cache puts such addresses into the same few places, where they drive each other out.
    """
    return torch.empty(rows, width + (16 if width % 256 == 0 else 0))[:, :width]


class Buffers:
    """Where the activations of a pass lie, all fp32, for up to `rows` tokens of `texts` texts."""

    def __init__(self, config: ModelConfig, rows: int, texts: int, page_size: int) -> None:
        m, d, f = config.d_model, config.head_dim, config.d_ff
        self.rows, self.texts = rows, texts
        self.x_nm = torch.empty(rows, m)  # the residual stream
        self.y_nm = torch.empty(rows, m)
        self.qkv_n = spaced(rows, (config.n_heads + 2 * config.n_kv_heads) * d)
        self.mixed_nhd = torch.empty(rows, config.n_heads, d)
        self.gate_up_n = spaced(rows, 2 * f)
        self.angles = torch.empty(rows, 2, config.rope_dim)
        self.local_angles = torch.empty(rows, 2, config.rope_dim)
        self.position_n = torch.empty(rows, dtype=torch.int32)
        self.slot_n = torch.empty(rows, dtype=torch.int32)
        self.text_n = torch.empty(rows, dtype=torch.int32)
        pages = -(-config.max_seq_len // page_size)
        self.pages_tp = torch.zeros(texts, pages, dtype=torch.int32)


class KernelRunner:
    """Llama-like decoders with packed weights on a CPU."""

    def __init__(self, model: Decoder, pool: PagePool) -> None:
        self.model = model
        self.pool = pool
        self.config = model.config
        # Layers by name, whatever classes stand there: `why_plain` has looked at them.
        self.blocks: list[Any] = list(model.blocks)
        for block in self.blocks:
            join([block.attention.q, block.attention.k, block.attention.v])
            join([block.feed_forward.gate, block.feed_forward.up])
        self.buffers = Buffers(self.config, 8, 8, pool.page_size)
        self._programs: dict[tuple[int, int, int], tuple[kernels.Program, kernels.Program]] = {}

    @torch.inference_mode()
    def run(self, feeds: Many[Feed]) -> Tensor:
        n = sum(len(feed.tokens) for feed in feeds)
        if n > self.buffers.rows or len(feeds) > self.buffers.texts:
            rows, texts = max(n, self.buffers.rows), max(len(feeds), self.buffers.texts)
            self._programs = {}  # they know the old ones
            self.buffers = Buffers(self.config, rows, texts, self.pool.page_size)
        with kernels.pytorch_alone():
            wanted = self._fill(feeds)
        w, buffers = len(wanted), self.buffers
        key = n, w, torch.get_num_threads()
        programs = self._programs.pop(key, None)
        fresh = programs is None
        first, second = programs or (kernels.Program(), kernels.Program())
        if fresh:
            with first.record():
                self._first_part(n)
        else:
            first()
        if w < n:  # what follows is for those alone whose logits are wanted
            index = torch.tensor(wanted, dtype=torch.long)  # there may be none
            buffers.x_nm[:w] = buffers.x_nm[index]
            buffers.mixed_nhd[:w] = buffers.mixed_nhd[index]
        if fresh:
            with second.record():
                self._second_part(w)
        else:
            second()
        self._programs[key] = first, second
        if len(self._programs) > KEPT:
            del self._programs[next(iter(self._programs))]
        return self.model.logits(buffers.y_nm[:w])

    def leave(self, sequence: Sequence) -> None:
        """Nothing is kept of a sequence."""

    def _fill(self, feeds: Many[Feed]) -> list[int]:
        """Write down what a pass is about; the places of the tokens whose logits are wanted."""
        buffers, size = self.buffers, self.pool.page_size
        pages_tp = buffers.pages_tp.numpy()  # which takes lists of numbers faster than PyTorch
        tokens: list[int] = []
        position: list[int] = []
        slot: list[int] = []
        text: list[int] = []
        wanted: list[int] = []
        for number, feed in enumerate(feeds):
            table, start = feed.sequence.table, feed.sequence.cached
            end = start + len(feed.tokens)
            tokens += feed.tokens
            position += range(start, end)
            slot += [table[p // size] * size + p % size for p in range(start, end)]
            text += [number] * len(feed.tokens)
            wanted += range(len(tokens) - feed.want, len(tokens))
            pages_tp[number, : len(table)] = table
        n = len(tokens)
        buffers.position_n.numpy()[:n] = position
        buffers.slot_n.numpy()[:n] = slot
        buffers.text_n.numpy()[:n] = text
        x_nm = self.model.embedding(torch.tensor(tokens))
        if self.config.scale_embedding:
            x_nm = x_nm * math.sqrt(self.config.d_model)
        buffers.x_nm[:n] = x_nm
        return wanted

    def _first_part(self, n: int) -> None:
        """Everything up to the last attention."""
        model, buffers = self.model, self.buffers
        position_n, loudness = buffers.position_n[:n], rope_loudness(self.config.rope_scaling)
        kernels.angles(position_n, model.frequencies, loudness, buffers.angles[:n])
        if model.local_frequencies is not None:
            local_angles = buffers.local_angles[:n]
            kernels.angles(position_n, model.local_frequencies, out=local_angles)
        for layer, block in enumerate(self.blocks):
            if layer:
                self._after_attention(self.blocks[layer - 1], n)
            self._attend(layer, block, n)

    def _second_part(self, w: int) -> None:
        """The rest of the last block, and the last norm."""
        self._after_attention(self.blocks[-1], w)
        self._norm(self.model.final_norm, self.buffers.x_nm[:w], self.buffers.y_nm[:w])

    def _attend(self, layer: int, block: Any, n: int) -> None:
        """norm, queries keys and values, rotation, into the cache, attention."""
        config, buffers, pool, attention = self.config, self.buffers, self.pool, block.attention
        h, k, d = config.n_heads, config.n_kv_heads, config.head_dim
        qkv_n = buffers.qkv_n[:n]
        source_nm = self._into(block.attention_norm, n)
        side_by_side([attention.q, attention.k, attention.v], source_nm, qkv_n)
        q_n, k_n, v_n = qkv_n.split([h * d, k * d, k * d], dim=1)
        if config.qk_norm is not None:
            for x_n, norm in ((q_n, attention.q_norm), (k_n, attention.k_norm)):
                for part in [x_n] if config.qk_norm == "all" else x_n.split(d, dim=1):
                    self._norm(norm, part, part)
        q_nhd, k_nkd, v_nkd = (
            q_n.unflatten(1, (h, d)),
            k_n.unflatten(1, (k, d)),
            v_n.unflatten(1, (k, d)),
        )
        local = attention.window and self.model.local_frequencies is not None
        turned = (buffers.local_angles if local else buffers.angles)[:n]
        kernels.rope(q_nhd, turned)
        kernels.rope(k_nkd, turned)
        keys, values = pool.keys[layer], pool.values[layer]
        scales = (None, None) if pool.scales is None else pool.scales[:, layer]
        kernels.kv_write(k_nkd, v_nkd, keys, values, buffers.slot_n[:n], *scales)
        kernels.attend(
            q_nhd, keys, values, buffers.pages_tp, buffers.text_n[:n], buffers.position_n[:n],
            scale=attention.scale,
            window=(config.window or 0) if attention.window else 0,
            softcap=config.attention_softcap or 0.0,
            key_scales_ks=scales[0], value_scales_ks=scales[1],
            out=buffers.mixed_nhd[:n],
        )  # fmt: skip

    def _after_attention(self, block: Any, n: int) -> None:
        """The heads brought together, onto the stream; then the feed-forward."""
        buffers, f = self.buffers, self.config.d_ff
        self._onto(block, "attention", block.attention.o, buffers.mixed_nhd[:n].flatten(1), n)
        source_nm = self._into(block.feed_forward_norm, n)
        gate_up_n = buffers.gate_up_n[:n]
        side_by_side([block.feed_forward.gate, block.feed_forward.up], source_nm, gate_up_n)
        gate_nf, up_nf = gate_up_n.split(f, dim=1)
        kernels.gated(gate_nf, up_nf, self.config.activation, out=gate_nf)
        self._onto(block, "feed_forward", block.feed_forward.down, gate_nf, n)

    def _into(self, norm: nn.Module, n: int) -> Tensor:
        """What a branch starts from: the normed stream, or in `branch_end` the stream itself."""
        x_nm = self.buffers.x_nm[:n]
        if self.config.residual == "branch_end" or not isinstance(norm, RMSNorm):
            return x_nm
        return self._norm(norm, x_nm, self.buffers.y_nm[:n])

    def _onto(self, block: Any, name: str, last: QuantLinear, z: Tensor, n: int) -> None:
        """A branch's last matrix, and its result onto the stream, normed where the config says."""
        x_nm, y_nm = self.buffers.x_nm[:n], self.buffers.y_nm[:n]
        if self.config.residual == "pre":
            kernels.linear(last.packed.handle, z, x_nm, last.bias, add=True)
            return
        kernels.linear(last.packed.handle, z, y_nm, last.bias)
        end = "end_norm" if self.config.residual == "sandwich" else "norm"
        kernels.add(self._norm(getattr(block, f"{name}_{end}"), y_nm, y_nm), x_nm)

    def _norm(self, norm: Any, x: Tensor, out: Tensor) -> Tensor:
        weight = norm.weight.detach().float()
        return kernels.rms_norm(x, weight, norm.eps, norm.plus_one, out)


def side_by_side(parts: Many[QuantLinear], x: Tensor, out: Tensor) -> None:
    """Several matrices on the same input; one call where they are joined."""
    whole = joined(parts)
    if whole is not None:
        kernels.linear(whole.handle, x, out)
        return
    for part, y in zip(parts, out.split([one.out_features for one in parts], dim=1), strict=True):
        kernels.linear(part.packed.handle, x, y, part.bias)


def join(parts: Many[nn.Module]) -> None:
    """Let matrices that read the same input lie one behind the other, if they are of one kind."""
    packed = [part.packed for part in parts if isinstance(part, QuantLinear) and part.bias is None]
    if len(packed) < len(parts) or joined(parts) is not None:
        return
    if any(one.layout != packed[0].layout or one.out_features % 16 for one in packed):
        return
    whole, start = PackedWeight.join(packed), 0
    for part in parts:
        assert isinstance(part, QuantLinear)
        part.packed = whole.narrow(start, part.out_features)
        start += part.out_features


def joined(parts: Many[nn.Module]) -> PackedWeight | None:
    """The one matrix of which the parts are rows, if `join` made them so."""
    packed = [part.packed for part in parts if isinstance(part, QuantLinear) and part.bias is None]
    if len(packed) < len(parts):
        return None
    first, at = packed[0], packed[0].data.data_ptr()
    for one in packed:
        if one.data.data_ptr() != at or one.layout != first.layout or one.out_features % 16:
            return None
        at += one.data.nbytes
    data = first.data.as_strided(
        (sum(len(one.data) for one in packed), first.data.shape[1]), first.data.stride()
    )
    outs = sum(one.out_features for one in packed)
    return PackedWeight(first.kind, data, first.layout, outs, first.in_features)
