"""Adapters in the engine: each request with its own, all on one base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.engine import Engine
from llm_from_scratch.generate.fast import KernelRunner
from llm_from_scratch.generate.pages import Pages
from llm_from_scratch.generate.requests import BASE, Request, Writer
from llm_from_scratch.generate.sampling import SamplingSettings
from llm_from_scratch.generate.speculative import Draft, Lookup
from llm_from_scratch.model.adapters import merged, use_adapter
from llm_from_scratch.model.config import ExpertsConfig
from llm_from_scratch.model.lora import LoraSettings, add_lora
from llm_from_scratch.quant import kernels
from llm_from_scratch.quant.base import pack_base
from llm_from_scratch.weights.folder import load_folder
from tests.generate.conftest import make_model
from tests.generate.engines import Listening, answers, finish, said
from tests.model.references_seq2seq import make_seq2seq

PROMPT = list(range(5, 45))
SETTINGS = SamplingSettings(max_new_tokens=6, temperature=0.0)


NAMES = ("first", "second")
LINEAR = (("q", "v", "down"), ("k", "o", "up"))


def adapt(
    model: Writer, size: float = 0.3, targets: tuple[tuple[str, ...], ...] = LINEAR,
    second: str = "dora",
) -> None:  # fmt: skip
    """Two adapters that change much, `first` and `second`, around these layers."""
    for seed, name in enumerate(NAMES):
        kind = second if seed else "lora"
        lora = LoraSettings(rank=3, alpha=9, kind=kind, targets=targets[seed])
        add_lora(model, lora, seed, name)
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


def make_pair(family: str, folder: Path) -> Writer:
    make_seq2seq(family).save_pretrained(folder / "base")
    model, _ = load_folder(folder / "base", torch.float32)
    return model  # type: ignore[return-value]


def test_an_encoder_reads_each_source_with_its_own(tmp_path: Path) -> None:
    model = make_pair("t5", tmp_path)
    adapt(model, 2.0)
    prompt = list(range(5, 17))
    wanted = {name: answers(model, asked(name, prompt))[0] for name in (BASE, "first", "second")}
    assert len({tuple(tokens) for tokens, _ in wanted.values()}) > 1
    engine = Engine(model, cache_tokens=1024)
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


# Layers of which the engine's passes could take one matrix for all rows, or that all rows share.
UNUSUAL = {
    "tied": (("embedding", "q"), ("head", "embedding")),
    "gpt2": (("q", "v"), ("k", "positions")),
    "mixture": (("router", "q"), ("router", "o")),
    "t5": (("k", "up"), ("relative_bias", "q")),
    "bart": (("positions", "v"), ("k", "up")),
}


@pytest.mark.parametrize("what", UNUSUAL)
@pytest.mark.parametrize("lengths", [(12, 12, 12, 12), (12, 7, 9, 5)])
def test_every_layer_knows_its_rows(what: str, lengths: tuple[int, ...], tmp_path: Path) -> None:
    """Texts of one length and of several: positions are shared by all rows, or are not."""
    if what in ("t5", "bart"):
        model = make_pair(what, tmp_path)
    elif what == "mixture":
        experts = ExpertsConfig(n_experts=4, n_active=2, d_ff=20, layers=(0, 2))
        model = make_model(max_seq_len=96, experts=experts)
    else:
        model = make_model("gpt2" if what == "gpt2" else "llama", max_seq_len=96)
    adapt(model, 0.6, UNUSUAL[what], "lora")
    names = ("first", BASE, "second", "first")
    prompts = [list(range(5 + i, 5 + i + n)) for i, n in enumerate(lengths)]
    requests = [asked(*pair) for pair in zip(names, prompts, strict=True)]
    wanted = []
    for name, request in zip(names, requests, strict=True):
        use_adapter(model, name or None)
        wanted.append(answers(merged(model), replace(request, adapter=None))[0])
    engine = Engine(model, cache_tokens=1024)
    numbers = [engine.submit(request) for request in requests]
    found = finish(engine)
    assert [said(found[number, 0]) for number in numbers] == wanted


@pytest.mark.skipif(not kernels.available(), reason="there is no C++ compiler")
def test_adapters_around_packed_blocks_alone() -> None:
    """The blocks could go through the recorded kernels, but what is around them differs by row."""
    model = make_model(d_model=64, head_dim=16, d_ff=128, max_seq_len=96)
    pack_base(model, "int8")
    assert isinstance(Engine(model, cache_tokens=96).runner, KernelRunner)
    adapt(model, 0.6, (("head",), ("embedding",)), "lora")
    assert len({tuple(solo(model, name)[0]) for name in (BASE, "first", "second")}) == 3


@pytest.mark.parametrize("packed", [False, True])
def test_an_adapter_that_comes_later(packed: bool) -> None:
    """What the engine has read before was read by the base alone."""
    model = make_model(d_model=64, head_dim=16, d_ff=128, max_seq_len=96)
    if packed:
        pack_base(model, "int8")
    engine = Engine(model, cache_tokens=1024)
    first = engine.submit(asked(None))
    before = said(finish(engine)[first, 0])
    adapt(model)
    numbers = {name: engine.submit(asked(name)) for name in ("second", BASE)}
    found = finish(engine)
    assert said(found[numbers[BASE], 0]) == before
    assert said(found[numbers["second"], 0]) == solo(model, "second") != before


def test_a_draft_uses_the_adapter_that_it_brings(adapted: Writer) -> None:
    use_adapter(adapted, "first")
    twin = merged(adapted, "first")  # nothing that the draft guesses is wrong
    long = replace(asked(None), settings=replace(SETTINGS, max_new_tokens=24))
    engine = Engine(twin, cache_tokens=256, proposer=Draft(adapted, most=5))  # type: ignore[arg-type]
    listening = engine.runner = Listening(engine)  # type: ignore[assignment]
    number = engine.submit(long)
    assert said(finish(engine)[number, 0]) == answers(twin, long)[0]
    assert listening.read <= len(PROMPT) + 24 + 5


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    asked_for=st.lists(
        st.tuples(st.sampled_from([*NAMES, BASE]), st.integers(1, 3), st.integers(1, 20)),
        min_size=2, max_size=6,
    ),
    room=st.sampled_from([80, 112, 512]),
    chunk=st.sampled_from([3, 17, 512]),
    guess=st.booleans(),
)  # fmt: skip
def test_company_changes_nothing(
    adapted: Writer, asked_for: list[tuple[str, int, int]], room: int, chunk: int, guess: bool
) -> None:
    """Prompts with the same beginnings, little room (texts wait and begin again), long prompts in
    pieces, guesses: each text is the one that its adapter writes alone."""
    requests = [
        asked(name, [*PROMPT[: 16 * shared], *range(60, 60 + own)])
        for name, shared, own in asked_for
    ]
    proposer = Lookup(3) if guess else None
    engine = Engine(adapted, cache_tokens=room, chunk=chunk, max_running=4, proposer=proposer)
    numbers = [engine.submit(one) for one in requests[:-1]]
    begun = engine.step()
    numbers.append(engine.submit(requests[-1]))
    found = finish(engine)
    for new in reversed(begun):
        found.setdefault((new.request, 0), []).insert(0, new)
    for number, request in zip(numbers, requests, strict=True):
        wanted = answers(adapted, request, reuse_prefixes=False)[0]
        assert said(found[number, 0]) == wanted
