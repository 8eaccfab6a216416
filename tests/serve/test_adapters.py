"""Adapters behind a server: a name for each, one base in memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.generate import complete
from llm_from_scratch.generate.sampling import SamplingSettings
from llm_from_scratch.model import inside
from llm_from_scratch.model.lora import LoraSettings, add_lora
from llm_from_scratch.serve.limits import Limits
from llm_from_scratch.serve.models import ServedModel, open_models, split_name
from llm_from_scratch.serve.service import make_service
from llm_from_scratch.serve.worker import Worker
from llm_from_scratch.text.chat_template import TEMPLATES
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.adapters_write import save_adapter
from llm_from_scratch.weights.folder import load_folder, save_folder
from llm_from_scratch.weights.sources import load
from tests.generate.conftest import make_model
from tests.serve.servers import running

LIMITS = Limits(cache_tokens=2048)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, and the runs poet/ and clerk/ with an adapter of it each."""
    folder = tmp_path_factory.mktemp("adapters")
    model = make_model(vocab_size=tokenizer.vocab_size, max_seq_len=256)
    save_folder(model, tokenizer, folder / "base")
    for seed, name in enumerate(("poet", "clerk")):
        model, _ = load_folder(folder / "base", torch.float32)  # type: ignore[assignment]
        add_lora(model, LoraSettings(rank=3, alpha=9), seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith((".a", ".b")):
                    parameter.copy_(torch.empty(parameter.shape).normal_(generator=generator) * 0.3)
        own = Tokenizer.load(folder / "base")
        own.chat_template = TEMPLATES[{"poet": "alpaca", "clerk": "japanese"}[name]]
        own.extra_stop_ids = set() if name == "poet" else {*range(60, 300)}
        place = folder / name / "adapter"
        save_adapter(model, place, str(folder / "base"), tokenizer=own)
    return folder


@contextlib.contextmanager
def calling(models: dict[str, ServedModel]) -> Iterator[httpx2.Client]:
    with (
        running(make_service(models, LIMITS)) as server,
        httpx2.Client(base_url=server.address, timeout=60) as client,
    ):
        yield client


def answer(worker: Worker, name: str, prompt: list[int]) -> list[int]:
    async def read() -> list[int]:
        settings = SamplingSettings(max_new_tokens=8, temperature=0.0)
        return [t async for piece in worker.write(name, [prompt], settings) for t in piece.tokens]

    return asyncio.run(read())


def test_one_base_many_names(folder: Path, tokenizer: Tokenizer) -> None:
    arguments = [str(folder / part) for part in ("poet/adapter", "base", "clerk/adapter")]
    models = open_models(arguments, LIMITS, report=lambda line: None)
    assert list(models) == ["poet", "base", "clerk"]
    assert models["poet"].model is models["clerk"].model is models["base"].model
    service = make_service(models, LIMITS)
    prompt = tokenizer.encode("Once upon a time there was a king.")
    service.worker.start()
    try:
        found = {name: answer(service.worker, name, prompt) for name in models}
        again = {name: answer(service.worker, name, prompt) for name in models}
    finally:
        service.worker.stop()
    assert found == again and len({tuple(tokens) for tokens in found.values()}) == 3
    for name, tokens in found.items():
        path = folder / "base" if name == "base" else folder / name / "adapter"
        model, own = load(path, device="cpu")
        wanted = complete(model, own, [prompt], max_new_tokens=8, temperature=0.0)[0]  # type: ignore[arg-type]
        assert tokens == wanted.tokens
    assert service.model("poet").context == 256
    page = service.metrics.page().decode()
    assert 'scratchlm_texts_total{finish_reason="length",model="poet"} 2.0' in page
    assert page.count("scratchlm_steps_total{") == 1


def test_a_base_that_is_not_served_itself(folder: Path) -> None:
    arguments = [str(folder / "poet" / "adapter"), f"second={folder / 'clerk' / 'adapter'}"]
    models = open_models(arguments, LIMITS, report=lambda line: None)
    assert list(models) == ["poet", "second"] and models["poet"].model is models["second"].model
    page = make_service(models, LIMITS).metrics.page().decode()
    assert 'scratchlm_steps_total{model="poet/base"}' in page and str(folder) not in page
    assert split_name(str(folder / "poet" / "adapter"))[0] == "poet"


@pytest.mark.parametrize("name", ["v1.5", "keys", "training"])
def test_names_that_mean_something_to_python(folder: Path, tokenizer: Tokenizer, name: str) -> None:
    arguments = [str(folder / "base"), f"{name}={folder / 'poet' / 'adapter'}"]
    models = open_models(arguments, LIMITS, report=lambda line: None)
    service = make_service(models, LIMITS)
    prompt = tokenizer.encode("Once upon a time there was a king.")
    service.worker.start()
    try:
        found = [answer(service.worker, one, prompt) for one in models]
    finally:
        service.worker.stop()
    assert list(models) == ["base", name] and found[0] != found[1]


def test_a_base_that_is_gone(folder: Path, tmp_path: Path) -> None:
    model, _ = load_folder(folder / "base", torch.float32)
    add_lora(model, LoraSettings(rank=3), 0)
    save_adapter(model, tmp_path / "lost", str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"is an adapter of .*gone, which is not to be had"):
        open_models([str(tmp_path / "lost")], LIMITS, report=lambda line: None)
    save_adapter(model, tmp_path / "orphan")
    with pytest.raises(UserError, match="does not say which model it was made for"):
        load(tmp_path / "orphan")
    found, _ = load(folder / "base", adapter=tmp_path / "orphan", device="cpu")
    assert found.config == model.config
    with pytest.raises(UserError, match=r"is no adapter: it has no adapter_config\.json"):
        load(folder / "base", adapter=folder / "base")


def test_a_base_is_one_however_it_is_called(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    models = open_models(["base", "poet/adapter"], LIMITS, report=lambda line: None)
    assert models["poet"].host is models["base"] and models["poet"].model is models["base"].model


def test_each_adapter_is_spoken_to_in_its_own_template(folder: Path) -> None:
    """One server, one base, three templates; and texts end where each adapter learnt to end."""
    arguments = [str(folder / part) for part in ("poet/adapter", "base", "clerk/adapter")]
    models = open_models(arguments, LIMITS, report=lambda line: None)
    messages = [{"role": "user", "content": "Once upon a time"}]
    body: dict[str, Any] = {"messages": messages, "max_tokens": 8, "temperature": 0}
    marks = {"poet": "### Instruction:", "base": "<|im_start|>user", "clerk": "アシスタント："}
    with calling(models) as client:
        for name, mark in marks.items():
            path = folder / "base" if name == "base" else folder / name / "adapter"
            model, own = load(path, device="cpu")
            asked = client.post("/v1/tokenize", json={"model": name, "messages": messages})
            prompt = asked.json()["tokens"]
            assert mark in own.decode(prompt)
            found = client.post("/v1/chat/completions", json={"model": name, **body}).json()
            wanted = complete(model, own, [prompt], max_new_tokens=8, temperature=0.0)[0]  # type: ignore[arg-type]
            choice = found["choices"][0]
            assert choice["message"]["content"] == wanted.text.lstrip()
            assert choice["finish_reason"] == wanted.finish_reason
            ends = {"poet": "length", "base": "length", "clerk": "stop"}
            assert choice["finish_reason"] == ends[name]
        listed = client.get("/v1/models").json()["data"]
        assert [one["id"] for one in listed] == ["poet", "base", "clerk"]
        chats = {one["name"]: one["chat"] for one in client.get("/api/page").json()["models"]}
        assert chats == dict.fromkeys(models, True)


def test_one_looks_inside_of_the_adapter(folder: Path, tokenizer: Tokenizer) -> None:
    """While the base and another adapter are writing."""
    arguments = [str(folder / part) for part in ("poet/adapter", "base", "clerk/adapter")]
    models = open_models(arguments, LIMITS, report=lambda line: None)
    ids = tokenizer.encode("Once upon a time there was")
    with calling(models) as client:
        seen = []
        for name in models:
            path = folder / "base" if name == "base" else folder / name / "adapter"
            alone, _ = load(path, device="cpu")
            wanted = inside.logit_lens(alone, ids, 2)  # type: ignore[arg-type]
            asked = {"model": name, "ids": ids, "top": 2}
            cells = client.post("/api/inside/lens", json=asked).json()["cells"]
            found = [[[one["id"] for one in cell] for cell in row] for row in cells]
            assert found == wanted.ids_ltk.tolist()
            asked = {"model": name, "ids": ids, "layer": 2}
            weights = client.post("/api/inside/attention", json=asked).json()["weights"]
            seen.append(weights)
    assert len({*seen}) == 3
