"""Training a mixture of experts: the balance loss divides once, too, and the run reports on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.runlog import read_metrics
from llm_from_scratch.data.loader import Batch
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.experts import experts_of
from llm_from_scratch.model.presets import FAMILIES, WINDOWED, ModelSettings, resolve
from llm_from_scratch.train.loop import Loop
from llm_from_scratch.train.losses import LossSum, Sums
from llm_from_scratch.train.optim import Muon, make_optimizers
from llm_from_scratch.train.pretrain import NextToken, pretrain
from llm_from_scratch.train.settings import TrainSettings
from llm_from_scratch.weights.families import family_of
from llm_from_scratch.weights.folder import load_folder, save_folder
from tests.train.helpers import RaggedSource, config, tiny_model, with_train

MIXTURE: dict[str, Any] = {
    "family": "qwen3_moe", "n_experts": 5, "n_active": 2, "expert_d_ff": 24, "balance": 0.5,
}  # fmt: skip


def mixture(**changes: object) -> Decoder:
    model = tiny_model(**MIXTURE | changes)
    with torch.no_grad():
        for part in experts_of(model):
            part.router.weight.mul_(100)  # decided, so that the balance has something to say
    return model


def gradients_of(
    micro: int, **changes: object
) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    model = mixture(**changes)
    settings = TrainSettings(batch_size=8, micro_batch_size=micro)
    device = torch.device("cpu")
    loop = Loop(model, NextToken(), RaggedSource(), settings, device=device, quiet=True)
    model.train()
    sums = loop.gradients(0)
    assert sums.count == 2 * (1 + 12 + 3 + 7)
    return (
        sums.loss,
        sums.metric_means(),
        [p.grad.clone() for p in model.parameters() if p.grad is not None],
    )


@pytest.mark.parametrize("micro", [4, 2, 1, 3])
def test_accumulation_equals_the_big_batch(micro: int) -> None:
    loss, metrics, whole = gradients_of(8)
    other_loss, other_metrics, parts = gradients_of(micro)
    assert metrics["balance"] > 2.02  # 2 is even
    assert metrics["expert_share_max"] > 0.22 > 0.18 > metrics["expert_share_min"] >= 0
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert other_metrics == pytest.approx(metrics, rel=1e-5)
    largest = max(g.abs().max().item() for g in whole)
    for a, b in zip(whole, parts, strict=True):
        assert (a - b).abs().max().item() <= 1e-6 * largest


def test_the_balance_is_part_of_what_is_learnt() -> None:
    with_it, without = gradients_of(8), gradients_of(8, balance=0.0)
    assert with_it[0] - without[0] == pytest.approx(0.5 * with_it[1]["balance"], rel=1e-5)
    names = [n for n, _ in mixture().named_parameters()]
    for name, a, b in zip(names, with_it[2], without[2], strict=True):
        if name.endswith("blocks.1.feed_forward.router.weight"):
            assert (a - b).abs().max() > 1e-3 * a.abs().max()
        if name == "final_norm.weight":  # behind the last router
            torch.testing.assert_close(a, b)


def test_a_metric_of_several_numbers_is_logged_as_its_ends() -> None:
    several = {"a": torch.tensor(8.0), "b": torch.tensor([[2.0, 12.0], [4.0, 1.0]])}
    sums = Sums()
    sums.add(LossSum(torch.tensor(3.0), 4, several))
    assert sums.metric_means() == {"a": 2.0, "b_min": 0.25, "b_max": 3.0}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_of_a_mixture(tmp_path: Path, optimizer: str) -> None:
    settings = {**MIXTURE, "n_kv_heads": 1, "n_heads": 2}
    for name in ("straight", "halved"):
        (tmp_path / name).mkdir()
    train = {"optimizer": optimizer}
    straight = pretrain(config(tmp_path / "straight", model=settings, train=train), quiet=True)
    half = config(tmp_path / "halved", model=settings, train={**train, "stop_after": 5})
    assert pretrain(half, quiet=True).interrupted
    halved = pretrain(with_train(half, stop_after=None), resume=True, quiet=True)
    tensors = [
        load_file(run.folder / "checkpoints/step-8/model.safetensors") for run in (straight, halved)
    ]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    records = [r for r in read_metrics(straight.folder) if "loss" in r]
    assert len(records) == 8
    for record in records:
        assert 0 <= record["expert_share_min"] <= 1 / 5 <= record["expert_share_max"] <= 1
        # The balance counts in the loss that is trained, not in that of the validation.
        assert record["loss"] - 0.5 * record["balance"] < 6.5
    model, _ = load_folder(straight.folder / "model")
    assert straight.summary["parameters"] == sum(p.numel() for p in model.parameters())
    values = json.loads((straight.folder / "model/config.json").read_text())
    assert values["architectures"] == ["Qwen3MoeForCausalLM"]
    assert (values["num_experts"], values["num_experts_per_tok"]) == (5, 2)
    assert values["router_aux_loss_coef"] == 0.5
    theirs = AutoModelForCausalLM.from_pretrained(straight.folder / "model").eval()
    tokens = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-4)


def test_muon_works_on_each_expert_s_matrices() -> None:
    model = mixture()
    for parameter in model.parameters():
        parameter.grad = torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
        )
    part = experts_of(model)[0]
    before = part.up.detach().clone()
    optimizers = make_optimizers(
        model, kind="muon", learning_rate=1.0, weight_decay=0.0, betas=(0.9, 0.95)
    )
    (muon,) = (o for o in optimizers if isinstance(o, Muon))
    assert any(p is part.up for group in muon.param_groups for p in group["params"])
    muon.step()
    for number, step in enumerate(before - part.up):
        values = torch.linalg.svdvals(step / (0.2 * 24**0.5))
        assert values.min() > 0.4 and values.max() < 1.4, number


class Always(RaggedSource):
    """The same sequences in every step."""

    def batch(self, start: int, count: int) -> Batch:
        return super().batch(0, count)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_trained_and_saved_as_itself(family: str, tmp_path: Path) -> None:
    window = 5 if family in WINDOWED else None
    settings = ModelSettings(family=family, d_model=16, n_layers=2, n_heads=2, window=window)
    shape = resolve(settings, 37, 12)
    assert family_of(shape).name == family
    model = Decoder(shape)
    model.initialise(0)
    loop = Loop(
        model, NextToken(), Always(),
        TrainSettings(batch_size=8, learning_rate=0.02, warmup_steps=0),
        device=torch.device("cpu"), quiet=True,
    )  # fmt: skip
    model.train()
    losses = [loop.step()["loss"] for _ in range(3)]
    assert losses[2] < losses[0] - 0.05
    save_folder(model, None, tmp_path / "model")
    again, _ = load_folder(tmp_path / "model")
    assert again.config == shape
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokens, _ = RaggedSource().row(5)
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(tokens[None]), theirs(tokens[None]).logits, atol=1e-5, rtol=1e-4
        )


def test_bent_logits_are_trained_as_they_are_computed() -> None:
    """Large vocabularies are trained without whole logits, but not where these are bent."""
    source = RaggedSource(vocab_size=2000)
    settings = ModelSettings(family="gemma2", d_model=16, n_layers=1, n_heads=2, init_std=1.0)
    model = Decoder(resolve(settings, 2000, 12))
    model.initialise(0)
    batch = source.batch(0, 4)
    steps = [NextToken().step(model.train(mode), batch).loss_sum for mode in (True, False)]
    torch.testing.assert_close(*steps)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"n_experts": 8}, "model.n_experts is given, but a llama has no experts"),
        ({"family": "qwen3_moe", "n_experts": 2, "n_active": 3}, r"n_active \(3\) is more than"),
        ({"family": "qwen3_moe", "n_experts": 0}, "n_experts is 0; it must be at least 1"),
        ({"family": "qwen3_moe", "balance": -1.0}, "model.balance is -1.0; it must be a number"),
        ({"family": "qwen3_moe", "balance": float("nan")}, "model.balance is nan"),
        ({"window": 8}, "model.window is given, but a llama is trained without"),
        ({"family": "mistral", "window": 0}, "model.window is 0; it must be at least 1"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        resolve(ModelSettings(**settings), 50, 16)


def test_a_mixture_computes_as_much_as_a_plain_model_of_its_size() -> None:
    """By default the active experts together are as wide as the feed-forward would be."""
    plain = resolve(ModelSettings(family="qwen3", depth=3), 50, 16)
    experts = resolve(ModelSettings(family="qwen3_moe", depth=3, n_active=4), 50, 16).experts
    assert experts is not None
    assert experts.n_active * experts.d_ff == plain.d_ff
    assert (experts.n_experts, experts.layers) == (8, (0, 1, 2))


@pytest.mark.full
def test_compiled_steps_learn_what_plain_steps_learn() -> None:
    losses = []
    for compile_it in (False, True):
        settings = TrainSettings(batch_size=4, max_steps=3, compile=compile_it, warmup_steps=0)
        loop = Loop(
            mixture(), NextToken(), RaggedSource(), settings,
            device=torch.device("cpu"), quiet=True,
        )  # fmt: skip
        losses.append(loop.train().train_losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
