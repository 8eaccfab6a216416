"""Every rung of the ladder is the fast attention, in values and in gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llm_from_scratch.model.config import ModelConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder import Encoder
from llm_from_scratch.model.ladder import (
    HeadWeights,
    backwards,
    grouped_heads,
    in_full,
    nearby,
    one_head,
    same_text,
    several_heads,
    sliding_heads,
    who_looks_at_whom,
)
from llm_from_scratch.model.layers import Attention
from llm_from_scratch.model.positions import angles, rope_frequencies
from llm_from_scratch.model.sight import look

WIDTH = 13  # of the model: no multiple of any number of heads


def layer(n_heads: int, n_kv_heads: int, head_dim: int, **changes: Any) -> Attention:
    fields: dict[str, Any] = {
        "vocab_size": 9, "d_model": WIDTH, "n_layers": 1, "d_ff": 8, "max_seq_len": 32,
        "position": "none", "n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim,
    }  # fmt: skip
    window = "window" in changes
    if window:
        changes["window_layers"] = (0,)
    attention = Attention(ModelConfig(**{**fields, **changes}), window=window)
    generator = torch.Generator().manual_seed(n_heads)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(0.3, 0.6, generator=generator)
    return attention.double()


def documents(kind: str, batch: int, time: int, seed: int) -> Tensor | None:
    """None, padding on a side, or several documents in a row."""
    if kind == "plain":
        return None
    generator = torch.Generator().manual_seed(seed)
    if kind == "documents":
        return torch.randint(0, 2, (batch, time), generator=generator).cumsum(1)
    lengths = torch.randint(1, time + 1, (batch, 1), generator=generator)
    mask = (torch.arange(time) < lengths).long()
    return mask if kind == "right" else mask.flip(1)


def assert_equal(
    attention: Attention,
    by_hand: Callable[[Tensor, Tensor], Tensor],
    batch: int,
    time: int,
    kind: str,
    seed: int,
) -> None:
    """The layer's output and all gradients are those of `by_hand(x, may_look)`."""
    numbers = documents(kind, batch, time, seed)
    sight = look(attention.config, torch.zeros(batch, time, dtype=torch.long), numbers, None)
    cos_sin = None
    if attention.config.position == "rope":
        frequencies = rope_frequencies(attention.config.rope_dim, 100.0, None)
        cos_sin = sight.angles = angles(sight.positions, frequencies)
        rung = by_hand
        by_hand = lambda x, may: rung(x, may, cos_sin)  # type: ignore[call-arg]  # noqa: E731
    may_look = backwards(time) if numbers is None else same_text(numbers) & backwards(time)
    generator = torch.Generator().manual_seed(seed)
    x, slopes = torch.randn(2, batch, time, WIDTH, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    found = []
    for run in (lambda: attention(x, sight, None), lambda: by_hand(x, may_look)):
        y = run()
        gradients = torch.autograd.grad((y * slopes).sum(), [x, *attention.parameters()])
        found.append([y, *gradients])
    for ours, wanted in zip(*found, strict=True):
        scale = wanted.abs().max() + 1e-3
        torch.testing.assert_close(ours / scale, wanted / scale, atol=1e-5, rtol=0)


sizes = {
    "batch": st.integers(1, 3),
    "time": st.integers(1, 9),
    "head_dim": st.integers(1, 7),
    "kind": st.sampled_from(["plain", "left", "right", "documents"]),
    "seed": st.integers(0, 1 << 20),
}


@given(**sizes)
def test_one_head(batch: int, time: int, head_dim: int, kind: str, seed: int) -> None:
    attention = layer(1, 1, head_dim)
    q, k, v = attention.q.weight, attention.k.weight, attention.v.weight

    def by_hand(x: Tensor, may_look: Tensor) -> Tensor:
        return attention.o(one_head(x, q, k, v, may_look))

    assert_equal(attention, by_hand, batch, time, kind, seed)


@given(**sizes, heads=st.integers(1, 5))
def test_several_heads(
    batch: int, time: int, head_dim: int, kind: str, seed: int, heads: int
) -> None:
    attention = layer(heads, heads, head_dim)

    def by_hand(x: Tensor, may_look: Tensor) -> Tensor:
        return several_heads(x, HeadWeights.of(attention), may_look)

    assert_equal(attention, by_hand, batch, time, kind, seed)


@given(**sizes, kv_heads=st.integers(1, 3), group=st.integers(1, 3))
def test_grouped_heads(
    batch: int, time: int, head_dim: int, kind: str, seed: int, kv_heads: int, group: int
) -> None:
    attention = layer(kv_heads * group, kv_heads, head_dim)

    def by_hand(x: Tensor, may_look: Tensor) -> Tensor:
        return grouped_heads(x, HeadWeights.of(attention), may_look)

    assert_equal(attention, by_hand, batch, time, kind, seed)


@given(**sizes, window=st.integers(1, 10))
def test_sliding_heads(
    batch: int, time: int, head_dim: int, kind: str, seed: int, window: int
) -> None:
    attention = layer(4, 2, head_dim, window=window)

    def by_hand(x: Tensor, may_look: Tensor) -> Tensor:
        return sliding_heads(x, HeadWeights.of(attention), may_look, window)

    assert_equal(attention, by_hand, batch, time, kind, seed)


@given(
    **{**sizes, "head_dim": st.integers(1, 3).map(lambda half: 2 * half)},
    qk_norm=st.sampled_from([None, "head", "all"]),
    softcap=st.sampled_from([None, 2.0]),
    bias=st.booleans(),
    norm=st.sampled_from(["rms", "layer", "rms_plus_one"]),
)
def test_in_full(
    batch: int, time: int, head_dim: int, kind: str, seed: int, qk_norm: str | None,
    softcap: float | None, bias: bool, norm: str,
) -> None:  # fmt: skip
    attention = layer(
        6, 2, head_dim, position="rope", qk_norm=qk_norm, attention_softcap=softcap, norm=norm,
        attention_bias=bias, output_bias=bias, attention_width=5.0,
    )  # fmt: skip

    def by_hand(x: Tensor, may_look: Tensor, cos_sin: Tensor | None = None) -> Tensor:
        y, looked = in_full(attention, x, may_look, cos_sin)
        torch.testing.assert_close(looked.sum(-1), torch.ones(batch, 6, time).double())
        assert not looked.masked_select(~may_look.expand(batch, -1, -1)[:, None]).any()
        return y

    assert_equal(attention, by_hand, batch, time, kind, seed)


@given(time=st.integers(1, 12), width=st.integers(1, 14))
def test_windows_by_their_definition(time: int, width: int) -> None:
    mask = nearby(time, width)
    for t in range(time):
        assert mask[t].nonzero().flatten().tolist() == [*range(max(0, t - width + 1), t + 1)]
    assert torch.equal(nearby(time, time), backwards(time))


@pytest.mark.parametrize("length", [5, 20])
def test_a_model_s_looks(length: int) -> None:
    config = ModelConfig(
        vocab_size=40, d_model=24, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=32,
        max_seq_len=32, window=7, window_layers=(0, 2), qk_norm="head", init_std=0.3,
    )  # fmt: skip
    model = Decoder(config).eval()
    model.initialise(1)
    tokens = torch.randint(0, 40, (2, length), generator=torch.Generator().manual_seed(1))
    layers = who_looks_at_whom(model, tokens)
    assert [tuple(weights.shape) for weights in layers] == [(2, 4, length, length)] * 3
    for number, weights in enumerate(layers):
        may_look = nearby(length, 7) if number in (0, 2) else backwards(length)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, length))
        assert torch.equal((weights > 0).all(0).all(0), may_look)
    # What the second layer takes is what its weights say, of the values it was shown.
    inputs: list[Tensor] = []
    attention = model.blocks[1].attention
    hook = attention.register_forward_hook(lambda part, args, y: inputs.extend([args[0], y]))
    model(tokens)
    hook.remove()
    values = attention.split(attention.v(inputs[0])).repeat_interleave(2, 1)
    y = attention.o((layers[1] @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(y, inputs[1], atol=1e-5, rtol=1e-4)


def test_an_encoder_looks_both_ways() -> None:
    config = ModelConfig(
        vocab_size=40, d_model=24, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=6, d_ff=32,
        max_seq_len=32, position="learned", causal=False,
    )  # fmt: skip
    model = Encoder(config).eval()
    layers = who_looks_at_whom(model, torch.arange(9)[None])
    assert all((weights > 0).all() for weights in layers)


def test_the_picture_of_the_page_is_drawn_by_the_page() -> None:
    """docs/images/draw.py takes the blocks that the documentation's test runs."""
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs/en/attention.md").read_text(encoding="utf-8")
    assert 'savefig("attention.png"' in page
    assert "(../images/attention.png)" in page
    assert (root / "docs/images/attention.png").stat().st_size < 50_000
