"""Where models are pushed: other precisions, no rows, devices without fp64, parts that are gone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.attend import attend
from llm_from_scratch.model.cache import KVCache
from llm_from_scratch.model.config import EncoderDecoderConfig, ExpertsConfig, ModelConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder import Encoder
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.model.ladder import who_looks_at_whom
from llm_from_scratch.model.modernise import absorbed
from llm_from_scratch.model.positions import sinusoidal_positions
from llm_from_scratch.model.surgery import drop_layers, grow_vocabulary
from llm_from_scratch.weights.heads import add_head


def shape(**changes: Any) -> ModelConfig:
    fields = {
        "vocab_size": 50, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2,
        "head_dim": 8, "d_ff": 48, "max_seq_len": 64,
    }  # fmt: skip
    return ModelConfig(**{**fields, **changes})


def pair(**changes: Any) -> EncoderDecoder:
    config = EncoderDecoderConfig(
        shape(causal=False, **changes), shape(cross_attention=True, **changes), start_id=1
    )
    model = EncoderDecoder(config)
    model.initialise(0)
    return model.eval()


def tokens(*size: int) -> torch.Tensor:
    return torch.randint(0, 50, size, generator=torch.Generator().manual_seed(0))


# --- precision -----------------------------------------------------------------------------------


def test_frequencies_stay_in_fp32() -> None:
    model = Decoder(shape(local_rope_theta=100.0))
    exact, local = model.frequencies.clone(), model.local_frequencies
    assert local is not None
    for cast in (model.bfloat16, model.half, model.float, lambda: model.to(torch.bfloat16)):
        cast()
        assert torch.equal(model.frequencies, exact)
        assert model.local_frequencies is not None and torch.equal(model.local_frequencies, local)
    assert model.blocks[0].attention.q.weight.dtype == torch.bfloat16
    assert "frequencies" not in model.state_dict()


@pytest.mark.parametrize("head", ["embedding", "classification"])
def test_a_head_leaves_the_states_of_a_bf16_model_as_they_were(head: str) -> None:
    model = Decoder(shape()).eval()
    model.initialise(0)
    model.bfloat16()
    model.final_norm.float()  # kept exact on purpose
    with torch.no_grad():
        before = model.hidden(tokens(1, 60))
        under = add_head(model, head, 3 if head == "classification" else None)
        assert torch.equal(under.backbone.hidden(tokens(1, 60)), before)  # type: ignore[union-attr, operator]
    assert model.final_norm.weight.dtype == torch.float32
    assert {p.dtype for n, p in under.named_parameters() if "backbone" not in n} <= {torch.bfloat16}


def test_a_new_pooler_is_like_the_rest() -> None:
    model = Encoder(shape(causal=False)).bfloat16()
    model.add_pooler(0)
    assert model.pooler.weight.dtype == model.pooler.bias.dtype == torch.bfloat16


def test_a_head_passes_the_compute_dtype_on() -> None:
    model = add_head(pair(family="t5"), "embedding")  # which takes the decoder away
    assert model.compute_dtype is None
    model.compute_dtype = torch.bfloat16
    assert model.backbone.encoder.compute_dtype == torch.bfloat16  # type: ignore[union-attr]
    assert model(tokens(2, 5)).dtype == torch.bfloat16


class NoDoubles(TorchDispatchMode):
    """A machine like Apple's: an fp64 tensor on its GPU is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
            assert out.device.type != "mps", func
        return out


def test_a_device_without_fp64_is_spared_it() -> None:
    with FakeTensorMode(), NoDoubles():
        table = sinusoidal_positions(torch.empty(7, device="mps"), 12)
        assert (table.device.type, table.dtype, table.shape) == ("mps", torch.float32, (7, 12))
        weight, bias, w = (torch.empty(s, device="mps") for s in ((3, 5), (3,), (5,)))
        assert absorbed(weight, bias, w).device.type == "mps"
        with pytest.raises(AssertionError):
            weight.double()


# --- nothing to do -------------------------------------------------------------------------------

