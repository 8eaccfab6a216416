"""The merges: exactly the reference's, and the same from the trainer to read and the one to use."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers, trainers

from llm_from_scratch.text import bpe
from llm_from_scratch.text.pretokenize import alphabet, count_words, from_letters, to_letters
from llm_from_scratch.text.training import train_tokenizer

# Few letters, so that runs, overlaps, ties and merges with equal bytes are the rule.
words = st.dictionaries(
    st.text(alphabet="aab", min_size=1, max_size=12)
    | st.text(alphabet="abcあ\x00ÿ", min_size=1, max_size=8),
    st.integers(1, 4),
    max_size=8,
)


@settings(max_examples=1000)
@given(words, st.integers(256, 290), st.integers(0, 3))
def test_the_indexed_trainer_finds_the_merges_of_the_naive_one(corpus, size, min_count):
    naive = bpe.train_naive(corpus, size, min_count=min_count)
    assert bpe.train_indexed(corpus, size, min_count=min_count) == naive


def test_the_reference_merges_come_out_exactly(data_dir: Path):
    folder = data_dir / "bpe-reference"
    lines = (folder / "train-bpe-reference-merges.txt").read_text("utf-8").splitlines()
    reference = [tuple(map(from_letters, line.split(" "))) for line in lines]
    text = (folder / "corpus.en").read_text("utf-8")
    counts = count_words([text], special=["<|endoftext|>"])
    assert bpe.train_indexed(counts, 499) == reference
    assert len(reference) == 243

    vocabulary = json.loads((folder / "train-bpe-reference-vocab.json").read_text("utf-8"))
    tokenizer = train_tokenizer([text], vocab_size=500)
    assert tokenizer.spec["model"]["vocab"] == vocabulary


def test_ties_go_to_the_greater_pair():
    assert bpe.train_indexed({"ab": 2, "cd": 2, "ca": 2}, 258) == [(b"c", b"d"), (b"c", b"a")]
    # The left parts decide first, and a longer token is greater than its own beginning.
    assert bpe.train_indexed({"abx": 3, "ax": 3, "ab": 2}, 259) == [
        (b"a", b"b"),
        (b"ab", b"x"),
        (b"a", b"x"),
    ]


def test_runs_merge_from_left_to_right():
    assert bpe.merge_pair([b"a"] * 5, (b"a", b"a")) == [b"aa", b"aa", b"a"]
    merges = bpe.train_indexed({"aaaaa": 2}, 300)
    assert merges[:2] == [(b"a", b"a"), (b"aa", b"aa")]


def test_equal_bytes_share_one_entry():
    corpus = {"aaaaaaa": 5, "aaa": 9, "aaaa": 3}
    merges = bpe.train_indexed(corpus, 262)
    made = Counter(left + right for left, right in merges)
    assert 256 + len(made) <= 262
    assert merges == bpe.train_naive(corpus, 262)


def test_nothing_to_merge():
    assert bpe.train_indexed({}, 300) == []
    assert bpe.train_indexed({"a": 7}, 300) == []
    assert bpe.train_indexed({"ab": 1}, 300) == []
    assert bpe.train_indexed({"ab": 1}, 300, min_count=1) == [(b"a", b"b")]
    assert bpe.train_indexed({"ab": 9}, 256) == []


def test_counts_beyond_32_bits():
    corpus = {"ab": 2**33, "abc": 2**40, "bc": 5}
    assert bpe.train_indexed(corpus, 300) == bpe.train_naive(corpus, 300)


def test_progress_counts_up_to_the_size_asked_for(monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(bpe.time, "monotonic", lambda: next(clock))
    said = []
    bpe.train_indexed({"hello": 3, "help": 2}, 260, progress=lambda *what: said.append(what))
    assert said
    assert all(what == "learning merges" and done <= total == 4 for what, done, total in said)
    assert all(a[1] <= b[1] for a, b in pairwise(said))


@given(st.text(alphabet="abcd", min_size=1, max_size=30))
def test_encoding_a_training_word_replays_its_merges(word):
    corpus = {word: 2, "abcabcd": 3, "ddcba": 2}
    merges = bpe.train_naive(corpus, 280)
    symbols = [bytes([byte]) for byte in word.encode()]
    for merge in merges:
        symbols = bpe.merge_pair(symbols, merge)
    ranks = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge, rank)
    assert bpe.encode_word(word.encode(), ranks) == symbols


@pytest.mark.parametrize("language", ["en", "ja"])
def test_as_few_tokens_as_the_tokenizers_package(data_dir: Path, language: str):
    """Other ties, other merges; but equally short texts."""
    with gzip.open(data_dir / "aozora" / "aozora_clean.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(next(file))["text"][:10000] for _ in range(12)]
    ours = train_tokenizer(texts, vocab_size=800, language=language)
    theirs = FastTokenizer(models.BPE())
    theirs.pre_tokenizer = ours._plain.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        min_frequency=2,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(texts, trainer)
    assert theirs.get_vocab_size() == ours.vocab_size == 800
    count_ours = sum(map(len, ours.encode_batch(texts)))
    count_theirs = sum(len(one.ids) for one in theirs.encode_batch(texts))
    assert abs(count_ours / count_theirs - 1) < 0.01


def test_the_byte_order_is_that_of_gpt2():
    letters = [to_letters(bytes([byte])) for byte in alphabet()]
    assert letters[:3] == ["!", '"', "#"]
    assert letters[-1] == "Ń"
    assert letters[220] == "Ġ"
