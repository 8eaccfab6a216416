"""WordPiece vocabularies (BERT) as a specification, and the `vocab.txt` they come in.

A WordPiece vocabulary has the beginnings of words as they are and what goes on marked with `##`;
a word is cut greedily, the longest piece first, and one that cannot be cut is unknown as a whole.
Papers: Schuster & Nakajima 2012; Devlin et al. 2019, arXiv:1810.04805.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.checks import REMEDY, Spec

CONTINUES = "##"


def wordpiece_spec(
    vocab: Mapping[str, int],
    *,
    unknown: str = "[UNK]",
    lowercase: bool = True,
    strip_accents: bool | None = None,
    chinese_apart: bool = True,
) -> Spec:
    """The spec of a WordPiece tokenizer that cuts text into words as BERT does.

    Args:
        vocab: tokens and ids; `unknown` stands for every word that it cannot express.
        lowercase: text becomes lower case; with it go the accents, unless `strip_accents` says
            otherwise.
        chinese_apart: every Chinese character (kanji, too) is a word of its own.
    """
    if unknown not in vocab:
        raise UserError(
            f"The vocabulary has no token '{unknown}' for unknown words: add it, or name the one "
            "it has as 'unk_token'."
        )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": chinese_apart,
            "strip_accents": strip_accents,
            "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": CONTINUES, "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": unknown,
            "continuing_subword_prefix": CONTINUES,
            "max_input_chars_per_word": 100,
            "vocab": dict(vocab),
        },
    }


def read_vocab_txt(path: Path) -> dict[str, int]:
    """Tokens and ids of a `vocab.txt`: a token a line, its id being the line's place from 0."""
    try:
        # Only "\n" ends a line: vocabularies hold other separators as tokens.
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); {REMEDY}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {REMEDY}.") from error
    if lines[-1] == "":
        lines.pop()
    vocab = {line.removesuffix("\r"): number for number, line in enumerate(lines)}
    if not vocab:
        raise UserError(f"{path} is empty; {REMEDY}.")
    return vocab


def write_vocab_txt(tokens: list[str | None]) -> str:
    """The content of a `vocab.txt`; an id without a token gets a name that no text has."""
    lines = [f"[unused{i}]" if token is None else token for i, token in enumerate(tokens)]
    if bad := [token for token in lines if "\n" in token or "\r" in token]:
        raise UserError(
            f"The token {bad[0]!r} holds a line end, which a vocab.txt cannot express: leave it "
            "out."
        )
    return "".join(f"{line}\n" for line in lines)
