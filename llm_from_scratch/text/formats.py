"""Specifications of byte-level BPE and character vocabularies, and tiktoken's rank files.

A *specification* ("spec") is the content of a `tokenizer.json` as a dict, the format of the
`tokenizers` package: what the vocabulary is, how text is cut and how tokens become text again. A
*config* is the content of the `tokenizer_config.json` beside it: which token begins, ends and pads
a text, and the chat template. Whatever is read (`files.py`) or trained becomes these two.
"""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.checks import Config, Spec
from llm_from_scratch.text.pretokenize import GPT2_PATTERN, letter_bytes, to_letters

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unk|>"
# Which token plays which part, where only the names can tell; the first that is there.
ROLE_NAMES = {
    "bos_token": ("<s>", "<|bos|>", "<|begin_of_text|>", "[BOS]", END_OF_TEXT),
    "eos_token": (END_OF_TEXT, "</s>", "<|eos|>", "<|end_of_text|>", "[EOS]"),
    "pad_token": ("<pad>", "<|pad|>", "[PAD]", "<|padding|>"),
    "unk_token": (UNKNOWN, "<unk>", "[UNK]"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]", "<mask>"),
}
TIKTOKEN_PATTERNS = {
    "gpt2": GPT2_PATTERN,
    "cl100k": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


# ------------------------------------------------------------------------- building a spec


def added_token(content: str, number: int, *, special: bool) -> dict[str, Any]:
    """One entry of a spec's `added_tokens`: found in text before anything else is done to it."""
    return {
        "id": number,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": not special,
        "special": special,
    }


def _spec(vocab: dict[str, int], merges: list[Any], special: Iterable[str], **model: Any) -> Spec:
    added = [added_token(token, vocab[token], special=True) for token in special]
    added.sort(key=lambda token: token["id"])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            **model,
            "vocab": vocab,
            "merges": merges,
        },
    }


def byte_level(pattern: str = GPT2_PATTERN, *, add_prefix_space: bool = False) -> dict[str, Any]:
    """The `pre_tokenizer` part of a spec: cut by `pattern`, then bytes as GPT-2's letters."""
    letters = {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": pattern == GPT2_PATTERN,  # the one expression that is built in
    }
    if letters["use_regex"]:
        return letters
    cut = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [cut, letters]}


def bpe_spec(
    tokens: Sequence[str] | Mapping[str, int],
    merges: Iterable[Sequence[str] | str],
    *,
    pattern: str = GPT2_PATTERN,
    special: Iterable[str] = (),
    add_prefix_space: bool = False,
    individual_digits: bool = False,
    normalizer: str | None = None,
    ignore_merges: bool = False,
) -> Spec:
    """The spec of a byte-level BPE tokenizer, from its vocabulary and merges in GPT-2's letters.

    Args:
        tokens: the vocabulary, a token's id being its place (or a mapping to ids).
        merges: pairs, or strings "left right" as in `merges.txt` and in GGUF files.
        pattern: the pre-tokenisation; `individual_digits` cuts numbers into digits before it.
        special: those of `tokens` that never come out of ordinary text.
        normalizer: "NFC", "NFKC", ... or None.
        ignore_merges: a word that is in the vocabulary is one token, whatever the merges say.
    """
    vocab = dict(tokens) if isinstance(tokens, Mapping) else {t: i for i, t in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise UserError("The vocabulary has the same token twice: give every id its own token.")
    special = list(special)
    if missing := [token for token in special if token not in vocab]:
        raise UserError(f"The special token '{missing[0]}' is not in the vocabulary: add it first.")
    pairs = [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in merges]
    spec = _spec(vocab, pairs, special, ignore_merges=ignore_merges)
    spec["pre_tokenizer"] = byte_level(pattern, add_prefix_space=add_prefix_space)
    if individual_digits:
        digits = {"type": "Digits", "individual_digits": True}
        rest = spec["pre_tokenizer"].get("pretokenizers", [spec["pre_tokenizer"]])
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, *rest]}
    if normalizer:
        spec["normalizer"] = {"type": normalizer}
    spec["decoder"] = {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": True,
    }
    return spec


def char_spec(
    characters: Sequence[str], special: Sequence[str] = (), unknown: str | None = None
) -> Spec:
    """The spec of a character tokenizer: a BPE model that has nothing to merge.

    Ids are the special tokens first, then `characters` in their order. `unknown`, one of
    `special`, stands for every character that is not in the vocabulary.
    """
    vocab = {token: i for i, token in enumerate([*special, *characters])}
    spec = _spec(vocab, [], special, unk_token=unknown)
    spec["decoder"] = {"type": "Fuse"}
    return spec


def guess_roles(special: Sequence[str]) -> Config:
    """Which of the special tokens begins a text, ends it, pads it, stands for the unknown."""
    roles: Config = {}
    for role, names in ROLE_NAMES.items():
        if found := [name for name in names if name in special]:
            roles[role] = found[0]
    return roles


# ------------------------------------------------------------------------- tiktoken


def read_tiktoken(
    path: Path | str,
    *,
    pattern: str = "gpt2",
    special: Mapping[str, int] | None = None,
) -> Spec:
    """The spec of a tiktoken rank file: lines of a token in base64 and its rank.

    Such a file has neither pattern nor special tokens: `pattern` is "gpt2", "cl100k" (GPT-4,
    Llama 3) or an expression, `special` maps tokens to ids.
    """
    path = Path(path)
    ranks: dict[bytes, int] = {}
    number = 0
    try:
        for line in path.read_bytes().splitlines():
            number += 1
            if line.strip():
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, binascii.Error):
        raise UserError(
            f"{path}, line {number}, is not a tiktoken rank (base64, space, number)."
        ) from None
    return tiktoken_spec(ranks, pattern=pattern, special=special)


def tiktoken_spec(
    ranks: Mapping[bytes, int], *, pattern: str = "gpt2", special: Mapping[str, int] | None = None
) -> Spec:
    """The spec of a tiktoken encoding: see `read_tiktoken`."""
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError("These tiktoken ranks lack some of the 256 bytes: the file is incomplete.")
    vocab = {to_letters(token): rank for token, rank in ranks.items()}
    vocab |= special or {}
    return bpe_spec(
        dict(sorted(vocab.items(), key=lambda item: item[1])),
        [(to_letters(left), to_letters(right)) for left, right in merges_of_ranks(ranks)],
        pattern=TIKTOKEN_PATTERNS.get(pattern, pattern),
        special=special or (),
        ignore_merges=True,  # tiktoken looks a whole word up before it merges
    )


def merges_of_ranks(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges behind a list of ranked tokens.

    A token is what its last merge made: encode it with the earlier tokens only, and two parts are
    left. (Where more are left no merge reaches it; it is found as a whole word or not at all.)
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            best = min(joined)
            if best >= rank:
                break
            i = joined.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def is_byte_level(spec: Spec) -> bool:
    """Whether the tokens of this spec are bytes in GPT-2's letters."""
    parts = [spec.get("decoder") or {}, spec.get("pre_tokenizer") or {}]
    for part in list(parts):
        parts += part.get("decoders", []) + part.get("pretokenizers", [])
    return any(part.get("type") == "ByteLevel" for part in parts)


def token_to_bytes(token: str) -> bytes | None:
    """A token in GPT-2's letters as bytes; None when it is not in that notation."""
    table = letter_bytes()
    try:
        return bytes(table[letter] for letter in token)
    except KeyError:
        return None
