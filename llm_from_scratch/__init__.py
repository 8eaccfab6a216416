"""From raw text to a language model that you trained, tuned, understand and take with you.

    import llm_from_scratch as llm
    model, tokenizer = llm.load("runs/quickstart")
    for piece in llm.generate(model, tokenizer, "def ", max_new_tokens=50):
        print(piece, end="")
    llm.save(model, tokenizer, "out/")

The names below are the whole public face; each is imported when it is first used, so that
`import llm_from_scratch` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# name -> the module that holds it, and its name there (None: the module itself, which is callable)
_NAMES: dict[str, tuple[str, str | None]] = {
    "load": ("llm_from_scratch.weights.sources", "load"),
    "save": ("llm_from_scratch.weights.folder_write", "save_folder"),
    "generate": ("llm_from_scratch.generate", None),
    "quantize": ("llm_from_scratch.train.quantize", "quantize"),
    "pretrain": ("llm_from_scratch.train.pretrain", "pretrain"),
    "finetune": ("llm_from_scratch.train.finetune", "finetune"),
    "PretrainConfig": ("llm_from_scratch.train.settings", "PretrainConfig"),
    "UserError": ("llm_from_scratch.core.errors", "UserError"),
    "RunError": ("llm_from_scratch.core.errors", "RunError"),
}

__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'llm_from_scratch' has no attribute '{name}'")
    module, attribute = _NAMES[name]
    found = importlib.import_module(module)
    return found if attribute is None else getattr(found, attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
