"""Text from a model: sampling, streaming, conversations.

`llm_from_scratch.generate` is two things under one name: this package, and the function of the
public face (`llm.generate(model, tokenizer, prompt)`). Importing a package binds its name in its
parent, so the package itself is made callable; the call goes to `generate.generate.generate`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **settings: Any) -> Iterator[str]:
        from llm_from_scratch.generate.generate import generate

        return generate(*arguments, **settings)


sys.modules[__name__].__class__ = _CallablePackage
