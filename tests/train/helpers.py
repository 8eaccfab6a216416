"""A tiny run for the tests of the loop: seconds, not minutes, and every part of it real."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from llm_from_scratch.core.config import from_dict, merge
from llm_from_scratch.data.loader import Batch
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.presets import ModelSettings, resolve
from llm_from_scratch.train.settings import PretrainConfig

WORDS = tuple("the cat sat on a mat and saw that it was good so she sang to him".split())


def text(count: int = 1500, seed: int = 0) -> str:
    """Words in a repeatable order that a tiny model can learn something from."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(WORDS), (count,), generator=generator).tolist()
    return " ".join(WORDS[i] for i in picks) + "\n"


def config(folder: Path, **changes: dict[str, object]) -> PretrainConfig:
    """Settings of a tiny run into folder/run over folder/text.txt (written when missing)."""
    source = folder / "text.txt"
    if not source.exists():
        source.write_text(text(), encoding="utf-8")
    base: dict[str, object] = {
        "out": str(folder / "run"),
        "data": {"paths": [str(source)], "seq_len": 16, "val_fraction": 0.1},
        "tokenizer": {"vocab_size": 300},
        "model": {"d_model": 16, "n_layers": 2, "n_heads": 2, "dropout": 0.1},
        "train": {
            "max_steps": 8, "batch_size": 4, "precision": "fp32", "device": "cpu", "seed": 3,
            "eval_every": 3, "sample_every": 0, "checkpoint_every": 4, "warmup_steps": 2,
        },
    }  # fmt: skip
    return from_dict(PretrainConfig, merge(base, changes))


def with_train(config: PretrainConfig, **changes: object) -> PretrainConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def tiny_model(seed: int = 0, **settings: object) -> Decoder:
    values = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, **settings}
    model = Decoder(resolve(ModelSettings(**values), 37, 12))  # type: ignore[arg-type]
    model.initialise(seed)
    return model


class RaggedSource:
    """Batches by number, with masks of very different lengths from row to row."""

    def __init__(self, vocab_size: int = 37, seq_len: int = 12) -> None:
        self.vocab_size, self.seq_len = vocab_size, seq_len

    def row(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(0, self.vocab_size, (self.seq_len + 1,), generator=generator)
        targets = ids[1:].clone()
        kept = (1, self.seq_len, 3, 7)[number % 4]
        targets[: self.seq_len - kept] = -100
        return ids[:-1], targets

    def batch(self, start: int, count: int) -> Batch:
        rows = [self.row(n) for n in range(start, start + count)]
        return Batch(torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows]))
