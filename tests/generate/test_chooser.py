"""A chooser's rules equal the reference's, one by one and together, as the text grows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.sampling import (
    Chooser,
    SamplingSettings,
    make_generator,
    top_logprobs,
    top_logprobs_of_all,
)

VOCAB = 40


def logits_of(seed: int, vocab: int = VOCAB) -> Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 3


def chooser(prompt: list[int], seed: int = 0, **values: Any) -> Chooser:
    return Chooser(SamplingSettings(**values), make_generator(seed), prompt)


def reference(values: dict[str, Any]) -> LogitsProcessorList:
    """The same rules of `transformers`, in the order in which its `generate` applies them."""
    made = {
        "logit_bias": lambda x: SequenceBiasLogitsProcessor(
            [[[k], float(v)] for k, v in x.items()]
        ),
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram": NoRepeatNGramLogitsProcessor,
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    return LogitsProcessorList(
        [make(values[name]) for name, make in made.items() if name in values]
    )


def check_against_reference(values: dict[str, Any], prompt: list[int], seed: int) -> None:
    ours = chooser(prompt, seed, **{"temperature": 1.0, **values})
    theirs, ids = reference(values), list(prompt)
    for step in range(8):
        logits_v = logits_of(100 * seed + step)
        expected = theirs(torch.tensor([ids]), logits_v[None].clone())[0]
        if expected.max() == -math.inf:
            return  # here the reference has nothing left to draw
        torch.testing.assert_close(
            ours.distribution(logits_v).exp(), expected.softmax(-1), atol=1e-5, rtol=1e-4
        )
        token = ours.choose(logits_v)
        assert expected[token] > -math.inf
        ours.accept(token)
        ids.append(token)


PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


@pytest.mark.parametrize(
    "values",
    [
        {"logit_bias": {5: 4.0, 1: -100.0, 39: 2.5}},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"no_repeat_ngram": 1},
        {"no_repeat_ngram": 2},
        {"no_repeat_ngram": 3},
        {"temperature": 0.3},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.1},
    ],
    ids=str,
)
def test_each_rule_equals_transformers(values: dict[str, Any]) -> None:
    for seed in range(4):
        check_against_reference(values, PROMPT, seed)


@settings(max_examples=30)
@given(
    st.fixed_dictionaries(
        {
            "temperature": st.floats(0.2, 3.0),
            "top_k": st.integers(1, VOCAB),
            "top_p": st.floats(0.05, 1.0),
            "min_p": st.floats(0.0, 0.5),
        },
        optional={
            "logit_bias": st.dictionaries(
                st.integers(0, VOCAB - 1), st.floats(-9, 9), min_size=1, max_size=4
            ),
            "repetition_penalty": st.floats(0.5, 2.0),
            "no_repeat_ngram": st.integers(1, 4),
        },
    ),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
    st.integers(0, 50),
)
def test_all_rules_together_equal_transformers(
    values: dict[str, Any], prompt: list[int], seed: int
) -> None:
    check_against_reference(values, prompt, seed)


@given(st.floats(-2, 2), st.floats(-2, 2), st.integers(0, 50))
def test_presence_and_frequency_are_openais_formula(
    presence: float, frequency: float, seed: int
) -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, with c over the new tokens alone."""
    ours = chooser([1, 2, 2], presence_penalty=presence, frequency_penalty=frequency, temperature=1)
    counts: dict[int, int] = {}
    for step, token in enumerate([7, 7, 2, 30, 7]):
        logits_v = logits_of(seed + step)
        expected = logits_v.clone()
        for j, c in counts.items():
            expected[j] += -c * frequency - float(c > 0) * presence
        torch.testing.assert_close(
            ours.distribution(logits_v), expected.log_softmax(-1), atol=1e-5, rtol=1e-5
        )
        ours.accept(token)
        counts[token] = counts.get(token, 0) + 1


def test_plain_greedy_is_the_argmax_and_nothing_else_is_called_so() -> None:
    plain = chooser([1], temperature=0.0, top_p=0.5, seed=0)
    assert plain.plain_greedy
    assert plain.choose(logits_of(1)) == int(logits_of(1).argmax())
    for values in (
        {"temperature": 0.5},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"no_repeat_ngram": 2},
        {"logit_bias": {1: 1}},
    ):
        assert not chooser([1], **{"temperature": 0.0, **values}).plain_greedy


def test_greedy_follows_penalties() -> None:
    logits_v = torch.tensor([3.0, 2.9, 0.0])
    ours = chooser([2], temperature=0.0, frequency_penalty=0.2)
    chosen = []
    for _ in range(4):
        chosen.append(ours.choose(logits_v))
        ours.accept(chosen[-1])
    assert chosen == [0, 1, 0, 1]
    only = ours.distribution(logits_v)
    assert only.exp().tolist() == [1.0, 0.0, 0.0]


def test_every_draw_takes_one_number_whatever_the_rules() -> None:
    for values in ({}, {"top_p": 0.5, "repetition_penalty": 1.3, "no_repeat_ngram": 2}):
        ours, generator = chooser([1], seed=5, **values), make_generator(5)
        for step in range(3):
            ours.accept(ours.choose(logits_of(step)))
            torch.rand((), generator=generator, dtype=torch.float64)
        assert ours.generator.get_state().equal(generator.get_state())


