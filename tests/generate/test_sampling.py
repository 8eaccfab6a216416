"""Sampling: the filters equal transformers' and keep what a distribution is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.sampling import (
    NUCLEUS,
    SamplingSettings,
    choose,
    draw,
    filter_logits,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    make_generator,
    penalise_repetition,
)


def random_logits(rows: int = 4, vocab: int = 300, seed: int = 0, scale: float = 3.0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * scale


SETTINGS = st.builds(
    SamplingSettings,
    temperature=st.floats(0.01, 5.0),
    top_k=st.integers(0, 400),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
    repetition_penalty=st.floats(0.5, 2.0),
)


@given(settings=SETTINGS, seed=st.integers(0, 100))
def test_all_filters_together_equal_transformers(settings: SamplingSettings, seed: int) -> None:
    logits = random_logits(seed=seed)
    history = torch.randint(0, 300, (4, 12), generator=torch.Generator().manual_seed(seed))
    seen = torch.zeros(4, 300, dtype=torch.bool).scatter(1, history, True)
    theirs = LogitsProcessorList()
    theirs.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    theirs.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        theirs.append(TopKLogitsWarper(settings.top_k))
    theirs.append(TopPLogitsWarper(settings.top_p))
    theirs.append(MinPLogitsWarper(settings.min_p))
    expected = theirs(history, logits.clone()).softmax(-1)
    found = filter_logits(logits, settings, seen).softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scale", [0.01, 10.0])  # the nucleus is nearly everything, or little
def test_top_p_of_a_vocabulary_larger_than_usual_nuclei(scale: float) -> None:
    logits = random_logits(vocab=3 * NUCLEUS, scale=scale)
    expected = TopPLogitsWarper(0.9)(torch.zeros(4, 1, dtype=torch.long), logits.clone())
    torch.testing.assert_close(keep_top_p(logits, 0.9), expected)


@given(settings=SETTINGS, seed=st.integers(0, 100))
def test_what_is_left_is_a_distribution(settings: SamplingSettings, seed: int) -> None:
    logits = random_logits(seed=seed)
    seen = torch.zeros(logits.shape, dtype=torch.bool)
    left = filter_logits(logits, settings, seen).softmax(-1)
    torch.testing.assert_close(left.sum(-1), torch.ones(4))
    assert left.argmax(-1).equal(logits.argmax(-1)), "the likeliest token is never cut off"
    tokens = draw(filter_logits(logits, settings, seen), [make_generator(seed)] * 4)
    assert bool((left.gather(1, tokens[:, None]) > 0).all()), "only what is left is drawn"


def test_each_filter_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = [
        (keep_top_k(logits, 2), [1, 1, 0, 0]),
        (keep_top_k(logits, 99), [1, 1, 1, 1]),
        (keep_top_p(logits, 0.75), [1, 1, 0, 0]),
        (keep_top_p(logits, 0.01), [1, 0, 0, 0]),
        (keep_min_p(logits, 0.2), [1, 1, 1, 0]),
        (keep_min_p(logits, 0.0), [1, 1, 1, 1]),
        (keep_min_p(logits, 1.0), [1, 0, 0, 0]),
    ]
    for found, expected in kept:
        assert found.isfinite().int().tolist() == [expected]
    both = torch.tensor([[2.0, -2.0, 1.0]])
    seen = torch.tensor([[True, True, False]])
    assert penalise_repetition(both, seen, 2.0).tolist() == [[1.0, -4.0, 1.0]]


def test_temperature_zero_is_argmax_whatever_else_is_set() -> None:
    logits = random_logits()
    settings = SamplingSettings(temperature=0, top_k=3, top_p=0.1, min_p=0.9, seed=5)
    assert choose(logits, settings, []).equal(logits.argmax(-1))


def test_tiny_temperatures_do_not_overflow() -> None:
    logits = random_logits(scale=100.0)
    settings = SamplingSettings(temperature=1e-30)
    generators = [make_generator(row) for row in range(4)]
    assert choose(logits, settings, generators).equal(logits.argmax(-1))


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.05, 0.6, 0.0, 0.25, 0.1])
    generator = make_generator(3)
    count = 4000
    tokens = draw(probabilities.log().expand(count, -1), [generator] * count)
    share = torch.bincount(tokens, minlength=5) / count
    assert share[2] == 0
    torch.testing.assert_close(share, probabilities, atol=0.03, rtol=0)


def test_a_row_draws_the_same_in_any_company() -> None:
    logits = random_logits(rows=3)
    settings = SamplingSettings(top_p=0.9)
    together = choose(logits, settings, [make_generator(seed) for seed in (7, 8, 9)])
    for row, seed in enumerate((7, 8, 9)):
        alone = choose(logits[row : row + 1], settings, [make_generator(seed)])
        assert alone.item() == together[row].item()


def test_the_last_token_of_a_vocabulary_can_be_drawn() -> None:
    logits = torch.full((1, 7), -math.inf)
    logits[0, 6] = 0.0
    generator = make_generator(0)
    assert {draw(logits, [generator]).item() for _ in range(50)} == {6}


def test_half_precision_logits_are_read_in_fp32() -> None:
    logits = random_logits().bfloat16()
    tokens = choose(logits, SamplingSettings(), [make_generator(row) for row in range(4)])
    expected = choose(logits.float(), SamplingSettings(), [make_generator(row) for row in range(4)])
    assert tokens.equal(expected)


def test_without_a_seed_runs_differ() -> None:
    assert make_generator(None).initial_seed() != make_generator(None).initial_seed()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_wrong_settings_are_named(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{name} is {value}; it must be"):
        SamplingSettings(**{name: value})


def test_stop_strings_are_a_tuple_of_texts() -> None:
    assert SamplingSettings(stop="\n").stop == ("\n",)  # type: ignore[arg-type]
    assert SamplingSettings(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="stop string is empty"):
        SamplingSettings(stop=("a", ""))
