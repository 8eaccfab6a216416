"""Unigram: the lattice beside enumeration, the trainer beside its naive twin, exact round trips."""

from __future__ import annotations

import gzip
import io
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text import unigram, unigram_lattice
from llm_from_scratch.text.encoder import ReadableEncoder
from llm_from_scratch.text.pretokenize import frequent
from llm_from_scratch.text.stream import StreamDecoder
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer
from llm_from_scratch.text.unigram_lattice import Lattice, _Trainer, train_unigram
from llm_from_scratch.text.unigram_spec import BYTES

ENGLISH = "The cat sat on the mat; the other cats' mat was flat. I'm sure that's that.\n" * 5
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたか見当がつかぬ。コーヒーを飲む。\n" * 5
words = st.dictionaries(
    st.text(alphabet="aab", min_size=1, max_size=9) | st.text(alphabet="abcあ", min_size=1),
    st.integers(1, 4),
    min_size=1,
    max_size=8,
)


@st.composite
def lattices(draw: st.DrawFn) -> tuple[str, dict[str, float]]:
    """A word and scored pieces that can express it."""
    word = draw(st.text(alphabet="abc", min_size=1, max_size=8))
    inside = sorted({word[i:j] for i in range(len(word)) for j in range(i + 1, len(word) + 1)})
    more = draw(st.lists(st.sampled_from(inside)))
    pieces = dict.fromkeys([*word, *more])
    return word, {p: draw(st.floats(-9, -0.1)) for p in pieces}


# ------------------------------------------------------------------------- the model


@given(lattices())
def test_forward_and_backward_sum_over_all_cuts(case):
    word, scores = case
    total, expected = unigram.expected_by_enumeration(word, scores)
    quick_total, quick = unigram.forward_backward(word, scores)
    assert quick_total == pytest.approx(total)
    assert quick == pytest.approx(expected)
    # Whatever the cut, its pieces make up the word.
    assert sum(len(piece) * times for piece, times in quick.items()) == pytest.approx(len(word))


@given(lattices())
def test_viterbi_finds_the_best_of_all_cuts(case):
    word, scores = case
    best = max(sum(scores[p] for p in cut) for cut in unigram.segmentations(word, scores))
    found = unigram.viterbi(word, scores)
    assert "".join(found) == word
    assert sum(scores[piece] for piece in found) == pytest.approx(best)


def test_unknown_characters_come_out_as_one():
    scores = {"a": -1.0, "ab": -1.5}
    found = unigram.viterbi("xyabzb", scores, longest=2, unknown=-20.0)
    assert found == ["xy", "ab", "zb"]


@pytest.mark.parametrize("x", [0.01, 0.5, 1.0, 3.7, 42.0, 1e9])
def test_digamma(x: float):
    expected = torch.special.digamma(torch.tensor(x, dtype=torch.float64)).item()
    assert unigram.digamma(x) == pytest.approx(expected, rel=1e-7)
    assert unigram_lattice.digamma(np.array([x]))[0] == pytest.approx(expected, rel=1e-7)


def test_substrings_leave_out_what_always_goes_on():
    found = unigram.substrings({"nation": 3, "national": 2, "at": 4})
    assert found["nation"] == 5
    assert "natio" not in found  # always goes on to "nation"
    assert found["at"] == 9
    assert "national" in found
    assert "nationa" not in found
    assert "l" in unigram.substrings({"l": 1})  # a character always stays


# ------------------------------------------------------------------------- the quick trainer


def trainer_of(corpus: dict[str, int], min_count: int = 2) -> tuple[_Trainer, list[str]]:
    trainer = _Trainer(corpus, min_count)
    spans = zip(trainer.example, trainer.length, strict=True)
    return trainer, [trainer.string[start : start + length] for start, length in spans]


