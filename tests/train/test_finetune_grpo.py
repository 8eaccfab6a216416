"""Group-relative policy optimisation: beside TRL's trainer, and whole runs of tiny models."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from llm_from_scratch.core.config import from_dict, merge
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.runlog import LiveLine
from llm_from_scratch.evaluate.verifiers import RULES, numbers_in
from llm_from_scratch.generate.generate import generate
from llm_from_scratch.model.adapters import without_adapters
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.lora import LoraSettings, add_lora
from llm_from_scratch.model.presets import ModelSettings, resolve
from llm_from_scratch.text.chat_template import TEMPLATES
from llm_from_scratch.text.training import train_tokenizer
from llm_from_scratch.train.finetune import finetune
from llm_from_scratch.train.loop import Loop
from llm_from_scratch.train.methods.grpo import FIGURES, Grpo, GrpoConfig, GrpoSettings
from llm_from_scratch.train.policy_loss import advantages, completion_weights
from llm_from_scratch.train.rollouts import PolicyBatch, Rollout, write
from llm_from_scratch.weights.folder import save_folder
from llm_from_scratch.weights.sources import load

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny decoder that has learnt nothing."""
    folder = tmp_path_factory.mktemp("start")
    text = ["0123456789+-= abcdefghijklmnopqrstuvwxyz"] * 4
    tokenizer = train_tokenizer(text, vocab_size=60, kind="char")
    settings = ModelSettings(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2)
    model = Decoder(resolve(settings, tokenizer.vocab_size, 64))
    model.initialise(1)
    save_folder(model, tokenizer, folder / "model")
    return str(folder / "model")


def rows(path: Path, count: int = 24) -> str:
    lines = [json.dumps({"prompt": f"{i}+{7 - i % 7}=", "answer": "7"}) for i in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def config(start: str, folder: Path, **changes: Any) -> GrpoConfig:
    base = {
        "model": start, "out": str(folder / "run"),
        "data": {"paths": [rows(folder / "rows.jsonl")], "drop_duplicates": False},
        "grpo": {"group_size": 4, "max_new_tokens": 4, "at_once": 8, "kl": 0.05},
        "train": {
            "epochs": None, "max_steps": 4, "batch_size": 8, "learning_rate": 1e-2, "seed": 3,
            "precision": "fp32", "device": "cpu", "eval_every": 2, "checkpoint_every": 2,
        },
    }  # fmt: skip
    return from_dict(GrpoConfig, merge(base, changes))


# --- beside TRL ----------------------------------------------------------------------------------


def rollout(model: Decoder, seed: int = 0) -> Rollout:
    """Completions of very different lengths, drawn by nobody, with all that belongs to them."""
    generator = torch.Generator().manual_seed(seed)
    given, own = [3, 5, 2, 7, 4, 1], [6, 1, 9, 3, 2, 5]
    total = sum(given) + sum(own)
    tokens = torch.randint(0, model.config.vocab_size, (total,), generator=generator)
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.0, 0.0, 1.0])
    above, _ = advantages(rewards, 3, scale=True)
    draw = torch.empty(sum(own)).uniform_(-4, -2, generator=generator)
    other = torch.empty(sum(own)).uniform_(-4, -2, generator=generator)
    return Rollout(
        tokens, torch.tensor([g + o for g, o in zip(given, own, strict=True)]),
        torch.tensor(given), draw, other, above, torch.ones(6), torch.zeros(6, 5),
    )  # fmt: skip


