"""How near written texts are to the wanted ones: ROUGE, BLEU, chrF and exact match.

ROUGE (Lin 2004) is written out here and equals the package `rouge_score` on English; BLEU (Papineni
et al. 2002) and chrF (Popović 2015) are those of `sacrebleu`, which the extra `eval` brings. Each
figure keeps the scale of its reference implementation: ROUGE and exact match are from 0 to 1, BLEU
and chrF from 0 to 100.

What a word is depends on the language. Japanese has no spaces; its words are MeCab's (extra `ja`).
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.text.mecab import MeCab

METRICS = ("rouge", "bleu", "chrf", "exact_match")
LANGUAGES = ("auto", "en", "ja", "zh", "other")
KANA = "぀-ヿㇰ-ㇿｦ-ﾟ"
HAN = "㐀-䶿一-鿿豈-﫿\U00020000-\U0003ffff"
ENOUGH = 0.2  # the share of kana and Chinese characters from which on a text is Japanese or Chinese
ENGLISH = 0.99  # the share of a-z from which on it is taken for English (German has about 0.98)

Wanted = str | Sequence[str]  # one reference, or several of which the best counts


def language_of(texts: Iterable[str]) -> str:
    """en, ja, zh or other, by the script that the letters of all texts together are of.

    Japanese without any kana (a headline, say) looks Chinese: where it matters, name the language.
    """
    letters = [c for text in texts for c in text if c.isalpha()]
    if not letters:
        return "en"
    joined = "".join(letters)
    kana, han = (len(re.findall(f"[{those}]", joined)) for those in (KANA, HAN))
    if kana + han >= ENOUGH * len(letters):
        return "ja" if kana else "zh"
    ascii_letters = sum(c.isascii() for c in letters)
    return "en" if ascii_letters >= ENGLISH * len(letters) else "other"


def check_names(metrics: Iterable[str], language: str, part: str = "") -> None:
    """`UserError` for unknown metrics and languages; `part` is the settings' one ("seq2seq.")."""
    for name in metrics:
        if name not in METRICS:
            raise UserError(
                f"{part}metrics has '{name}'; there are {', '.join(METRICS)}."
                + nearest(name, METRICS)
            )
    if language not in LANGUAGES:
        raise UserError(
            f"{part}language is '{language}'; there are {', '.join(LANGUAGES)}."
            + nearest(language, LANGUAGES)
        )


def check_packages(metrics: Iterable[str], language: str) -> None:
    """`UserError` for a package that these metrics need in this language, and that is missing."""
    metrics = set(metrics)
    if {"bleu", "chrf"} & metrics:
        _needs("sacrebleu", "BLEU and chrF are computed by", "eval")
    if language == "ja" and {"rouge", "bleu"} & metrics:
        for package in ("fugashi", "unidic_lite"):
            _needs(package, "Japanese words are found by", "ja")


def _needs(package: str, why: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{why} the package '{package}', which is missing: pip install 'scratchlm[{extra}]'"
        )


def words(text: str, language: str) -> list[str]:
    """The words that ROUGE compares, in lower case and without punctuation.

    en: runs of a-z and 0-9, exactly as `rouge_score` (without its stemmer) has them. ja: NFKC, then
    MeCab's words with UniDic. zh: NFKC, each Chinese character a word. other: runs of letters and
    digits of any script.
    """
    if language == "en":
        return re.findall("[a-z0-9]+", text.lower())
    text = unicodedata.normalize("NFKC", text).lower()
    if language == "ja":
        return [word for word in _mecab().words(text) if any(c.isalnum() for c in word)]
    if language == "zh":
        return re.findall(f"[{HAN}]|[^\\W_{HAN}]+", text)
    return re.findall(r"[^\W_]+", text)


@lru_cache(maxsize=1)
def _mecab() -> MeCab:
    return MeCab()


# --- ROUGE ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rouge:
    """Overlap of a text with a reference: of unigrams, of bigrams, of the longest subsequence.

    Each as F1, the harmonic mean of precision (share of the text that the reference has) and
    recall (share of the reference that the text has).
    """

    rouge1: float
    rouge2: float
    rougeL: float


def rouge(got: str, wanted: Wanted, language: str = "en") -> Rouge:
    """ROUGE-1, -2 and -L of a text; with several references the best of each."""
    found = words(got, language)
    scores = [_rouge(found, words(one, language)) for one in _references(wanted)]
    return Rouge(*(max(column) for column in zip(*scores, strict=True)))


def _rouge(got: list[str], wanted: list[str]) -> tuple[float, float, float]:
    shared = [sum((_ngrams(got, n) & _ngrams(wanted, n)).values()) for n in (1, 2)] + [
        longest_common_subsequence(got, wanted)
    ]
    sizes = ((len(got), len(wanted)), (len(got) - 1, len(wanted) - 1), (len(got), len(wanted)))
    one, two, long = (_f1(n, *size) for n, size in zip(shared, sizes, strict=True))
    return one, two, long


