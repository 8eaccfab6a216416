"""Mixtures: only the chosen compute, the balance loss is the reference's, the report adds up."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.loader import Batch
from llm_from_scratch.model.config import ExpertsConfig, ModelConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.experts import (
    Experts,
    Routing,
    balance_losses,
    mix_by_hand,
    route,
    routings,
    visit_shares,
)
from llm_from_scratch.model.router_report import router_report
from llm_from_scratch.train.pretrain import NextToken
from llm_from_scratch.weights.folder import load_folder
from tests.model.references import make_reference


def made(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mixture_config(**changes: Any) -> ModelConfig:
    experts = {"n_experts": 7, "n_active": 3, "d_ff": 20, "balance": 0.02, "layers": (0, 2)}
    experts |= {name: changes.pop(name) for name in list(changes) if name in experts}
    fields = {
        "vocab_size": 50, "d_model": 24, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2,
        "head_dim": 6, "d_ff": 40, "max_seq_len": 32, "family": "qwen3_moe", "qk_norm": "head",
    }  # fmt: skip
    return ModelConfig(**{**fields, **changes}, experts=ExpertsConfig(**experts))  # type: ignore[arg-type]


def mixture(**changes: Any) -> Decoder:
    model = Decoder(mixture_config(**changes))
    model.initialise(seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.weight"):
                parameter.copy_(made(2, *parameter.shape))
    return model


def layer(**changes: Any) -> Experts:
    part = Experts(mixture_config(init_std=0.3, **changes))
    with torch.no_grad():
        part.router.weight.copy_(made(3, *part.router.weight.shape))
    return part


@given(
    batch=st.integers(1, 3),
    time=st.integers(1, 9),
    n_experts=st.integers(1, 9),
    active=st.integers(1, 4),
    normalise=st.booleans(),
    gelu=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
def test_sorted_visits_equal_one_token_at_a_time(
    batch: int, time: int, n_experts: int, active: int, normalise: bool, gelu: bool, seed: int
) -> None:
    part = layer(n_experts=n_experts, n_active=min(active, n_experts), layers=(0,))
    part.settings = ExpertsConfig(n_experts, min(active, n_experts), 20, normalise)
    if gelu:
        part.config = mixture_config(activation="gelu_tanh")
    inputs = [made(seed, batch, time, 24).requires_grad_() for _ in range(2)]
    outputs = [
        run(x) for run, x in zip((part, lambda x: mix_by_hand(part, x)), inputs, strict=True)
    ]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    slopes = made(seed + 1, batch, time, 24)
    found = [
        torch.autograd.grad((y * slopes).sum(), [x, *part.parameters()], allow_unused=True)
        for x, y in zip(inputs, outputs, strict=True)
    ]
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)


def test_only_the_chosen_experts_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    part = layer(n_experts=9, n_active=2)
    came: list[int] = []
    real = Experts.feed_forward

    def counting(self: Experts, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        came.append(len(x))
        return real(self, x, *weights)

    monkeypatch.setattr(Experts, "feed_forward", counting)
    x = made(5, 1, 4, 24)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        part(x)
    assert part.routing is not None
    chosen = part.routing.chosen.flatten()
    assert len(came) == len(chosen.unique()) < 9  # some experts had nobody
    assert sum(came) == 4 * 2  # and every token was at its two
    matrices = 4 * 2 * 3 * 24 * 20 + 4 * 9 * 24  # visits x three matrices, and the router
    assert counter.get_total_flops() == 2 * matrices


def test_an_expert_that_nobody_visits_cannot_be_felt() -> None:
    part = layer(n_experts=9, n_active=2)
    x = made(5, 1, 4, 24)
    with torch.no_grad():
        before = part(x)
        assert part.routing is not None
        idle = sorted({*range(9)} - {*part.routing.chosen.flatten().tolist()})
        part.gate[idle] = torch.nan
        part.down[idle] = torch.nan
        assert torch.equal(part(x), before)


# --- balance -------------------------------------------------------------------------------------


def random_routings(layers: int, rows: int, time: int, e: int, active: int) -> Any:
    logits = [made(10 + n, rows, time, e) for n in range(layers)]
    return logits, [route(x, active, normalise=True) for x in logits]


def as_one_row(found: list[Routing]) -> list[Routing]:
    return [
        Routing(*(part.flatten(0, 1)[None] for part in (r.probabilities, r.chosen, r.weights)))
        for r in found
    ]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("active", [1, 3])
def test_balance_loss_is_the_reference_library_s(masked: bool, active: int) -> None:
    logits, found = random_routings(layers=3, rows=4, time=11, e=7, active=active)
    mask = (made(1, 4, 11) > -0.5).long() if masked else None

    def theirs(layers: list[int], rows: slice) -> torch.Tensor:
        flat = tuple(logits[layer][rows].flatten(0, 1) for layer in layers)
        return load_balancing_loss_func(flat, 7, active, None if mask is None else mask[rows])

    flat_mask = None if mask is None else mask.view(1, -1)
    together = balance_losses(as_one_row(found), flat_mask, pooled=True)
    torch.testing.assert_close(together[0], theirs([0, 1, 2], slice(0, 4)))
    # Row by row and layer by layer, as in training.
    for row in range(4):
        alone = slice(row, row + 1)
        torch.testing.assert_close(
            balance_losses(found, mask, pooled=True)[row], theirs([0, 1, 2], alone)
        )
        by_layer = torch.stack([theirs([layer], alone) for layer in range(3)]).mean()
        torch.testing.assert_close(balance_losses(found, mask)[row], by_layer)


def test_balance_is_least_where_it_is_even() -> None:
    e, active = 6, 2
    turns = torch.arange(12)[:, None] * active % e + torch.arange(active)  # everyone in turn
    even = Routing(torch.full((1, 12, e), 1 / e), turns[None] % e, torch.ones(1, 12, active))
    assert balance_losses([even])[0] == pytest.approx(active)
    crowd = route(torch.tensor([9.0, 8, 0, 0, 0, 0]).expand(1, 12, e), active, True)
    assert balance_losses([crowd])[0] > 1.4 * active
    assert visit_shares(crowd)[0].tolist() == [0.5, 0.5, 0, 0, 0, 0]
    assert balance_losses([crowd], torch.zeros(1, 12)).isfinite().all()


def test_training_step_is_the_reference_library_s(tmp_path: Any) -> None:
    """Loss and gradients of a row with `output_router_logits`, as transformers computes them."""
    # Of its four layers only one has experts: theirs pools the layers, ours does not.
    theirs = make_reference(
        "qwen3_moe", output_router_logits=True, attention_dropout=0.0, mlp_only_layers=[0, 1, 3]
    )
    theirs.save_pretrained(tmp_path)
    ours, _ = load_folder(tmp_path)
    assert isinstance(ours, Decoder)
    tokens = torch.randint(0, 71, (1, 41), generator=torch.Generator().manual_seed(4))
    labels = tokens.clone()
    labels[:, :9] = -100
    wanted = theirs(tokens, labels=labels)
    wanted.loss.backward()
    assert wanted.aux_loss > 3.1  # 3 is even
    # Theirs moves the labels on by itself; ours is told the targets, and reads the same 41 tokens.
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    result = NextToken().step(ours.train(), Batch(tokens, targets))
    torch.testing.assert_close(result.loss_sum / result.count, wanted.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.metrics["balance"] / result.count, wanted.aux_loss)
    (result.loss_sum / result.count).backward()
    gradients = dict(theirs.named_parameters())
    for number, block in enumerate(ours.blocks):
        base = f"model.layers.{number}."
        pairs = [(block.attention.q.weight, gradients[f"{base}self_attn.q_proj.weight"])]
        if isinstance(block.feed_forward, Experts):
            part = block.feed_forward
            pairs += [
                (part.router.weight, gradients[f"{base}mlp.gate.weight"]),
                (part.down, gradients[f"{base}mlp.experts.down_proj"]),
            ]
        for mine, other in pairs:
            scale = other.grad.abs().max()
            torch.testing.assert_close(mine.grad / scale, other.grad / scale, atol=1e-4, rtol=0)


def test_a_model_that_is_not_trained_has_no_balance_in_its_loss() -> None:
    model = mixture()
    tokens = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(4))
    batch = Batch(tokens, tokens.roll(-1, 1))
    with_it = NextToken().step(model.train(), batch)
    without = NextToken().step(model.eval(), batch)
    assert without.metrics == {}
    balance = with_it.metrics["balance"] * 0.02
    torch.testing.assert_close(with_it.loss_sum, without.loss_sum + balance)
    shares = with_it.metrics["expert_share"] / 24
    assert shares.shape == (2, 7)
    torch.testing.assert_close(shares.sum(1), torch.ones(2))


def test_a_model_is_copied_after_a_step() -> None:
    model = mixture().train()
    tokens = torch.arange(20).view(2, 10)
    NextToken().step(model, Batch(tokens, tokens))
    again = copy.deepcopy(model)
    assert routings(model) and not routings(again)
    assert torch.equal(model(tokens), again(tokens))


# --- report --------------------------------------------------------------------------------------


def test_report_counts_every_visit() -> None:
    model = mixture().train()
    tokens = torch.randint(0, 50, (3, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    report = router_report(model, [tokens[:1], (tokens[1:], mask[1:])])
    assert model.training
    assert report.tokens == 16 + 5 + 16
    assert report.layers == (0, 2)
    assert report.dropped == 0
    assert report.visits_le.sum(1).tolist() == [37 * 3] * 2
    alone = torch.zeros(2, 7, dtype=torch.long)
    for row, length in ((0, 16), (1, 5), (2, 16)):
        model(tokens[row : row + 1, :length])
        alone += torch.stack([r.chosen.flatten().bincount(minlength=7) for r in routings(model)])
    assert torch.equal(report.visits_le, alone)
    torch.testing.assert_close(report.shares_le.sum(1), torch.ones(2))
    assert (report.evenness_l > 0).all() and (report.evenness_l < 1).all()
    said = str(report)
    assert "37 tokens to 3 of 7 experts each in 2 layers, 0 visits dropped" in said
    assert len(said.split("\n")) == 4
    assert f"{report.shares_le[0].max():.1%}" in said


def test_report_of_an_undecided_and_of_a_stubborn_router() -> None:
    model = mixture(n_active=1)
    with torch.no_grad():
        for part in (model.blocks[0].feed_forward, model.blocks[2].feed_forward):
            part.router.weight.zero_()
    report = router_report(model, [torch.arange(20).view(2, 10)])
    torch.testing.assert_close(
        report.choice_l, torch.log2(torch.tensor([7.0, 7.0])).double(), rtol=1e-6, atol=0
    )
    assert report.evenness_l.tolist() == [0.0, 0.0]  # of equal chances the first is taken


def test_report_refuses_what_it_cannot_report_on() -> None:
    with pytest.raises(UserError, match="no experts"):
        router_report(Decoder(mixture_config(layers=())), [torch.zeros(1, 2, dtype=torch.long)])
    with pytest.raises(UserError, match="no token"):
        router_report(mixture(), [])
    model = mixture().train()
    with pytest.raises(UserError, match="999 tokens were given"):
        router_report(model, [torch.zeros(1, 999, dtype=torch.long)])
    assert model.training


@pytest.mark.parametrize(("name", "value"), [("n_active", 8), ("n_active", 0), ("d_ff", 0)])
def test_impossible_mixtures_are_refused(name: str, value: int) -> None:
    with pytest.raises(UserError, match=f"experts.{name}"):
        mixture_config(**{name: value})
