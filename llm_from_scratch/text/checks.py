"""Tokenizer files are downloads: that every value in them has its type, before it is used.

The `tokenizers` package checks most of a `tokenizer.json` itself. Here is what it lets pass, and
what stands in the files beside it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.charsmap import charsmap_parts

Spec = dict[str, Any]
Config = dict[str, Any]

ROLES = (
    "bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token",
)  # fmt: skip
REMEDY = "fetch it again"
# Fields that are used as they are, and must have their type.
FIELDS: dict[str, tuple[type, str]] = {
    "tokenizer_class": (str, "the name of a class"),
    "extra_ids": (int, "a whole number"),
    "mecab_kwargs": (dict, "a table"),
    "padding_side": (str, "'left' or 'right'"),
}
# No vocabulary is larger; one token with the id 4,000,000,000 would be a list of that length.
LARGEST_ID = 1 << 24


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_ID


def _is_text(value: Any) -> bool:
    """JSON can spell half a character ("\\ud800"), which nothing can encode."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _refuse_id(token: Any, value: Any) -> UserError:
    return UserError(
        f"The token {token!r:.60} has the id {value!r:.60}; ids are whole numbers from 0 to "
        f"{LARGEST_ID:,}."
    )


def check_spec(spec: Spec) -> None:
    """Raise `UserError` for a `tokenizer.json` that is none, or that would fill the memory."""
    model = spec.get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise UserError("This is JSON but no tokenizer.json: it has no model with a vocabulary.")
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        # Two quick passes over what may be a quarter of a million entries.
        wrong_type = not set(map(type, vocab.values())) <= {int}
        if wrong_type or (
            vocab and not 0 <= min(vocab.values()) <= max(vocab.values()) <= LARGEST_ID
        ):
            token = next(token for token, number in vocab.items() if not _is_id(number))
            raise _refuse_id(token, vocab[token])
    elif not isinstance(vocab, list):
        raise UserError("The vocabulary of this tokenizer.json is neither a table nor a list.")
    added = spec.get("added_tokens") or []
    if not isinstance(added, list) or not all(
        isinstance(token, dict)
        and isinstance(token.get("content"), str)
        and isinstance(token.get("special"), bool)
        for token in added
    ):
        raise UserError("'added_tokens' of this tokenizer.json is not a list of tokens.")
    for token in added:
        if not _is_id(token.get("id")):
            raise _refuse_id(token["content"], token.get("id"))
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        _check_part(spec.get(name), name)


def _check_part(part: Any, name: str) -> None:
    """A step of the pipeline is a table; a sequence of them holds a list of tables."""
    if part is None:
        return
    if not isinstance(part, dict) or not isinstance(part.get("type", ""), str):
        raise UserError(f"'{name}' of this tokenizer.json is not a table with a type.")
    if part.get("type") == "Precompiled" and name == "normalizer":
        try:
            blob = base64.b64decode(part["precompiled_charsmap"], validate=True)
        except (KeyError, TypeError, ValueError):
            raise UserError(
                "'precompiled_charsmap' of this tokenizer.json is not base64."
            ) from None
        charsmap_parts(blob)
    for inner in ("decoders", "pretokenizers", "normalizers"):
        steps = part.get(inner, [])
        if not isinstance(steps, list):
            raise UserError(f"'{name}' of this tokenizer.json holds no list of steps.")
        for step in steps:
            _check_part(step if step is not None else [], name)


def check_ids(tokens: Mapping[str, Any], where: Path) -> dict[str, int]:
    """A table of tokens and their ids, from the file `where`."""
    for token, number in tokens.items():
        if not _is_id(number):
            raise UserError(f"{where}: {_refuse_id(token, number)}")
    return dict(tokens)


def token_text(token: Any) -> str | None:
    """A token as these files have it: its text, or a table with its text; else None."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if _is_text(token) else None


def check_config(values: Config, where: Path) -> Config:
    """The content of `tokenizer_config.json` or one of its relatives, tokens as plain texts.

    What such a file says of a token beside its text is kept under "token_flags". Raises
    `UserError`, which names the file and the field.
    """
    config = {**values, "token_flags": {}}

    def refuse(name: str, must: str) -> UserError:
        return UserError(f"{where}: '{name}' is {values[name]!r:.60}; it must be {must}.")

    for role in ROLES:
        if (entry := config.get(role)) is not None:
            config[role] = token_text(entry)
            if config[role] is None:
                raise refuse(role, "a token's text")
            if isinstance(entry, dict):
                config["token_flags"][config[role]] = entry
    for name, (kind, must) in FIELDS.items():
        if config.get(name) is not None and not isinstance(config[name], kind):
            raise refuse(name, must)
    extra = config.get("additional_special_tokens")
    if extra is not None and (
        not isinstance(extra, list) or any(token_text(token) is None for token in extra)
    ):
        raise refuse("additional_special_tokens", "a list of tokens")
    decoder = config.get("added_tokens_decoder")
    if decoder is not None and not (
        isinstance(decoder, dict)
        and all(number.isascii() and number.isdigit() and len(number) < 9 for number in decoder)
        and all(isinstance(t, dict) and token_text(t) is not None for t in decoder.values())
    ):
        raise refuse("added_tokens_decoder", "a table of ids and tokens")
    if config.get("chat_template") == []:
        config["chat_template"] = None
    if config.get("chat_template") is not None:
        config["chat_template"] = _one_template(config["chat_template"])
        if config["chat_template"] is None:
            raise refuse("chat_template", "a text, or a list of tables with name and template")
    return config


def _one_template(template: Any) -> str | None:
    """The template, of several with names the one called "default", or None if it is none."""
    if isinstance(template, list):
        named = {}
        for entry in template:
            texts = [entry.get(k) for k in ("name", "template")] if isinstance(entry, dict) else []
            if not texts or not all(isinstance(text, str) for text in texts):
                return None
            named[texts[0]] = texts[1]
        template = named.get("default", template[0]["template"])
    return template if _is_text(template) else None


def stop_ids(values: Mapping[str, Any], where: Path) -> set[int]:
    """`eos_token_id` of a `config.json` or `generation_config.json`: one id, several, or none."""
    ends = values.get("eos_token_id")
    found: Iterable[Any] = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(_is_id(end) for end in found):
        raise UserError(
            f"{where}: 'eos_token_id' is {ends!r:.60}; it must be a token's id or a list of ids."
        )
    return set(found)
