"""Pretraining with every kind of tokenizer that can be trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.training import KINDS
from llm_from_scratch.train.pretrain import pretrain
from llm_from_scratch.train.settings import TOKENIZERS, TokenizerSettings
from llm_from_scratch.weights.folder import load_folder
from tests.train.helpers import config


def test_a_run_knows_every_kind() -> None:
    assert TOKENIZERS == KINDS


@pytest.mark.parametrize(("kind", "size"), [("unigram", 275), ("wordpiece", 40)])
def test_a_run_with_another_tokenizer(kind: str, size: int, tmp_path: Path) -> None:
    settings = config(
        tmp_path, tokenizer={"kind": kind, "vocab_size": size}, train={"max_steps": 2}
    )
    run = pretrain(settings, quiet=True)
    _, tokenizer = load_folder(run.folder / "model")
    assert tokenizer is not None
    assert (tokenizer.kind, tokenizer.vocab_size) == (kind, size)
    assert tokenizer.eos_id == 0
    # Only what loses nothing of the text can be told in bits per byte.
    assert (run.summary.get("bits_per_byte") is not None) == (kind == "unigram")


@pytest.mark.parametrize(("kind", "size"), [("bpe", 256), ("unigram", 258), ("wordpiece", 2)])
def test_too_small_a_vocabulary_is_refused_at_once(kind: str, size: int) -> None:
    with pytest.raises(UserError, match=f"vocab_size is {size}; it must be at least {size + 1}"):
        TokenizerSettings(kind=kind, vocab_size=size)
    TokenizerSettings(kind=kind, vocab_size=size + 1)
