"""Small models and a tokenizer to generate with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_from_scratch.model.config import ModelConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.presets import FAMILIES
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer
from llm_from_scratch.weights.folder import save_folder

TEXT = "Once upon a time there was a king. むかしむかし、王様がいました。🙂 The end.\n\n" * 20


def make_model(family: str = "llama", vocab_size: int = 83, **changes: Any) -> Decoder:
    """A model whose every parameter is random, with no size equal to another."""
    fields = {
        "d_model": 36, "n_layers": 3, "n_heads": 6, "n_kv_heads": 6 if family == "gpt2" else 2,
        "head_dim": 6 if family == "gpt2" else 10, "d_ff": 52, "max_seq_len": 48, "init_std": 0.3,
        **FAMILIES[family], **changes,
    }  # fmt: skip
    model = Decoder(ModelConfig(vocab_size=vocab_size, **fields))  # type: ignore[arg-type]
    model.initialise(seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.7, 0.4, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def make() -> Callable[..., Decoder]:
    return make_model


@pytest.fixture(scope="session", params=["llama", "qwen3", "gpt2"])
def model(request: pytest.FixtureRequest) -> Decoder:
    return make_model(request.param)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], vocab_size=300)


class Scripted(Decoder):
    """A decoder that says what it is told: the given ids, one per step, then the first id."""

    def __init__(self, config: ModelConfig, ids: list[int]) -> None:
        super().__init__(config)
        self.ids = ids
        self.steps = 0

    def logits(self, hidden_btm: Tensor) -> Tensor:
        token = self.ids[self.steps] if self.steps < len(self.ids) else self.ids[0]
        self.steps += 1
        logits = torch.full((hidden_btm.shape[0], self.config.vocab_size), -100.0)
        logits[:, token] = 100.0
        return logits


@pytest.fixture(scope="session")
def scripted(tokenizer: Tokenizer) -> Callable[..., Scripted]:
    def make_scripted(text: str | list[int], **changes: Any) -> Scripted:
        ids = tokenizer.encode(text, special=True) if isinstance(text, str) else text
        config = make_model(vocab_size=tokenizer.vocab_size, **changes).config
        return Scripted(config, ids)

    return make_scripted


@pytest.fixture(scope="module")
def folder(
    make: Callable[..., Decoder], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """A base model as a folder."""
    path: Path = tmp_path_factory.mktemp("models") / "base"
    save_folder(make(vocab_size=tokenizer.vocab_size, max_seq_len=120), tokenizer, path)
    return str(path)