@settings(max_examples=200)
@given(words, st.integers(1, 3))
def test_it_begins_with_the_substrings_of_the_naive_one(corpus, min_count):
    trainer, pieces = trainer_of(corpus, min_count)
    counts = unigram.substrings(corpus, min_count)
    assert pieces == sorted(counts, key=lambda piece: (len(piece), piece))
    total = sum(counts.values())
    assert trainer.scores == pytest.approx([math.log(counts[p] / total) for p in pieces])


@settings(max_examples=200)
@given(words)
def test_its_expectations_are_those_of_the_definition(corpus):
    trainer, pieces = trainer_of(corpus)
    scores = dict(zip(pieces, trainer.scores.tolist(), strict=True))
    expected = Counter(dict.fromkeys(pieces, 0.0))
    for word, count in corpus.items():
        for piece, times in unigram.forward_backward(word, scores)[1].items():
            expected[piece] += count * times
    found = trainer.corpus.expected(trainer.scores, trainer.times)
    assert dict(zip(pieces, found, strict=True)) == pytest.approx(dict(expected))


@settings(max_examples=200)
@given(words)
def test_its_losses_are_those_of_the_definition(corpus):
    trainer, pieces = trainer_of(corpus)
    # Distinct scores: of cuts that are equally good sums in another order may choose another.
    trainer.scores = trainer.scores - np.linspace(0, 0.1, len(pieces)) ** 2
    scores = dict(zip(pieces, trainer.scores.tolist(), strict=True))
    counts: Counter[str] = Counter(dict.fromkeys(pieces, 0))
    for word, count in corpus.items():
        for piece in unigram.viterbi(word, scores):
            counts[piece] += count
    losses = {}
    for piece in pieces:
        others = {p: s for p, s in scores.items() if p != piece}
        instead = unigram.viterbi(piece, others) if len(piece) > 1 else []
        losses[piece] = unigram.loss(counts[piece], [counts[p] for p in instead], counts.total())
    found = dict(zip(pieces, trainer.losses().tolist(), strict=True))
    assert found == pytest.approx(losses, abs=2e-6)


ZEN = """Beautiful is better than ugly. Explicit is better than implicit. Simple is better than
complex. Complex is better than complicated. Flat is better than nested. Sparse is better than
dense. Readability counts. Special cases aren't special enough to break the rules. Although
practicality beats purity. Errors should never pass silently. Unless explicitly silenced. In the
face of ambiguity, refuse the temptation to guess. There should be one-- and preferably only one
--obvious way to do it. 吾輩は猫である。名前はまだ無い。名前は猫である。"""


@pytest.mark.parametrize("size", [55, 70, 120, 1000])
def test_it_finds_the_vocabulary_of_the_naive_one(size: int):
    corpus = Counter(ZEN.split())
    naive = unigram.train_naive(corpus, size)
    quick = train_unigram(corpus, size)
    assert quick == pytest.approx(naive, abs=2e-6)
    assert list(quick.values()) == sorted(quick.values(), reverse=True)
    assert set("".join(corpus)) <= set(quick)
    assert len(quick) == min(size, len(quick))


@settings(max_examples=200)
@given(words, st.integers(4, 20))
def test_and_on_any_corpus(corpus, size):
    size = max(size, len(set("".join(corpus))))
    naive = unigram.train_naive(corpus, size)
    assert train_unigram(corpus, size) == pytest.approx(naive, abs=2e-6)


def test_a_lattice_of_one_path():
    nodes = np.array([0, 1], np.int32)
    edges = np.array([0], np.int32), np.array([1], np.int32), np.array([0], np.int32)
    lattice = Lattice(*edges, nodes[:1], nodes[1:])
    assert lattice.expected(np.array([-3.0]), np.array([7.0])) == pytest.approx([7.0])


