"""Log-probabilities tile by tile are those of the whole table, and so are their gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_from_scratch.data.loader import IGNORED
from llm_from_scratch.model.config import EncoderDecoderConfig, ModelConfig
from llm_from_scratch.train import logprobs as module
from llm_from_scratch.train.logprobs import token_logprobs, token_logprobs_and_entropy
from tests.model.architectures import ARCHITECTURES, ids, make, without_dropout

DECODERS = [n for n, c in ARCHITECTURES.items() if isinstance(c, ModelConfig) and c.causal]
PAIRS = [n for n, c in ARCHITECTURES.items() if isinstance(c, EncoderDecoderConfig)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles even of a tiny model, the last ones incomplete."""
    monkeypatch.setattr(module, "TILE_TOKENS", 7)
    monkeypatch.setattr(module, "TILE_ENTRIES", 20)


def plain(
    model: Any, hidden: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """From the table of all logits."""
    table = (model.logits(hidden).float() / temperature).log_softmax(-1)
    kept = targets != IGNORED
    chosen = table.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    return chosen * kept, -(table.exp() * table).sum(-1) * kept


def prepared(name: str) -> tuple[Any, Tensor, Tensor]:
    """A model, its last states, and targets of which some are left out."""
    config = without_dropout(ARCHITECTURES[name])
    model: Any = make(config)
    tokens = ids(config, 2, 13)
    if isinstance(config, EncoderDecoderConfig):
        if config.logits_bias:
            torch.nn.init.normal_(model.logits_bias)
        hidden = model.hidden(tokens, model.encoder(tokens))
    else:
        hidden = model.hidden(tokens)
    targets = tokens.clone()
    targets[0, :4] = targets[1, 5] = IGNORED
    return model, hidden, targets


def gradients(model: Any, value: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(value, list(named.values()), retain_graph=True, allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    largest = max(gradient.abs().max().item() for gradient in wanted.values())
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max().item() <= bound * largest, name


@pytest.mark.parametrize("name", [*DECODERS, *PAIRS])
def test_values_and_gradients_are_those_of_the_whole_table(name: str) -> None:
    model, hidden, targets = prepared(name)
    weights = torch.linspace(-1, 2, targets.numel()).view(targets.shape)
    found, entropy = token_logprobs_and_entropy(model, hidden, targets, temperature=0.7)
    wanted, wanted_entropy = plain(model, hidden, targets, 0.7)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, wanted_entropy, rtol=1e-5, atol=1e-5)
    assert not entropy.requires_grad
    first, second = (gradients(model, (values * weights).sum()) for values in (found, wanted))
    assert_close(first, second, 1e-5)
    only = token_logprobs(model, hidden, targets, temperature=0.7)
    torch.testing.assert_close(only, found, rtol=1e-6, atol=1e-6)


def test_large_logits_of_several_stretches_do_not_overflow() -> None:
    model, hidden, targets = prepared("llama")
    hidden = (hidden * 400).detach()
    found = token_logprobs(model, hidden, targets)
    assert found.isfinite().all()
    torch.testing.assert_close(found, plain(model, hidden, targets)[0], rtol=1e-5, atol=1e-3)


class Detour(torch.nn.Module):
    """A head that is no plain matrix, as one with an adapter around it."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head
        self.more = torch.nn.Linear(head.in_features, head.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.more(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["gemma2", "llama-d192"])
def test_a_head_that_is_no_matrix_goes_in_pieces(name: str) -> None:
    model, hidden, targets = prepared(name)
    model.head = Detour(model.head)
    found, entropy = token_logprobs_and_entropy(model, hidden, targets)
    wanted, wanted_entropy = plain(model, hidden, targets)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, wanted_entropy, rtol=1e-5, atol=1e-5)
    assert_close(gradients(model, found.sum()), gradients(model, wanted.sum()), 1e-5)


def test_a_frozen_head_gets_no_gradient_and_states_do() -> None:
    model, hidden, targets = prepared("gpt2")
    model.head.weight.requires_grad_(False)
    hidden = hidden.detach().requires_grad_()
    token_logprobs(model, hidden, targets).sum().backward()
    assert model.head.weight.grad is None
    found, hidden.grad = hidden.grad, None
    plain(model, hidden, targets)[0].sum().backward()
    torch.testing.assert_close(found, hidden.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("detour", [False, True])
def test_nothing_to_learn_from_is_nothing(detour: bool) -> None:
    model, hidden, targets = prepared("llama")
    if detour:
        model.head = Detour(model.head)
    found = token_logprobs(model, hidden, torch.full_like(targets, IGNORED))
    assert found.shape == targets.shape
    assert not found.any()


def test_bf16_states_stay_near() -> None:
    base: Any = without_dropout(ARCHITECTURES["llama"])
    config = replace(base, vocab_size=300)
    model: Any = make(config, torch.bfloat16)
    tokens = ids(config, 2, 13)
    hidden = model.hidden(tokens)
    assert hidden.dtype == torch.bfloat16
    found, (wanted, _) = token_logprobs(model, hidden, tokens), plain(model, hidden, tokens)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-2)
    first, second = (gradients(model, values.sum()) for values in (found, wanted))
    assert_close(first, second, 2e-2)
