"""Adapters in the engine: each request with its own, all on one base."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.engine import Engine
from llm_from_scratch.generate.fast import KernelRunner
from llm_from_scratch.generate.pages import Pages
from llm_from_scratch.generate.requests import BASE, Request, Writer
from llm_from_scratch.generate.sampling import SamplingSettings
from llm_from_scratch.model.adapters import use_adapter
from llm_from_scratch.model.lora import LoraSettings, add_lora
from llm_from_scratch.quant.base import pack_base
from tests.generate.conftest import make_model
from tests.generate.engines import Listening, answers, finish, said
from tests.model.references_seq2seq import make_seq2seq

PROMPT = list(range(5, 45))
SETTINGS = SamplingSettings(max_new_tokens=6, temperature=0.0)


def adapt(model: Writer, size: float = 0.3) -> None:
    for seed, name in enumerate(("first", "second")):
        targets = ("q", "v", "down") if seed == 0 else ("k", "o", "up")
        kind = "dora" if seed else "lora"
        add_lora(model, LoraSettings(rank=3, alpha=9, kind=kind, targets=targets), seed, name)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".a", ".b")):
                parameter.copy_(torch.empty(parameter.shape).normal_(generator=generator) * size)


@pytest.fixture(scope="module")
def adapted() -> Writer:
    model = make_model(max_seq_len=96)
    adapt(model)
    return model


def asked(adapter: str | None, prompt: list[int] = PROMPT) -> Request:
    return Request(prompt, SETTINGS, adapter=adapter)


def solo(model: Writer, adapter: str) -> tuple[list[int], str | None]:
    return answers(model, asked(adapter), reuse_prefixes=False)[0]


def test_answers_in_company_are_those_alone(adapted: Writer) -> None:
    """The same prompt for all, so that a page of another adapter would be found at once."""
    wanted = {name: solo(adapted, name) for name in (BASE, "first", "second")}
    assert len({tuple(tokens) for tokens, _ in wanted.values()}) == 3
    engine = Engine(adapted, cache_tokens=1024)
    order = ["first", BASE, "second", "first", "second", BASE]
    numbers = [engine.submit(asked(name)) for name in order]
    found = finish(engine)
    for number, name in zip(numbers, order, strict=True):
        assert said(found[number, 0]) == wanted[name], name
    listening = engine.runner = Listening(engine)  # type: ignore[assignment]
    again = [engine.submit(asked(name)) for name in ("second", BASE)]
    found = finish(engine)
    assert [said(found[number, 0]) for number in again] == [wanted["second"], wanted[BASE]]
    assert listening.read < 2 * len(PROMPT)  # each found its own beginning


def test_the_adapter_that_acts_is_the_default(adapted: Writer) -> None:
    use_adapter(adapted, "first")
    assert answers(adapted, asked(None))[0] == solo(adapted, "first")
    use_adapter(adapted, None)
    assert answers(adapted, asked(None))[0] == solo(adapted, BASE)
    use_adapter(adapted, "second")
    with pytest.raises(UserError, match="no adapter 'third'; it has first, second"):
        Engine(adapted, cache_tokens=256).submit(asked("third"))
    with pytest.raises(UserError, match="it has none at all"):
        Engine(make_model(), cache_tokens=48).submit(asked("first", PROMPT[:8]))


def test_beams_and_several_texts(adapted: Writer) -> None:
    for settings in (
        SamplingSettings(max_new_tokens=5, temperature=0.9, seed=3, n=3),
        SamplingSettings(max_new_tokens=5, temperature=0.0, num_beams=3, n=2),
    ):
        wanted = {
            name: answers(adapted, replace(asked(name), settings=settings))
            for name in ("first", "second")
        }
        engine = Engine(adapted, cache_tokens=2048)
        numbers = {name: engine.submit(replace(asked(name), settings=settings)) for name in wanted}
        found = finish(engine)
        for name, number in numbers.items():
            got = {choice: said(new) for (n, choice), new in found.items() if n == number}
            assert got == wanted[name]


def test_an_encoder_reads_each_source_with_its_own(tmp_path: object) -> None:
    from pathlib import Path

    from llm_from_scratch.weights.folder import load_folder

    make_seq2seq("t5").save_pretrained(Path(str(tmp_path)) / "base")
    model, _ = load_folder(Path(str(tmp_path)) / "base", torch.float32)
    adapt(model, 2.0)  # type: ignore[arg-type]
    prompt = list(range(5, 17))
    wanted = {name: answers(model, asked(name, prompt))[0] for name in (BASE, "first", "second")}  # type: ignore[arg-type]
    assert len({tuple(tokens) for tokens, _ in wanted.values()}) > 1
    engine = Engine(model, cache_tokens=1024)  # type: ignore[arg-type]
    numbers = {name: engine.submit(asked(name, prompt)) for name in ("second", "first", BASE)}
    found = finish(engine)
    assert {name: said(found[number, 0]) for name, number in numbers.items()} == wanted


def test_a_packed_base() -> None:
    model = make_model(d_model=64, head_dim=16, d_ff=128, max_seq_len=96)
    pack_base(model, "int8")
    adapt(model)
    engine = Engine(model, cache_tokens=1024)
    assert not isinstance(engine.runner, KernelRunner)
    numbers = {name: engine.submit(asked(name)) for name in ("second", "first", BASE)}
    found = finish(engine)
    for name, number in numbers.items():
        assert said(found[number, 0]) == solo(model, name)


def test_changed_weights_are_read_anew() -> None:
    model = make_model(max_seq_len=96)
    engine = Engine(model, cache_tokens=1024)
    engine.submit(asked(None))
    finish(engine)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    engine.forget()
    number = engine.submit(asked(None))
    assert said(finish(engine)[number, 0]) == answers(model, asked(None), reuse_prefixes=False)[0]


def test_pages_forget_and_are_free_again() -> None:
    pages = Pages(6, 2)
    first = [pages.take(), pages.take()]
    serial = pages.remember(0, [1, 2], first[0])  # type: ignore[arg-type]
    pages.remember(serial, [3, 4], first[1])  # type: ignore[arg-type]
    pages.release(first[1])  # type: ignore[arg-type]
    assert pages.find([1, 2, 9], -1) == ([], -1)  # of another root nothing is known
    assert pages.available == 4
    pages.forget()
    assert pages.find([1, 2, 3, 4, 5]) == ([], 0)
    pages.release(first[0])  # type: ignore[arg-type]
    assert pages.available == 5 and pages.held == 0
    assert len({pages.take() for _ in range(5)}) == 5 and pages.take() is None
