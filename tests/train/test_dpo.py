"""Preferences: losses and gradients are TRL's, batches change nothing, runs resume bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llm_from_scratch.core.config import from_dict, merge
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.loader import IGNORED
from llm_from_scratch.data.records import BadRow
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.presets import ModelSettings, resolve
from llm_from_scratch.text.training import train_tokenizer
from llm_from_scratch.train.finetune import finetune
from llm_from_scratch.train.loop import Loop
from llm_from_scratch.train.methods.dpo import Dpo, DpoConfig, scored_pairs
from llm_from_scratch.train.pairs import Pair, PairBatch
from llm_from_scratch.train.run import Run
from llm_from_scratch.weights.folder import save_folder
from tests.train.helpers import tiny_model

SIZES = ((5, 4, 3), (7, 2, 6), (4, 9, 1), (6, 3, 3))  # tokens of prompt, chosen, rejected


def pairs(seed: int = 0, sizes: tuple[tuple[int, int, int], ...] = SIZES) -> list[Pair]:
    """Random pairs with random reference log-probabilities."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(1, 37, (count,), generator=generator).tolist()

    found = []
    for prompt, *answers in sizes:
        asked = draw(prompt)
        ids = [asked + draw(count) for count in answers]
        masks = [[0] * prompt + [1] * count for count in answers]
        reference = [-4 * torch.rand(count, generator=generator) for count in answers]
        found.append(Pair(tuple(ids), tuple(masks), tuple(reference)))  # type: ignore[arg-type]
    return found


def method_of(**settings: Any) -> Dpo:
    return Dpo(from_dict(DpoConfig, {"dpo": settings}))


