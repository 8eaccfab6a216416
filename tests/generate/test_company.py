"""Requests that join and leave a running batch: each is answered as if it were alone."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate import engine as engine_module
from llm_from_scratch.generate.engine import Engine
from llm_from_scratch.generate.fast import KernelRunner
from llm_from_scratch.generate.requests import Request, Writer
from llm_from_scratch.generate.sampling import SamplingSettings
from llm_from_scratch.generate.speculative import Draft, Lookup, Proposer
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.quant import kernels
from llm_from_scratch.weights.folder import load_folder
from tests.generate.conftest import make_model
from tests.generate.engines import answers, assert_empty, finish, listen, said
from tests.generate.test_fast import LLAMA, packed_model
from tests.model.references import make_reference
from tests.model.references_seq2seq import SEQ2SEQ, make_seq2seq

PAGE = engine_module.PAGE
GREEDY = SamplingSettings(max_new_tokens=6, temperature=0.0)
PACKED = "packed llama"  # through the kernels
WAYS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.0, "no_repeat_ngram": 2, "frequency_penalty": 0.5},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 1.2, "top_k": 20, "n": 2},
    {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 1},
    {"temperature": 0.0, "num_beams": 3, "n": 2},
]


@cache
def made(family: str) -> Writer:
    if family == PACKED:
        return packed_model(LLAMA, bits=4)
    make = make_seq2seq if family in SEQ2SEQ else make_reference
    with TemporaryDirectory() as folder:
        make(family).save_pretrained(folder)
        model, _ = load_folder(Path(folder))
    assert isinstance(model, Decoder | EncoderDecoder)
    return model.eval()


@cache
def llama() -> Decoder:
    return make_model(max_seq_len=96)


def requests_for(model: Writer, count: int) -> list[Request]:
    """Prompts of all lengths, of which many begin alike, each with settings of its own."""
    draw = random.Random(7)
    vocab, hear = model.config.vocab_size, isinstance(model, Decoder)
    root = [draw.randrange(vocab) for _ in range(36)]
    found = []
    for number in range(count):
        own = [draw.randrange(vocab) for _ in range(draw.randint(1, 9))]
        prompt = [*root[: draw.choice([0, 3, 16, 20, 32, 36])], *own]
        way = draw.choice(WAYS)
        if way.get("num_beams"):
            prompt = prompt[:20]
        if not hear:
            way = {name: value for name, value in way.items() if name != "prompt_logprobs"}
        settings = SamplingSettings(max_new_tokens=draw.randint(1, 11), seed=number, **way)
        stop = frozenset(draw.sample(range(vocab), 3))
        found.append(Request(prompt, settings, stop))
    return found


def near_tie(model: Writer, request: Request, wanted: list[int], found: list[int]) -> bool:
    """Whether two greedy texts part where the two likeliest tokens are all but equal."""
    if request.settings != SamplingSettings(**{**vars(request.settings), **WAYS[0]}):
        return False
    place = next(i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b)
    before = torch.tensor([[*request.prompt, *wanted[:place]]])
    if isinstance(model, EncoderDecoder):
        target = torch.tensor([[model.config.start_id, *wanted[:place]]])
        logits = model(torch.tensor([list(request.prompt)]), target)[0, -1]
    else:
        logits = model(before)[0, -1]
    best = logits.topk(2).values
    return bool(best[0] - best[1] <= 1e-3)


@cache
def alone(family: str, number: int) -> dict[int, tuple[list[int], str | None]]:
    model = made(family)
    return answers(model, requests_for(model, 64)[number])


DECODERS = ["llama", "mistral", "gemma3_text", "gpt2", "qwen3_moe", PACKED]


@pytest.mark.parametrize(
    ("family", "reuse"),
    [
        *((family, reuse) for family in DECODERS for reuse in (True, False)),
        *((family, True) for family in ("t5", "marian", "bart")),
    ],
)
def test_64_requests_that_come_and_go_at_random(family: str, reuse: bool) -> None:
    """Also cancelled at random, in a cache that is far too small, with prompts read in pieces."""
    model = made(family)
    requests = requests_for(model, 64)
    engine = Engine(model, cache_tokens=7 * PAGE, chunk=11, max_running=9, reuse_prefixes=reuse)
    assert isinstance(engine.runner, KernelRunner) == (family == PACKED and kernels.available())
    listening = listen(engine)
    draw = random.Random(3)
    waiting = list(requests)
    texts: dict[tuple[int, int], list[Any]] = {}
    cancelled: set[int] = set()
    sent_back = steps = 0
    while waiting or engine.busy:
        for _ in range(min(len(waiting), draw.choice([0, 0, 1, 4]))):
            engine.submit(waiting.pop(0))
        if engine.runs and draw.random() < 0.15:
            gone = draw.choice(list(engine.runs))
            engine.cancel(gone)
            cancelled.add(gone)
        before = set(engine.running)
        for new in engine.step():
            texts.setdefault((new.request, new.choice), []).append(new)
        sent_back += len(before & set(engine.waiting))
        steps += 1
        assert steps < 3000
        assert engine.pages.held <= 7
    assert_empty(engine)
    assert sent_back > 3 and len(cancelled) > 3
    assert listening.passes < 0.7 * sum(len(text) for text in texts.values())
    for number, request in enumerate(requests):
        for choice, (tokens, reason) in alone(family, number).items():
            text = texts.get((number, choice), [])
            if number in cancelled:
                assert [one.token for one in text] == tokens[: len(text)]
            elif said(text) != (tokens, reason):
                found = [one.token for one in text]
                assert near_tie(model, request, tokens, found), (number, choice, tokens, found)


@pytest.mark.parametrize("family", list(SEQ2SEQ))
def test_sources_of_all_lengths_join_and_leave(family: str) -> None:
    model = made(family)
    assert isinstance(model, EncoderDecoder)
    engine = Engine(model, cache_tokens=20 * PAGE)
    sources = [[(5 * i + n) % 60 + 2 for i in range(n)] for n in (3, 17, 1, 30, 9)]
    texts: dict[int, list[int]] = {}
    for source in sources:
        engine.submit(Request(source, GREEDY))
        for _ in range(2):
            for new in engine.step():
                texts.setdefault(new.request, []).append(new.token)
    engine.cancel(3)
    for (number, _), new in finish(engine).items():
        texts[number] += [one.token for one in new]
    for number, source in enumerate(sources):
        wanted = answers(model, Request(source, GREEDY))[0][0]
        assert texts[number] == (wanted[: len(texts[3])] if number == 3 else wanted)


# ------------------------------------------------------------------ memory


def test_a_cancelled_request_frees_its_memory_at_once() -> None:
    engine = Engine(llama(), cache_tokens=20 * PAGE)
    numbers = [engine.submit(Request([n] * 40, GREEDY)) for n in range(3)]
    engine.step()
    assert engine.pages.held == 9
    engine.cancel(numbers[1])
    assert engine.pages.held == 6
    engine.cancel(numbers[1])  # again: nothing happens
    engine.cancel(99)
    finish(engine)


def test_a_cancelled_source_is_forgotten_at_once() -> None:
    engine = Engine(made("t5"), cache_tokens=20 * PAGE)
    for _ in range(2):
        engine.submit(Request([5, 6, 7], GREEDY))
    engine.step()
    assert engine.runner._company  # type: ignore[attr-defined]
    engine.cancel(0)
    assert not engine.runner._company  # type: ignore[attr-defined]
    assert not engine.runner._sources  # type: ignore[attr-defined]
    finish(engine)


def test_one_text_of_several_can_be_cancelled() -> None:
    settings = SamplingSettings(max_new_tokens=9, seed=1, n=3)
    request = Request([1, 2, 3], settings)
    engine = Engine(llama(), cache_tokens=20 * PAGE)
    number = engine.submit(request)
    texts = {choice: [new.token] for new in engine.step() for choice in [new.choice]}
    engine.cancel(number, 0)
    for (_, choice), new in finish(engine).items():
        texts[choice] += [one.token for one in new]
    wanted = answers(llama(), request)
    assert texts[0] == wanted[0][0][:1]
    assert (texts[1], texts[2]) == (wanted[1][0], wanted[2][0])


def test_a_full_cache_queues() -> None:
    """Twenty texts in a cache with room for one of them; the oldest always goes on."""
    engine = Engine(llama(), cache_tokens=48, chunk=16)
    settings = SamplingSettings(max_new_tokens=20, temperature=0.0)
    requests = [Request([n, 3, 5, 7] * 7, settings) for n in range(20)]
    for request in requests:
        engine.submit(request)
    texts = finish(engine, most=20 * 30)
    for number, request in enumerate(requests):
        assert said(texts[number, 0]) == answers(llama(), request)[0]


def test_texts_that_fit_side_by_side_never_wait() -> None:
    prompts = [[n] * (n + 3) for n in range(12)]
    engine = Engine(llama(), cache_tokens=engine_module.room_for(llama(), prompts, GREEDY))
    for prompt in prompts:
        engine.submit(Request(prompt, GREEDY))
    assert len(engine.step()) == 12
    while engine.busy:
        assert not engine.waiting
        engine.step()


def test_room_is_made_for_those_who_run_at_once() -> None:
    def room(prompts: list[list[int]], **settings: Any) -> int:
        return engine_module.room_for(llama(), prompts, SamplingSettings(**settings))

    short, long = [1] * 10, [1] * 40
    assert room([short, long], max_new_tokens=6) == PAGE + 3 * PAGE
    assert room([short], max_new_tokens=6, n=500) == engine_module.MOST * PAGE
    assert room([short] * 500, max_new_tokens=6, n=2) == engine_module.MOST * PAGE
    assert room([short], max_new_tokens=6, num_beams=5, temperature=0) == 5 * PAGE
    assert room([short], max_new_tokens=10**6) == 96


@pytest.mark.parametrize("beams", [1, 3])
def test_a_prompt_that_can_never_fit_is_one_clear_error(beams: int) -> None:
    settings = SamplingSettings(temperature=0.0, num_beams=beams)
    engine = Engine(llama(), cache_tokens=48)
    with pytest.raises(UserError, match=r"The prompt has 97 tokens, but the model's context is 96"):
        engine.submit(Request([1] * 97, settings))
    length, room = (49, "room for 48") if beams == 1 else (17, "room for 16 in each of 3 beams")
    with pytest.raises(UserError, match=f"prompt has {length} tokens, but the cache has {room}"):
        engine.submit(Request([1] * length, settings))
    assert_empty(engine)
    engine = Engine(llama(), cache_tokens=96 * beams)
    engine.submit(Request([1] * 96, settings))
    (new,) = finish(engine).values()
    assert len(new) == 1 and new[0].finish_reason == "length"


def test_an_engine_that_could_do_nothing_is_refused() -> None:
    for name in ("chunk", "max_running"):
        with pytest.raises(UserError, match=f"{name} is 0; it must be at least 1"):
            Engine(llama(), **{name: 0})
    with pytest.raises(UserError, match=r"cache_dtype is torch\.int32; it must be"):
        Engine(llama(), cache_dtype=torch.int32)


def test_more_beams_than_texts_at_once() -> None:
    """Beams that were sent back come again together, however many there are."""
    engine = Engine(llama(), cache_tokens=8 * PAGE, max_running=2)
    beams = SamplingSettings(max_new_tokens=14, temperature=0.0, num_beams=4, n=2)
    long = SamplingSettings(max_new_tokens=60, temperature=0.0)
    requests = [Request([1, 2] * 9, long), Request([3, 4] * 8, beams), Request([5, 6] * 8, beams)]
    for request in requests:
        engine.submit(request)
    texts = finish(engine, most=300)
    for number, request in enumerate(requests):
        for choice, wanted in answers(llama(), request).items():
            assert said(texts[number, choice]) == wanted


def test_beams_that_came_first_are_not_sent_back_for_others() -> None:
    engine = Engine(llama(), cache_tokens=9 * PAGE)
    beams = SamplingSettings(max_new_tokens=16, temperature=0.0, num_beams=4)
    engine.submit(Request([3, 4] * 8, beams))
    engine.submit(Request([1, 2] * 31, SamplingSettings(max_new_tokens=30, temperature=0.0)))
    sent_back = 0
    while engine.busy:
        engine.step()
        assert 0 not in {one.number for one in engine.waiting}
        sent_back += bool(engine.waiting)
    assert sent_back


# ------------------------------------------------------------------ any engine

REQUESTS = [
    Request(
        [7 * i % 83 for i in range(length)], SamplingSettings(max_new_tokens=new, seed=1, **way)
    )
    for length, new, way in (
        (3, 12, {"temperature": 0.0}),
        (20, 9, {"temperature": 0.0, "num_beams": 2, "n": 2}),
        (18, 4, {"temperature": 0.0, "repetition_penalty": 1.2}),
        (1, 20, {"temperature": 0.0}),
        (17, 6, {"temperature": 0.0, "num_beams": 3}),
        (16, 12, {"temperature": 0.0, "n": 2, "prompt_logprobs": 0}),
        (33, 12, {"temperature": 0.0}),
    )
]


@cache
def by_itself(number: int) -> dict[int, tuple[list[int], str | None]]:
    return answers(llama(), REQUESTS[number])


@hypothesis_settings(max_examples=30)
@given(
    order=st.lists(st.integers(0, len(REQUESTS) - 1), min_size=1, max_size=7),
    pages=st.integers(6, 12),
    chunk=st.integers(1, 40),
    most=st.integers(1, 5),
    reuse=st.booleans(),
    guesser=st.sampled_from(["none", "lookup", "draft"]),
)
def test_any_engine_comes_to_an_end(
    order: list[int], pages: int, chunk: int, most: int, reuse: bool, guesser: str
) -> None:
    """With the same answers, however little it has and however it guesses."""
    proposer: Proposer | None = Lookup() if guesser == "lookup" else None
    if guesser == "draft":
        proposer = Draft(llama(), most=2, cache_tokens=6 * PAGE)
    engine = Engine(
        llama(), cache_tokens=pages * PAGE, chunk=chunk, max_running=most, reuse_prefixes=reuse,
        proposer=proposer,
    )  # fmt: skip
    for number in order:
        engine.submit(REQUESTS[number])
    texts = finish(engine, most=600)
    for place, number in enumerate(order):
        for choice, wanted in by_itself(number).items():
            assert said(texts[place, choice]) == wanted
    if isinstance(proposer, Draft):
        assert proposer.pages.held == 0
