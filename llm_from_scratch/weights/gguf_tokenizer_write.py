"""A tokenizer as the `tokenizer.*` metadata of a GGUF file: the inverse of `gguf_tokenizer.py`.

llama.cpp has its own code for each kind of vocabulary and reads only the lists from the file. What
its code would cut otherwise than our specification says is refused in a sentence.
"""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.checks import Spec
from llm_from_scratch.text.formats import is_byte_level
from llm_from_scratch.text.inputs import put_around
from llm_from_scratch.text.sentencepiece_spec import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    merges_of_scores,
)
from llm_from_scratch.text.token_bytes import BYTE_TOKEN
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.wordpiece_spec import CONTINUES
from llm_from_scratch.weights.gguf_cuts import flat_steps, name_of_cut
from llm_from_scratch.weights.gguf_tokenizer import PREFIX, ROLES, padding_name

FOLDER = "save the model as a Hugging Face folder instead"


def tokenizer_metadata(tokenizer: Tokenizer | None, vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.*` keys of a GGUF file for a model of `vocab_size` embeddings.

    Raises `UserError` for a tokenizer that llama.cpp could not apply as it is.
    """
    if tokenizer is None:
        return {f"{PREFIX}model": "none"}
    if tokenizer.front is not None:
        raise UserError(
            "llama.cpp cannot cut text into words with MeCab or as Marian does before it looks at "
            f"the vocabulary; {FOLDER}."
        )
    tokens, types = _vocabulary(tokenizer, vocab_size)
    kind, spec = tokenizer.kind, tokenizer.spec
    if kind == "bpe" and is_byte_level(spec):
        values = _bpe(spec)
    elif kind == "bpe" and spec["model"].get("byte_fallback"):
        values = _sentencepiece_bpe(spec, tokens, types)
    elif kind == "unigram":
        values = _unigram(spec, tokens)
    elif kind == "wordpiece":
        values = _wordpiece(spec)
        tokens = _phantom_spaces(tokens, types)
    else:
        raise UserError(
            f"llama.cpp has no vocabularies of the kind '{kind}' that work as this one; {FOLDER}."
        )
    if len(set(tokens)) != len(tokens):
        raise UserError(f"Two tokens have the same text, which llama.cpp does not allow; {FOLDER}.")
    values |= {"tokens": tokens, "token_type": types, **_roles(tokenizer)}
    metadata = {PREFIX + name: value for name, value in values.items()}
    if tokenizer.chat_template:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def _vocabulary(tokenizer: Tokenizer, size: int) -> tuple[list[str], list[int]]:
    """The tokens, one for each row of the embedding, and what kind each is."""
    added = {token["id"]: token for token in tokenizer.rules["added_tokens"]}
    pieces = tokenizer.kind == "unigram" or not is_byte_level(tokenizer.rules)
    fallback = bool(tokenizer.rules["model"].get("byte_fallback"))
    tokens: list[str] = []
    types: list[int] = []
    for number, token in enumerate([*tokenizer.tokens, *[None] * (size - tokenizer.vocab_size)]):
        kind = NORMAL
        if token is None:
            token, kind = padding_name(number), UNUSED
        elif number == tokenizer.unk_id and pieces and tokenizer.kind != "wordpiece":
            kind = UNKNOWN
        elif number in added:
            kind = CONTROL if added[number]["special"] else USER_DEFINED
            if kind == USER_DEFINED and pieces:
                token = token.replace(SPACE, " ")  # it is looked for in the text as it was written
        elif fallback and BYTE_TOKEN.match(token):
            kind = BYTE
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _roles(tokenizer: Tokenizer) -> dict[str, Any]:
    """Which ids begin and end a text, stand for the unknown and so on."""
    values: dict[str, Any] = {}
    for role, name in ROLES.items():
        token = tokenizer.config.get(name)
        if token is not None and (number := tokenizer.token_id(str(token))) is not None:
            values[f"{role}_token_id"] = number
    if tokenizer.unk_id is not None:
        values["unknown_token_id"] = tokenizer.unk_id
    others = tokenizer.stop_ids - {tokenizer.eos_id}
    if others:
        values["eot_token_id"] = min(others)
    if tokenizer.kind == "wordpiece":
        if "cls_token_id" in values:
            values["bos_token_id"] = values["cls_token_id"]
        return values
    first, last = put_around(tokenizer)
    values["add_bos_token"] = first and tokenizer.bos_id is not None
    values["add_eos_token"] = last and tokenizer.eos_id is not None
    return values


# ------------------------------------------------------------------------- the four kinds


def _bpe(spec: Spec) -> dict[str, Any]:
    merges = spec["model"]["merges"]
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return {"model": "gpt2", "pre": name_of_cut(spec), "merges": lines}


def _sentencepiece_bpe(spec: Spec, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Merges become scores: a piece is worth the more, the earlier it is made."""
    prefix = _spaces(spec, needs_metaspace=False)
    never = {t for t, kind in zip(tokens, types, strict=True) if kind in (UNKNOWN, CONTROL, BYTE)}
    merges = [m.split(" ") if isinstance(m, str) else list(m) for m in spec["model"]["merges"]]
    pairs = [(left, right) for left, right in merges if not never & {left, right, left + right}]
    scores = _scores_of_merges(pairs)
    mixed = {score for score, count in Counter(scores.values()).items() if count > 1}
    order = [
        (-score, -len(left), -len(right)) if (score := scores[left + right]) in mixed else (-score,)
        for left, right in pairs
    ]
    least = min(scores.values(), default=0.0) - 1.0
    # llama.cpp joins what is a piece, whether a merge makes it or not.
    every = {piece: scores.get(piece, least) for piece in spec["model"]["vocab"]}
    again = merges_of_scores(spec["model"]["vocab"], every, never)
    if order != sorted(order) or set(pairs) != {(left, right) for left, right in again}:
        raise UserError(
            "The merges of this tokenizer do not follow from scores of its pieces, and llama.cpp "
            f"knows SentencePiece vocabularies by scores only; {FOLDER}."
        )
    return {
        "model": "llama",
        "pre": "default",
        "scores": [
            0.0 if kind in (UNKNOWN, CONTROL, BYTE) else scores.get(piece, least)
            for piece, kind in zip(tokens, types, strict=True)
        ],
        "add_space_prefix": prefix,
    }


def _scores_of_merges(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """0, -1, -2, ... for the pieces in the order in which merges make them.

    Pieces whose merges are mixed (runs of spaces, mostly) had the same score.
    """
    last = {left + right: rank for rank, (left, right) in enumerate(pairs)}
    scores: dict[str, float] = {}
    score, end = 1.0, -1
    for rank, (left, right) in enumerate(pairs):
        piece = left + right
        if piece not in scores:
            score -= rank > end
            scores[piece] = score
            end = max(end, last[piece])
    return scores


def _unigram(spec: Spec, tokens: list[str]) -> dict[str, Any]:
    vocab = spec["model"]["vocab"]
    scores = [float(score) for _, score in vocab]
    values: dict[str, Any] = {
        "model": "t5",
        "pre": "default",
        "scores": [*scores, *[min(scores)] * (len(tokens) - len(scores))],
        "add_space_prefix": _spaces(spec, needs_metaspace=True),
        "remove_extra_whitespaces": False,
    }
    for step in _steps(spec):
        if step["type"] == "Precompiled":
            try:
                charsmap = base64.b64decode(step["precompiled_charsmap"], validate=True)
            except (binascii.Error, ValueError, TypeError) as error:
                raise UserError(f"The tokenizer's normalisation is not sound ({error}).") from error
            if charsmap:
                values["precompiled_charsmap"] = charsmap
        elif step["type"] == "WhitespaceSplit" or "Regex" in step.get("pattern", {}):
            values["remove_extra_whitespaces"] = True
    if spec["model"].get("byte_fallback"):
        raise UserError(f"llama.cpp has no Unigram vocabulary with bytes as a fallback; {FOLDER}.")
    return values


def _steps(spec: Spec) -> list[dict[str, Any]]:
    return [*flat_steps(spec.get("normalizer")), *flat_steps(spec.get("pre_tokenizer"))]


def _spaces(spec: Spec, *, needs_metaspace: bool) -> bool:
    """Whether a text begins with an added space; every other step must be SentencePiece's own."""
    prefix = metaspace = False
    for step in _steps(spec):
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                metaspace = True
            case {"type": "Replace", "pattern": {"Regex": " {2,}"}} if needs_metaspace:
                pass
            case {"type": "Precompiled"} | {"type": "Strip"} if needs_metaspace:
                pass
            # No space is left to cut at, once each has become a `▁`.
            case {"type": "Split", "pattern": {"String": " "}} if metaspace:
                pass
            case {"type": "WhitespaceSplit"} if needs_metaspace:
                pass
            # llama.cpp adds the space also where a text begins with one or follows a special
            # token; its own converter does not tell these apart either.
            case {"type": "Metaspace", "replacement": "▁"}:
                metaspace = True
                prefix = step.get("prepend_scheme", "always") != "never"
            case _:
                raise UserError(
                    f"llama.cpp has no step {step.get('type')} for vocabularies of this kind, so "
                    f"it would cut text into other tokens; {FOLDER}."
                )
    if not metaspace:
        raise UserError(
            f"This vocabulary does not write spaces as '▁', as llama.cpp does; {FOLDER}."
        )
    return prefix


def _wordpiece(spec: Spec) -> dict[str, Any]:
    normalizer, cut = spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}
    sound = normalizer.get("type") == "BertNormalizer" and cut.get("type") == "BertPreTokenizer"
    prefix = spec["model"].get("continuing_subword_prefix")
    if not sound or prefix != CONTINUES or not normalizer.get("handle_chinese_chars", True):
        raise UserError(
            f"llama.cpp applies WordPiece vocabularies as BERT does and in no other way; {FOLDER}."
        )
    lowercase = bool(normalizer.get("lowercase"))
    accents = normalizer.get("strip_accents")
    return {
        "model": "bert",
        "normalizer.lowercase": lowercase,
        "normalizer.strip_accents": lowercase if accents is None else bool(accents),
        "token_type_count": 2,
    }


def _phantom_spaces(tokens: list[str], types: list[int]) -> list[str]:
    """llama.cpp marks the beginning of a word instead of its continuation."""
    return [
        token if kind != NORMAL else token[2:] if token.startswith(CONTINUES) else SPACE + token
        for token, kind in zip(tokens, types, strict=True)
    ]
