"""A published translator under `finetune seq2seq`: it knows the right translations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_from_scratch.core.config import from_dict
from llm_from_scratch.train.finetune import finetune
from llm_from_scratch.train.methods.seq2seq import Seq2SeqConfig
from llm_from_scratch.weights.convert import convert
from tests.weights.real_files import real

pytestmark = pytest.mark.weights
PAIRS = {
    "I love music.": "J'aime la musique.",
    "Where is the station?": "Où est la gare ?",
    "The house is red.": "La maison est rouge.",
    "My brother works in Paris.": "Mon frère travaille à Paris.",
    "It is raining today.": "Il pleut aujourd'hui.",
    "The children play in the garden.": "Les enfants jouent dans le jardin.",
    "We will leave tomorrow morning.": "Nous partirons demain matin.",
    "The train is late again.": "Le train est encore en retard.",
}


def test_a_translator_finds_the_right_translations_likely(tmp_path: Path) -> None:
    """Had the targets another end, another language's pieces or another beginning than those that
    it was trained on, it would not."""
    convert(real("opus-mt-en-fr"), "hf", tmp_path / "model", report=lambda _: None)
    rows = [json.dumps({"source": a, "target": b}) for a, b in PAIRS.items()]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    config = from_dict(
        Seq2SeqConfig,
        {
            "model": str(tmp_path / "model"),
            "out": str(tmp_path / "run"),
            "data": {"paths": [str(tmp_path / "rows.jsonl")], "val_fraction": 0.5},
            "seq2seq": {"max_target": 32, "num_beams": 2},
            "train": {
                "epochs": None, "max_steps": 2, "batch_size": 3, "device": "cpu",
                "precision": "fp32", "learning_rate": 1e-6,
            },
        },
    )  # fmt: skip
    summary = finetune("seq2seq", config, quiet=True).summary
    assert summary["val_loss"] < 0.6
    assert summary["val_chrf"] > 70 and summary["val_bleu"] > 50
