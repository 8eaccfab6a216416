"""Bits per byte: how well a model predicts a text, beside what compressors make of it.

A model that gives a text the probability p could send it in -log2 p bits (arithmetic coding). Per
byte of UTF-8 this does not depend on the tokenizer, and it can be held against gzip, bz2 and xz.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from llm_from_scratch.data.loader import IGNORED, evaluation_batches
from llm_from_scratch.data.shards import TokenStore
from llm_from_scratch.model.decoder import Decoder


@torch.inference_mode()
def nats_of(
    model: Decoder, store: TokenStore, seq_len: int, stride: int, batch_size: int = 16
) -> Iterator[tuple[float, int]]:
    """(nats, targets) batch by batch over the whole store, each token a target once.

    Windows overlap by `seq_len - stride` tokens, so that a token has that much context or all that
    its document offers.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        for batch in evaluation_batches(store, seq_len, batch_size, stride):
            ids = None if batch.document_ids is None else batch.document_ids.to(device)
            hidden = model.hidden(batch.tokens.to(device), document_ids_bt=ids)
            counted = batch.targets != IGNORED
            targets = batch.targets[counted].to(device)
            logprobs = model.logits(hidden[counted.to(device)]).float().log_softmax(-1)
            chosen = logprobs.gather(1, targets[:, None])
            yield -chosen.double().sum().item(), int(counted.sum())
    finally:
        model.train(training)


def bits_per_byte(nats: float, byte_count: int) -> float:
    """nats / ln 2 / bytes."""
    return nats / math.log(2) / byte_count


def compressor_bits_per_byte(text: bytes, training_text: bytes = b"") -> dict[str, float]:
    """gzip, bz2 and xz at their strongest on `text`, in bits per byte.

    With `training_text`, `xz_primed` is what `text` adds when xz has first read the training text
    (its window made large enough): the fair comparison for a model that was trained on it.
    """
    strongest = 9 | lzma.PRESET_EXTREME
    window = min(1 << 30, 1 << max(23, (len(training_text) + len(text)).bit_length()))
    wide = [{"id": lzma.FILTER_LZMA2, "preset": strongest, "dict_size": window}]
    jobs: dict[str, Callable[[], bytes]] = {
        "gzip": lambda: gzip.compress(text, 9),
        "bz2": lambda: bz2.compress(text, 9),
        "xz": lambda: lzma.compress(text, preset=strongest),
    }
    if training_text:
        jobs["both"] = lambda: lzma.compress(training_text + text, filters=wide)
        jobs["primer"] = lambda: lzma.compress(training_text, filters=wide)
    # The compressors let go of the interpreter, so threads do run side by side.
    with ThreadPoolExecutor() as pool:
        running = {name: pool.submit(job) for name, job in jobs.items()}
        sizes = {name: len(future.result()) for name, future in running.items()}
    if training_text:
        sizes["xz_primed"] = sizes.pop("both") - sizes.pop("primer")
    return {name: 8 * size / len(text) for name, size in sizes.items()}
