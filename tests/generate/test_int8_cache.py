"""Keys and values in int8: a quarter of the memory, and nearly the same logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llm_from_scratch.generate.engine import PAGE, Engine, default_room
from llm_from_scratch.generate.requests import Request
from llm_from_scratch.generate.sampling import SamplingSettings
from llm_from_scratch.generate.speculative import Lookup
from llm_from_scratch.model.cache import KVCache, PagePool
from tests.generate.conftest import make_model
from tests.generate.engines import answers, finish, listen, said
from tests.generate.test_company import made

GREEDY = SamplingSettings(max_new_tokens=8, temperature=0.0)


@hypothesis_settings(max_examples=20)
@given(
    pieces=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    size=st.sampled_from([1e-20, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_every_feature_is_half_a_step_off_at_most(
    pieces: list[int], size: float, seed: int
) -> None:
    model = make_model()
    cache = KVCache(model.config, batch=2, dtype=torch.int8)
    generator = torch.Generator().manual_seed(seed)
    wanted = []
    for t in pieces:
        new = size * torch.randn(2, 2, 2, t, 10, generator=generator)
        new[..., 0, :] *= torch.rand(2, 2, 2, 1, generator=generator) > 0.5  # some are zero
        wanted.append(new)
        cache.start(t)
        found = torch.stack(cache.layer(1).append(*new))
        cache.finish()
    whole = torch.cat(wanted, -2)
    step = whole.abs().amax(-1, keepdim=True) / 127
    assert bool(((found - whole).abs() <= 0.5001 * step).all())


def test_memory() -> None:
    config = make_model(head_dim=64).config
    small, large = PagePool(config, 9, PAGE, torch.int8), PagePool(config, 9, PAGE)
    positions = 2 * config.n_layers * config.n_kv_heads * 9 * PAGE
    assert small.nbytes == positions * (64 + 4)
    assert large.nbytes == positions * 64 * 4
    room = default_room(config, 10**9, torch.int8, torch.device("cpu"))
    assert room / default_room(config, 10**9, torch.float32, torch.device("cpu")) > 3.5


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "t5"])
def test_logits_are_near_those_of_fp32(family: str) -> None:
    """For every token of a text of 30, written as fp32 writes it."""
    model = made(family)
    settings = SamplingSettings(max_new_tokens=30, temperature=0.0)
    exact = answers(model, Request([5, 9, 2, 7], settings))[0][0]
    heard = []
    for dtype in (torch.float32, torch.int8):
        engine = Engine(model, cache_tokens=64, cache_dtype=dtype)
        listening = listen(engine)
        engine.submit(Request([5, 9, 2, 7], settings))
        for token in exact:
            engine.step()
            if engine.running:
                engine.running[0].tokens[-1] = token
        heard.append(torch.stack([logits[-1] for _, logits in listening.heard]).log_softmax(-1))
    exact_tv, found_tv = heard
    divergence = (exact_tv.exp() * (exact_tv - found_tv)).sum(-1)
    assert 0 < divergence.mean() < 1e-3
    assert (exact_tv.argmax(-1) == found_tv.argmax(-1)).float().mean() >= 0.9


@pytest.mark.parametrize("family", ["llama", "mistral", "t5"])
def test_the_whole_engine_runs_with_it(family: str) -> None:
    """In company as alone: what a page holds does not depend on how it came there."""
    model = made(family)
    proposer = Lookup()
    engine = Engine(
        model, cache_tokens=6 * PAGE, chunk=7, cache_dtype=torch.int8, proposer=proposer
    )
    assert engine.pool.keys.dtype == torch.int8
    requests = [Request([5, 9, 2, number] * 4, GREEDY) for number in range(6)]
    beams = SamplingSettings(max_new_tokens=8, temperature=0.0, num_beams=3)
    requests += [Request([3, 1, 4], beams), Request([8] * 20, SamplingSettings(n=2, seed=1))]
    for request in requests:
        engine.submit(request)
    texts = finish(engine)
    same = 0
    for number, request in enumerate(requests):
        for choice, wanted in answers(model, request, cache_dtype=torch.int8).items():
            same += said(texts[number, choice]) == wanted
    assert same >= 7  # a step more or less, where a feature lies between two of them