def trl_loss(
    theirs: Any, r: Rollout, kind: str, kl: float, low: float, high: float, longest: int,
    temperature: float, fresh: bool,
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """TRL's own `_compute_loss`, on a trainer that holds nothing but what that reads."""
    lengths, given = r.lengths.tolist(), r.given.tolist()
    own = [n - g for n, g in zip(lengths, given, strict=True)]
    prompt, answer = torch.zeros(6, max(given)).long(), torch.zeros(6, max(own)).long()
    prompt_mask, answer_mask = torch.zeros_like(prompt), torch.zeros_like(answer)
    old, reference = torch.zeros(6, max(own)), torch.zeros(6, max(own))
    at = done = 0
    for row in range(6):
        prompt[row, max(given) - given[row] :] = r.tokens[at : at + given[row]]
        prompt_mask[row, max(given) - given[row] :] = 1
        answer[row, : own[row]] = r.tokens[at + given[row] : at + lengths[row]]
        answer_mask[row, : own[row]] = 1
        old[row, : own[row]] = r.old[done : done + own[row]]
        reference[row, : own[row]] = r.reference[done : done + own[row]]
        at, done = at + lengths[row], done + own[row]
    accelerator = types.SimpleNamespace(
        num_processes=1, is_main_process=False, autocast=contextlib.nullcontext,
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
    )  # fmt: skip
    trainer = types.SimpleNamespace(
        model=theirs, accelerator=accelerator, aux_loss_enabled=False, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, importance_sampling_level="token", beta=kl,
        loss_type=kind, epsilon_low=low, epsilon_high=high, use_vllm=False,
        vllm_importance_sampling_correction=False, current_gradient_accumulation_steps=1,
        max_completion_length=longest, _entropy_bonus_enabled=False,
        args=types.SimpleNamespace(
            delta=None, use_bias_correction_kl=False, steps_per_generation=1
        ),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )  # fmt: skip
    trainer._get_per_token_logps_and_entropies = types.MethodType(
        GRPOTrainer._get_per_token_logps_and_entropies, trainer
    )
    add_fused_lm_head(theirs, temperature=temperature, outputs=("log_probs", "entropy"))
    inputs = {
        "prompt_ids": prompt, "prompt_mask": prompt_mask, "completion_ids": answer,
        "completion_mask": answer_mask, "advantages": r.advantages,
        "ref_per_token_logps": reference, "num_items_in_batch": answer_mask.sum(),
        **({} if fresh else {"old_per_token_logps": old}),
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, theirs, inputs)  # type: ignore[arg-type]
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize(
    ("kind", "kl", "low", "high", "temperature", "fresh"),
    [
        ("grpo", 0.1, 0.2, 0.2, 1.0, False), ("grpo", 0.0, 0.1, 0.3, 0.7, True),
        ("dr_grpo", 0.3, 0.2, 0.28, 1.3, False), ("dapo", 0.02, 0.2, 0.28, 0.7, False),
        ("dapo", 0.0, 0.3, 0.1, 1.0, True),
    ],
)  # fmt: skip
def test_loss_and_gradients_are_those_of_trl(
    start: str, kind: str, kl: float, low: float, high: float, temperature: float, fresh: bool
) -> None:
    settings = {
        "loss": kind, "kl": kl, "clip_low": low, "clip_high": high, "temperature": temperature,
        "max_new_tokens": 11, "scale": True,
    }  # fmt: skip
    method = Grpo(from_dict(GrpoConfig, {"model": start, "grpo": settings}))
    ours = method.open()
    assert isinstance(ours, Decoder)
    r = rollout(ours)
    own = (r.lengths - r.given).float()
    r.weights = completion_weights(kind, own, 11)
    if fresh:
        r.old = torch.zeros(0)
    if not kl:
        r.reference = torch.zeros(0)
    result = method.step(ours.train(), r.batch(range(6)))
    assert result.count == 6 and result.tokens == int(r.lengths.sum()) - 6
    (result.loss_sum / 6).backward()

    theirs = transformers.AutoModelForCausalLM.from_pretrained(start).train()
    full = rollout(ours)
    loss, metrics = trl_loss(theirs, full, kind, kl, low, high, 11, temperature, fresh)
    loss.backward()
    assert abs(result.loss_sum.item() / 6 - loss.item()) < 1e-5
    wanted = dict(theirs.named_parameters())
    found = {name: p.grad for name, p in ours.named_parameters()}
    pairs = [("embedding.weight", "model.embed_tokens.weight"),
             ("final_norm.weight", "model.norm.weight")]  # fmt: skip
    for layer in range(2):
        for name in "qkvo":
            pairs.append((f"blocks.{layer}.attention.{name}.weight",
                          f"model.layers.{layer}.self_attn.{name}_proj.weight"))  # fmt: skip
        for name in ("gate", "up", "down"):
            pairs.append((f"blocks.{layer}.feed_forward.{name}.weight",
                          f"model.layers.{layer}.mlp.{name}_proj.weight"))  # fmt: skip
    largest = max(float(p.grad.abs().max()) for p in wanted.values())
    assert largest > 1e-3
    for mine, other in pairs:
        torch.testing.assert_close(found[mine], wanted[other].grad, atol=1e-5 * largest, rtol=1e-5)
    # TRL takes means over all tokens, and ours are means of each completion's; here over one.
    if not fresh:
        means = {n: float(v) / 6 for n, v in result.metrics.items()}
        assert (means["clip_fraction"] > 0) == (metrics["clip_ratio/region_mean"] > 0)
        one = method.step(ours, r.batch([2]))
        _, theirs_one = trl_one(theirs, full, 2, kind, kl, low, high, temperature)
        assert float(one.metrics["clip_fraction"]) == pytest.approx(
            theirs_one["clip_ratio/region_mean"], abs=1e-6
        )
        assert float(one.metrics["kl"]) == pytest.approx(theirs_one["kl"], rel=1e-4)
        assert float(one.metrics["entropy"]) == pytest.approx(theirs_one["entropy"], rel=1e-5)


def trl_one(theirs: Any, r: Rollout, place: int, kind: str, kl: float, low: float, high: float,
            temperature: float) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """TRL on six copies of one completion, whose means over tokens are then its own."""
    lengths = r.lengths.tolist()
    begin = sum(lengths[:place])
    own = [int(n - g) for n, g in zip(r.lengths, r.given, strict=True)]
    first = sum(own[:place])
    copies = Rollout(
        r.tokens[begin : begin + lengths[place]].repeat(6), r.lengths[place].repeat(6),
        r.given[place].repeat(6), r.old[first : first + own[place]].repeat(6),
        r.reference[first : first + own[place]].repeat(6), r.advantages[place].repeat(6),
        r.weights, r.figures,
    )  # fmt: skip
    return trl_loss(theirs, copies, kind, kl, low, high, 11, temperature, False)


def test_advantages_are_those_of_the_group() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.1, 0.1, 0.1, 0.1, 2.0, 0.0, 0.0, 0.0])
    found, std = advantages(rewards, 4, scale=True)
    for group in range(3):
        part = rewards[4 * group : 4 * group + 4]
        wanted = (part - part.mean()) / (part.std() + 1e-4)
        if group == 1:
            wanted = torch.zeros(4)
            assert not std[4:8].any()
        torch.testing.assert_close(found[4 * group : 4 * group + 4], wanted)
    plain, _ = advantages(rewards, 4, scale=False)
    torch.testing.assert_close(plain[8:], torch.tensor([1.5, -0.5, -0.5, -0.5]))


