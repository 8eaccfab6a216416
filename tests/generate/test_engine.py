"""Tokens: the cache changes nothing, and neither does company in the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from llm_from_scratch.core.errors import RunError, UserError
from llm_from_scratch.generate.engine import generate_tokens
from llm_from_scratch.generate.requests import NewToken
from llm_from_scratch.generate.sampling import SamplingSettings
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.weights.folder import save_folder
from tests.generate.engines import Listening, engine_for

PROMPTS = [[5, 9, 2], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [11, 12, 13, 14]]
GREEDY = SamplingSettings(max_new_tokens=12, temperature=0.0)


def by_row(
    model: Decoder, prompts: Sequence[Sequence[int]], settings: SamplingSettings, stop: Any = ()
) -> dict[int, list[NewToken]]:
    rows: dict[int, list[NewToken]] = {}
    for step in generate_tokens(model, prompts, settings, stop):
        for new in step:
            rows.setdefault(new.request, []).append(new)
    return rows


def ids(new: list[NewToken]) -> list[int]:
    return [one.token for one in new]


def assert_logits_equal_uncached(model: Decoder, stop: list[int]) -> None:
    """Every logit that a batch of unequal prompts chose from is that of the whole text at once."""
    engine = engine_for(model, PROMPTS, GREEDY, stop)
    engine.runner = listening = Listening(engine)
    texts = [list(prompt) for prompt in PROMPTS]
    while engine.busy:
        new = engine.step()
        numbers, logits = listening.heard[-1]
        for number, found in zip(numbers, logits, strict=True):
            with torch.inference_mode():
                expected = model(torch.tensor([texts[number]]))[0, -1]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        for one in new:
            texts[one.request].append(one.token)


def test_cached_logits_equal_uncached_at_every_position(model: Decoder) -> None:
    assert_logits_equal_uncached(model, [])


def test_cached_logits_equal_uncached_while_rows_leave(model: Decoder) -> None:
    alone = by_row(model, PROMPTS, GREEDY)
    stop = [alone[row][3 + row].token for row in range(3)]
    assert_logits_equal_uncached(model, stop)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_batch_of_unequal_prompts_equals_each_alone(model: Decoder, temperature: float) -> None:
    settings = SamplingSettings(
        max_new_tokens=12, temperature=temperature, top_p=0.95, repetition_penalty=1.2, seed=3
    )
    together = by_row(model, PROMPTS, settings)
    for row, prompt in enumerate(PROMPTS):
        own = SamplingSettings(**{**vars(settings), "seed": 3 + row})
        assert ids(by_row(model, [prompt], own)[0]) == ids(together[row])


@hypothesis_settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    stop=st.sets(st.integers(0, 82), max_size=12),
)
def test_any_company_and_any_end(lengths: list[int], stop: set[int]) -> None:
    model = _shared(make_tiny)
    prompts = [[(7 * i + 3 * n) % 83 for i in range(n)] for n in lengths]
    together = by_row(model, prompts, GREEDY, stop)
    for row, prompt in enumerate(prompts):
        assert by_row(model, [prompt], GREEDY, stop)[0] == [
            NewToken(0, 0, one.token, one.finish_reason) for one in together[row]
        ]


def make_tiny() -> Decoder:
    from llm_from_scratch.model.config import ModelConfig

    config = ModelConfig(
        vocab_size=83, d_model=12, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=20,
        max_seq_len=40, init_std=0.5,
    )  # fmt: skip
    model = Decoder(config)
    model.initialise(seed=4)
    return model


_made: dict[Callable[[], Decoder], Decoder] = {}


def _shared(make: Callable[[], Decoder]) -> Decoder:
    if make not in _made:
        _made[make] = make()
    return _made[make]


def test_greedy_is_the_argmax_of_the_whole(model: Decoder) -> None:
    text = list(PROMPTS[0])
    for token in ids(by_row(model, [text], GREEDY)[0]):
        with torch.inference_mode():
            assert token == model(torch.tensor([text]))[0, -1].argmax().item()
        text.append(token)


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_equals_transformers_generate(
    model: Decoder, tmp_path: Path, penalty: float
) -> None:
    save_folder(model, None, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    settings = SamplingSettings(max_new_tokens=20, temperature=0.0, repetition_penalty=penalty)
    for prompt in PROMPTS:
        expected = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=20,
            repetition_penalty=penalty,
            pad_token_id=0,
        )
        assert ids(by_row(model, [prompt], settings)[0]) == expected[0, len(prompt) :].tolist()


def test_same_seed_same_tokens(model: Decoder) -> None:
    def run(seed: int | None) -> list[int]:
        settings = SamplingSettings(max_new_tokens=12, temperature=1.5, seed=seed)
        return ids(by_row(model, [PROMPTS[0]], settings)[0])

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(None) != run(None)


def test_end_tokens_stop_their_row_only(model: Decoder) -> None:
    free = by_row(model, PROMPTS, GREEDY)
    stop = ids(free[2])[2]
    rows = by_row(model, PROMPTS, GREEDY, {stop})
    assert rows[2][-1].finish_reason == "stop"
    for row in range(len(PROMPTS)):
        expected = ids(free[row])
        if stop in expected:
            expected = expected[: expected.index(stop) + 1]
        assert ids(rows[row]) == expected
        assert all(one.finish_reason is None for one in rows[row][:-1])


def test_the_end_of_the_context_ends_a_row(model: Decoder) -> None:
    long = [1 + i % 50 for i in range(45)]
    settings = SamplingSettings(max_new_tokens=20, temperature=0.0)
    rows = by_row(model, [long, [7], [*long, 1, 2, 3]], settings)
    assert [len(rows[row]) for row in range(3)] == [3, 20, 1]
    assert {rows[row][-1].finish_reason for row in range(3)} == {"length"}
    assert ids(rows[0]) == ids(by_row(model, [long], settings)[0])


def test_requests_can_be_cancelled_at_any_time(model: Decoder) -> None:
    free = by_row(model, PROMPTS, GREEDY)
    engine = engine_for(model, PROMPTS, GREEDY)
    engine.cancel(0)
    first = engine.step()
    engine.cancel(3)
    second = engine.step()
    assert [(one.request, one.token) for one in first] == [(r, free[r][0].token) for r in (1, 2, 3)]
    assert [(one.request, one.token) for one in second] == [(r, free[r][1].token) for r in (1, 2)]
    engine.cancel(1)
    engine.cancel(2)
    assert not engine.busy
    assert engine.step() == []
    assert engine.pages.held == 0


def test_a_model_in_training_is_left_in_training(make: Callable[..., Decoder]) -> None:
    model = make(dropout=0.5)
    expected = by_row(model, PROMPTS, GREEDY)
    model.train()
    assert by_row(model, PROMPTS, GREEDY) == expected
    assert model.training
    assert not torch.is_inference_mode_enabled()
    model(torch.tensor([[1, 2, 3]])).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_bf16_runs(make: Callable[..., Decoder], dtype: torch.dtype | None) -> None:
    model = make()
    if dtype is None:
        model.compute_dtype = torch.bfloat16
    else:
        model = model.to(dtype)
    engine = engine_for(model, PROMPTS, GREEDY)
    assert engine.pool.keys.dtype == torch.bfloat16
    new = [one for _ in range(12) for one in engine.step()]
    assert not engine.busy
    assert len(new) == 4 * 12


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ([], "no prompt"),
        ([[]], "no tokens"),
        ([[1] * 49], "49 tokens, but the model's context is 48"),
        ([[1], [83]], "token id 83, but the model's vocabulary ends at 82"),
        ([[-1]], "vocabulary ends"),
    ],
)
def test_wrong_prompts(model: Decoder, prompts: list[list[int]], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        generate_tokens(model, prompts, GREEDY)


def test_broken_weights_are_reported(make: Callable[..., Decoder]) -> None:
    model = make()
    with torch.no_grad():
        model.final_norm.weight[0] = float("nan")
    with pytest.raises(RunError, match="not a number"):
        by_row(model, PROMPTS, GREEDY)
