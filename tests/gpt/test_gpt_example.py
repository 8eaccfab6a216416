"""examples/train_gpt.py, with few steps."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from llm_from_scratch.gpt import GPT, SimpleTokenizer, load_gpt
from llm_from_scratch.weights.folder import load_folder

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_gpt.py"


def test_train_small_gpt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train_small_gpt = runpy.run_path(str(SCRIPT))["train_small_gpt"]
    model, tokenizer, losses = train_small_gpt(steps=12, device="cpu", model_folder="model")
    assert isinstance(model, GPT) and isinstance(tokenizer, SimpleTokenizer)
    assert model.block_size == 64 and model.n_embd == 128 and len(model.blocks) == 4
    assert len(losses["train_losses"]) == 12
    assert losses["train_losses"][-1] < losses["train_losses"][0]
    assert capsys.readouterr().out.startswith("The quick")
    assert load_gpt("gpt_checkpoint.pt").sizes == model.sizes
    decoder, saved_tokenizer = load_folder("model")
    assert saved_tokenizer is not None
    assert decoder.config.vocab_size == saved_tokenizer.vocab_size == tokenizer.vocab_size


def test_command_line_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--steps", "0"])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code == 2
    assert "max_steps is 0; it must be at least 1." in capsys.readouterr().err
