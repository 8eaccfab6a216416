"""The `tokenizers` package, opened so that a user's text can never become a special token.

`tokenizers` looks for added tokens before anything else: whoever types `<|endoftext|>` into a chat
ends the conversation. `encode_special_tokens` turns that off for a whole instance, so a tokenizer
has two: one for ordinary text, one for what a template wrote. They share the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import tokenizers

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.checks import Spec

Placed = tuple[int, int, int]  # a token's id, and where in the text it begins and ends


def open_backend(spec: Spec, *, special: bool) -> tokenizers.Tokenizer:
    """A fast tokenizer for `spec`; `special`: whether special tokens in the text are found."""
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    except BaseException as error:
        # The package raises plain Exception for whatever it dislikes, and sometimes panics.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"This tokenizer.json cannot be used: {error}.") from error
    backend.no_truncation()  # files made for a certain model may cut and pad every text
    backend.no_padding()
    backend.encode_special_tokens = not special
    return backend


def run_backend(
    backend: tokenizers.Tokenizer, texts: list[str] | list[list[str]], *, words: bool = False
) -> list[list[int]]:
    """The ids of each text, nothing put before or after; `words`: each is a list of words.

    `UserError` for a vocabulary that lacks the token which its own rules call for.
    """
    # The "fast" call leaves out what is not asked for: where in the text each token was.
    return [one.ids for one in _run(backend.encode_batch_fast, texts, words)]


def run_with_places(backend: tokenizers.Tokenizer, texts: list[str]) -> list[list[Placed]]:
    """As `run_backend`, and where in the text each token begins and ends."""
    return [
        [(number, *place) for number, place in zip(one.ids, one.offsets, strict=True)]
        for one in _run(backend.encode_batch, texts, False)
    ]


def _run(call: Callable[..., Any], texts: list[Any], words: bool) -> list[tokenizers.Encoding]:
    try:
        found: list[tokenizers.Encoding] = call(texts, words, add_special_tokens=False)
    except BaseException as error:
        _refused(error)
        raise UserError(
            f"The tokenizer cannot encode this text ({error}); its tokenizer.json is not sound, "
            "fetch it again."
        ) from error
    return found


def _refused(error: BaseException) -> None:
    """Raise again what is no refusal of the package.

    Its panics are no `Exception`; they mean a specification that contradicts itself.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


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
