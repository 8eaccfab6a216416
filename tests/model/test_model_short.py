"""The bf16 path for short contexts computes what attention written out in fp32 computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_from_scratch.model.attend import attend, attend_by_hand, attend_short
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.presets import ModelSettings, resolve


def made(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.booleans(), st.integers(0, 999))
def test_short_equals_by_hand(b: int, h: int, t: int, masked: bool, seed: int) -> None:
    q, k, v = (made(seed + i, b, h, t, 6) for i in range(3))
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    mask = None
    if masked:
        ids = torch.randint(0, 2, (b, t), generator=torch.Generator().manual_seed(seed)).cumsum(1)
        mask = (causal & (ids[:, :, None] == ids[:, None, :]))[:, None]
    expected = attend_by_hand(q, k, v, causal if mask is None else mask)
    torch.testing.assert_close(attend_short(q, k, v, mask, 0.0), expected, rtol=1e-5, atol=1e-5)


def test_what_sees_nothing_becomes_zero_as_in_the_fused_kernel() -> None:
    q, k, v = (made(i, 2, 2, 5, 8).bfloat16().requires_grad_() for i in range(3))
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1] = False
    y = attend(q, k, v, mask, causal=False)
    fused = attend(q.float(), k.float(), v.float(), mask, causal=False)
    assert not y[1].any() and not fused[1].any()
    torch.testing.assert_close(y.float(), fused, atol=0.02, rtol=0.02)
    for grad in torch.autograd.grad(y.float().square().sum(), (q, k, v)):
        assert grad.isfinite().all() and not grad[1].any() and grad[0].any()


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_bf16_gradients_are_near_those_of_fp32(kv_heads: int) -> None:
    grads = {}
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (
            made(i, 2, heads, 33, 8).to(dtype).requires_grad_()
            for i, heads in ((0, 4), (1, kv_heads), (2, kv_heads))
        )
        y = attend(q, k, v, None, causal=True)
        assert y.shape == (2, 4, 33, 8)
        grads[dtype] = torch.autograd.grad((y.float() ** 2).sum(), (q, k, v))
    for exact, rough in zip(*grads.values(), strict=True):
        error = (exact - rough.float()).norm() / exact.norm()
        assert error < 0.03


def test_a_model_in_bf16_predicts_what_it_predicts_in_fp32() -> None:
    settings = ModelSettings(d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, init_std=0.1)
    model = Decoder(resolve(settings, 50, 32))
    model.initialise(1)
    tokens = torch.randint(0, 50, (2, 32), generator=torch.Generator().manual_seed(2))
    exact = model(tokens).log_softmax(-1)
    model.compute_dtype = torch.bfloat16
    rough = model(tokens).float().log_softmax(-1)
    divergence = (exact.exp() * (exact - rough)).sum(-1)
    assert divergence.mean() < 1e-3
