"""Supervised fine-tuning beside TRL: masks, packing, resuming, bad rows, and whole runs."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llm_from_scratch.cli.main import run
from llm_from_scratch.core.config import from_dict, merge
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.runlog import LiveLine, read_json
from llm_from_scratch.data.loader import IGNORED
from llm_from_scratch.data.records import BadRow, Row
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.presets import ModelSettings, resolve
from llm_from_scratch.text.chat import ChatTokens
from llm_from_scratch.text.training import train_tokenizer
from llm_from_scratch.train.finetune import finetune
from llm_from_scratch.train.loop import Loop
from llm_from_scratch.train.methods.sft import Sft, SftConfig, SftSettings, mask_texts
from llm_from_scratch.weights.folder import load_folder, save_folder

ANIMALS = "cat dog hen fox owl bee ant cow".split()


def rows(count: int = 48) -> list[dict[str, Any]]:
    """Questions whose answers can be learnt by heart, with padding of all lengths."""
    found = []
    for n in range(count):
        animal, times = ANIMALS[n % 8], 1 + n % 5
        found.append({
            "instruction": f"Case {n}: say {animal}" + " please" * times,
            "input": f"no {n}" if n % 3 == 0 else "",
            "output": " ".join([animal] * times),
        })  # fmt: skip
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base") / "model"
    text = "Below is an instruction that describes a task. Write a response that appropriately "
    text += "completes the request. ### Instruction: Input: Response: Case say please no "
    tokenizer = train_tokenizer([text + " ".join(ANIMALS)] * 9, vocab_size=400)
    settings = ModelSettings(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2)
    model = Decoder(resolve(settings, tokenizer.vocab_size, 128))
    model.initialise(1)
    save_folder(model, tokenizer, folder)
    return str(folder)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    return path


def made(base: str, out: Path, data: Path, **changes: Any) -> SftConfig:
    values = {
        "model": base, "out": str(out),
        "data": {"paths": [str(data)], "drop_duplicates": False},
        "sft": {"template": "alpaca", "eval_rows": 3, "max_new_tokens": 8},
        "train": {
            "max_steps": 6, "epochs": None, "batch_size": 6, "precision": "fp32", "device": "cpu",
            "eval_every": 3, "checkpoint_every": 3, "sample_every": 0, "learning_rate": 3e-3,
        },
    }  # fmt: skip
    return from_dict(SftConfig, merge(values, changes))


def opened(config: SftConfig, count: int = 6) -> tuple[Sft, Decoder, list[ChatTokens]]:
    method = Sft(config)
    model = method.open()
    assert isinstance(model, Decoder)
    return method, model.train(), [method.encode(method.check(row)) for row in rows(count)]


def gradients(
    method: Sft, model: Decoder, items: list[ChatTokens]
) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    result = method.step(model, method.collate(items))
    result.loss_sum.backward()  # type: ignore[no-untyped-call]
    count = float(result.count)
    found = {n: p.grad.clone() / count for n, p in model.named_parameters() if p.grad is not None}
    return result.loss_sum.item() / count, found


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    largest = max(grad.abs().max().item() for grad in a.values())
    return max((a[n] - b[n]).abs().max().item() for n in a) / largest


@pytest.mark.parametrize("loss_on", ["answers", "all"])
@pytest.mark.parametrize("padding_free", [False, True])
def test_loss_and_gradients_are_those_of_trl(
    base: str, tmp_path: Path, data: Path, loss_on: str, padding_free: bool
) -> None:
    changes = {"loss_on": loss_on, "packing": padding_free}
    method, model, items = opened(made(base, tmp_path / "run", data, sft=changes))
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)
    features = [
        {
            "input_ids": item.ids,
            "labels": [
                i if on or loss_on == "all" else IGNORED for i, on in zip(*item, strict=True)
            ],
        }
        for item in items
    ]
    batch = collator(features)
    loss = theirs(**batch, use_cache=False).loss
    loss.backward()
    ours, grads = gradients(method, model, items)
    assert ours == pytest.approx(loss.item(), abs=1e-5)
    found = {
        "blocks.0.attention.q.weight": theirs.model.layers[0].self_attn.q_proj.weight.grad,
        "blocks.1.feed_forward.down.weight": theirs.model.layers[1].mlp.down_proj.weight.grad,
        "embedding.weight": theirs.model.embed_tokens.weight.grad,
        "final_norm.weight": theirs.model.norm.weight.grad,
    }
    for name, grad in found.items():
        assert (grads[name] - grad).abs().max() <= 1e-5 * max(1.0, grad.abs().max().item()), name


@pytest.mark.parametrize("window", [None, 8])
def test_packed_is_unpacked(base: str, tmp_path: Path, data: Path, window: int | None) -> None:
    losses, grads = [], []
    for packing in (True, False):
        method, model, items = opened(made(base, tmp_path / "run", data, sft={"packing": packing}))
        if window is not None:
            sight = dataclasses.replace(model.config, window=window, window_layers=(0,))
            windowed = Decoder(sight)
            windowed.load_state_dict(model.state_dict())
            model = windowed.train()
        batch = method.collate(items)
        assert batch.read == sum(len(item.ids) - 1 for item in items)
        assert (batch.tokens.shape[0] == 1) is packing
        loss, found = gradients(method, model, items)
        losses.append(loss)
        grads.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert furthest(*grads) <= 1e-6


@pytest.mark.parametrize("packing", [True, False])
def test_micro_batches_change_nothing(base: str, tmp_path: Path, data: Path, packing: bool) -> None:
    found = []
    for micro in (6, 4, 1):
        changes = {"sft": {"packing": packing}, "train": {"micro_batch_size": micro}}
        method, model, items = opened(made(base, tmp_path / "run", data, **changes))
        loop = Loop(
            model, method, method.source(items), method.config.train,
            device=torch.device("cpu"), quiet=True,
        )  # fmt: skip
        loop.gradients(0)
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert furthest(found[0], found[1]) <= 1e-6
    assert furthest(found[0], found[2]) <= 1e-6


def test_a_run_learns_resumes_bit_for_bit_and_reports(
    base: str, tmp_path: Path, data: Path
) -> None:
    straight = finetune(
        "sft", made(base, tmp_path / "a", data, train={"max_steps": 40}), quiet=True
    )
    s = straight.summary
    assert s["test_answer_loss"] < 0.7 * s["base_test_answer_loss"]
    assert s["test_bits_per_byte"] < 0.7 * s["base_test_bits_per_byte"]
    assert s["test_rougeL"] >= s["base_test_rougeL"] and "test_chrf" in s
    report = (tmp_path / "a" / "report.md").read_text(encoding="utf-8")
    assert "Lengths of the texts" in report and "test bits per byte" in report

    changes = {"max_steps": 40, "stop_after": 4}
    assert finetune("sft", made(base, tmp_path / "b", data, train=changes), quiet=True).interrupted
    finetune("sft", SftConfig(out=str(tmp_path / "b")), resume=True, quiet=True)
    a, b = (
        load_file(tmp_path / run / "checkpoints" / "step-40" / "model.safetensors") for run in "ab"
    )
    assert all(torch.equal(a[name], b[name]) for name in a)

    _, tokenizer = load_folder(tmp_path / "a" / "model")
    assert tokenizer is not None and "### Response" in str(tokenizer.chat_template)
    generation = read_json(tmp_path / "a" / "model" / "generation_config.json")
    assert generation["eos_token_id"] == tokenizer.eos_id


def test_a_long_prompt_shortens_no_other_answer(base: str, tmp_path: Path, data: Path) -> None:
    config = made(base, tmp_path / "a", data, sft={"max_new_tokens": 24})
    method, model, items = opened(config, 2)
    short = [Row(method.check(row), f"d:{n}") for n, row in enumerate(rows(2))]
    method.learn(short)
    model.eval()

    def lengths(rows: list[Row]) -> list[int]:
        return [one.tokens for one in method._answers(model, rows, LiveLine(quiet=True))]

    alone = lengths(short)
    length = len(items[0].ids)
    long = {"instruction": "say" + " please" * (130 - length), "output": "no"}
    left = 128 - len(method.encode(method.check(long)).ids)
    assert 0 < left < min(alone)
    assert lengths([*short, Row(method.check(long), "d:2")])[:2] == alone


def test_new_control_tokens_are_added_when_asked_for(base: str, tmp_path: Path, data: Path) -> None:
    config = made(base, tmp_path / "run", data, sft={"template": "chatml"})
    with pytest.raises(UserError, match="writes <\\|im_start\\|>, <\\|im_end\\|>, which the vocab"):
        Sft(config).open()
    config = made(base, tmp_path / "run", data, sft={"template": "chatml", "add_tokens": True})
    with pytest.raises(UserError, match="embeddings adapters leave untrained"):
        Sft(dataclasses.replace(config, lora=from_dict(type(config.lora), {"rank": 2}))).open()
    result = finetune("sft", dataclasses.replace(
        config, train=dataclasses.replace(config.train, max_steps=2)
    ), quiet=True)  # fmt: skip
    model, tokenizer = load_folder(tmp_path / "run" / "model")
    assert tokenizer is not None and result.summary["steps"] == 2
    end = tokenizer.special_tokens["<|im_end|>"]
    assert end < model.config.vocab_size and end in tokenizer.stop_ids  # type: ignore[union-attr]


def test_masks_can_be_printed(base: str, tmp_path: Path, data: Path) -> None:
    _, tokenizer = load_folder(base)
    assert tokenizer is not None
    config = made(base, tmp_path / "run", data)
    first, second = mask_texts(config, tokenizer, 2, color=False)
    assert "data.jsonl:1: " in first and "[[cat<|endoftext|>]]" in first
    assert "### Input:\nno 0\n\n### Response:\n[[" in first and "[[dog dog<|end" in second
    config = made(base, tmp_path / "run", data, sft={"loss_on": "all"})
    (whole,) = mask_texts(config, tokenizer, 1, color=False)
    assert "[[Below is" in whole
    data.write_text('{"instruction": "a", "output": ""}\n', encoding="utf-8")
    (broken,) = mask_texts(config, tokenizer, 1)
    assert "data.jsonl:1: has an empty 'output'" in broken


def test_bad_rows_are_named(base: str, tmp_path: Path, data: Path) -> None:
    method, _, _ = opened(made(base, tmp_path / "run", data))
    long = {"instruction": "a", "output": "cat " * 200}
    with pytest.raises(BadRow, match="tokens, more than 128; shorten it"):
        method.encode(method.check(long))
    with pytest.raises(BadRow, match="no conversation"):
        method.check({"text": "cat"})
    lines = [json.dumps(row) for row in [*rows(20), long, {"instruction": "b", "output": ""}]]
    data.write_text("\n".join(lines), encoding="utf-8")
    config = made(base, tmp_path / "run", data, train={"max_steps": 2})
    finetune("sft", config, quiet=True)
    skipped = (tmp_path / "run" / "data" / "skipped.txt").read_text(encoding="utf-8").split("\n")
    assert any("data.jsonl:21: has" in line for line in skipped)
    assert any("data.jsonl:22: has an empty 'output'" in line for line in skipped)
    stopping = dataclasses.replace(
        config, data=dataclasses.replace(config.data, on_bad="stop"), out="x"
    )
    with pytest.raises(UserError, match=r"data\.jsonl:22: has an empty 'output'"):
        finetune("sft", stopping, quiet=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss_on": "some"}, "must be answers or all"),
        ({"metrics": ["rogue"]}, "Did you mean 'rouge'"),
        ({"language": "jp"}, "sft.language is 'jp'"),
        ({"eval_rows": -1}, "must not be negative"),
        ({"max_new_tokens": 0}, "must be at least 1"),
    ],
)
def test_broken_settings(base: str, tmp_path: Path, data: Path, settings: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        made(base, tmp_path / "run", data, sft=settings)


def test_the_command_shows_masks(base: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["finetune", "sft", base, "--data", str(data), "--sft.template", "alpaca"]
    assert run([*words, "--show_masks", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("of them learnt") == 2 and "[[cat<|endoftext|>]]" in said


def test_adapters_learn_and_are_merged(base: str, tmp_path: Path, data: Path) -> None:
    changes = {"max_steps": 40, "learning_rate": 2e-2, "precision": "bf16"}
    config = made(base, tmp_path / "run", data, train=changes, lora={"rank": 4, "alpha": 8.0})
    s = finetune("sft", config, quiet=True).summary
    assert s["trainable_parameters"] < 0.6 * s["parameters"]
    assert s["test_answer_loss"] < 0.99 * s["base_test_answer_loss"]
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    load_folder(tmp_path / "run" / "model")


@pytest.mark.parametrize("language", ["en", "ja"])
def test_the_page_names_every_setting_with_its_default(language: str) -> None:
    page = Path(__file__).parents[2] / "docs" / language / "sft.md"
    text = page.read_text(encoding="utf-8")
    for one in dataclasses.fields(SftSettings):
        value: Any = one.default
        default = f"`{str(value).lower() if isinstance(value, bool) else value}`"
        default = default if value not in (None, ()) else ""
        assert re.search(rf"\| `sft\.{one.name}` \| .*{re.escape(default)}", text), one.name