def test_a_copy_goes_its_own_way() -> None:
    values = {"repetition_penalty": 1.5, "frequency_penalty": 1.0, "no_repeat_ngram": 2}
    first = chooser(PROMPT, **values)
    first.distribution(logits_of(0))
    for token in (7, 8, 9):
        first.accept(token)
    before = first.distribution(logits_of(1))
    twin = first.copy()
    assert twin.distribution(logits_of(1)).equal(before)
    assert twin.copy().choose(logits_of(2)) == twin.copy().choose(logits_of(2))
    for token in (7, 8, 30):
        twin.accept(token)
    assert not twin.distribution(logits_of(1)).equal(before)
    assert first.distribution(logits_of(1)).equal(before)
    other = make_generator(9)
    assert first.copy(other).generator is other


def test_when_every_token_would_repeat_the_ban_gives_way() -> None:
    ours = chooser([0, 1, 2], no_repeat_ngram=1, temperature=1.0)
    logits_v = logits_of(0, vocab=3)
    torch.testing.assert_close(ours.distribution(logits_v), logits_v.log_softmax(-1))


def test_half_precision_logits_are_read_in_fp32() -> None:
    logits_v = logits_of(0).bfloat16()
    ours = chooser([1], temperature=0.7, repetition_penalty=1.2)
    found = ours.distribution(logits_v)
    assert found.dtype == torch.float32
    assert found.equal(ours.distribution(logits_v.float()))


def test_a_bias_beyond_the_vocabulary_is_refused() -> None:
    ours = chooser([1], logit_bias={VOCAB: 1.0})
    with pytest.raises(UserError, match=f"token id {VOCAB}, but the model's vocabulary ends at 39"):
        ours.choose(logits_of(0))


def test_logprobs_are_the_models_own() -> None:
    logits_v = logits_of(3)
    expected = logits_v.double().log_softmax(-1)
    order = expected.argsort(descending=True).tolist()
    found = top_logprobs(logits_v, 3, 11)
    assert found.token == 11
    assert found.logprob == pytest.approx(expected[11].item(), abs=1e-5)
    assert [token for token, _ in found.top] == order[:3]
    for token, logprob in found.top:
        assert logprob == pytest.approx(expected[token].item(), abs=1e-5)
    assert top_logprobs(logits_v, 0, 2).top == ()
    assert len(top_logprobs(logits_v, 99, 2).top) == VOCAB
    rows = torch.stack([logits_of(3), logits_of(4)]).bfloat16()
    assert top_logprobs_of_all(rows, 2, [11, 0]) == [
        top_logprobs(rows[0], 2, 11),
        top_logprobs(rows[1], 2, 0),
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"presence_penalty": math.nan}, "presence_penalty is nan; it must be"),
        ({"frequency_penalty": math.inf}, "frequency_penalty is inf; it must be"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram is -1; it must be"),
        ({"n": 0}, "n is 0; it must be"),
        ({"n": 10**9}, "n is 1000000000; it must be from 1 to 10,000"),
        ({"num_beams": 10**9}, "num_beams is 1000000000; it must be from 1"),
        ({"logprobs": -1}, "logprobs is -1; it must be"),
        ({"presence_penalty": None}, "presence_penalty is None; it must be from -100"),
        ({"frequency_penalty": 1e308}, "frequency_penalty is 1e.308; it must be from -100"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty is 1e-300; it must be from 0.01"),
        ({"length_penalty": 1e5}, "length_penalty is 100000.0; it must be from -10 to 10"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be"),
        ({"frequency_penalty": 10**400}, "frequency_penalty is 10*.*; it must be from -100"),
        ({"logit_bias": {math.inf: 1}}, "logit_bias has inf: 1; it must be a token id"),
        ({"prompt_logprobs": -2}, "prompt_logprobs is -2; it must be"),
        ({"logit_bias": {"the": 1}}, "logit_bias has 'the': 1; it must be a token id"),
        ({"logit_bias": {3: "x"}}, "logit_bias has 3: 'x'; it must be a token id"),
        ({"logit_bias": {3: 101}}, "logit_bias has 3: 101; ids begin at 0"),
        ({"logit_bias": {-1: 1}}, "logit_bias has -1: 1; ids begin at 0"),
        ({"logit_bias": {1: math.nan}}, "logit_bias has 1: nan; ids begin at 0"),
        ({"regex": "a", "choice": ["b"]}, "regex and choice are set together"),
    ],
)
def test_wrong_settings_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingSettings(**values)


def test_a_bias_may_come_from_json() -> None:
    assert SamplingSettings(logit_bias={"42": "-100", 7: 1}).logit_bias == {42: -100.0, 7: 1.0}
    assert hash(SamplingSettings(logit_bias={1: 2})) is not None


def test_a_temperature_that_is_all_but_zero() -> None:
    """Divided by what is zero in fp32, logits would be no numbers."""
    logits_v = torch.tensor([1.0, 3.0, 2.999, -1.0])
    for temperature in (1e-300, 1e-40, 1e-6):
        settings = SamplingSettings(temperature=temperature)
        assert Chooser(settings, make_generator(1), [0]).choose(logits_v) == 1
