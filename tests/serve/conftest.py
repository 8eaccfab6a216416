"""Models to serve, and servers for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

from llm_from_scratch.serve.limits import Limits
from llm_from_scratch.serve.models import ServedModel, give_engine, serve_model
from llm_from_scratch.serve.service import Service, make_service
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer
from llm_from_scratch.weights.folder import save_folder
from tests.generate.conftest import TEXT, make_model
from tests.serve.servers import Running, running

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTEXT = 512


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """With a chat template, so that conversations can be held."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = train_tokenizer([TEXT], vocab_size=320, special=special)
    made.chat_template = CHATML
    return made


def make_writer(tokenizer: Tokenizer, limits: Limits | None = None, **changes: Any) -> ServedModel:
    """A small decoder with random weights under the name "tiny", with its engine."""
    model = make_model(vocab_size=tokenizer.vocab_size, **{"max_seq_len": CONTEXT, **changes})
    served = serve_model(model, tokenizer, "tiny")
    give_engine(served, limits or Limits(cache_tokens=4096))
    return served


@pytest.fixture
def writer(tokenizer: Tokenizer) -> Callable[..., ServedModel]:
    return lambda *args, **kwargs: make_writer(tokenizer, *args, **kwargs)


@pytest.fixture
def service(tokenizer: Tokenizer) -> Service:
    """A service with the model "tiny", which nobody serves yet."""
    limits = Limits(cache_tokens=4096)
    return make_service({"tiny": make_writer(tokenizer, limits)}, limits)


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """start(service) serves it on a free port until the test is over."""
    with ExitStack() as stack:
        yield lambda service, **options: stack.enter_context(running(service, **options))


@pytest.fixture
def server(service: Service, start: Callable[..., Running]) -> Running:
    """A running server with the model "tiny"."""
    return start(service)


@pytest.fixture(scope="session")
def model_folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model "tiny" as a folder of that name, for servers that are processes."""
    path: Path = tmp_path_factory.mktemp("served") / "tiny"
    model = make_model(vocab_size=tokenizer.vocab_size, max_seq_len=CONTEXT)
    save_folder(model, tokenizer, path)
    return str(path)
