"""Calibration sees what the layers see, and each block sees what the changed ones before give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.config import EncoderDecoderConfig, ModelConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.quant.calibrate import InputSums, piles, walk


def tiny(**changes: object) -> ModelConfig:
    sizes = {
        "vocab_size": 53,
        "n_layers": 3,
        "d_model": 32,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 10,
        "d_ff": 40,
    }
    return ModelConfig(**{**sizes, "max_seq_len": 24, **changes})  # type: ignore[arg-type]


@pytest.fixture
def model() -> Decoder:
    decoder = Decoder(tiny())
    decoder.initialise(3)
    return decoder.eval()


BATCHES = [torch.arange(40).view(2, 20) * step % 53 for step in (3, 7, 11)]


def seen_by(model: nn.Module, name: str, batches: list[Tensor]) -> Tensor:
    """All inputs of one layer when the whole model runs: (tokens, inputs)."""
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, given: found.append(given[0].flatten(0, -2))
    )
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize("full", [True, False])
def test_unchanged_blocks_meet_what_the_model_gives_them(model: Decoder, full: bool) -> None:
    means: dict[str, Tensor] = {}

    def treat(name: str, layer: nn.Module, mean: Tensor) -> None:
        means[name] = mean

    walk(model, BATCHES, lambda name: not name.endswith(".v"), treat, full=full)
    assert len(means) == 3 * 6
    assert not any(name.endswith(".v") for name in means)
    for name, mean in means.items():
        x = seen_by(model, name, BATCHES)
        wanted = x.t() @ x / len(x) if full else x.square().mean(0)
        torch.testing.assert_close(mean, wanted, atol=1e-5, rtol=1e-4)
    # Queries and keys are given the same tensor, which is summed up once.
    assert torch.equal(means["blocks.1.attention.q"], means["blocks.1.attention.k"])


def test_later_blocks_meet_what_changed_ones_give(model: Decoder) -> None:
    means: dict[str, Tensor] = {}

    def treat(name: str, layer: nn.Module, mean: Tensor) -> None:
        means[name] = mean
        assert isinstance(layer, nn.Linear)
        layer.weight.mul_(0.5)

    walk(model, BATCHES, lambda name: name.startswith("blocks.0.") or "2.attention.q" in name,
         treat, full=False)  # fmt: skip
    # By now blocks.0 is changed; so is blocks.2, which lies behind its own input.
    x = seen_by(model, "blocks.2.attention.q", BATCHES)
    torch.testing.assert_close(
        means["blocks.2.attention.q"], x.square().mean(0), atol=1e-5, rtol=1e-4
    )


def test_both_halves_of_an_encoder_decoder_are_walked() -> None:
    encoder = tiny(causal=False)
    pair = EncoderDecoder(EncoderDecoderConfig(encoder, tiny(cross_attention=True), start_id=1))
    pair.initialise(1)
    seen: list[str] = []
    batches = [(BATCHES[0], BATCHES[1][:, :9]), (BATCHES[2], BATCHES[1][:, 5:])]
    walk(pair.eval(), batches, lambda name: True, lambda name, *_: seen.append(name), full=False)
    assert [prefix for prefix, _ in piles(pair)] == ["encoder.blocks.", "decoder.blocks."]
    assert {name.split(".")[0] for name in seen} == {"encoder", "decoder"}
    assert "decoder.blocks.2.cross.k" in seen
    assert seen.index("encoder.blocks.2.feed_forward.down") < seen.index("decoder.blocks.0.cross.q")


def test_a_layer_that_nothing_reaches_is_named() -> None:
    layers = {"a": nn.Linear(3, 2)}
    with InputSums(layers, full=True) as sums:
        pass
    with pytest.raises(UserError, match="'a'"):
        sums.of("a")
