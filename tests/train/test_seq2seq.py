"""Pairs of texts through the loop: it learns, and batches change nothing."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.engine import generate_tokens
from llm_from_scratch.generate.sampling import SamplingSettings
from llm_from_scratch.model.config import EncoderDecoderConfig, ModelConfig
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.train.examples import Examples
from llm_from_scratch.train.loop import Loop
from llm_from_scratch.train.losses import IGNORED
from llm_from_scratch.train.seq2seq import Seq2Seq, decoder_input, pad_pairs
from llm_from_scratch.train.settings import TrainSettings
from llm_from_scratch.weights.folder import load_folder, save_folder
from tests.model.references_seq2seq import make_seq2seq

START, END = 0, 1
CPU = torch.device("cpu")


def tiny(seed: int = 0) -> EncoderDecoder:
    """A Marian over twelve tokens."""
    encoder = ModelConfig(
        vocab_size=12, d_model=32, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=64,
        max_seq_len=16, family="marian", norm="layer", residual="post", final_norm=False,
        position="sinusoidal", attention_bias=True, output_bias=True, feed_forward_bias=True,
        activation="relu", gated=False, scale_embedding=True, causal=False, init_std=0.18,
    )  # fmt: skip
    decoder = dataclasses.replace(encoder, causal=True, cross_attention=True)
    model = EncoderDecoder(
        EncoderDecoderConfig(
            encoder, decoder, START, end_id=END, writes_start=False, logits_bias=True
        )
    )
    model.initialise(seed)
    return model


def pairs(count: int = 400) -> list[tuple[list[int], list[int]]]:
    """A text of two to four letters, and the same text."""
    generator = torch.Generator().manual_seed(5)

    def draw(low: int, high: int, size: int) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    texts = [draw(2, 8, draw(2, 5, 1)[0]) for _ in range(count)]
    return [(text, text) for text in texts]


def test_it_learns_to_copy(tmp_path: Path) -> None:
    model = tiny()
    settings = TrainSettings(
        max_steps=200, batch_size=16, learning_rate=1e-2, warmup_steps=10, weight_decay=0.0,
        seed=1, eval_every=0, checkpoint_every=0,
    )  # fmt: skip
    loop = Loop(
        model,
        Seq2Seq(),
        Examples(pairs(), partial(pad_pairs, end_id=END)),
        settings,
        device=CPU,
        quiet=True,
    )
    losses = loop.train().train_losses
    assert losses[0] > 2.0 and sum(losses[-10:]) / 10 < 0.1
    save_folder(model, None, tmp_path / "model")
    back, _ = load_folder(tmp_path / "model")
    assert isinstance(back, EncoderDecoder)
    sources = [[5, 7, 3, 6], [7, 2], [4, 4, 5]]
    written: list[list[int]] = [[], [], []]
    for step in generate_tokens(back, sources, SamplingSettings(max_new_tokens=9, temperature=0.0)):
        for new in step:
            written[new.request].append(new.token)
    assert written == [[*source, END] for source in sources]
    # The bias on the logits is fixed, as in the reference class.
    assert not model.logits_bias.any() and not back.logits_bias.requires_grad


def gradients(batch_size: int, micro: int) -> tuple[float, int, dict[str, torch.Tensor]]:
    model = tiny()
    settings = TrainSettings(batch_size=batch_size, micro_batch_size=micro)
    loop = Loop(
        model,
        Seq2Seq(),
        Examples(pairs(), partial(pad_pairs, end_id=END)),
        settings,
        device=CPU,
        quiet=True,
    )
    model.train()
    sums = loop.gradients(0)
    return (
        sums.loss,
        int(sums.count),
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
    )


@pytest.mark.parametrize("micro", [4, 2, 3])
def test_accumulation_equals_the_big_batch(micro: int) -> None:
    """Although every micro-batch is padded to a length of its own."""
    loss, count, whole = gradients(8, 8)
    other_loss, other_count, parts = gradients(8, micro)
    assert count == other_count and other_loss == pytest.approx(loss, rel=1e-6)
    largest = max(gradient.abs().max().item() for gradient in whole.values())
    assert largest > 1e-3
    for name, gradient in whole.items():
        assert (gradient - parts[name]).abs().max().item() <= 1e-6 * largest, name


def test_a_large_vocabulary_changes_nothing_but_memory(tmp_path: Path) -> None:
    """In training the logits of a T5 exist for a part of the tokens at a time."""
    make_seq2seq("t5", vocab_size=1500).save_pretrained(tmp_path)
    model, _ = load_folder(tmp_path)
    assert isinstance(model, EncoderDecoder)
    model.requires_grad_(True)
    batch = pad_pairs([([3, 1400, 5], [6]), ([7], [8, 999])], end_id=END)
    found = []
    for training in (True, False):
        model.zero_grad()
        for stack in (model.encoder, model.decoder):
            for part in stack.modules():
                if hasattr(part, "config"):
                    part.training = False  # no dropout
        model.training = training
        result = Seq2Seq().step(model, batch)
        result.loss_sum.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((result.loss_sum.item(), gradients))
    (loss, gradients), (other_loss, other_gradients) = found
    assert loss == pytest.approx(other_loss, rel=1e-6)
    for one, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_what_the_decoder_sees() -> None:
    batch = pad_pairs([([3, 4, 5], [6]), ([7], [8, 9])], end_id=END)
    assert batch.source.tolist() == [[3, 4, 5], [7, 0, 0]]
    assert batch.source_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[6, END, IGNORED], [8, 9, END]]
    assert decoder_input(batch.labels, START).tolist() == [[START, 6, END], [START, 8, 9]]
    gap = torch.tensor([[4, IGNORED, 5]])
    assert decoder_input(gap, 2).tolist() == [[2, 4, 2]]


def test_pairs_come_once_per_epoch_in_another_order() -> None:
    known = [([n], [n]) for n in range(2, 9)]
    source = Examples(known, pad_pairs, seed=3)
    seen = [source.batch(number, 1).source.item() for number in range(21)]
    epochs = [seen[:7], seen[7:14], seen[14:]]
    assert all(sorted(epoch) == list(range(2, 9)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert source.batch(5, 4).source.flatten().tolist() == seen[5:9]
    with pytest.raises(UserError, match="no example"):
        Examples([], pad_pairs)
    with pytest.raises(UserError, match="no source or no target"):
        pad_pairs([([1], [])])
