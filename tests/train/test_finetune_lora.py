"""Adapters, bases in few bits and frozen layers in whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_from_scratch.core.config import from_dict, merge
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.runlog import read_json
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.lora import KINDS, LoraSettings, add_lora
from llm_from_scratch.model.presets import ModelSettings, resolve
from llm_from_scratch.quant.base import pack_base
from llm_from_scratch.text.chat_template import TEMPLATES
from llm_from_scratch.train.account import account
from llm_from_scratch.train.finetune import finetune
from llm_from_scratch.train.loop import Loop
from llm_from_scratch.train.methods.sft import SftConfig
from llm_from_scratch.train.pretrain import NextToken
from llm_from_scratch.train.settings import TrainSettings
from llm_from_scratch.weights.adapter_config import CONFIG, TENSORS
from llm_from_scratch.weights.folder import save_folder
from llm_from_scratch.weights.sources import load
from tests.train.helpers import RaggedSource, tiny_model
from tests.train.tiny_folders import byte_pairs

COLOURS = "red green blue".split()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = byte_pairs()
    settings = ModelSettings(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2)
    model = Decoder(resolve(settings, tokenizer.vocab_size, 192))
    model.initialise(0)
    save_folder(model, tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"prompt": f"{n} film", "response": COLOURS[n % 3] * 2} for n in range(36)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def made(base: str, out: Path, data: Path, **changes: Any) -> SftConfig:
    values = {
        "model": base, "out": str(out), "data": {"paths": [str(data)], "drop_duplicates": False},
        "sft": {"template": "alpaca", "eval_rows": 2, "max_new_tokens": 4},
        "lora": {"rank": 4, "dropout": 0.1},
        "train": {
            "max_steps": 12, "epochs": None, "batch_size": 6, "precision": "fp32", "device": "cpu",
            "eval_every": 6, "checkpoint_every": 4, "sample_every": 0, "learning_rate": 1e-2,
        },
    }  # fmt: skip
    return from_dict(SftConfig, merge(values, changes))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_an_adapter_and_a_merged_model(
    base: str, data: Path, tmp_path: Path, kind: str
) -> None:
    config = made(base, tmp_path / "run", data, lora={"kind": kind})
    summary = finetune("sft", config, quiet=True).summary
    log = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [v["loss"] for line in log if "loss" in (v := json.loads(line))]
    assert losses[-1] < losses[0] - 0.3
    assert summary["trainable_parameters"] < summary["parameters"] / 3
    stored = load_file(tmp_path / "run" / "checkpoints" / "step-12" / "model.safetensors")
    assert stored and all(".adapters." in name for name in stored)
    whole, tokenizer = load(tmp_path / "run", device="cpu")
    apart, _ = load(tmp_path / "run" / "adapter", device="cpu")
    tokens = torch.tensor([tokenizer.encode("good film one two")])
    wanted = whole(tokens)
    torch.testing.assert_close(apart(tokens), wanted, rtol=0, atol=1e-5)
    # PEFT finds the base by itself, and the merged model is one like any other.
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter").eval()
    torch.testing.assert_close(theirs(tokens).logits, wanted, rtol=0, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    torch.testing.assert_close(plain(tokens).logits, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "lora", [{"rank": 4}, {"rank": 4, "kind": "dora"}, {"rank": 2, "base": "int8"}]
)
def test_resumed_is_straight(base: str, data: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    finetune("sft", made(base, tmp_path / "a", data, lora=lora), quiet=True)
    cut = made(base, tmp_path / "b", data, lora=lora, train={"stop_after": 5})
    assert finetune("sft", cut, quiet=True).interrupted
    finetune("sft", SftConfig(out=str(tmp_path / "b")), resume=True, quiet=True)
    straight, resumed = (
        load_file(tmp_path / run / "checkpoints" / "step-12" / "model.safetensors")
        for run in ("a", "b")
    )
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_the_adapter_brings_the_template(base: str, data: Path, tmp_path: Path) -> None:
    finetune("sft", made(base, tmp_path / "run", data, train={"max_steps": 2}), quiet=True)
    assert load(base, device="cpu")[1].chat_template != TEMPLATES["alpaca"]
    for place, more in (("run/model", None), ("run/adapter", None), (base, tmp_path / "run")):
        _, tokenizer = load(tmp_path / place, adapter=more, device="cpu")
        assert tokenizer.chat_template == TEMPLATES["alpaca"]
    # And `info` knows what such a run has made.
    told = {name: account(str(tmp_path / name)) for name in ("run", "run/adapter")}
    assert told["run"]["adapter"] is None and told["run/adapter"]["adapter"]["rank"] == 4
    assert told["run"]["parameters"] == told["run/adapter"]["parameters"]
    own = AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter")
    assert own.chat_template == TEMPLATES["alpaca"]


def test_an_adapter_is_trained_on_but_not_replaced(base: str, data: Path, tmp_path: Path) -> None:
    short = {"max_steps": 2}
    finetune("sft", made(base, tmp_path / "a", data, train=short), quiet=True)
    adapter = str(tmp_path / "a" / "adapter")
    with pytest.raises(UserError, match="has an adapter 'default' already"):
        finetune("sft", made(adapter, tmp_path / "b", data, train=short), quiet=True)
    more = made(adapter, tmp_path / "c", data, train=short, lora={"rank": 0, "dropout": 0.0})
    summary = finetune("sft", more, quiet=True).summary
    assert summary["trainable_parameters"] < summary["parameters"] / 3
    first, second = (load_file(tmp_path / run / "adapter" / TENSORS) for run in "ac")
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)
    described = json.loads((tmp_path / "c" / "adapter" / CONFIG).read_text())
    assert described["base_model_name_or_path"] == str(Path(base).resolve())
    whole, tokenizer = load(tmp_path / "c", device="cpu")
    apart, _ = load(tmp_path / "c" / "adapter", device="cpu")
    tokens = torch.tensor([tokenizer.encode("good film one two")])
    torch.testing.assert_close(apart(tokens), whole(tokens), rtol=0, atol=1e-5)


def test_a_base_in_few_bits(base: str, data: Path, tmp_path: Path) -> None:
    config = made(base, tmp_path / "run", data, lora={"base": "int4"})
    summary = finetune("sft", config, quiet=True).summary
    assert summary["base_bytes"] < summary["base_bytes_before"]
    assert read_json(tmp_path / "run" / "summary.json")["base_bytes"] == summary["base_bytes"]
    # The merged model has the rounded base in it, as the adapter learnt to live with it.
    whole, tokenizer = load(tmp_path / "run", device="cpu")
    rounded, _ = load(base, dtype="fp32", device="cpu")
    pack_base(rounded, "int4")
    for name, weight in load_file(tmp_path / "run" / "model" / "model.safetensors").items():
        assert torch.isfinite(weight).all(), name
    tokens = torch.tensor([tokenizer.encode("good film one two")])
    with torch.no_grad():
        assert not torch.equal(whole(tokens), rounded(tokens))


def test_frozen_blocks_stay_as_they_are(base: str, data: Path, tmp_path: Path) -> None:
    freeze = {"blocks": 1, "embeddings": True}
    config = made(base, tmp_path / "run", data, lora={"rank": 0}, freeze=freeze)
    finetune("sft", config, quiet=True)
    before = load_file(Path(base) / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for name, weight in after.items():
        frozen = "embed_tokens" in name or ".layers.0." in name
        assert torch.equal(weight, before[name]) == frozen, name


def test_contradictions_are_said_before_anything_is_read(tmp_path: Path) -> None:
    config = made("nowhere", tmp_path / "run", tmp_path / "none.jsonl", freeze={"blocks": 1})
    with pytest.raises(UserError, match=r"with lora\.rank all of them are frozen already"):
        finetune("sft", config, quiet=True)


def test_gradients_do_not_depend_on_the_micro_batches() -> None:
    def gradients(micro: int) -> list[torch.Tensor]:
        model = tiny_model()
        add_lora(model, LoraSettings(rank=3, kind="dora"), seed=0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".b"):
                    parameter.add_(0.1)
        settings = TrainSettings(batch_size=6, micro_batch_size=micro)
        device = torch.device("cpu")
        loop = Loop(model, NextToken(), RaggedSource(), settings, device=device, quiet=True)
        loop.gradients(0)
        return [p.grad for p in loop.parameters if p.grad is not None]

    whole = gradients(6)
    largest = max(float(gradient.abs().max()) for gradient in whole)
    for micro in (1, 4):
        for got, wanted in zip(gradients(micro), whole, strict=True):
            assert float((got - wanted).abs().max()) <= 1e-6 * largest
