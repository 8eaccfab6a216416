"""However the tokens arrive, the logits are those of one plain pass over each text alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.cache import KVCache
from llm_from_scratch.model.decoder import Decoder

Pair = tuple[PreTrainedModel, Decoder]
Tokens = Callable[..., torch.Tensor]


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    scale = wanted.abs().max().clamp(min=1.0)
    torch.testing.assert_close(got / scale, wanted / scale, atol=1e-5, rtol=0)


@torch.no_grad()
def test_token_by_token_equals_full(pair: Pair, tokens_for: Tokens) -> None:
    _, model = pair
    tokens = tokens_for(model)
    cache = KVCache(model.config, batch=2)
    steps = [model(tokens[:, i : i + 1], cache=cache) for i in range(tokens.shape[1])]
    assert_close(torch.cat(steps, dim=1), model(tokens))


@torch.no_grad()
@pytest.mark.parametrize("first", [1, 7, 39])
def test_a_prompt_and_pieces_equal_full(pair: Pair, tokens_for: Tokens, first: int) -> None:
    _, model = pair
    tokens = tokens_for(model)
    cache = KVCache(model.config, batch=2, capacity=40)
    pieces = [model(tokens[:, :first], cache=cache)]
    for start in range(first, 40, 5):
        pieces.append(model(tokens[:, start : start + 5], cache=cache))
    assert_close(torch.cat(pieces, dim=1), model(tokens))


@torch.no_grad()
def test_packed_documents_equal_each_alone(pair: Pair, tokens_for: Tokens) -> None:
    _, model = pair
    tokens = tokens_for(model)
    lengths = ([13, 1, 26], [40])
    ids = torch.stack(
        [torch.repeat_interleave(torch.arange(len(ls)) + 3, torch.tensor(ls)) for ls in lengths]
    )
    packed = model(tokens, document_ids_bt=ids)
    for row, parts in enumerate(lengths):
        start = 0
        for length in parts:
            alone = model(tokens[row : row + 1, start : start + length])
            assert_close(packed[row : row + 1, start : start + length], alone)
            start += length


@torch.no_grad()
def test_unequal_prompts_equal_each_alone(pair: Pair, tokens_for: Tokens) -> None:
    """Right-padded prompts, then tokens one by one, each row at its own positions."""
    _, model = pair
    tokens, lengths = tokens_for(model, batch=3), torch.tensor([5, 17, 11])
    full = model(tokens)
    cache = KVCache(model.config, batch=3)
    prompt = torch.where(torch.arange(17) < lengths[:, None], tokens[:, :17], 0)
    first = model(prompt, cache=cache)
    for row, length in enumerate(lengths.tolist()):
        assert_close(first[row, :length], full[row, :length])
    cache.set_lengths(lengths)
    for step in range(12):
        where = lengths + step
        logits = model(tokens[torch.arange(3), where][:, None], cache=cache)
        assert_close(logits[:, 0], full[torch.arange(3), where])
    where = lengths + 12
    several = where[:, None] + torch.arange(4)  # and several at once
    logits = model(tokens.gather(1, several), cache=cache)
    assert_close(logits, full[torch.arange(3)[:, None], several])


@torch.no_grad()
def test_tokens_can_be_taken_back(pair: Pair, tokens_for: Tokens) -> None:
    _, model = pair
    tokens = tokens_for(model)
    cache = KVCache(model.config, batch=2)
    model(tokens[:, :20], cache=cache)
    model((tokens[:, 20:28] + 1) % model.config.vocab_size, cache=cache)
    cache.set_lengths(torch.tensor([20, 20]))
    assert_close(model(tokens[:, 20:30], cache=cache), model(tokens[:, :30])[:, 20:])


@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=8), family=st.integers(0, 2))
@torch.no_grad()
def test_any_cut_equals_full(cuts: list[int], family: int, tokens_for: Tokens) -> None:
    model = small(family)
    total = min(sum(cuts), 40)
    tokens = tokens_for(model, batch=1, length=total)
    cache, at, pieces = KVCache(model.config), 0, []
    for cut in cuts:
        if at < total:
            pieces.append(model(tokens[:, at : at + cut], cache=cache))
            at += cut
    assert_close(torch.cat(pieces, dim=1), model(tokens))


def small(family: int) -> Decoder:
    from llm_from_scratch.model.presets import ModelSettings, resolve

    name = ("gpt2", "llama", "qwen3")[family]
    config = resolve(ModelSettings(family=name, depth=2, n_heads=4), vocab_size=61, seq_len=40)
    model = Decoder(config).eval()
    model.initialise(seed=family)
    return model


@torch.no_grad()
def test_a_full_cache_and_a_long_text_are_refused(pair: Pair, tokens_for: Tokens) -> None:
    _, model = pair
    cache = KVCache(model.config, batch=1, capacity=8)
    model(tokens_for(model, batch=1, length=8), cache=cache)
    with pytest.raises(UserError, match="context is full"):
        model(tokens_for(model, batch=1, length=1), cache=cache)
    more = model.config.max_seq_len + 1
    with pytest.raises(UserError, match=f"{more} tokens were given"):
        model(tokens_for(model, batch=1, length=more))
    with pytest.raises(UserError, match=f"cache of {more} positions"):
        KVCache(model.config, capacity=more)
