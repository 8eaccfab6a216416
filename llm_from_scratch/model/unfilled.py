"""Modules whose parameters have shapes but no memory yet, for weights that come from elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


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
def unfilled() -> Iterator[None]:
    """Modules made within the block are on PyTorch's `meta` device and draw nothing."""
    with torch.device("meta"), SkipInitialisation():
        yield