def test_long_words_and_large_texts_are_bounded(monkeypatch: pytest.MonkeyPatch):
    cut = unigram_lattice.usable_words({"a" * 600: 2, "b\0c": 1})
    assert cut == {"a" * 256: 4, "a" * 88: 2, "b": 1, "c": 1}
    assert unigram_lattice.usable_words({"abcab": 2, "b": 1}, "ab-]^") == {"ab": 4, "b": 1}
    assert unigram_lattice.usable_words({"xy": 1}, "") == {}
    monkeypatch.setattr(unigram_lattice, "MOST_CHARACTERS", 5)
    corpus = {"aca": 1, "bb": 5, "cc": 3, "d": 2}
    assert unigram_lattice.usable_words(corpus) == {"bb": 5, "cc": 3, "a": 1, "d": 1}


def test_nothing_and_very_little():
    assert train_unigram({}, 10) == {}
    assert list(train_unigram({"a": 1}, 10)) == ["a"]
    assert set(train_unigram({"ab": 5}, 10, without=["ab"])) == {"a", "b"}


def test_progress_counts_up(monkeypatch: pytest.MonkeyPatch):
    said = []
    corpus = Counter((ENGLISH + JAPANESE).split())
    train_unigram(corpus, 40, progress=lambda *what: said.append(what))
    assert {what for what, _, _ in said} == {"finding pieces by their length", "dropping pieces"}
    assert said == sorted(said, key=lambda what: (what[0] == "dropping pieces", what[1]))
    assert all(done <= total for _, done, total in said)


def test_frequent_characters():
    counts = {"a": 90, "b": 9, "c": 1}
    assert frequent(counts, 0.9, 9) == ["a"]
    assert frequent(counts, 0.91, 9) == ["a", "b"]
    assert frequent(counts, 1.0, 9) == ["a", "b", "c"]
    assert frequent(counts, 1.0, 2) == ["a", "b"]


# ------------------------------------------------------------------------- the tokenizer


@pytest.fixture(scope="module", params=["en", "ja", "own"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    own = {"language": "en", "pattern": r"[^\n]{1,40}|\n"}
    how = own if request.param == "own" else {"language": request.param}
    return train_tokenizer([ENGLISH + JAPANESE], kind="unigram", vocab_size=400, **how)


SAMPLES = [
    "The cat's mats, 2023  times!\n\n  \tIndented",
    "吾輩は犬である。😀👨‍👩‍👧 naïve Ångström ｶﾅ \u3000\r\n",
    "▁a ▁ <0x41><0xE3> <0x4> <|endoftext|><|unk|>",
    " leading and trailing ",
    "",
    "\x00\x1f\x85\u2028\ufeff",
]


@pytest.mark.parametrize("text", SAMPLES)
def test_three_encoders_agree_and_text_comes_back(tokenizer: Tokenizer, text: str):
    theirs = FastTokenizer.from_str(json.dumps(tokenizer.spec))
    readable = ReadableEncoder(tokenizer.spec)
    with_special = theirs.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text, special=True) == with_special
    assert readable.encode(text, special=True) == with_special
    ids = tokenizer.encode(text)
    assert ids == readable.encode(text) == tokenizer.encode_batch([text])[0]
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(with_special) == text
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.push, ids)) + stream.flush() == text


UNIGRAM = train_tokenizer([ENGLISH + JAPANESE], kind="unigram", vocab_size=400, language="ja")
OWN = train_tokenizer([ENGLISH + JAPANESE], kind="unigram", vocab_size=400, pattern=r"[^\n]+")
tricky = st.text(max_size=30) | st.lists(
    st.sampled_from(["<", "0x", "<0x41>", ">", "<0xe3", "▁", " ", "cat", "猫", "<|unk|>", "é"])
).map("".join)


@settings(max_examples=300)
@given(tricky)
def test_any_text_comes_back(text: str):
    for tokenizer in (UNIGRAM, OWN):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert ReadableEncoder(tokenizer.spec).encode(text) == tokenizer.encode(text)


