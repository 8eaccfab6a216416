"""The `tokenizers` package, opened so that a user's text can never become a special token.

`tokenizers` looks for added tokens before anything else: whoever types `<|endoftext|>` into a chat
ends the conversation. `encode_special_tokens` turns that off for a whole instance, so a tokenizer
has two: one for ordinary text, one for what a template wrote. They share the vocabulary.
"""

from __future__ import annotations

import json
from typing import Any

import tokenizers

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.checks import Spec


def open_backend(spec: Spec, *, special: bool) -> tokenizers.Tokenizer:
    """A fast tokenizer for `spec`; `special`: whether special tokens in the text are found."""
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    except Exception as error:  # the package raises plain Exception for whatever it dislikes
        raise UserError(f"This tokenizer.json cannot be used: {error}.") from error
    backend.no_truncation()  # files made for a certain model may cut and pad every text
    backend.no_padding()
    backend.encode_special_tokens = not special
    return backend


def sibling(backend: tokenizers.Tokenizer, *, special: bool) -> tokenizers.Tokenizer:
    """A second instance over the same vocabulary in memory, milliseconds instead of a reload."""
    twin = tokenizers.Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (value := getattr(backend, part)) is not None:
            setattr(twin, part, value)
    added = sorted(backend.get_added_tokens_decoder().items())
    for number, token in added:
        add = twin.add_special_tokens if token.special else twin.add_tokens
        add([token])
        if twin.token_to_id(token.content) != number:  # ids with gaps: only a reload keeps them
            twin = tokenizers.Tokenizer.from_str(backend.to_str())
            break
    twin.encode_special_tokens = not special
    return twin


def inert_spec(spec: Spec, special: dict[str, int], unknown: str | None) -> Spec:
    """`spec` with special tokens renamed to what no text contains; every id stays.

    For the rare vocabulary that reaches a special token by its ordinary rules (in a Unigram model
    `</s>` is a piece like any other), so that even there text stays text.
    """
    names = {token: f"\0{number}\0" for token, number in special.items() if token != unknown}
    model: dict[str, Any] = dict(spec["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    if "merges" in model:
        pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        model["merges"] = [
            [left, right] for left, right in pairs if not {left, right, left + right} & names.keys()
        ]
    added = [
        {**token, "content": names.get(token["content"], token["content"])}
        for token in spec["added_tokens"]
    ]
    return {**spec, "model": model, "added_tokens": added, "post_processor": None}
