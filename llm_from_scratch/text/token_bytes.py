"""Which bytes of text a token stands for.

Three notations are exact, byte for byte, so that text can be put together from the bytes of its
tokens: GPT-2's letters (`Ġthe` is b" the"); SentencePiece's, with `▁` for a space and `<0xE3>` for
a byte that has no piece of its own; and plain characters. In others (WordPiece) the spaces between
tokens are guessed anew when text is decoded, and the bytes are those of the token alone.
"""

from __future__ import annotations

import re
from typing import Any

from llm_from_scratch.text.checks import Spec
from llm_from_scratch.text.formats import is_byte_level, token_to_bytes

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class TokenBytes:
    """How the tokens of one specification become bytes.

    Attributes:
        exact: whether the text of many tokens is simply the bytes of each, joined.
        strip: how many spaces at the very beginning of a text are not part of it.
        first_space: the replacement sign whose spaces the first token of a text loses, or None.
    """

    def __init__(self, spec: Spec) -> None:
        decoder = spec.get("decoder") or {}
        parts: list[dict[str, Any]] = decoder.get("decoders", [decoder])
        kinds = {part.get("type") for part in parts}
        self.letters = is_byte_level(spec)
        self.exact = self.letters or _is_exact(parts)
        self.byte_fallback = "ByteFallback" in kinds
        self.replace: list[tuple[str, str]] = []
        self.prefix = self.suffix = ""
        self.strip = 0
        self.first_space: str | None = None
        if self.letters:
            return
        for part in parts:
            if part.get("type") == "Replace" and "String" in part["pattern"]:
                self.replace.append((part["pattern"]["String"], part["content"]))
            elif part.get("type") == "Strip":
                self.strip += part["start"]
            elif part.get("type") == "Metaspace":
                self.replace.append((part["replacement"], " "))
                default = "always" if part.get("add_prefix_space", True) else "never"
                if part.get("prepend_scheme", default) != "never":
                    self.first_space = part["replacement"]
            elif part.get("type") == "WordPiece":
                self.prefix = part["prefix"]
            elif part.get("type") == "BPEDecoder":
                self.suffix = part["suffix"]

    def __call__(self, token: str, *, first: bool = False) -> bytes:
        """The bytes of a token of the vocabulary; `first`: it begins the text."""
        if self.letters:
            data = token_to_bytes(token)
            return token.encode() if data is None else data
        if self.byte_fallback and (match := BYTE_TOKEN.match(token)):
            return bytes([int(match[1], 16)])
        if self.prefix and token.startswith(self.prefix):
            token = token[len(self.prefix) :]
        if self.suffix and token.endswith(self.suffix):
            token = token[: -len(self.suffix)] + " "
        if first and self.first_space:
            token = token.replace(self.first_space, "")
        for old, new in self.replace:
            token = token.replace(old, new)
        return token.encode()


def _is_exact(parts: list[dict[str, Any]]) -> bool:
    """Whether these decoders do no more than join, replace `▁`, and strip at the beginning."""
    kinds = [part.get("type") for part in parts]
    if kinds == ["Metaspace"]:
        return True
    return "Fuse" in kinds and all(
        part.get("type") in ("Fuse", "ByteFallback")
        or (part.get("type") == "Replace" and "String" in part["pattern"])
        or (part.get("type") == "Strip" and part["content"] == " " and not part["stop"])
        for part in parts
    )