MIXTURE = ExpertsConfig(4, 2, 16, layers=(0, 1))


@pytest.mark.parametrize("size", [(0, 5), (2, 0)])
@pytest.mark.parametrize("changes", [{}, {"experts": MIXTURE}, {"qk_norm": "head"}], ids=str)
def test_empty_batches_have_empty_answers(changes: dict[str, Any], size: tuple[int, int]) -> None:
    model = Decoder(shape(**changes))
    model.initialise(0)
    logits = model(torch.zeros(size, dtype=torch.long))
    assert logits.shape == (*size, 50)
    logits.sum().backward()


def test_a_cache_may_lose_all_of_its_rows() -> None:
    model = Decoder(shape()).eval()
    cache = KVCache(model.config, 2)
    model(tokens(2, 3), cache=cache)
    cache.select(torch.tensor([], dtype=torch.long))
    assert cache.longest == 0
    assert model(tokens(0, 1), cache=cache).shape == (0, 1, 50)


# --- what was passed over ------------------------------------------------------------------------


def test_a_mask_beside_a_cache_is_refused() -> None:
    decoder, both, mask = Decoder(shape()), pair(), torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(UserError, match="A cache and a mask"):
        decoder(tokens(2, 4), document_ids_bt=mask, cache=KVCache(decoder.config, 2))
    with pytest.raises(UserError, match="A cache and a mask"):
        both.hidden(
            tokens(2, 4), both.encoder(tokens(2, 5)), target_mask=mask,
            cache=KVCache(both.config.decoder, 2),
        )  # fmt: skip


def test_one_new_token_has_dropout_too() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 1, 8, generator=generator)
    k = torch.randn(1, 2, 6, 8, generator=generator)
    first, second = (attend(q, k, k, None, causal=False, dropout=0.5) for _ in range(2))
    assert not torch.equal(first, second)


def test_every_write_into_the_stream_is_scaled() -> None:
    block = pair(n_layers=3, d_model=96).decoder.blocks[0]
    for part in (block.attention.o, block.cross.o, block.feed_forward.down):
        assert part.weight.std().item() == pytest.approx(0.02 / 3, rel=0.05)  # / sqrt(3 * 3)


def test_what_is_frozen_stays_frozen() -> None:
    model = Decoder(shape(tie_embeddings=False))
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in drop_layers(model, [0]).parameters())
    assert not any(p.requires_grad for p in grow_vocabulary(model, 50, 60).parameters())
    model.head.requires_grad_(True)
    grown = grow_vocabulary(model, 50, 60)
    assert [n for n, p in grown.named_parameters() if p.requires_grad] == ["head.weight"]
    model.blocks[1].requires_grad_(True)
    kept = drop_layers(model, [1])
    assert all(p.requires_grad for p in kept.blocks[0].parameters())
    assert not kept.embedding.weight.requires_grad


@pytest.mark.parametrize("causal", [True, False])
def test_who_looks_at_whom_with_learned_distances(causal: bool) -> None:
    config = shape(position="none", relative_buckets=8, relative_distance=32, causal=causal)
    model = (Decoder if causal else Encoder)(replace(config, n_layers=1)).eval()
    model.initialise(0)
    with torch.no_grad():
        model.relative_bias.weight.copy_(torch.randn(8, 4))
    (looked,) = who_looks_at_whom(model, tokens(2, 6))
    assert looked.shape == (2, 4, 6, 6)
    torch.testing.assert_close(looked.sum(-1), torch.ones(2, 4, 6))
    assert bool((looked.triu(1) == 0).all()) == causal
    # Queries of zeros leave the bias alone.
    with torch.no_grad():
        model.blocks[0].attention.q.weight.zero_()
    (alone,) = who_looks_at_whom(model, tokens(2, 6))
    bias = model.sight(tokens(2, 6), None, None).of(False)[0]
    assert bias is not None
    torch.testing.assert_close(alone, bias.softmax(-1).expand(2, 4, 6, 6))