# --- writing -------------------------------------------------------------------------------------


def test_what_is_written_depends_on_neither_company_nor_order(start: str, tmp_path: Path) -> None:
    method = Grpo(config(start, tmp_path))
    model = method.open()
    assert isinstance(model, Decoder)
    prompts = [
        method.encode({"prompt": f"what is {i} plus {i} if i is {i}="}).ids for i in range(5)
    ]

    def written(at_once: int) -> list[list[list[int]]]:
        found = write(
            model, prompts, 3, max_new_tokens=9, temperature=1.0, end_ids=method.end_ids, seed=5,
            at_once=at_once,
        )  # fmt: skip
        return [[w.tokens for w in group] for group in found]

    alone = written(1)
    assert written(64) == alone == written(4)
    assert len({tuple(tokens) for group in alone for tokens in group}) == 15


def test_completions_end_at_the_end_token(start: str, tmp_path: Path) -> None:
    changes = {"grpo": {"stop": ["7"], "max_new_tokens": 40}}
    method = Grpo(config(start, tmp_path, **changes))
    model = method.open()
    prompt = method.encode({"prompt": "1+6="})
    (group,) = method.write(model, [prompt], 12, 1.0, 0)
    seven = method.tokenizer.encode("7")[0]
    assert any(w.ended for w in group)
    for w in group:
        assert w.ended == (w.tokens[-1] in method.end_ids)
        assert len(w.tokens) == 40 or w.ended
        assert seven not in w.tokens[:-1]
        assert "7" not in method.text(w)


def test_the_engine_draws_what_the_training_model_finds_likely(start: str, tmp_path: Path) -> None:
    """Greedy from the engine is the argmax of the logits that the step trains."""
    method = Grpo(config(start, tmp_path))
    model = method.open()
    assert isinstance(model, Decoder)
    prompt = method.encode({"prompt": "3+4="})
    ((w,),) = method.write(model, [prompt], 1, 0.0, 0)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt.ids, *w.tokens]]))[0]
    first = len(prompt.ids) - 1
    assert logits[first:-1].argmax(-1).tolist() == w.tokens


# --- batches, checkpoints ------------------------------------------------------------------------


