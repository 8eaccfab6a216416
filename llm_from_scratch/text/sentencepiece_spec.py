"""SentencePiece vocabularies as a specification: pieces, scores and types to a `tokenizer.json`.

SentencePiece writes a space as `▁` and knows two ways to cut a text into pieces. In a BPE model
the pair of neighbours whose union has the highest score is joined first; `tokenizers` wants the
same order as a list of merges, which the scores determine. In a Unigram model the cut with the
highest sum of scores wins (Kudo 2018, arXiv:1804.10959; Kudo & Richardson 2018, arXiv:1808.06226).

The `.model` files of the sentencepiece package and the vocabularies `llama` and `t5` in GGUF files
are both such lists of pieces.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.checks import Spec
from llm_from_scratch.text.formats import added_token

SPACE = "▁"
# Characters of a piece that merges may make. SentencePiece learns 16 at most; only what a user
# defined is longer, and is found in text as a whole.
MOST_MERGED = 256
# What kind of piece: the numbers in SentencePiece's own files and in GGUF's.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def sentencepiece_spec(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    kind: str,
    prefix: bool = True,
    merge_spaces: bool = False,
    charsmap: bytes = b"",
    special: Collection[str] = (),
) -> Spec:
    """The content of a `tokenizer.json` that cuts text as SentencePiece does.

    Args:
        pieces: the vocabulary, a piece's id being its place; `scores` and `types` belong to it.
        kind: "bpe" or "unigram".
        prefix: a text that begins with a word gets a space before it (`add_dummy_prefix`).
        merge_spaces: runs of spaces count as one, those at the ends as none
            (`remove_extra_whitespaces`).
        charsmap: the compiled normalisation (`precompiled_charsmap`), such as NFKC.
        special: user-defined pieces that are special tokens all the same.

    Raises `UserError` for a vocabulary that has a piece twice or no piece for the unknown.
    """
    assert len(pieces) == len(scores) == len(types)
    if len(set(pieces)) != len(pieces):
        raise UserError("The vocabulary has the same piece twice: give every id its own piece.")
    unknown = next((i for i, kind_ in enumerate(types) if kind_ == UNKNOWN), None)
    byte_fallback = BYTE in types
    if kind == "bpe":
        vocab = {piece: i for i, piece in enumerate(pieces)}
        never = {p for p, t in zip(pieces, types, strict=True) if t in (UNKNOWN, CONTROL, BYTE)}
        scored = dict(zip(pieces, scores, strict=True))
        model: dict[str, Any] = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else pieces[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": byte_fallback,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges_of_scores(vocab, scored, never),
        }
    else:
        if unknown is None:
            raise UserError("The vocabulary has no piece for unknown characters: add '<unk>'.")
        model = {
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": [[piece, score] for piece, score in zip(pieces, scores, strict=True)],
            "byte_fallback": byte_fallback,
        }
    spec: Spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(pieces, types, special),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    spec.update(_steps(pieces, types, kind, prefix, merge_spaces, charsmap))
    return spec


def merges_of_scores(
    vocab: Mapping[str, int], scores: Mapping[str, float], never: Collection[str] = ()
) -> list[list[str]]:
    """The merges, best first, of a BPE model that knows its pieces and their scores.

    A piece may come from every pair of pieces that it can be cut into; `never` are pieces that no
    text becomes, such as `</s>`. Pairs of equal score stand in the order that `transformers` gives
    them, so that ids agree with its tokenizers.
    """
    # The vocabulary's own strings: half a million merges of fresh ones take 60 MB more.
    parts = {piece: piece for piece in vocab.keys() - set(never)}
    found = []
    for piece, score in scores.items():
        if len(piece) > MOST_MERGED or piece in never:
            continue
        pairs = []
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in parts and right in parts:
                pairs.append((score, cut, len(piece) - cut, parts[left], parts[right]))
        found += sorted(pairs, key=lambda pair: (vocab[pair[3]], vocab[pair[4]]))
    found.sort(key=lambda pair: pair[:3], reverse=True)
    return [[left, right] for *_, left, right in found]


def _added(
    pieces: Sequence[str], types: Sequence[int], special: Collection[str]
) -> list[dict[str, Any]]:
    """Control pieces are special tokens; what a user defined is found in text before all else."""
    added = []
    for number, (piece, kind) in enumerate(zip(pieces, types, strict=True)):
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            entry = added_token(piece, number, special=kind != USER_DEFINED or piece in special)
            added.append({**entry, "normalized": False})
    return added


def _steps(
    pieces: Sequence[str],
    types: Sequence[int],
    kind: str,
    prefix: bool,
    merge_spaces: bool,
    charsmap: bytes,
) -> Spec:
    """The normalizer, pre-tokenizer and decoder."""
    before: list[dict[str, Any]] = []
    if charsmap:
        text = base64.b64encode(charsmap).decode()
        before.append({"type": "Precompiled", "precompiled_charsmap": text})
    if merge_spaces:
        before.append({"type": "Strip", "strip_left": False, "strip_right": True})
        before.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": SPACE})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    pre_tokenizer = None
    if kind == "bpe" and not merge_spaces:
        if prefix:
            before.append({"type": "Prepend", "prepend": SPACE})
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        before.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    else:
        pre_tokenizer = {
            "type": "Metaspace",
            "replacement": SPACE,
            "prepend_scheme": "always" if prefix else "never",
            # Word by word is quicker, and the same unless a piece goes beyond a word.
            "split": not any(SPACE in piece[1:] for piece in pieces),
        }
        if prefix:
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    decoder: dict[str, Any] = {"type": "Sequence", "decoders": decoders}
    if pre_tokenizer is not None and BYTE not in types:
        decoder = dict(pre_tokenizer)
    normalizer = {"type": "Sequence", "normalizers": before} if before else None
    return {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": decoder}
