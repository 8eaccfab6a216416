"""Building a decoder from stored tensors without ever holding its weights twice.

The modules are made on PyTorch's `meta` device, which has shapes but no memory; then each stored
tensor takes its parameter's place, one at a time.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator
from math import prod

import torch
from torch import Tensor, nn

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.freed import give_back
from llm_from_scratch.model.config import EncoderDecoderConfig, ModelConfig
from llm_from_scratch.model.decoder import Decoder, Stack
from llm_from_scratch.model.encoder import Encoder
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.model.heads import Backbone, Head, HeadConfig, MaskedLM, make_head
from llm_from_scratch.model.unfilled import unfilled
from llm_from_scratch.weights.families.table import Entry
from llm_from_scratch.weights.layouts import stored_shape
from llm_from_scratch.weights.packing import tie_packed

Model = Backbone | Head
GIVE_BACK_EVERY = 1 << 22  # numbers


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


def sparing(model: nn.Module, entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries, whose parameters `model` gets between them.

    What a tensor took before it was turned or converted is returned to the system now and then.
    """
    numbers = 0
    for entry in entries:
        shape = stored_shape(entry, [model.get_parameter(name).shape for name in entry.ours])
        numbers += prod(shape)
        yield entry
        if numbers > GIVE_BACK_EVERY:
            give_back()
            numbers = 0
    give_back()


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
        if isinstance(module, Decoder) and module.config.tie_embeddings and not tie_packed(module):
            module.head.weight = module.embedding.weight
        if isinstance(module, Stack):
            module.make_frequencies()
    for module in model.modules():
        if isinstance(module, EncoderDecoder | MaskedLM):
            module.tie()
    left = [name for name, p in model.named_parameters() if p.is_meta]
    assert not left, f"no value for {left}"
    model.to(device).eval()


def check_ties(model: Model) -> None:
    """Refuse a model whose config says that two matrices are one, which they are not."""
    for module in model.modules():
        if isinstance(module, Decoder) and module.config.tie_embeddings:
            pair, field = (module.head.weight, module.embedding.weight), "tie_embeddings"
        elif isinstance(module, EncoderDecoder) and module.config.share_embeddings:
            if not isinstance(module.decoder, Decoder):
                continue  # a head that looks at the source alone took it away
            pair = (module.decoder.embedding.weight, module.encoder.embedding.weight)
            field = "share_embeddings"
        else:
            continue
        if pair[0] is not pair[1] and not torch.equal(*pair):
            what = "head" if field == "tie_embeddings" else "decoder's embedding"
            raise UserError(
                f"The model's config says {field}, but its {what} is another matrix than the "
                f"embedding: let both be one parameter, or make the model with {field}=False."
            )
