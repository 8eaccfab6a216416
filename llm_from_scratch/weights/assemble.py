"""Building a decoder from stored tensors without ever holding its weights twice.

The modules are made on PyTorch's `meta` device, which has shapes but no memory; then each stored
tensor takes its parameter's place, one at a time.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llm_from_scratch.model.config import ModelConfig
from llm_from_scratch.model.decoder import Decoder


class SkipInitialisation(TorchFunctionMode):
    """Leave fresh parameters as they are: they are about to be replaced.

    Not a matter of arithmetic: drawing random numbers on `meta` makes PyTorch import its compiler,
    which takes longer than reading the weights of a small model.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


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


def empty_decoder(config: ModelConfig) -> Decoder:
    """A decoder whose parameters have shapes but no memory yet."""
    with torch.device("meta"), SkipInitialisation():
        return Decoder(config)


def put(model: nn.Module, name: str, value: Tensor) -> None:
    """Let `value` be the parameter called `name` (dotted), which must have the same shape."""
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    assert getattr(module, last).shape == value.shape, name
    setattr(module, last, nn.Parameter(value))


def complete(model: Decoder, device: torch.device | str) -> Decoder:
    """Tie what is tied, compute what is not stored, and return the model ready for inference."""
    if model.config.tie_embeddings:
        model.head.weight = model.embedding.weight
    model.make_tables()
    model.table = model.table.to(device) if model.table is not None else model.table
    left = [name for name, p in model.named_parameters() if p.is_meta]
    assert not left, f"no value for {left}"
    return model.eval()
