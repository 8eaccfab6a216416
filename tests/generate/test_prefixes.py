"""What is read of a prompt: the rest of it alone where its beginning is known, and in pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_from_scratch.generate.engine import PAGE, Engine
from llm_from_scratch.generate.requests import Request
from llm_from_scratch.generate.sampling import SamplingSettings
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from tests.generate.engines import finish, listen
from tests.generate.test_company import GREEDY, llama, made


def test_a_second_request_reads_the_rest_alone() -> None:
    prompt = [(7 * i) % 80 for i in range(70)]
    engine = Engine(llama(), cache_tokens=40 * PAGE)
    listening = listen(engine)
    engine.submit(Request(prompt, GREEDY))
    first = finish(engine)[0, 0]
    assert listening.read == 70 + 5
    engine.submit(Request(prompt, GREEDY))
    second = finish(engine)[1, 0]
    assert [one.token for one in second] == [one.token for one in first]
    assert listening.read == 75 + (70 - 64) + 5
    engine.submit(Request([*prompt[:40], 1, 2], GREEDY))
    finish(engine)
    assert listening.read == 86 + (42 - 32) + 5


def test_the_end_of_a_text_is_forgotten_before_its_beginning() -> None:
    prompt = [(7 * i) % 80 for i in range(66)]
    engine = Engine(llama(), cache_tokens=6 * PAGE)
    listening = listen(engine)
    read = []
    for tokens in (prompt, [9] * 40, prompt):
        engine.submit(Request(tokens, SamplingSettings(max_new_tokens=1, temperature=0.0)))
        finish(engine)
        read.append(listening.read)
    assert read == [66, 106, 106 + 66 - 3 * PAGE]  # one of the four pages had to go


def test_a_conversation_goes_on_from_the_answer() -> None:
    prompt = [(5 * i) % 80 for i in range(30)]
    engine = Engine(llama(), cache_tokens=40 * PAGE)
    listening = listen(engine)
    settings = SamplingSettings(max_new_tokens=20, temperature=0.0)
    engine.submit(Request(prompt, settings))
    answer = [one.token for one in finish(engine)[0, 0]]
    read = listening.read
    engine.submit(Request([*prompt, *answer, 9, 8, 7], GREEDY))
    finish(engine)
    assert listening.read - read == 53 - 48 + 5


def test_several_texts_of_a_prompt_read_it_once() -> None:
    prompt = [(3 * i) % 80 for i in range(67)]
    engine = Engine(llama(), cache_tokens=60 * PAGE, chunk=20)
    listening = listen(engine)
    engine.submit(Request(prompt, SamplingSettings(max_new_tokens=4, seed=1, n=5)))
    finish(engine)
    assert listening.read == 67 + 4 * (67 - 64) + 5 * 3


def test_beams_read_the_prompt_once() -> None:
    prompt = [(3 * i) % 80 for i in range(67)]
    engine = Engine(llama(), cache_tokens=60 * PAGE, chunk=20)
    listening = listen(engine)
    engine.submit(Request(prompt, SamplingSettings(max_new_tokens=4, temperature=0.0, num_beams=5)))
    finish(engine)
    assert listening.read == 67 + 5 * 3


def test_several_texts_of_a_source_read_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("bart")
    assert isinstance(model, EncoderDecoder)
    read: list[int] = []
    forward = model.encoder.forward

    def counting(tokens: torch.Tensor, **more: Any) -> torch.Tensor:
        read.append(tokens.numel())
        return forward(tokens, **more)

    monkeypatch.setattr(model.encoder, "forward", counting)
    engine = Engine(model, cache_tokens=40 * PAGE)
    engine.submit(Request([5, 6, 7], SamplingSettings(max_new_tokens=5, seed=1, n=4)))
    finish(engine)
    assert read == [3]


def test_without_reuse_everything_is_read() -> None:
    prompt = [(7 * i) % 80 for i in range(70)]
    engine = Engine(llama(), cache_tokens=40 * PAGE, reuse_prefixes=False)
    listening = listen(engine)
    for _ in range(2):
        engine.submit(Request(prompt, GREEDY))
        finish(engine)
    assert listening.read == 2 * 75


def test_a_long_prompt_holds_nobody_up() -> None:
    engine = Engine(llama(), cache_tokens=40 * PAGE, chunk=8)
    settings = SamplingSettings(max_new_tokens=30, temperature=0.0)
    engine.submit(Request([1, 2], settings))
    engine.submit(Request([3], settings))
    engine.step()
    long = engine.submit(Request([5] * 90, GREEDY))
    came = []
    for _ in range(12):
        new = engine.step()
        assert {0, 1} <= {one.request for one in new}
        came.append(long in {one.request for one in new})
    assert came == [False] * 11 + [True]  # 90 tokens in pieces of 8
    finish(engine)
