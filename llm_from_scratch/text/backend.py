"""The `tokenizers` package, opened so that a user's text can never become a special token.

`tokenizers` looks for added tokens before anything else: whoever types `<|endoftext|>` into a chat
ends the conversation. `encode_special_tokens` turns that off for a whole instance, so a tokenizer
has two: one for ordinary text, one for what a template wrote. They share the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.freed import give_back
from llm_from_scratch.text.checks import Spec
from llm_from_scratch.text.packed import BLOCK, PackedModel, unusable

Placed = tuple[int, int, int]  # a token's id, and where in the text it begins and ends


def open_backend(spec: Spec, *, special: bool) -> tokenizers.Tokenizer:
    """A fast tokenizer for `spec`; `special`: whether special tokens in the text are found."""
    return open_packed(spec, PackedModel(spec["model"]), special=special)


def open_packed(
    rules: Spec, model: PackedModel, *, special: bool, source: Path | str | None = None
) -> tokenizers.Tokenizer:
    """The same for the specification `rules` with this model in place of its own.

    `source` is the file that they came from, which an error names.
    """
    try:
        unigram = model.rest.get("type") == "Unigram"
        backend = _open_unigram(rules, model) if unigram else None
        if backend is None:
            backend = tokenizers.Tokenizer.from_buffer(model.text(rules))
    except BaseException as error:  # the package raises plain Exception for whatever it dislikes
        _refused(error)
        raise unusable(error, source) from error
    backend.no_truncation()  # files made for a certain model may cut and pad every text
    backend.no_padding()
    backend.encode_special_tokens = not special
    if model.size > BLOCK:
        give_back()
    return backend


def check_rules(rules: Spec, model: PackedModel) -> None:
    """Refuse what the package refuses, without the time and memory that a vocabulary takes."""
    try:
        if model.rest.get("type") == "Unigram" and model.scored:
            _steps(rules)
            _added(rules)
            return
        empty: Spec = {**model.rest, "vocab": [["", 0.0]] if model.scored else {}}
        if model.merges is not None:
            empty["merges"] = []
        tokenizers.Tokenizer.from_str(json.dumps({**rules, "model": empty}, ensure_ascii=False))
    except BaseException as error:
        _refused(error)
        raise unusable(error) from error


def _open_unigram(rules: Spec, packed: PackedModel) -> tokenizers.Tokenizer | None:
    """The same without JSON for the scores, or None where that cannot be.

    The package reads a number such as -9.077554702758789 as its neighbour. In a row of equal
    characters many cuts are equally good, and then the last bit decides.
    """
    model = tokenizers.models.Unigram(
        packed.pieces(), packed.rest.get("unk_id"), bool(packed.rest.get("byte_fallback", False))
    )
    return _assembled(model, _steps(rules), _added(rules))


def _steps(rules: Spec) -> tokenizers.Tokenizer:
    """A tokenizer of these steps and nothing else."""
    nothing = {"type": "Unigram", "unk_id": 0, "vocab": [["", 0.0]]}
    rest = {**rules, "model": nothing, "added_tokens": [], "post_processor": None}
    return tokenizers.Tokenizer.from_str(json.dumps(rest, ensure_ascii=False))


def _added(rules: Spec) -> list[tuple[int, tokenizers.AddedToken]]:
    return [
        (entry["id"], tokenizers.AddedToken(**{k: v for k, v in entry.items() if k != "id"}))
        for entry in rules.get("added_tokens") or []
    ]


def _assembled(
    model: Any, parts: tokenizers.Tokenizer, added: list[tuple[int, tokenizers.AddedToken]]
) -> tokenizers.Tokenizer | None:
    """A tokenizer of a model, the steps of another tokenizer, and added tokens.

    None where the ids of added tokens have gaps: only a reload keeps those.
    """
    made = tokenizers.Tokenizer(model)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (value := getattr(parts, part)) is not None:
            setattr(made, part, value)
    for number, token in sorted(added, key=lambda pair: pair[0]):
        add = made.add_special_tokens if token.special else made.add_tokens
        add([token])
        if made.token_to_id(token.content) != number:
            return None
    return made


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
    added = list(backend.get_added_tokens_decoder().items())
    twin = _assembled(backend.model, backend, added)
    if twin is None:
        twin = tokenizers.Tokenizer.from_str(backend.to_str())
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
