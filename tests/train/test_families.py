"""Every decoder family trains through the one loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.train.loop import Loop
from llm_from_scratch.train.pretrain import NextToken
from llm_from_scratch.train.settings import TrainSettings
from llm_from_scratch.weights.families import read_config
from llm_from_scratch.weights.folder import load_folder, save_folder
from tests.model.references import REFERENCES, make_reference
from tests.train.helpers import RaggedSource


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("family", REFERENCES)
def test_a_family_learns_and_is_saved(family: str, optimizer: str, tmp_path: Path) -> None:
    values = make_reference(family).config.to_dict()
    config = dataclasses.replace(read_config(values, "config.json")[1], init_std=0.05, dropout=0.0)
    model = Decoder(config)  # type: ignore[arg-type]
    model.initialise(seed=1)
    source = RaggedSource(vocab_size=37)
    batch = source.batch(0, 8)

    def loss() -> float:
        with torch.no_grad():
            logits = model(batch.tokens).flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(logits, batch.targets.flatten()))

    before = loss()
    settings = TrainSettings(
        batch_size=8, max_steps=25, learning_rate=0.01, warmup_steps=2, optimizer=optimizer,
        precision="fp32",
    )  # fmt: skip

    class Same(RaggedSource):
        def batch(self, start: int, count: int):  # type: ignore[no-untyped-def]
            return source.batch(start % 8, count)

    Loop(model, NextToken(), Same(), settings, device=torch.device("cpu"), quiet=True).train()
    assert loss() < before - 1.0
    save_folder(model, None, tmp_path / "m")
    again, _ = load_folder(tmp_path / "m")
    assert torch.equal(again(batch.tokens), model.eval()(batch.tokens))
