"""A unigram vocabulary that was trained here, as a specification.

SentencePiece writes a space as `▁`, so a `▁` in a text comes back as a space. Here a piece holds
its spaces as they are, and words are cut as for byte-level BPE. A character without a piece of its
own becomes its UTF-8 bytes, `<0xE7>` and so on. With that every text comes back exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm_from_scratch.text.checks import Spec
from llm_from_scratch.text.formats import added_token
from llm_from_scratch.text.pretokenize import GPT2_PATTERN, PATTERNS

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# A text may hold the letters `<0x41>`: cut so, they are never looked up together.
_NO_BYTE = r"<(?=0x[0-9A-Fa-f]{2}>)"


def unigram_spec(
    pieces: Mapping[str, float],
    *,
    special: Sequence[str],
    unknown: str,
    pattern: str = GPT2_PATTERN,
    byte_fallback: bool = True,
) -> Spec:
    """The spec whose ids are the special tokens, perhaps the 256 bytes, and then the pieces.

    Args:
        pieces: what training found, with log probabilities.
        special: the special tokens; `unknown`, one of them, stands for characters that have no
            piece where there is no `byte_fallback`.
        pattern: the pre-tokenisation.
    """
    first = [*special, *(BYTES if byte_fallback else ())]
    assert not set(special) & {*pieces, *BYTES}
    # No text may prefer these to ordinary pieces.
    lowest = min(pieces.values(), default=0.0)
    steps: list[dict[str, Any]] = [cut(pattern)]
    if byte_fallback and pattern not in PATTERNS.values():
        steps.insert(0, cut(_NO_BYTE))
    parts = [{"type": "ByteFallback"}, {"type": "Fuse"}] if byte_fallback else [{"type": "Fuse"}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(token, number, special=True) for number, token in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": parts},
        "model": {
            "type": "Unigram",
            "unk_id": first.index(unknown),
            "vocab": [[token, lowest] for token in first] + [list(pair) for pair in pieces.items()],
            "byte_fallback": byte_fallback,
        },
    }


def cut(pattern: str) -> dict[str, Any]:
    """A step that cuts a text into what `pattern` matches and what lies between."""
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