def test_sizes_roles_and_order():
    assert UNIGRAM.kind == "unigram"
    assert UNIGRAM.special_tokens == {"<|endoftext|>": 0, "<|unk|>": 1}
    assert (UNIGRAM.eos_id, UNIGRAM.unk_id) == (0, 1)
    assert UNIGRAM.tokens[2:258] == list(BYTES)
    scores = [score for _, score in UNIGRAM.spec["model"]["vocab"]]
    assert scores[258:] == sorted(scores[258:], reverse=True)
    assert scores[:258] == [min(scores)] * 258
    small = train_tokenizer([ENGLISH], kind="unigram", vocab_size=290, special=["<unk>", "</s>"])
    assert (small.vocab_size, small.unk_id, small.eos_id) == (290, 0, 1)


def test_without_bytes_the_unknown_is_lost():
    tokenizer = train_tokenizer([ENGLISH], kind="unigram", vocab_size=35, byte_fallback=False)
    assert tokenizer.vocab_size == 35
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    ids = tokenizer.encode("a猫犬a")
    assert ids.count(tokenizer.unk_id) == 1
    assert ReadableEncoder(tokenizer.spec).encode("a猫犬a") == ids
    assert tokenizer.decode(ids) == "a<|unk|>a"


def test_special_tokens_stay_special_even_when_words_look_like_them():
    tokenizer = train_tokenizer(
        [ENGLISH], kind="unigram", vocab_size=400, special=["cat", "<|endoftext|>", "'"]
    )
    forbidden = set(tokenizer.special_tokens.values())
    for text in ("the cat", "cat cat", "<|endoftext|>", "it's"):
        ids = tokenizer.encode(text)
        assert forbidden.isdisjoint(ids)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("cat", special=True) == [0]


def test_transformers_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size
    for text in SAMPLES:
        ids = tokenizer.encode(text, special=True)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == tokenizer.decode(ids)
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint


def test_asked_wrongly():
    with pytest.raises(UserError, match="needs a vocabulary size"):
        train_tokenizer(["text"], kind="unigram")
    with pytest.raises(UserError, match=r"one piece, <\|unk\|> and 1 special .* need 259"):
        train_tokenizer(["text"], kind="unigram", vocab_size=258)
    with pytest.raises(UserError, match="no text to learn"):
        train_tokenizer([""], kind="unigram", vocab_size=300)
    with pytest.raises(UserError, match="special token '<0x41>' is how a byte is written"):
        train_tokenizer(["text"], kind="unigram", vocab_size=300, special=["<0x41>"])
    with pytest.raises(UserError, match=r"Did you mean 'unigram'"):
        train_tokenizer(["text"], kind="unigrams", vocab_size=300)
    for share in (0, 1.5):
        with pytest.raises(UserError, match=r"character coverage is .*; it must be above 0"):
            train_tokenizer(["text"], kind="unigram", vocab_size=300, character_coverage=share)


def test_japanese_texts_of_real_books(data_dir: Path):
    """Equal ids from the package and the readable twin; held-out text as short as sentencepiece's.

    The whole corpus is measured by benchmarks/unigram_training.py.
    """
    with gzip.open(data_dir / "aozora" / "aozora_clean.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(next(file))["text"][:20000] for _ in range(14)]
    seen, held_out = texts[:12], texts[12:]
    tokenizer = train_tokenizer(seen, kind="unigram", vocab_size=4000, language="ja")
    assert tokenizer.vocab_size == 4000
    readable = ReadableEncoder(tokenizer.spec)
    for text in held_out:
        assert readable.encode(text) == tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [line for text in seen for line in text.split("\n")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=4000, model_type="unigram",
        normalization_rule_name="identity", remove_extra_whitespaces=False, bos_id=-1,
        add_dummy_prefix=False, byte_fallback=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    lines = [line for text in held_out for line in text.split("\n")]
    count = sum(map(len, tokenizer.encode_batch(lines)))
    assert count <= 1.02 * sum(map(len, theirs.encode(lines)))