def test_micro_batches_change_nothing(start: str, tmp_path: Path) -> None:
    def gradients(micro: int) -> tuple[dict[str, float], list[Tensor]]:
        changes = {"train": {"batch_size": 12, "micro_batch_size": micro}, "grpo": {"repeats": 2}}
        made = config(start, tmp_path, **changes)
        method = Grpo(made)
        model = method.open()
        items = [method.encode({"prompt": f"{i}+1=", "answer": str(i)}) for i in range(9)]
        method.prepare(model, {"train": items}, tmp_path, LiveLine(quiet=True))
        loop = Loop(model, method, method.source(items), made.train, device=CPU, quiet=True)
        sums = loop.gradients(0)
        return {"loss": sums.loss, **sums.metric_means()}, [p.grad for p in loop.parameters]  # type: ignore[misc]

    method_rewards = {"kl", "entropy", "reward", "completion_length", "truncated", "policy_loss"}
    means, whole = gradients(12)
    assert method_rewards <= set(means)
    largest = max(float(g.abs().max()) for g in whole)
    for micro in (5, 1):
        others, parts = gradients(micro)
        assert others == pytest.approx(means, rel=1e-4, abs=1e-6)
        apart = max(float((a - b).abs().max()) for a, b in zip(whole, parts, strict=True))
        assert apart <= 1e-6 * largest


def test_resumed_in_the_middle_of_a_rollout(start: str, tmp_path: Path) -> None:
    shape = {"steps_per_rollout": 2, "repeats": 2}
    ends = []
    for name, stop in (("straight", 5), ("stopped", 3)):
        folder = tmp_path / name
        folder.mkdir()
        made = config(start, folder, grpo=shape, train={"max_steps": 6, "stop_after": stop})
        assert finetune("grpo", made, quiet=True).interrupted
        if stop == 3:
            kept = load_file(folder / "run" / "checkpoints" / "step-3" / "source.safetensors")
            assert len(kept["lengths"]) == 16 and len(kept["old"]) == len(kept["reference"]) > 0
            again = GrpoConfig(out=made.out, train=dataclasses.replace(made.train, stop_after=5))
            assert finetune("grpo", again, resume=True, quiet=True, given={}).interrupted
        last = folder / "run" / "checkpoints" / "step-5"
        ends.append({path.name: load_file(path) for path in sorted(last.glob("*.safetensors"))})
    one, two = ends
    assert one.keys() == two.keys() and len(one) == 4
    for name in one:
        assert one[name].keys() == two[name].keys()
        for key, value in one[name].items():
            assert torch.equal(value, two[name][key]), f"{name}: {key}"


def test_an_early_rollout_is_used_in_another_order_each_time(start: str, tmp_path: Path) -> None:
    made = config(start, tmp_path, grpo={"repeats": 2, "steps_per_rollout": 2})
    method = Grpo(made)
    model = method.open()
    items = [method.encode({"prompt": f"{i}+1=", "answer": str(i)}) for i in range(9)]
    method.prepare(model, {"train": items}, tmp_path, LiveLine(quiet=True))
    source = method.source(items)
    played: list[int] = []
    play = source.play

    def counted(number: int, prompts: list[Any]) -> Rollout:
        played.append(number)
        return play(number, prompts)

    source.play = counted

    def seen(start: int) -> list[tuple[int, ...]]:
        batch: PolicyBatch = source.batch(start, 8)
        assert batch.old is not None and batch.reference is not None
        return [tuple(row) for row in batch.tokens[:, :4].tolist()]

    first, second = seen(0) + seen(8), seen(16) + seen(24)
    assert played == [0] and first != second and sorted(first) == sorted(second)
    seen(32)
    assert played == [0, 1]
    assert method.sequences(items) == 9 * 4 * 2


# --- whole runs ----------------------------------------------------------------------------------


def test_a_run_learns_what_is_rewarded(start: str, tmp_path: Path) -> None:
    changes = {
        "data": {"val_fraction": 0.25, "test_fraction": 0.25},
        "grpo": {"max_new_tokens": 2, "group_size": 8, "kl": 0.0, "rewards": ["number", "exact"],
                 "weights": [1.0, 0.5]},
        "train": {"max_steps": 24, "batch_size": 64, "learning_rate": 2e-2, "eval_every": 8},
    }  # fmt: skip
    run = finetune("grpo", config(start, tmp_path, **changes), quiet=True)
    assert run.summary["base_test_accuracy"] < 0.5 < run.summary["test_accuracy"]
    assert run.summary["test_reward"] > 0.9 and run.summary["best_val_loss"] < 0.6
    lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    steps = [m for m in metrics if "reward" in m]
    assert len(steps) == 24
    assert steps[-1]["reward"] > steps[0]["reward"] + 0.5
    for name in (
        "policy_loss", "kl", "clip_fraction", "reward_std", "zero_variance", "entropy",
        "completion_length", "truncated", "reward_number", "reward_exact",
    ):  # fmt: skip
        assert name in steps[0], name
    assert any("val_accuracy" in m for m in metrics)
    report = (run.folder / "report.md").read_text(encoding="utf-8")
    assert "Verifiers" in report and "number" in report
    model, tokenizer = load(str(run.folder))
    assert isinstance(model, Decoder)
    text = "".join(generate(model, tokenizer, "5+2=", max_new_tokens=2, temperature=0))
    assert numbers_in(text)[-1] == 7


