"""Reference models and ours, loaded from the folders that the reference wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.weights.folder import load_folder
from tests.model.references import REFERENCES, make_reference


@pytest.fixture(scope="session", params=list(REFERENCES))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, Decoder]:
    """A reference model and ours, loaded from the folder that the reference wrote."""
    theirs = make_reference(request.param)
    folder: Path = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    ours, _ = load_folder(folder)
    assert isinstance(ours, Decoder)
    return theirs, ours


def random_tokens(model: Decoder, batch: int = 2, length: int = 40, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)


@pytest.fixture(scope="session")
def reference() -> Callable[..., PreTrainedModel]:
    return make_reference


@pytest.fixture(scope="session")
def tokens_for() -> Callable[..., torch.Tensor]:
    return random_tokens