def gradients(model: Decoder, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def same(found: list[Tensor], wanted: list[Tensor], bound: float) -> None:
    largest = max(gradient.abs().max().item() for gradient in wanted)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max().item() <= bound * largest


def plain_logprobs(model: Decoder, batch: PairBatch) -> Tensor:
    """Of the answers' tokens, from all logits."""
    table = model(batch.tokens).log_softmax(-1)
    chosen = table.gather(-1, batch.targets.clamp_min(0)[..., None])[..., 0]
    return chosen * (batch.targets != IGNORED)


# --- TRL -----------------------------------------------------------------------------------------


def trl_loss(model: Decoder, batch: PairBatch, kinds: list[str], weights: list[float]) -> Tensor:
    """The mean loss that TRL's DPOTrainer computes of the same rows, its own code."""
    from trl.trainer.dpo_trainer import DPOTrainer

    rows = len(batch.tokens)
    tokens = torch.cat([batch.tokens, torch.zeros(rows, 1, dtype=torch.long)], 1)
    mask = torch.cat([torch.zeros(rows, 1), (batch.targets != IGNORED).float()], 1).long()
    reference = batch.reference.sum(1).chunk(2)
    inputs = {
        "input_ids": tokens, "attention_mask": torch.ones_like(tokens), "completion_mask": mask,
        "ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1],
    }  # fmt: skip
    found = plain_logprobs(model, batch)

    class Policy(torch.nn.Module):
        def forward(self, **given: Any) -> Any:
            zero = torch.zeros_like(found)
            return SimpleNamespace(
                log_probs=found, entropy=zero, mean_logits=zero, is_top1=zero.bool()
            )

    from collections import defaultdict

    trainer: Any = SimpleNamespace(
        model=Policy(), aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_types=kinds, loss_weights=weights, beta=0.3,
        label_smoothing=0.0, use_weighting=False, _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0, _tp_size=1,
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
    )  # fmt: skip
    loss: Tensor = DPOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    trainer_metrics.clear()
    trainer_metrics.update({k: v[-1] for k, v in trainer._metrics["train"].items()})
    return loss


trainer_metrics: dict[str, float] = {}


@pytest.mark.parametrize(("kind", "theirs"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_loss_gradients_and_metrics_are_trls(kind: str, theirs: str) -> None:
    model, method = tiny_model(), method_of(loss=kind, beta=0.3)
    batch = method.collate(pairs())
    ours = method.step(model, batch)
    loss = ours.loss_sum / ours.count
    wanted = trl_loss(model, batch, [theirs], [1.0])
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    same(gradients(model, loss), gradients(model, wanted), 1e-5)
    means = {name: value.item() / float(ours.count) for name, value in ours.metrics.items()}
    assert means["chosen_logprob"] == pytest.approx(trainer_metrics["logps/chosen"], rel=1e-5)
    assert means["rejected_logprob"] == pytest.approx(trainer_metrics["logps/rejected"], rel=1e-5)
    if kind == "dpo":
        for name, other in (
            ("chosen_reward", "rewards/chosen"), ("rejected_reward", "rewards/rejected"),
            ("reward_margin", "rewards/margins"), ("reward_accuracy", "rewards/accuracies"),
        ):  # fmt: skip
            assert means[name] == pytest.approx(trainer_metrics[other], rel=1e-5)


def test_the_sft_term_is_trls_where_answers_are_equally_long() -> None:
    """TRL takes the mean over all tokens of a batch, RPO over those of each answer."""
    model, method = tiny_model(), method_of(beta=0.3, sft_weight=0.4)
    batch = method.collate(pairs(sizes=((5, 4, 3), (2, 4, 6), (6, 4, 1))))
    ours = method.step(model, batch)
    loss = ours.loss_sum / ours.count
    wanted = trl_loss(model, batch, ["sigmoid", "sft"], [1.0, 0.4])
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    same(gradients(model, loss), gradients(model, wanted), 1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["simpo", "dpo"])
def test_simpo_and_smoothing_are_trls_cpo(kind: str, smoothing: float) -> None:
    """CPOTrainer has SimPO, and DPO's sigmoid with smoothed labels over given log-ratios."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    model = tiny_model()
    method = method_of(loss=kind, beta=2.0, gamma=0.7, label_smoothing=smoothing)
    batch = method.collate(pairs())
    logprobs, mask = plain_logprobs(model, batch), batch.targets != IGNORED
    sums = logprobs.sum(1) / mask.sum(1) if kind == "simpo" else (logprobs - batch.reference).sum(1)
    trainer: Any = SimpleNamespace(
        alpha=0.0, beta=2.0, simpo_gamma=0.7, label_smoothing=smoothing,
        loss_type="simpo" if kind == "simpo" else "sigmoid",
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )  # fmt: skip
    halves: Any = sums.chunk(2)
    losses, chosen, rejected = CPOTrainer.cpo_loss(trainer, *halves)
    ours = method.step(model, batch)
    assert ours.loss_sum.item() == pytest.approx(losses.sum().item(), rel=1e-5)
    same(gradients(model, ours.loss_sum), gradients(model, losses.sum()), 1e-5)
    score = method.score(model, batch)
    torch.testing.assert_close(score["chosen_reward"], chosen)
    torch.testing.assert_close(score["rejected_reward"], rejected)


# --- batches, figures ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dpo", "ipo", "simpo"])
def test_micro_batches_change_nothing(kind: str) -> None:
    method = method_of(loss=kind, sft_weight=0.5)
    items = pairs()

    def learnt(micro: int) -> list[Tensor]:
        config = from_dict(
            DpoConfig,
            {"train": {"batch_size": 4, "micro_batch_size": micro, "precision": "fp32",
                       "device": "cpu", "max_steps": 1}},
        )  # fmt: skip
        model = tiny_model()
        source = SimpleNamespace(batch=lambda start, n: method.collate(items[start : start + n]))
        loop = Loop(model, method, source, config.train, device=torch.device("cpu"), quiet=True)
        loop.gradients(0)
        return [p.grad for p in model.parameters() if p.grad is not None]

    for micro in (1, 3):
        same(learnt(micro), learnt(4), 1e-6)


def test_dropout_is_off_and_the_start_is_a_tie() -> None:
    model, method = tiny_model(dropout=0.5), method_of()
    model.train()
    items = pairs()
    batch = method.collate(items)
    logprobs = method.logprobs(model, batch)
    assert model.training
    assert torch.equal(logprobs, method.logprobs(model, batch))
    batch.reference = logprobs.detach()
    result = method.step(model, batch)
    means = {name: value.item() / 4 for name, value in result.metrics.items()}
    assert means["reward_accuracy"] == 0.5
    assert means["drift"] == means["reward_margin"] == 0.0
    assert result.tokens == batch.read == sum(p + a - 1 for p, *both in SIZES for a in both)


def test_scores_are_in_the_order_of_the_pairs() -> None:
    model, method = tiny_model(), method_of()
    items = pairs()
    together = scored_pairs(method.score(model, batch := method.collate(items)), batch)
    for item, one in zip(items, together, strict=True):
        alone = method.collate([item])
        found = scored_pairs(method.score(model, alone), alone)[0]
        assert found.chosen_reward == pytest.approx(one.chosen_reward, abs=1e-5)
        assert found.drift == pytest.approx(one.drift, abs=1e-5)
        assert (one.chosen_tokens, one.rejected_tokens) == tuple(map(sum, item.masks))


# --- whole runs ----------------------------------------------------------------------------------

WORDS = ("red", "green", "blue", "apple", "river", "stone", "cloud", "tree", "house")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and rows in which the polite answer is liked."""
    where = tmp_path_factory.mktemp("dpo")
    tokenizer = train_tokenizer(
        [" ".join(WORDS) + " The is fine. No! What of and User Assistant:"] * 20, vocab_size=300
    )
    model = Decoder(
        resolve(ModelSettings(d_model=32, n_layers=2, n_heads=2), tokenizer.vocab_size, 128)
    )
    model.initialise(1)
    save_folder(model, tokenizer, where / "base")
    rows: list[dict[str, Any]] = [
        {
            "prompt": f"What of {word} {i} and {WORDS[(i * 5 + 1) % 9]}, {i * i}?",
            "chosen": f"The {word} is fine.",
            "rejected": f"No {word}!",
        }
        for i, word in enumerate(WORDS * 5)
    ]
    rows.insert(2, {"prompt": "Same?", "chosen": "yes", "rejected": "yes"})
    rows.insert(4, {"prompt": "Long? " * 200, "chosen": "yes", "rejected": "no"})
    (where / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return where


def run(folder: Path, name: str, resume: bool = False, **changes: Any) -> Run:
    base = {
        "model": str(folder / "base"), "out": str(folder / name),
        "data": {"paths": [str(folder / "rows.jsonl")], "drop_duplicates": False,
                 "val_fraction": 0.2, "test_fraction": 0.2},
        "dpo": {"max_new_tokens": 4},
        "train": {
            "max_steps": 12, "epochs": None, "batch_size": 6, "learning_rate": 3e-3,
            "precision": "fp32", "device": "cpu", "eval_every": 5, "checkpoint_every": 4,
            "sample_every": 0,
        },
    }  # fmt: skip
    if resume:
        return finetune("dpo", DpoConfig(out=str(folder / name)), resume=True, quiet=True)
    return finetune("dpo", from_dict(DpoConfig, merge(base, changes)), quiet=True)


def test_a_run_learns_and_resumes_bit_by_bit(folder: Path) -> None:
    whole = run(folder, "whole", dpo={"sft_weight": 0.3})
    found = whole.summary
    assert found["base_test_reward_accuracy"] == 0.5
    assert found["test_reward_accuracy"] > 0.9
    assert found["test_chosen_logprob"] > found["base_test_chosen_logprob"]
    assert found["skipped_rows"] == 2
    skipped = (folder / "whole/data/skipped.txt").read_text()
    assert "rows.jsonl:3: has the same text" in skipped
    assert "rows.jsonl:5: has " in skipped
    report = (folder / "whole/report.md").read_text()
    for part in ("Margins", "Likelihood since the start", "Lengths", "Calibration", "Examples"):
        assert part in report
    stopped = run(folder, "parts", dpo={"sft_weight": 0.3}, train={"stop_after": 6})
    assert stopped.interrupted
    run(folder, "parts", resume=True)
    states = [load_file(folder / n / "checkpoints/step-12/model.safetensors")
              for n in ("whole", "parts")]  # fmt: skip
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_damaged_reference_is_refused(folder: Path) -> None:
    run(folder, "damaged", train={"stop_after": 2, "max_steps": 4})
    path = folder / "damaged/data/reference.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"reference.safetensors.*Start a new run"):
        run(folder, "damaged", resume=True)


def test_the_reference_is_made_of_the_pairs_that_are_used() -> None:
    config = from_dict(DpoConfig, {"train": {"max_steps": 2, "batch_size": 3, "epochs": None}})
    method, items = Dpo(config), pairs(sizes=SIZES * 5)
    used = method._used(items)
    seen = [method.source(items).item(number) for number in range(6)]
    assert sorted(map(id, used)) == sorted(map(id, seen))
    assert method._used(items[:6]) == items[:6]


def test_simpo_runs_with_adapters(folder: Path) -> None:
    found = run(
        folder, "adapters", dpo={"loss": "simpo"}, lora={"rank": 4}, train={"learning_rate": 2e-2}
    ).summary
    assert found["test_reward_margin"] > found["base_test_reward_margin"]
    assert found["trainable_parameters"] < found["parameters"]


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"dpo": {"loss": "dppo"}}, "must be one of dpo, ipo, simpo. Did you mean"),
        ({"dpo": {"beta": 0}}, "dpo.beta is 0"),
        ({"dpo": {"gamma": -1}}, "dpo.gamma is -1"),
        ({"dpo": {"sft_weight": -1}}, "dpo.sft_weight is -1"),
        ({"dpo": {"label_smoothing": 0.5}}, "must be in [0, 0.5)"),
        ({"dpo": {"loss": "ipo", "label_smoothing": 0.1}}, "ipo has none"),
        ({"dpo": {"max_new_tokens": 0}}, "dpo.max_new_tokens is 0"),
        ({"lora": {"rank": 4, "dropout": 0.1}}, "lora.dropout is 0.1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as caught:
        from_dict(DpoConfig, settings)
    assert part in str(caught.value)


def test_rows_that_do_not_fit_are_named(folder: Path) -> None:
    method = Dpo(from_dict(DpoConfig, {"model": str(folder / "base"), "train": {"device": "cpu"}}))
    method.open()
    row = {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}
    item = method.encode(row)
    learnt = [i for i, m in zip(item.ids[0], item.masks[0], strict=True) if m]
    assert method.tokenizer.decode(learnt).strip().startswith("b")
    with pytest.raises(BadRow, match="tokens with one of its answers, more than 128; shorten it"):
        method.encode({**row, "chosen": "b " * 300})
    with pytest.raises(BadRow, match="the same to the tokenizer"):
        method.encode({**row, "rejected": "b"})
    tool = {"role": "tool", "content": "x", "name": 3}
    refusing = "{{ raise_exception('no tools') }}"
    method.tokenizer.chat_template = refusing
    with pytest.raises(BadRow, match=r"does not fit the chat template: .*no tools"):
        method.encode({**row, "prompt": [tool]})


def test_only_the_last_answer_of_a_dialogue_is_compared(folder: Path) -> None:
    method = Dpo(from_dict(DpoConfig, {"model": str(folder / "base"), "train": {"device": "cpu"}}))
    method.open()
    prompt = [
        {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]  # fmt: skip
    item = method.encode({"prompt": prompt, "chosen": "four", "rejected": "five"})
    learnt = [i for i, m in zip(item.ids[0], item.masks[0], strict=True) if m]
    assert method.tokenizer.decode(learnt).strip().startswith("four")


def test_a_template_whose_tokens_are_missing_is_refused(folder: Path) -> None:
    config = from_dict(DpoConfig, {"model": str(folder / "base"), "dpo": {"template": "chatml"}})
    with pytest.raises(UserError, match=r"<\|im_start\|>.*finetune sft"):
        Dpo(config).open()