def test_rows_are_refused_with_their_number(start: str, tmp_path: Path) -> None:
    made = config(start, tmp_path)
    path = Path(made.data.paths[0])
    bad = [
        {"question": "1+1="}, {"prompt": "1+1="}, {"prompt": "1+1=", "answer": "two"},
        {"prompt": "", "answer": "2"}, {"prompt": "1" * 70, "answer": "2"},
        {"prompt": [{"role": "nobody", "content": "1"}], "answer": "2"},
    ]  # fmt: skip
    good = path.read_text(encoding="utf-8")
    path.write_text("".join(json.dumps(b) + "\n" for b in bad) + good, encoding="utf-8")
    begun = dataclasses.replace(made, train=dataclasses.replace(made.train, stop_after=1))
    run = finetune("grpo", begun, quiet=True)
    said = (run.folder / "data" / "skipped.txt").read_text(encoding="utf-8").splitlines()
    assert len(said) == 6
    for number, part in enumerate(
        ("--grpo.prompt_field", "no answer", "no number", "neither a text", "leave room", "nobody"),
        start=1,
    ):
        assert any(f"rows.jsonl:{number}: " in s and part in s for s in said), (number, said)
    stopping = dataclasses.replace(
        made, out=str(tmp_path / "other"), data=dataclasses.replace(made.data, on_bad="stop")
    )
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .*prompt_field"):
        finetune("grpo", stopping, quiet=True)


