"""Speculative decoding: what comes out is what the model alone would write, in fewer passes."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_from_scratch.core.errors import RunError, UserError
from llm_from_scratch.generate import runs
from llm_from_scratch.generate.constraint import make_constraint
from llm_from_scratch.generate.engine import PAGE, Engine
from llm_from_scratch.generate.generate import complete, make_settings, stream
from llm_from_scratch.generate.requests import Request
from llm_from_scratch.generate.sampling import Chooser, SamplingSettings, make_generator
from llm_from_scratch.generate.speculative import Draft, Lookup, Proposer
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.text.tokenizer import Tokenizer
from tests.generate.conftest import make_model
from tests.generate.engines import answers, finish, listen, said
from tests.generate.test_company import made

PROMPTS = [[5, 9, 2], [7], [3, 1, 4, 1, 5] * 6, [11, 12, 13] * 9, [1, 2, 3, 4], [8] * 20]
MODEL = make_model(max_seq_len=96)


def blurred(model: Decoder, by: float) -> Decoder:
    """A model that agrees with this one, but not always."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += by * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return other


PROPOSERS: dict[str, Callable[[], Proposer]] = {
    "itself": lambda: Draft(MODEL),
    "blurred": lambda: Draft(blurred(MODEL, 0.05), most=3),
    "stranger": lambda: Draft(make_model("gpt2", max_seq_len=40)),
    "short of memory": lambda: Draft(blurred(MODEL, 0.05), cache_tokens=5 * PAGE),
    "lookup": Lookup,
    "lookup of one": lambda: Lookup(most=1, longest=1),
}
WAYS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3, "presence_penalty": 0.4},
    {"no_repeat_ngram": 2, "logit_bias": {3: 2.0}},
    {"logprobs": 3, "prompt_logprobs": 1},
]


@pytest.mark.parametrize("name", PROPOSERS)
@pytest.mark.parametrize("room", [60, 8], ids=["room", "tight"])
def test_greedy_text_is_the_same(name: str, room: int) -> None:
    """Also with penalties, end tokens, and texts that are sent back for want of room."""
    proposer = PROPOSERS[name]()
    engine = Engine(MODEL, cache_tokens=room * PAGE, chunk=17, proposer=proposer)
    requests = [
        Request(prompt, SamplingSettings(max_new_tokens=20, temperature=0.0, **way), frozenset({4}))
        for prompt in PROMPTS
        for way in WAYS
    ]
    for request in requests:
        engine.submit(request)
    texts = finish(engine)
    for number, request in enumerate(requests):
        assert said(texts[number, 0]) == answers(MODEL, request)[0]
    if isinstance(proposer, Draft):
        assert proposer.pages.held == 0


def test_logprobs_are_those_of_the_model() -> None:
    settings = SamplingSettings(max_new_tokens=20, temperature=0.0, logprobs=2, prompt_logprobs=2)
    found = []
    for proposer in (None, PROPOSERS["blurred"]()):
        engine = Engine(MODEL, cache_tokens=400, proposer=proposer)
        engine.submit(Request(PROMPTS[2], settings))
        found.append(finish(engine)[0, 0])
    assert found[0][0].prompt_logprobs == found[1][0].prompt_logprobs
    for one, other in zip(*found, strict=True):
        assert one.logprobs is not None and other.logprobs is not None
        assert one.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_that_is_right_saves_passes(temperature: float) -> None:
    engine = Engine(MODEL, cache_tokens=400, proposer=Draft(MODEL, most=4))
    listening = listen(engine)
    settings = SamplingSettings(max_new_tokens=41, temperature=temperature, seed=1)
    engine.submit(Request([5, 9, 2], settings))
    (new,) = finish(engine).values()
    assert len(new) == 41
    assert listening.passes == 1 + 8  # 4 guesses and one more each time


def test_a_text_that_repeats_itself_is_guessed() -> None:
    engine = Engine(MODEL, cache_tokens=400, proposer=Lookup())
    listening = listen(engine)
    bias = dict.fromkeys((1,), 100.0)
    engine.submit(
        Request([1, 1], SamplingSettings(max_new_tokens=40, temperature=0.0, logit_bias=bias))
    )
    (new,) = finish(engine).values()
    assert [one.token for one in new] == [1] * 40
    assert listening.passes < 40 / 1.5


def test_an_encoder_decoder_can_look_up() -> None:
    for family in ("t5", "marian", "bart"):
        model = made(family)
        settings = SamplingSettings(max_new_tokens=20, temperature=0.0)
        engine = Engine(model, cache_tokens=40 * PAGE, proposer=Lookup())
        for source in PROMPTS[:4]:
            engine.submit(Request(source, settings))
        texts = finish(engine)
        for number, source in enumerate(PROMPTS[:4]):
            assert said(texts[number, 0]) == answers(model, Request(source, settings))[0]


