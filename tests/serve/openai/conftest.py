"""One server for all tests of the protocol, with a model of every kind, and clients for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx2
import pytest
import torch
from torch import Tensor

from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder import Encoder
from llm_from_scratch.model.heads import HeadConfig, HeadStyle, make_head
from llm_from_scratch.serve.limits import Limits
from llm_from_scratch.serve.models import ServedModel, give_engine, serve_model
from llm_from_scratch.serve.service import make_service
from llm_from_scratch.text.inputs import template
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer
from tests.generate.conftest import TEXT, make_model
from tests.model.architectures import ARCHITECTURES, make
from tests.serve.conftest import make_writer
from tests.serve.servers import Running, running
from tests.text import tool_templates

openai = pytest.importorskip("openai", reason="the openai client is not installed")

CONTEXT = 2048  # descriptions of tools are long for a vocabulary of little more than bytes
LIMITS = Limits(cache_tokens=4096, max_new_tokens=300, max_running=8, max_queue=32)


class Told(Decoder):
    """A decoder that says what it is told, whatever it is asked."""

    ids: tuple[int, ...] = ()
    said = 0
    fails_at = -1  # how many tokens it says before it breaks

    def logits(self, hidden_btm: Tensor) -> Tensor:
        logits = torch.full((len(hidden_btm), self.config.vocab_size), -100.0)
        if self.said == self.fails_at:
            raise RuntimeError("a secret of the machine room")
        if len(hidden_btm):
            logits[:, self.ids[self.said % len(self.ids)]] = 100.0
            self.said += 1
        return logits


def with_template(text: str | None) -> Tokenizer:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = train_tokenizer([TEXT], vocab_size=320, special=special)
    made.chat_template = text
    return made


def make_embedder() -> ServedModel:
    """A small encoder whose texts stand between [CLS] and [SEP]."""
    made = train_tokenizer([TEXT], vocab_size=320, special=["[PAD]", "[CLS]", "[SEP]"])
    names = {"cls": "[CLS]", "sep": "[SEP]"}
    around = template("cls A sep", "cls A sep B sep", names, made.special_tokens, True)
    roles = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    made = Tokenizer.from_spec({**made.spec, "post_processor": around}, roles)
    known: Any = ARCHITECTURES["bert"]
    encoder: Any = make(replace(known, vocab_size=made.vocab_size, max_seq_len=90))
    assert isinstance(encoder, Encoder)
    head = HeadConfig("embedding", HeadStyle(pooling="mean"), normalise=True, max_length=80)
    return serve_model(make_head(encoder, head), made, "vectors")


def make_pair() -> ServedModel:
    """A small encoder-decoder, such as translates."""
    made = with_template(None)
    config: Any = ARCHITECTURES["t5"]
    stacks = {
        name: replace(getattr(config, name), vocab_size=made.vocab_size)
        for name in ("encoder", "decoder")
    }
    pair: Any = make(replace(config, **stacks))
    return serve_model(pair, made, "pair")


def make_models(tokenizer: Tokenizer) -> dict[str, ServedModel]:
    """By name: "tiny" knows no tools, "hermes" and "mistral" do, "told" says what it is told."""
    hermes, mistral = map(with_template, (tool_templates.HERMES, tool_templates.MISTRAL))
    size: dict[str, Any] = {"max_seq_len": CONTEXT}
    models = {
        "tiny": make_writer(tokenizer, LIMITS, **size),
        "hermes": make_writer(hermes, LIMITS, **size),
        "mistral": make_writer(mistral, LIMITS, **size),
        "plain": make_writer(with_template(None), LIMITS, max_seq_len=200),
    }
    config = make_model(vocab_size=hermes.vocab_size, n_layers=1, **size).config
    models["told"] = serve_model(Told(config).eval(), hermes, "told")
    give_engine(models["told"], LIMITS)
    models["pair"] = make_pair()
    give_engine(models["pair"], LIMITS)
    models["vectors"] = make_embedder()
    for name, served in models.items():
        served.name = name
    return models


@pytest.fixture(scope="session")
def models(tokenizer: Tokenizer) -> dict[str, ServedModel]:
    return make_models(tokenizer)


@pytest.fixture(scope="session")
def api(models: dict[str, ServedModel]) -> Iterator[Running]:
    """The server."""
    with running(make_service(models, LIMITS)) as server:
        yield server


@pytest.fixture(scope="session")
def client(api: Running) -> Iterator[Any]:
    """OpenAI's own client."""
    with openai.OpenAI(
        base_url=f"{api.address}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client


@pytest.fixture(scope="session")
def http(api: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=api.address, timeout=60) as client:
        yield client


@pytest.fixture
def tell(models: dict[str, ServedModel]) -> Callable[..., str]:
    """tell(text) makes "told" write that next, or break off; gives its name."""
    served = models["told"]
    assert isinstance(served.model, Told)
    told = served.model

    def say(text: str, fails_at: int = -1) -> str:
        told.ids = (*served.tokenizer.encode(text), served.tokenizer.special_tokens["<|im_end|>"])
        told.said, told.fails_at = 0, fails_at
        return served.name

    return say