def test_other_fields_and_a_template(start: str, tmp_path: Path) -> None:
    settings = {
        "prompt_field": "q", "answer_field": "a", "template": "plain", "max_new_tokens": 9,
    }  # fmt: skip
    method = Grpo(from_dict(GrpoConfig, {"model": start, "grpo": settings}))
    method.open()
    row = method.check({"q": "1+1", "a": "= 2", "place": "x", "prompt": "other", "answer": "3"})
    assert row == {"prompt": "1+1", "answer": "= 2"}
    chat = method.tokenizer.decode(method.encode(row).ids)
    assert chat != "1+1" and "1+1" in chat
    # Whoever asks the finished model asks as it was asked, and it ends where it learnt to.
    assert method.tokenizer.chat_template == TEMPLATES["plain"]
    stopping = Grpo(from_dict(GrpoConfig, {"model": start, "grpo": {"stop": ["7"]}}))
    stopping.open()
    (seven,) = stopping.tokenizer.encode("7")
    assert seven in stopping.tokenizer.stop_ids and seven in stopping.end_ids
    bare = Grpo(from_dict(GrpoConfig, {"model": start, "grpo": {"max_new_tokens": 9}}))
    bare.open()
    assert bare.tokenizer.decode(bare.encode({"prompt": "1+1"}).ids) == "1+1"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"loss": "gpro"}, "Did you mean 'grpo'"), ({"group_size": 1}, "at least 2"),
        ({"group_size": 7}, "whole groups"), ({"temperature": 0.0}, "above 0"),
        ({"rewards": []}, "at least one verifier"), ({"weights": [1.0, 2.0]}, "one for each"),
        ({"rewards": ["nubmer"]}, "Did you mean 'number'"), ({"stop": ["ab"]}, "one token"),
        ({"kl": -1.0}, "at least 0"), ({"answer_pattern": "("}, "no regular expression"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(
    start: str, tmp_path: Path, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        finetune("grpo", config(start, tmp_path, grpo=settings), quiet=True)


def test_truncated_completions_can_be_left_out(start: str, tmp_path: Path) -> None:
    method = Grpo(config(start, tmp_path, grpo={"mask_truncated": True, "max_new_tokens": 12}))
    model = method.open()
    items = [method.encode({"prompt": f"{i}+1=", "answer": str(i)}) for i in range(9)]
    method.prepare(model, {"train": items}, tmp_path, LiveLine(quiet=True))
    made = method.play(0, items)
    cut = made.figures[:, 4].bool()
    assert 0 < cut.sum() < len(made)
    assert not made.weights[cut].any() and made.weights[~cut].all()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_are_their_own_reference(start: str, tmp_path: Path, kind: str) -> None:
    lora = {"rank": 4, "kind": kind}
    made = config(start, tmp_path, lora=lora, grpo={"kl": 0.5, "repeats": 2})
    method = Grpo(made)
    model = method.open()
    assert isinstance(model, Decoder)
    items = [method.encode({"prompt": f"{i}+1=", "answer": str(i)}) for i in range(4)]
    plain = method.logprobs(model, rollout(model))
    add_lora(model, made.lora, 1)
    method.prepare(model, {"train": items}, tmp_path, LiveLine(quiet=True))
    assert method.reference is None
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "b" in name.rpartition(".")[2]:
            torch.nn.init.normal_(parameter, std=0.3)
    made_rollout = method.play(0, items)
    moved = (made_rollout.old - made_rollout.reference).abs().max()
    assert moved > 1e-3
    with without_adapters(model):
        torch.testing.assert_close(method.logprobs(model, rollout(model)), plain)
    result = method.step(model, made_rollout.batch(range(8)))
    result.loss_sum.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_an_adapter_that_is_trained_on_is_compared_with_its_beginning(
    start: str, tmp_path: Path
) -> None:
    method = Grpo(config(start, tmp_path, grpo={"kl": 0.5, "repeats": 2}))
    model = method.open()
    assert isinstance(model, Decoder)
    add_lora(model, LoraSettings(rank=4), 1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith(".b"):
            torch.nn.init.normal_(parameter, std=0.3)  # it has learnt something before
    before = method.logprobs(model, rollout(model))
    method.prepare(model, {}, tmp_path, LiveLine(quiet=True))
    assert method.reference is not None
    assert method.reference.embedding.weight is model.embedding.weight  # what is frozen is shared
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    assert (method.logprobs(model, rollout(model)) - before).abs().max() > 1e-3
    torch.testing.assert_close(method.logprobs(method.reference, rollout(model)), before)


def test_nothing_is_dropped(start: str, tmp_path: Path) -> None:
    """Likelihoods are compared with those of the model that wrote, which dropped nothing."""
    with pytest.raises(UserError, match=r"lora\.dropout is 0\.1; grpo compares exact likelihoods"):
        config(start, tmp_path, lora={"rank": 2, "dropout": 0.1})
    method = Grpo(config(start, tmp_path, grpo={"repeats": 2}))
    model = method.open()
    assert isinstance(model, Decoder)
    parts: list[Any] = list(model.modules())
    for part in parts:
        if hasattr(part, "config"):
            part.config = dataclasses.replace(part.config, dropout=0.5)
        if hasattr(part, "dropout"):
            part.dropout = 0.5
    items = [method.encode({"prompt": f"{i}+1=", "answer": str(i)}) for i in range(4)]
    method.prepare(model, {"train": items}, tmp_path, LiveLine(quiet=True))
    made = method.play(0, items)
    model.train()
    found = method.step(model, made.batch(range(8)))
    assert model.training and float(found.metrics["kl"]) == pytest.approx(0, abs=1e-5)
    assert float(found.metrics["clip_fraction"]) == 0


def test_a_run_with_an_adapter(start: str, tmp_path: Path) -> None:
    made = config(start, tmp_path, lora={"rank": 2}, train={"max_steps": 3, "stop_after": 2})
    assert finetune("grpo", made, quiet=True).interrupted
    kept = load_file(tmp_path / "run" / "checkpoints" / "step-2" / "model.safetensors")
    whole = sum(p.numel() for p in load(start)[0].parameters())
    assert 0 < sum(t.numel() for t in kept.values()) < whole / 2


@pytest.mark.parametrize("language", ["en", "ja"])
def test_the_page_lists_every_setting_and_curve(language: str) -> None:
    page = (ROOT / "docs" / language / "grpo.md").read_text(encoding="utf-8")
    for setting in dataclasses.fields(GrpoSettings):
        assert f"`grpo.{setting.name}`" in page, setting.name
    for name in (*RULES, *FIGURES, "policy_loss", "kl", "clip_fraction", "clip_low", "clip_high",
                 "entropy", "val_accuracy"):  # fmt: skip
        assert f"`{name}`" in page, name