def _ngrams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def _f1(shared: int, got: int, wanted: int) -> float:
    """2PR / (P + R), where P = shared / got and R = shared / wanted."""
    return 2 * shared / (got + wanted) if shared else 0.0


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length, by one addition of long integers for each word (Hyyrö 2004).

    Bit i of `row` is 0 where the best length grows at word i of `first`.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    every = (1 << len(first)) - 1
    row = every
    for word in second:
        here = row & places.get(word, 0)
        row = (row + here | row - here) & every
    return len(first) - row.bit_count()


# --- all of them ---------------------------------------------------------------------------------


def exact_match(got: str, wanted: Wanted) -> bool:
    """Whether a text is a reference, after NFKC and with white space made alike."""
    return _plain(got) in {_plain(one) for one in _references(wanted)}


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def text_metrics(
    got: Sequence[str],
    wanted: Sequence[Wanted],
    *,
    language: str = "auto",
    metrics: Iterable[str] = METRICS,
) -> dict[str, float]:
    """Figures of texts beside what was wanted: rouge1, rouge2, rougeL, bleu, chrf, exact_match.

    Args:
        got: the written texts.
        wanted: for each its reference, or several references (every text as many).
        language: one of `LANGUAGES`; "auto" tells by the script of the references.
        metrics: which of `METRICS`; "rouge" gives its three figures.

    ROUGE and exact match are means over the texts (0 to 1); BLEU and chrF (chrF2) count over all
    texts together (0 to 100). BLEU cuts English and others as sacrebleu's `13a` does, Chinese as
    its `zh`; Japanese comes cut by MeCab with UniDic (`language="ja"`), which is not sacrebleu's
    `ja-mecab`, whose dictionary is another: compare such figures among themselves only.
    """
    metrics = tuple(metrics)
    check_names(metrics, language)
    if len(got) != len(wanted) or not got:
        raise UserError(
            f"There are {len(got)} texts and {len(wanted)} references; give one for each, and at "
            "least one."
        )
    references = [_references(one) for one in wanted]
    if language == "auto":
        language = language_of(one for some in references for one in some)
    check_packages(metrics, language)
    figures: dict[str, float] = {}
    if "rouge" in metrics:
        rows = [rouge(a, b, language) for a, b in zip(got, references, strict=True)]
        for name in ("rouge1", "rouge2", "rougeL"):
            figures[name] = sum(getattr(row, name) for row in rows) / len(rows)
    if "bleu" in metrics:
        figures["bleu"] = bleu(got, references, language)
    if "chrf" in metrics:
        figures["chrf"] = chrf(got, references)
    if "exact_match" in metrics:
        hits = sum(exact_match(a, b) for a, b in zip(got, references, strict=True))
        figures["exact_match"] = hits / len(got)
    return figures


def bleu(got: Sequence[str], wanted: Sequence[Wanted], language: str = "en") -> float:
    """Corpus BLEU of sacrebleu (four-grams, brevity penalty, exponential smoothing), 0 to 100."""
    references = _columns(wanted)
    tokenize = {"ja": "none", "zh": "zh"}.get(language, "13a")
    if language == "ja":

        def spaced(texts: Sequence[str]) -> list[str]:
            plain = (unicodedata.normalize("NFKC", text) for text in texts)
            return [" ".join(_mecab().words(text)) for text in plain]

        got, references = spaced(got), [spaced(column) for column in references]
    metric = _sacrebleu().BLEU(tokenize=tokenize, force=True)
    return float(metric.corpus_score(list(got), references).score)


def chrf(got: Sequence[str], wanted: Sequence[Wanted]) -> float:
    """Corpus chrF2 of sacrebleu: character n-grams to length 6, recall twice as heavy; 0 to 100."""
    return float(_sacrebleu().CHRF().corpus_score(list(got), _columns(wanted)).score)


def _sacrebleu() -> Any:
    _needs("sacrebleu", "BLEU and chrF are computed by", "eval")
    return importlib.import_module("sacrebleu.metrics")


def _references(wanted: Wanted) -> list[str]:
    references = [wanted] if isinstance(wanted, str) else list(wanted)
    if not references:
        raise UserError("A text has no reference to be compared with; give at least one.")
    return references


def _columns(wanted: Sequence[Wanted]) -> list[list[str]]:
    """The references as sacrebleu wants them: a list of first ones, one of second ones ..."""
    rows = [_references(one) for one in wanted]
    most = max(map(len, rows))
    # A row with fewer references repeats its last one, which changes neither count nor length.
    return [[row[min(i, len(row) - 1)] for row in rows] for i in range(most)]
