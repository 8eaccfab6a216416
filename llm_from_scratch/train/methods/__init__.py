"""The methods of fine-tuning: each a small file with its settings, its batch and its step."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.train.methods.names import METHODS

if TYPE_CHECKING:
    from llm_from_scratch.train.methods.base import FinetuneMethod


def method_named(name: str) -> type[FinetuneMethod]:
    """The class of a method; an unknown name is a `UserError` with the nearest one."""
    if name not in METHODS:
        raise UserError(
            f"There is no method '{name}'; there are {', '.join(METHODS)}.{nearest(name, METHODS)}"
        )
    found = importlib.import_module(f"{__name__}.{METHODS[name].module}")
    cls: type[FinetuneMethod] = getattr(found, METHODS[name].cls)
    return cls