def test_broken_weights_of_a_draft_are_reported() -> None:
    broken = copy.deepcopy(MODEL)
    with torch.no_grad():
        broken.final_norm.weight[0] = float("nan")
    engine = Engine(MODEL, cache_tokens=400, proposer=Draft(broken))
    engine.submit(Request([5, 9, 2], SamplingSettings(max_new_tokens=9, seed=1)))
    with pytest.raises(RunError, match="The draft's output is not a number"):
        finish(engine)


def test_a_text_that_nobody_waits_for_leaves_the_draft(tokenizer: Tokenizer) -> None:
    model = make_model(vocab_size=tokenizer.vocab_size, max_seq_len=96)
    draft = Draft(model)
    pieces = stream(model, tokenizer, [[5, 9, 2]], make_settings(seed=1), proposer=draft)
    for _ in range(3):
        next(pieces)
    assert draft.pages.held > 0
    pieces.close()
    assert draft.pages.held == 0 and not draft._twins


def test_a_draft_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="The draft's vocabulary has 82 tokens, the model's 83"):
        Engine(MODEL, proposer=Draft(make_model(vocab_size=82)))
    with pytest.raises(UserError, match="for a decoder alone"):
        Engine(made("t5"), proposer=Draft(MODEL))
    with pytest.raises(UserError, match="The draft is no decoder"):
        Draft(made("t5"))  # type: ignore[arg-type]


@pytest.mark.parametrize("form", [{"choice": ["a king", "the end"]}, {"regex": "[a-c]{3,9}!"}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_form_is_kept(form: dict[str, Any], temperature: float, tokenizer: Tokenizer) -> None:
    import re

    model = make_model(vocab_size=tokenizer.vocab_size, max_seq_len=96)
    settings = make_settings(max_new_tokens=30, temperature=temperature, seed=2, **form)
    prompts = [tokenizer.encode(text) for text in ("Once", "the king", "むかし")]
    alone = complete(model, tokenizer, prompts, **vars(settings))
    for proposer in (Draft(model), Draft(blurred(model, 0.1)), Lookup()):
        results = [
            piece.result
            for piece in stream(model, tokenizer, prompts, settings, proposer=proposer)
            if piece.result is not None
        ]
        results.sort(key=lambda one: one.prompt_tokens)
        for result in results:
            assert result.finish_reason == "stop"
            pattern = form.get("regex", "a king|the end")
            assert re.fullmatch(pattern, result.text)
        if temperature == 0.0:
            assert {one.text for one in results} == {one.text for one in alone}
    assert make_constraint(settings, tokenizer) is not None


# ------------------------------------------------------------------ distribution

SMALL = make_model(vocab_size=5, max_seq_len=16, init_std=0.25)
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 3, "repetition_penalty": 1.4},
]


def texts_of(settings: SamplingSettings, prompt: list[int]) -> dict[tuple[int, ...], float]:
    """Every text that can be written, and its probability."""
    length = settings.max_new_tokens
    found = {}
    for text in itertools.product(range(5), repeat=length):
        chooser = Chooser(settings, make_generator(0), prompt)
        with torch.inference_mode():
            logits = SMALL(torch.tensor([[*prompt, *text[:-1]]]))[0, len(prompt) - 1 :]
        logprob = 0.0
        for row, token in zip(logits, text, strict=True):
            logprob += chooser.distribution(row)[token].item()
            chooser.accept(token)
        found[text] = torch.tensor(logprob).exp().item()
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-4)
    return found


def p_value(proposer: Proposer, settings: SamplingSettings) -> float:
    """Of Pearson's chi-square test that texts of many seeds have their probabilities."""
    prompt = [1, 2, 1]
    wanted = texts_of(settings, prompt)
    engine = Engine(SMALL, cache_tokens=64 * PAGE, proposer=proposer)
    count = 3000
    engine.submit(Request(prompt, SamplingSettings(**{**vars(settings), "n": count, "seed": 1})))
    found = Counter(tuple(one.token for one in new) for new in finish(engine, 10_000).values())
    assert set(found) <= {text for text, share in wanted.items() if share > 0.0}
    usual = [text for text, share in wanted.items() if share * count >= 8]
    observed = [found[text] for text in usual]
    expected = [wanted[text] * count for text in usual]
    if (rest := count - sum(expected)) > 8:
        observed.append(count - sum(observed))
        expected.append(rest)
    assert len(expected) > 10
    distance = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    half = torch.tensor([(len(expected) - 1) / 2, distance / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@pytest.mark.parametrize("way", SETTINGS, ids=["plain", "cut"])
@pytest.mark.parametrize("name", ["draft", "lookup"])
def test_sampled_texts_have_the_same_distribution(name: str, way: dict[str, Any]) -> None:
    settings = SamplingSettings(max_new_tokens=3, **way)
    proposer = Lookup() if name == "lookup" else Draft(blurred(SMALL, 0.5))
    assert p_value(proposer, settings) > 0.01


def test_the_distribution_test_would_see_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """If every guess were taken."""
    monkeypatch.setattr(runs, "check_guess", lambda chooser, row, guess, odds: guess)
    settings = SamplingSettings(max_new_tokens=3, temperature=1.0)
    assert p_value(Draft(blurred(SMALL, 0.5)), settings) < 1e-6
