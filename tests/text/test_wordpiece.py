"""WordPiece: the trainer beside its naive twin, BERT's rules and the encoder beside the package."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text import wordpiece
from llm_from_scratch.text.encoder import ReadableEncoder
from llm_from_scratch.text.pretokenize import JAPANESE_PATTERN
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer

TEXT = (
    """The cat sat on the mat, the other cats' mat was flat. I'm sure that's that. Café NAÏVE!
吾輩は猫である。名前はまだ無い。どこで生れたか見当がつかぬ。コーヒーを飲む。\n"""
    * 5
)
words = st.dictionaries(
    st.text(alphabet="aab", min_size=1, max_size=9) | st.text(alphabet="abcあ", min_size=1),
    st.integers(1, 4),
    min_size=1,
    max_size=8,
)
# Blocks that Unicode 8 has whole, which is how far the package's own tables go.
blocks = [(0, 0x2FF), (0x370, 0x3FF), (0x400, 0x52F), (0x5D0, 0x5EA), (0x900, 0x970)]
blocks += [(0x1E00, 0x1FFF), (0x2000, 0x206F), (0x20A0, 0x20BE), (0x2200, 0x22FF)]
blocks += [(0x3000, 0x30FF), (0x3400, 0x3410), (0x4E00, 0x4E20), (0xAC00, 0xAC20)]
blocks += [(0xF900, 0xF910), (0xFF00, 0xFFEF), (0x1F600, 0x1F64F), (0x20000, 0x20010)]
characters = st.one_of(
    [
        st.characters(min_codepoint=a, max_codepoint=b, exclude_categories=("Cn", "Cs"))
        for a, b in blocks
    ]
)


# ------------------------------------------------------------------------- training


@settings(max_examples=300)
@given(words, st.integers(1, 40), st.integers(1, 3))
def test_the_indexed_trainer_finds_the_pieces_of_the_naive_one(corpus, size, min_count):
    least = len(wordpiece.train_naive(corpus, 0))
    size = max(size, -(-least * 4 // 3))  # room for all characters
    naive = wordpiece.train_naive(corpus, size, min_count=min_count)
    assert wordpiece.train_wordpiece(corpus, size, min_count=min_count) == naive


def test_pieces_of_a_few_words():
    corpus = {"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5}
    pieces = wordpiece.train_naive(corpus, 10)
    assert pieces == ["b", "h", "p", "##g", "##n", "##s", "##u", "##ug", "##un", "hug"]
    # The example of the literature: by the quotient the first pair is a rare one.
    assert wordpiece.train_naive(corpus, 8, score=wordpiece.by_ratio)[7:] == ["##gs"]


def test_the_quotient_fills_the_vocabulary_with_rare_pairs():
    corpus = Counter(wordpiece.words_of(wordpiece.normalize(TEXT + "qx qxj zkw qj " * 2)))
    size = len(wordpiece.train_naive(corpus, 0)) + 12
    by_count = set(wordpiece.train_naive(corpus, size))
    by_ratio = set(wordpiece.train_naive(corpus, size, score=wordpiece.by_ratio))
    length = {
        name: sum(len(wordpiece.encode_word(w, v) or []) * n for w, n in corpus.items())
        for name, v in (("count", by_count), ("ratio", by_ratio))
    }
    assert length["count"] < 0.9 * length["ratio"]


def test_rare_characters_give_way():
    corpus = {"ab": 50, "ba": 50, "zq": 1, "aq": 1}
    assert "z" in wordpiece.train_wordpiece(corpus, 100)
    pieces = wordpiece.train_wordpiece(corpus, 100, coverage=0.97)
    assert set(pieces) == {"a", "b", "##a", "##b", "ab", "ba"}
    assert len(wordpiece.train_wordpiece(corpus, 4)) == 4  # three characters and a pair


# ------------------------------------------------------------------------- BERT's rules


@settings(max_examples=300)
@given(
    st.text(alphabet=characters, max_size=20),
    st.booleans(),
    st.sampled_from([None, True, False]),
    st.booleans(),
    st.booleans(),
)
def test_text_is_normalised_and_cut_as_by_the_package(text, clean, accents, lowercase, apart):
    theirs = normalizers.BertNormalizer(
        clean_text=clean,
        handle_chinese_chars=apart,
        strip_accents=accents,
        lowercase=lowercase,
    )
    ours = wordpiece.normalize(
        text, clean=clean, chinese_apart=apart, strip_accents=accents, lowercase=lowercase
    )
    assert ours == theirs.normalize_str(text)
    cut = [word for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(ours)]
    assert wordpiece.words_of(ours) == cut


def test_the_rules_in_an_example():
    assert wordpiece.normalize("Héllo\u200b\tΣΑΣ が東京") == "hello σασ か 東  京 "
    assert wordpiece.normalize("が É", lowercase=False) == "が É"
    assert wordpiece.words_of("don't pay $5.") == ["don", "'", "t", "pay", "$", "5", "."]
    found = wordpiece.count_words(["名前はまだ無い<x>無い"], special=["<x>"], chinese_apart=False)
    assert found == {"名前はまた無い": 1, "無い": 1}
    found = wordpiece.count_words(["名前はまだ"], pattern=JAPANESE_PATTERN, lowercase=False)
    assert found == {"名": 1, "前": 1, "はまだ": 1}


# ------------------------------------------------------------------------- the encoder


def test_the_longest_piece_first():
    vocab = {"un", "##aff", "##able", "##a", "una"}
    assert wordpiece.encode_word("unaffable", vocab) is None  # "una", then no "##ffable"
    assert wordpiece.encode_word("unaffable", vocab - {"una"}) == ["un", "##aff", "##able"]
    assert wordpiece.encode_word("un" * 51, {"un", "##un"}) is None
    assert wordpiece.encode_word("", vocab) == []


@pytest.fixture(scope="module", params=["en", "ja", "own"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    how = {"language": "ja", "pattern": JAPANESE_PATTERN, "special": ["cat", "<unk>"]}
    how = how if request.param == "own" else {"language": request.param}
    return train_tokenizer([TEXT], kind="wordpiece", vocab_size=95, **how)


SAMPLES = [
    "The cat's mats, 2023  times!\n\n  \tIndented",
    "吾輩は犬である。😀👨‍👩‍👧 naïve Ångström ｶﾅ \u3000\r\n",
    "[CLS] cat [SEP][UNK] <unk>",
    "",
    "\x00\x1f\x85\u2028\ufeff",
    "a" * 101,
]


@pytest.mark.parametrize("text", SAMPLES)
def test_three_encoders_agree(tokenizer: Tokenizer, text: str):
    theirs = FastTokenizer.from_str(json.dumps(tokenizer.spec))
    readable = ReadableEncoder(tokenizer.spec)
    with_special = theirs.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text, special=True) == with_special
    assert readable.encode(text, special=True) == with_special
    ids = tokenizer.encode(text)
    assert ids == readable.encode(text) == tokenizer.encode_batch([text])[0]
    special = set(tokenizer.special_tokens.values()) - {tokenizer.unk_id}
    assert special.isdisjoint(ids)


WORDPIECE = train_tokenizer([TEXT], kind="wordpiece", vocab_size=95)
READABLE = ReadableEncoder(WORDPIECE.spec)


@given(st.text(alphabet=st.one_of(characters, st.sampled_from("the cat mat")), max_size=40))
def test_the_readable_encoder_gives_the_packages_ids(text: str):
    assert READABLE.encode(text) == WORDPIECE.encode(text)


def test_what_comes_back():
    """Case, accents and spaces are gone, unknown words too; the rest is the words joined."""
    ids = WORDPIECE.encode("The  Cat sat on the naïve mat, 無い。")
    assert WORDPIECE.decode(ids) == "the cat sat on the naive mat, 無 い 。"
    assert WORDPIECE.encode("ξ the") == [WORDPIECE.unk_id, WORDPIECE.token_id("the")]


def test_sizes_and_roles():
    assert WORDPIECE.kind == "wordpiece"
    assert WORDPIECE.vocab_size == 95
    names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    assert WORDPIECE.special_tokens == {name: i for i, name in enumerate(names)}
    assert (WORDPIECE.pad_id, WORDPIECE.unk_id) == (0, 1)
    plain = train_tokenizer([TEXT], kind="wordpiece", vocab_size=95, special=["<|endoftext|>"])
    assert plain.special_tokens == {"<|endoftext|>": 0, "<|unk|>": 1}
    assert (plain.eos_id, plain.unk_id, plain.vocab_size) == (0, 1, 95)


def test_transformers_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size
    for text in SAMPLES:
        ids = tokenizer.encode(text, special=True)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == tokenizer.decode(ids)
    if "[CLS]" in tokenizer.special_tokens:
        ids = theirs("cat", "mat")["input_ids"]
        marks = [tokenizer.special_tokens[name] for name in ("[CLS]", "[SEP]", "[SEP]")]
        assert ids == [marks[0], *tokenizer.encode("cat"), marks[1], *tokenizer.encode("mat"), 3]
        assert theirs("cat", "mat")["token_type_ids"][-1] == 1


def test_lower_case_and_accents_as_asked():
    for language, lowercase, expected in (
        ("en", None, "cafe か"),
        ("ja", None, "Café が"),
        ("ja", True, "café が"),
        ("en", False, "Café が"),
    ):
        made = train_tokenizer(
            ["Café が\n" * 9], kind="wordpiece", vocab_size=60, language=language,
            lowercase=lowercase,
        )  # fmt: skip
        assert made.decode(made.encode("Café が")) == expected


def test_asked_wrongly():
    with pytest.raises(UserError, match="needs a vocabulary size"):
        train_tokenizer(["text"], kind="wordpiece")
    with pytest.raises(UserError, match="one piece and 5 special tokens alone need 6"):
        train_tokenizer(["text"], kind="wordpiece", vocab_size=5)
    with pytest.raises(UserError, match="no text to learn"):
        train_tokenizer(["\x00 \n"], kind="wordpiece", vocab_size=300)
