"""Bits per byte against sums done by hand, and compressors against the standard library."""

from __future__ import annotations

import gzip
import lzma
import math

import pytest
import torch

from llm_from_scratch.data.shards import TokenStore
from llm_from_scratch.evaluate.bits_per_byte import (
    bits_per_byte,
    compressor_bits_per_byte,
    nats_of,
)
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.flops import (
    forward_flops_per_token,
    parameter_count,
    training_flops_per_token,
)
from llm_from_scratch.model.presets import FAMILIES, PRESETS, ModelSettings, resolve


def test_nats_equal_a_loop_over_single_tokens() -> None:
    model = Decoder(resolve(ModelSettings(d_model=16, n_layers=1, n_heads=2), 23, 8))
    model.initialise(1)
    generator = torch.Generator().manual_seed(2)
    documents = [torch.randint(0, 23, (n,), generator=generator).tolist() for n in (5, 19, 1)]
    store = TokenStore.from_documents(documents, 23)
    nats, count = 0.0, 0
    for part, targets in nats_of(model, store, seq_len=8, stride=8, batch_size=2):
        nats, count = nats + part, count + targets
    expected = 0.0
    starts = [0, 5, 24]
    for number, document in enumerate(documents):
        for place in range(1, len(document)):
            # A window of 8 targets begins at every eighth place of the stream.
            window = (starts[number] + place - 1) // 8 * 8
            first = max(0, window - starts[number])
            logits = model(torch.tensor([document[first:place]]))[0, -1]
            expected -= logits.log_softmax(-1)[document[place]].item()
    assert count == 4 + 18
    assert nats == pytest.approx(expected, rel=1e-5)


def test_overlapping_windows_give_every_token_at_least_that_much_context() -> None:
    model = Decoder(resolve(ModelSettings(d_model=16, n_layers=1, n_heads=2), 23, 8))
    model.initialise(1)
    ids = torch.randint(0, 23, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    store = TokenStore.from_documents([ids], 23)
    found = sum(n for n, _ in nats_of(model, store, seq_len=8, stride=1))
    expected = 0.0
    for place in range(1, 40):
        context = torch.tensor([ids[max(0, place - 8) : place]])
        expected -= model(context)[0, -1].log_softmax(-1)[ids[place]].item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_uniform_model_needs_the_logarithm_of_its_vocabulary() -> None:
    assert bits_per_byte(100 * math.log(256), 100) == pytest.approx(8.0)


def test_compressors_are_the_strongest_settings() -> None:
    text = b"".join(b"line %d of a text\n" % (i * i % 97) for i in range(500))
    found = compressor_bits_per_byte(text, training_text=text[:4000])
    assert found["gzip"] == 8 * len(gzip.compress(text, 9)) / len(text)
    best = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    assert found["xz"] == 8 * len(best) / len(text)
    assert found["xz_primed"] < found["xz"]
    assert "xz_primed" not in compressor_bits_per_byte(text)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_flops_are_counted_exactly(family: str, tied: bool) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    settings = ModelSettings(
        family=family, d_model=48, n_layers=2, n_heads=4, n_kv_heads=2, tie_embeddings=tied
    )
    config = resolve(settings, 101, 32)
    model = Decoder(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())
    # The counter does not know the CPU's fused attention kernel, so it watches the plain one.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 32, dtype=torch.long))
    counted = counter.get_total_flops() / 32
    assert forward_flops_per_token(config, 32) == pytest.approx(counted, rel=0.01)
    assert training_flops_per_token(config, 32) == pytest.approx(3 * counted, rel=0.01)


@pytest.mark.parametrize(
    ("preset", "millions"),
    [
        ("nano-char", 0.81), ("gpt2-10m", 10.77), ("gpt2", 124.44), ("gpt2-medium", 354.82),
        ("gpt2-large", 774.03), ("gpt2-xl", 1557.61), ("smollm2-135m", 134.52),
        ("smollm2-360m", 361.82), ("llama-3.2-1b", 1235.81), ("llama-3.2-3b", 3212.75),
        ("qwen3-0.6b", 596.05), ("qwen3-1.7b", 1720.57), ("stories15m", 15.19),
    ],
)  # fmt: skip
def test_presets_have_the_published_sizes(preset: str, millions: float) -> None:
    fields = PRESETS[preset][1]
    vocab, length = fields["vocab_size"], fields["max_seq_len"]
    config = resolve(ModelSettings(preset=preset), int(vocab), int(length))  # type: ignore[call-overload]
    assert parameter_count(config) / 1e6 == pytest.approx(millions, abs=0.011)


def test_every_preset_has_a_published_size_in_the_test_above() -> None:
    marks = test_presets_have_the_published_sizes.pytestmark  # type: ignore[attr-defined]
    assert {row[0] for row in marks[0].args[1]} == set(PRESETS)
