"""Learning a tokenizer from text: what `scratchlm tokenizer train` calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.text import wordpiece
from llm_from_scratch.text.bpe import Merge, Progress, train_indexed
from llm_from_scratch.text.checks import Spec
from llm_from_scratch.text.formats import (
    END_OF_TEXT,
    ROLE_NAMES,
    UNKNOWN,
    added_token,
    bpe_spec,
    char_spec,
    token_to_bytes,
)
from llm_from_scratch.text.inputs import template
from llm_from_scratch.text.pretokenize import (
    alphabet,
    count_words,
    frequent,
    pattern_for,
    special_splitter,
    to_letters,
)
from llm_from_scratch.text.tokenizer import Tokenizer, without_surrogates
from llm_from_scratch.text.unigram_lattice import train_unigram
from llm_from_scratch.text.unigram_spec import BYTES, cut, unigram_spec
from llm_from_scratch.text.wordpiece_spec import wordpiece_spec

BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# What a vocabulary with BERT's special tokens puts around two texts tells them apart.
SEGMENTS = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
# Where bytes can write the rest, the rarest characters need no entries; in Japanese these are many.
COVERAGE = {("unigram", "en"): 0.9999, ("unigram", "ja"): 0.9995}
# What `progress` counts.
COUNTED = {
    "counting words": "characters",
    "learning merges": "merges",
    "finding pieces by their length": "characters long",
    "dropping pieces": "pieces",
}
NO_TEXT = "There is no text to learn a vocabulary from: give files that have some."


@dataclass(frozen=True)
class _Wishes:
    """The arguments of `train_tokenizer`."""

    vocab_size: int | None
    special: list[str]
    language: str
    pattern: str | None
    min_count: int
    unknown: bool
    character_coverage: float | None
    byte_fallback: bool
    lowercase: bool | None
    progress: Progress | None

    def __post_init__(self) -> None:
        special = self.special
        if repeated := [token for token, count in Counter(special).items() if count > 1]:
            raise UserError(f"The special token '{repeated[0]}' is given twice: give it once.")
        if any(not token for token in special):
            raise UserError("A special token is empty: give every special token some text.")
        if bytes_ := [token for token in special if token in BYTES]:
            raise UserError(
                f"The special token '{bytes_[0]}' is how a byte is written: choose another text."
            )
        if self.min_count < 1:
            raise UserError(f"min_count is {self.min_count}; it must be at least 1.")
        share = self.character_coverage
        if share is not None and not 0 < share <= 1:
            raise UserError(f"The character coverage is {share}; it must be above 0 and at most 1.")

    def coverage(self, kind: str) -> float:
        if self.character_coverage is not None:
            return self.character_coverage
        return COVERAGE.get((kind, self.language), 1.0)

    def room(self, least: int, what: str) -> int:
        """How many entries are left when `least` are taken by `what` and the special tokens."""
        if self.vocab_size is None:
            raise UserError("This kind of tokenizer needs a vocabulary size: give vocab_size.")
        needed = least + len(self.special)
        if self.vocab_size < needed:
            raise UserError(
                f"A vocab_size of {self.vocab_size} is too small: {what} and {len(self.special)} "
                f"special tokens alone need {needed}."
            )
        return self.vocab_size - len(self.special)

    def with_unknown(self) -> tuple[list[str], str]:
        """The special tokens, and which of them stands for the unknown: added if none does."""
        named = [token for token in self.special if token in ROLE_NAMES["unk_token"]]
        return (self.special, named[0]) if named else ([*self.special, UNKNOWN], UNKNOWN)


def train_tokenizer(
    texts: Iterable[str],
    *,
    kind: str = "bpe",
    vocab_size: int | None = None,
    special: Sequence[str] | None = None,
    language: str = "en",
    pattern: str | None = None,
    min_count: int = 2,
    unknown: bool = True,
    character_coverage: float | None = None,
    byte_fallback: bool = True,
    lowercase: bool | None = None,
    progress: Progress | None = None,
) -> Tokenizer:
    """Learn a tokenizer from `texts`, which are read once.

    Args:
        kind: "bpe" (byte-level byte pair encoding), "unigram" (pieces with probabilities),
            "wordpiece" (BERT's) or "char" (one token per character).
        vocab_size: entries in all, special tokens included. A small corpus may yield fewer. For
            "char" it may be left out: then every character that occurs has an entry.
        special: tokens that ordinary text never becomes; they get the lowest ids. By default
            `<|endoftext|>`, for "wordpiece" BERT's five. "unigram" and "wordpiece" need a token
            for the unknown: if none is among them, `<|unk|>` is added.
        language: "en" or "ja": what suits it where `pattern`, `character_coverage` or `lowercase`
            are not given.
        pattern: a regular expression of your own that cuts text into words (not for "char"). For
            "wordpiece" there is none by default: BERT's own rules cut after it.
        min_count: pairs, for "unigram" substrings, that occur less often get no entry.
        unknown: "char" only: reserve `<|unk|>` for characters never seen. Without it the
            vocabulary is one smaller and such a character is an error.
        character_coverage: "unigram" and "wordpiece": the share of the text whose characters get
            entries of their own, which take at most three quarters of the vocabulary. By default
            all, for "unigram" nearly all (0.9999, and 0.9995 for "ja").
        byte_fallback: "unigram" only: 256 entries for bytes, which write every other character.
            Without them it is unknown, and lost.
        lowercase: "wordpiece" only: in lower case and without accents, as BERT's uncased models.
            By default so, except for "ja", whose voicing marks stay in any case.
        progress: called as `progress(what, done, total)` while this takes its time; `COUNTED` names
            what is counted. A total of 0 is not known yet: it is all of the text.
    """
    if kind not in TRAINERS:
        raise UserError(
            f"There is no tokenizer kind '{kind}': choose one of {', '.join(KINDS)}."
            f"{nearest(kind, KINDS)}"
        )
    if special is None:
        special = BERT if kind == "wordpiece" else (END_OF_TEXT,)
    wishes = _Wishes(
        vocab_size, list(special), language, pattern, min_count, unknown, character_coverage,
        byte_fallback, lowercase, progress,
    )  # fmt: skip
    spec = TRAINERS[kind]((without_surrogates(text) for text in texts), wishes)
    return Tokenizer.from_spec(spec, SEGMENTS if spec["post_processor"] else None)


# ------------------------------------------------------------------------- byte pair encoding


def _train_bpe(texts: Iterable[str], wishes: _Wishes) -> Spec:
    pattern = wishes.pattern or pattern_for(wishes.language)
    if wishes.vocab_size is None:
        raise UserError("Byte pair encoding needs a vocabulary size: give vocab_size, say 8192.")
    size = wishes.room(256, "the 256 bytes")
    words = count_words(texts, pattern=pattern, special=wishes.special, progress=wishes.progress)
    if not words:
        raise UserError(NO_TEXT)
    merges = train_indexed(words, size, min_count=wishes.min_count, progress=wishes.progress)
    return spec_of_merges(merges, pattern=pattern, special=wishes.special)


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


# ------------------------------------------------------------------------- the others


def _train_unigram(texts: Iterable[str], wishes: _Wishes) -> Spec:
    pattern = wishes.pattern or pattern_for(wishes.language)
    special, unknown = wishes.with_unknown()
    taken = len(special) - len(wishes.special) + (256 if wishes.byte_fallback else 0)
    what = "the 256 bytes, one piece" if wishes.byte_fallback else "one piece"
    room = wishes.room(taken + 1, what + ", <|unk|>" * (special != wishes.special)) - taken
    words = count_words(texts, pattern=pattern, special=special, progress=wishes.progress)
    if not words:
        raise UserError(NO_TEXT)
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    pieces = train_unigram(
        words,
        room,
        characters=frequent(counts, wishes.coverage("unigram"), max(1, room * 3 // 4)),
        without=[*special, *BYTES],
        min_count=wishes.min_count,
        progress=wishes.progress,
    )
    return unigram_spec(
        pieces,
        special=special,
        unknown=unknown,
        pattern=pattern,
        byte_fallback=wishes.byte_fallback,
    )


def _train_wordpiece(texts: Iterable[str], wishes: _Wishes) -> Spec:
    japanese = wishes.language == "ja"
    special, unknown = wishes.with_unknown()
    taken = len(special) - len(wishes.special)
    room = wishes.room(taken + 1, "one piece" + ", <|unk|>" * taken) - taken
    lowercase = not japanese if wishes.lowercase is None else wishes.lowercase
    accents = lowercase and not japanese  # for them が is か with an accent
    words = wordpiece.count_words(
        texts,
        special=special,
        pattern=wishes.pattern,
        lowercase=lowercase,
        strip_accents=accents,
        progress=wishes.progress,
    )
    if not words:
        raise UserError(NO_TEXT)
    pieces = wordpiece.train_wordpiece(
        words,
        room,
        coverage=wishes.coverage("wordpiece"),
        min_count=wishes.min_count,
        progress=wishes.progress,
    )
    vocab = {token: number for number, token in enumerate(dict.fromkeys([*special, *pieces]))}
    spec = wordpiece_spec(vocab, unknown=unknown, lowercase=lowercase, strip_accents=accents)
    spec["added_tokens"] = [added_token(token, vocab[token], special=True) for token in special]
    if wishes.pattern:
        steps = [cut(wishes.pattern), spec["pre_tokenizer"]]
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    if "[CLS]" in special and "[SEP]" in special:
        roles = {"cls": "[CLS]", "sep": "[SEP]"}
        spec["post_processor"] = template("cls A sep", "cls A sep B sep", roles, vocab, True)
    return spec


def _train_char(texts: Iterable[str], wishes: _Wishes) -> Spec:
    special, unknown = list(wishes.special), wishes.unknown
    if unknown and UNKNOWN not in special:
        special = [*special, UNKNOWN]
    split = special_splitter(special)
    counts: Counter[str] = Counter()
    for text in texts:
        for plain in split(text)[::2]:
            counts.update(plain)
    if not counts:
        raise UserError(NO_TEXT)
    size = wishes.vocab_size
    room = len(counts) if size is None else size - len(special)
    if room < 1 or (room < len(counts) and not unknown):
        raise UserError(
            f"A vocab_size of {size} is too small: the text has {len(counts)} different "
            f"characters, and {len(special)} special tokens come on top."
        )
    most = sorted(counts, key=lambda character: (-counts[character], character))[:room]
    return char_spec(sorted(most), special, UNKNOWN if unknown else None)


TRAINERS: dict[str, Callable[[Iterable[str], _Wishes], Spec]] = {
    "bpe": _train_bpe,
    "unigram": _train_unigram,
    "wordpiece": _train_wordpiece,
    "char": _train_char,
}
KINDS = tuple(TRAINERS)
