"""Learning a tokenizer from text: what `scratchlm tokenizer train` calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.text.bpe import Merge, Progress, train_indexed
from llm_from_scratch.text.checks import Spec
from llm_from_scratch.text.formats import (
    END_OF_TEXT,
    UNKNOWN,
    bpe_spec,
    char_spec,
    token_to_bytes,
)
from llm_from_scratch.text.pretokenize import (
    alphabet,
    count_words,
    pattern_for,
    special_splitter,
    to_letters,
)
from llm_from_scratch.text.tokenizer import Tokenizer, without_surrogates

KINDS = ("bpe", "char")


def train_tokenizer(
    texts: Iterable[str],
    *,
    kind: str = "bpe",
    vocab_size: int | None = None,
    special: Sequence[str] = (END_OF_TEXT,),
    language: str = "en",
    pattern: str | None = None,
    min_count: int = 2,
    unknown: bool = True,
    progress: Progress | None = None,
) -> Tokenizer:
    """Learn a tokenizer from `texts`, which are read once.

    Args:
        kind: "bpe" (byte-level byte pair encoding) or "char" (one token per character).
        vocab_size: entries in all, special tokens included. A small corpus may yield fewer. For
            "char" it may be left out: then every character that occurs has an entry.
        special: tokens that ordinary text never becomes; they get the lowest ids.
        language: "en" or "ja", the default `pattern` (BPE only).
        pattern: a regular expression of your own that cuts text into words (BPE only).
        min_count: pairs that occur less often are not merged (BPE only).
        unknown: "char" only: reserve `<|unk|>` for characters never seen. Without it the
            vocabulary is one smaller and such a character is an error.
        progress: called as `progress(what, done, total)` while this takes its time.
    """
    special = list(special)
    if repeated := [token for token, count in Counter(special).items() if count > 1]:
        raise UserError(f"The special token '{repeated[0]}' is given twice: give it once.")
    if any(not token for token in special):
        raise UserError("A special token is empty: give every special token some text.")
    texts = (without_surrogates(text) for text in texts)
    if kind == "bpe":
        pattern = pattern or pattern_for(language)
        spec = _train_bpe(texts, vocab_size, special, pattern, min_count, progress)
    elif kind == "char":
        spec = _train_char(texts, vocab_size, special, unknown)
    else:
        raise UserError(
            f"There is no tokenizer kind '{kind}': choose one of {', '.join(KINDS)}."
            f"{nearest(kind, KINDS)}"
        )
    return Tokenizer.from_spec(spec)


def _train_bpe(
    texts: Iterable[str],
    vocab_size: int | None,
    special: list[str],
    pattern: str,
    min_count: int,
    progress: Progress | None,
) -> Spec:
    if vocab_size is None:
        raise UserError("Byte pair encoding needs a vocabulary size: give vocab_size, say 8192.")
    if vocab_size < 256 + len(special):
        raise UserError(
            f"A vocab_size of {vocab_size} is too small: the 256 bytes and {len(special)} special "
            f"tokens alone need {256 + len(special)}."
        )
    words = count_words(texts, pattern=pattern, special=special, progress=progress)
    if not words:
        raise UserError("There is no text to learn a vocabulary from: give files that have some.")
    merges = train_indexed(words, vocab_size - len(special), min_count=min_count, progress=progress)
    return spec_of_merges(merges, pattern=pattern, special=special)


def spec_of_merges(merges: Sequence[Merge], *, pattern: str, special: Sequence[str] = ()) -> Spec:
    """The spec whose ids are the special tokens, the 256 bytes and then what the merges make."""
    tokens = dict.fromkeys(special)
    for byte in alphabet():
        tokens.setdefault(to_letters(bytes([byte])))
    for left, right in merges:
        tokens.setdefault(to_letters(left + right))
    pairs = [(to_letters(left), to_letters(right)) for left, right in merges]
    if len(tokens) < len(special) + 256 + len({left + right for left, right in merges}):
        clash = next(token for token in special if token_to_bytes(token) in _pieces(merges))
        raise UserError(
            f"The special token '{clash}' is also a piece of ordinary words: choose a text that "
            f"no word holds, such as '<|{clash}|>'."
        )
    return bpe_spec(list(tokens), pairs, pattern=pattern, special=special)


def _pieces(merges: Sequence[Merge]) -> set[bytes]:
    return {bytes([byte]) for byte in range(256)} | {left + right for left, right in merges}


def _train_char(
    texts: Iterable[str], vocab_size: int | None, special: list[str], unknown: bool
) -> Spec:
    if unknown and UNKNOWN not in special:
        special = [*special, UNKNOWN]
    split = special_splitter(special)
    counts: Counter[str] = Counter()
    for text in texts:
        for plain in split(text)[::2]:
            counts.update(plain)
    if not counts:
        raise UserError("There is no text to learn a vocabulary from: give files that have some.")
    room = len(counts) if vocab_size is None else vocab_size - len(special)
    if room < 1 or (room < len(counts) and not unknown):
        raise UserError(
            f"A vocab_size of {vocab_size} is too small: the text has {len(counts)} different "
            f"characters, and {len(special)} special tokens come on top."
        )
    frequent = sorted(counts, key=lambda character: (-counts[character], character))[:room]
    return char_spec(sorted(frequent), special, UNKNOWN if unknown else None)
