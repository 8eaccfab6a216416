"""Building a decoder from stored tensors without ever holding its weights twice.

The modules are made on PyTorch's `meta` device, which has shapes but no memory; then each stored
tensor takes its parameter's place, one at a time.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from llm_from_scratch.model.config import EncoderDecoderConfig, ModelConfig
from llm_from_scratch.model.decoder import Decoder, Stack
from llm_from_scratch.model.encoder import Encoder
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.model.heads import Backbone, Head, HeadConfig, MaskedLM, make_head
from llm_from_scratch.model.unfilled import unfilled

Model = Backbone | Head


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Load without the garbage collector and on one thread; both are as before afterwards.

    A vocabulary is a hundred thousand small objects, through which the collector walks again and
    again. Decoding is many short operations: next to other programs, waiting for each other costs
    PyTorch's threads far more time than they save.
    """
    collecting, threads = gc.isenabled(), torch.get_num_threads()
    gc.disable()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()


def empty_model(
    config: ModelConfig | EncoderDecoderConfig, head: HeadConfig | None = None
) -> Model:
    """A model, under a head or without one, whose parameters have shapes but no memory yet."""
    with unfilled():
        backbone: Backbone
        if isinstance(config, EncoderDecoderConfig):
            backbone = EncoderDecoder(config)
        else:
            backbone = Decoder(config) if config.causal else Encoder(config)
        return backbone if head is None else make_head(backbone, head)


def put(model: nn.Module, name: str, value: Tensor) -> None:
    """Let `value` be the parameter called `name` (dotted), which must have the same shape."""
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    assert getattr(module, last).shape == value.shape, name
    setattr(module, last, nn.Parameter(value))


def complete(model: nn.Module, device: torch.device | str) -> None:
    """Tie what is tied, compute what is not stored, and make the model ready for inference."""
    for module in model.modules():
        if isinstance(module, Decoder) and module.config.tie_embeddings:
            module.head.weight = module.embedding.weight
        if isinstance(module, Stack):
            module.make_frequencies()
    for module in model.modules():
        if isinstance(module, EncoderDecoder | MaskedLM):
            module.tie()
    left = [name for name, p in model.named_parameters() if p.is_meta]
    assert not left, f"no value for {left}"
    model.to(device).eval()
