"""Packed rows, recomputed blocks and mixed-precision products: the same results with less work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.apart import apart
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.layers import Linear
from llm_from_scratch.model.presets import ModelSettings, resolve

LENGTHS = [5, 9, 1, 7]


def decoder(**changes: object) -> Decoder:
    settings = ModelSettings(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2)
    config = resolve(settings, 50, 12)
    config = type(config)(**{**vars(config), **changes})
    model = Decoder(config)
    model.initialise(1)
    return model


def packed() -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 50, (n,), generator=generator) for n in LENGTHS]
    numbers = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)])
    return torch.cat(texts)[None], numbers[None], texts


@pytest.mark.parametrize(
    "changes", [{}, {"window": 4, "window_layers": (1,)}, {"attention_softcap": 5.0}]
)
def test_packed_documents_are_what_they_are_alone(changes: dict[str, object]) -> None:
    model = decoder(**changes)
    tokens, numbers, texts = packed()
    assert apart(numbers) is not None
    together = model.hidden(tokens, document_ids_bt=numbers)[0]
    alone = torch.cat([model.hidden(text[None])[0] for text in texts])
    assert torch.allclose(together, alone, atol=1e-6)
    weights = torch.randn(alone.shape, generator=torch.Generator().manual_seed(2))
    one, other = (
        torch.autograd.grad((hidden * weights).sum(), model.blocks[0].attention.k.weight)[0]  # type: ignore[union-attr, arg-type]
        for hidden in (together, alone)
    )
    assert (one - other).abs().max() <= 1e-6 * other.abs().max() + 1e-7


def test_moving_apart_and_back_loses_nothing() -> None:
    _, numbers, _ = packed()
    rows = apart(numbers)
    assert rows is not None and rows.longest == 9
    x = torch.randn(1, 2, sum(LENGTHS), 3, dtype=torch.float64, requires_grad=True)
    moved = rows.split(x)
    assert moved.shape == (4, 2, 9, 3)
    back = rows.join(moved.transpose(1, 2).flatten(2))
    assert torch.equal(back, x.transpose(1, 2).flatten(2))

    def there_and_back(x: Tensor) -> Tensor:
        return rows.join((rows.split(x) * 2).transpose(1, 2).flatten(2))

    assert torch.autograd.gradcheck(there_and_back, (x,))  # type: ignore[no-untyped-call]


def test_where_a_mask_does_less_work_there_is_one() -> None:
    assert apart(torch.tensor([[0, 1, 0, 1]])) is None  # documents in pieces
    assert apart(torch.tensor([[0] * 30 + list(range(1, 30))])) is None  # one long, many short
    assert apart(torch.tensor([[0, 0, 1, 1], [2, 1, 1, 1]])) is None
    both = apart(torch.tensor([[0, 0, 0, 1, 1, 1], [5, 5, 5, 4, 4, 4]]))
    assert both is not None and both.positions.tolist() == [[0, 1, 2] * 2] * 2


def test_rows_may_be_longer_than_the_context_but_no_document() -> None:
    model = decoder()
    tokens, numbers, _ = packed()
    assert tokens.shape[1] > model.config.max_seq_len
    model.hidden(tokens, document_ids_bt=numbers)
    for ids in (torch.zeros_like(numbers), numbers.clone().clamp_max(1)):
        with pytest.raises(UserError, match="the model's context is 12 tokens"):
            model.hidden(tokens, document_ids_bt=ids)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    found = []
    for recompute in (False, True):
        model = decoder(dropout=0.1).train()
        model.recompute = recompute
        torch.manual_seed(3)
        tokens, numbers, _ = packed()
        model.hidden(tokens, document_ids_bt=numbers).square().sum().backward()  # type: ignore[no-untyped-call]
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_mixed_products_have_autograds_own_gradients(bias: bool) -> None:
    layer = Linear(6, 4, bias=bias)
    x = torch.randn(2, 3, 6).bfloat16().requires_grad_()
    slope = torch.randn(2, 3, 4).bfloat16()
    wanted = [x, *layer.parameters()]
    y = layer(x)
    plain = torch.nn.functional.linear(
        x, layer.weight.bfloat16(), None if layer.bias is None else layer.bias.bfloat16()
    )
    ours, theirs = (torch.autograd.grad((out * slope).sum(), wanted) for out in (y, plain))
    assert torch.allclose(y, plain, atol=2e-2)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype and torch.allclose(one, other, atol=2e-2, rtol=1e-2)
    layer.weight.requires_grad_(False)
    assert torch.equal(torch.autograd.grad((layer(x) * slope).sum(), x)[0], ours[0])
