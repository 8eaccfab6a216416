"""The fused attention equals its readable twin; sinusoids, rotary frequencies and dropout."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_from_scratch.model.attend import attend, attend_by_hand
from llm_from_scratch.model.config import ModelConfig, RopeScaling
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.positions import (
    angles,
    rope_frequencies,
    rotate,
    sinusoidal_positions,
)


@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    time=st.integers(1, 7),
    earlier=st.integers(0, 5),
    width=st.integers(1, 9),
    kind=st.sampled_from(["causal", "random", "rows", "none"]),
    seed=st.integers(0, 1 << 20),
)
def test_fused_attention_equals_the_one_by_hand(
    batch: int,
    groups: int,
    kv_heads: int,
    time: int,
    earlier: int,
    width: int,
    kind: str,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    source = time if kind == "causal" else time + earlier
    q = torch.randn(batch, kv_heads * groups, time, width, generator=generator)
    k = torch.randn(batch, kv_heads, source, width, generator=generator)
    v = torch.randn(batch, kv_heads, source, width, generator=generator)
    mask = None
    if kind in ("random", "rows"):
        rows = batch if kind == "rows" else 1
        mask = torch.rand(rows, 1, time, source, generator=generator) < 0.6
        mask[..., 0] = True  # a query that sees nothing has no answer
    by_hand = torch.ones(time, source).tril().bool() if kind == "causal" else mask
    wanted = attend_by_hand(
        q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), by_hand
    )
    got = attend(q, k, v, mask, causal=kind == "causal")
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("width", [8, 7])
def test_sinusoids_follow_the_formula(width: int) -> None:
    table = sinusoidal_positions(torch.arange(30), width)
    # Sines first, then cosines; the formula takes turns.
    order = [*range(0, width, 2), *range(1, width, 2)]
    table = table[:, torch.tensor(order).argsort()]
    for position in (0, 1, 29):
        for i in range(width):
            angle = position / 10_000 ** ((i - i % 2) / width)
            wanted = math.cos(angle) if i % 2 else math.sin(angle)
            assert table[position, i].item() == pytest.approx(wanted, abs=1e-5)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    config = tiny(position="rope")
    table = angles(torch.arange(32), rope_frequencies(config.head_dim, 10_000.0, None))
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 1, config.head_dim, generator=generator)

    def score(i: int, j: int) -> float:
        return float((rotate(q, table[i : i + 1]) * rotate(k, table[j : j + 1])).sum())

    assert score(5, 2) == pytest.approx(score(20, 17), abs=1e-5)
    assert score(5, 2) != pytest.approx(score(5, 4), abs=1e-3)


def test_llama3_scaling_keeps_the_fast_and_divides_the_slow() -> None:
    plain = rope_frequencies(64, 500_000.0, None)
    scaled = rope_frequencies(64, 500_000.0, RopeScaling(factor=8.0))
    wavelength = 2 * math.pi / plain
    fast, slow = wavelength < 8192 / 4, wavelength > 8192 / 1
    assert fast.any() and slow.any() and (~fast & ~slow).any()
    assert torch.equal(scaled[fast], plain[fast])
    torch.testing.assert_close(scaled[slow], plain[slow] / 8)
    between = scaled[~fast & ~slow] / plain[~fast & ~slow]
    assert ((between > 1 / 8) & (between < 1)).all()


def tiny(**changes: object) -> ModelConfig:
    fields: dict[str, object] = {
        "vocab_size": 50, "d_model": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2,
        "head_dim": 6, "d_ff": 40, "max_seq_len": 32,
    }  # fmt: skip
    return ModelConfig(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal"])
def test_dropout_acts_in_training_only(position: str) -> None:
    model = Decoder(tiny(position=position, dropout=0.3))
    model.initialise(seed=0)
    plain = Decoder(tiny(position=position))
    plain.load_state_dict(model.state_dict())
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        model.train()
        assert not torch.equal(model(tokens), model(tokens))
        model.eval()
        assert torch.equal(model(tokens), model(tokens))
        assert torch.equal(model(tokens), plain.train()(tokens))


@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal"])
def test_order_matters_and_the_future_does_not(position: str) -> None:
    model = Decoder(tiny(position=position, init_std=0.2)).eval()
    model.initialise(seed=0)
    tokens = torch.randint(0, 50, (1, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = model(tokens)
        swapped = tokens.clone()
        swapped[0, [3, 4]] = tokens[0, [4, 3]]
        assert not torch.allclose(model(swapped)[0, 19], before[0, 19], atol=1e-6)
        changed = tokens.clone()
        changed[0, 12:] = (tokens[0, 12:] + 1) % 50
        torch.testing.assert_close(model(changed)[:, :12], before[:, :12], atol=1e-6, rtol=0)


def test_fresh_weights_are_repeatable_and_scaled() -> None:
    first, second, other = (Decoder(tiny(n_layers=8, d_model=96)) for _ in range(3))
    first.initialise(1)
    second.initialise(1)
    other.initialise(2)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
    assert first.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    down = first.blocks[0].feed_forward.down.weight
    assert down.std().item() == pytest.approx(0.02 / 4, rel=0.05)  # / sqrt(2 * 8)
