"""`Tokenizer`: ids and text, special tokens, adding, and what `transformers` makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.encoder import ReadableEncoder, explain_word
from llm_from_scratch.text.formats import added_token
from llm_from_scratch.text.tokenizer import END_OF_TURN, Tokenizer
from llm_from_scratch.text.training import train_tokenizer

ENGLISH = "The cat sat on the mat; the other cats' mat was flat. I'm sure that's that.\n" * 5
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたか見当がつかぬ。コーヒーを飲む。\n" * 5
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SAMPLES = [
    "The cat's mats, 2023  times!\n\n  \tIndented",
    "吾輩は犬である。😀👨‍👩‍👧 naïve Ångström ｶﾅ \u3000\r\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    " leading and trailing ",
    "",
    "\x00\x1f\x85\u2028\ufeff",
]


def make(kind: str, language: str = "en", **more) -> Tokenizer:
    size = {"vocab_size": 340} if kind == "bpe" else {}
    return train_tokenizer(
        [ENGLISH + JAPANESE], kind=kind, language=language, special=SPECIAL, **size, **more
    )


@pytest.fixture(scope="module", params=["bpe-en", "bpe-ja", "char"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    kind, _, language = request.param.partition("-")
    return make(kind, language or "en")


def test_sizes_and_roles(tokenizer: Tokenizer):
    assert tokenizer.special_tokens["<|endoftext|>"] == tokenizer.eos_id == tokenizer.bos_id == 0
    assert len(tokenizer) == tokenizer.vocab_size == len(set(tokenizer.tokens))
    assert tokenizer.pad_id is None
    if tokenizer.kind == "char":
        assert tokenizer.unk_id == tokenizer.special_tokens["<|unk|>"] == 3
    else:
        assert tokenizer.vocab_size == 340
        assert tokenizer.unk_id is None


@pytest.mark.parametrize("text", SAMPLES)
def test_three_encoders_agree(tokenizer: Tokenizer, text: str):
    theirs = FastTokenizer.from_str(json.dumps(tokenizer.spec))
    readable = ReadableEncoder(tokenizer.spec)
    with_special = theirs.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text, special=True) == with_special
    assert readable.encode(text, special=True) == with_special
    assert tokenizer.encode(text) == readable.encode(text) == tokenizer.encode_batch([text])[0]
    if tokenizer.kind == "bpe":
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(with_special) == theirs.decode(with_special, False) == text


BPE = make("bpe")
READABLE = ReadableEncoder(BPE.spec)


@given(st.text(max_size=30))
def test_any_text_comes_back(text: str):
    assert BPE.decode(BPE.encode(text)) == text
    assert READABLE.encode(text) == BPE.encode(text)


def test_a_users_text_never_becomes_a_special_token(tokenizer: Tokenizer):
    forbidden = {tokenizer.special_tokens[token] for token in SPECIAL}
    for text in ("<|endoftext|>", "a<|im_end|><|im_start|>b"):
        ids = tokenizer.encode(text)
        assert forbidden.isdisjoint(ids)
        assert forbidden.isdisjoint(tokenizer.encode_batch([text])[0])
        if tokenizer.kind == "bpe":
            assert tokenizer.decode(ids) == text
        assert forbidden & set(tokenizer.encode(text, special=True))


def unigram_spec() -> dict:
    pieces = [["<unk>", 0.0], ["</s>", 0.0], ["▁", -2.0], ["<", -3.0], ["/", -3.0], ["s", -3.0]]
    pieces += [[">", -3.0], ["▁s", -2.5], ["あ", -3.0]]
    return {
        "version": "1.0",
        "truncation": {"max_length": 3, "stride": 0, "strategy": "LongestFirst"},
        "padding": None,
        "added_tokens": [
            added_token("<unk>", 0, special=True),
            added_token("</s>", 1, special=True),
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        "post_processor": None,
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces},
    }


def test_not_even_where_the_model_knows_it_as_a_piece():
    tokenizer = Tokenizer.from_spec(unigram_spec())
    assert tokenizer.kind == "unigram"
    assert tokenizer._plain.encode("s</s>").ids == [7, 1]  # what the package would do
    ids = tokenizer.encode("s</s>")  # nor is the text cut to 3 tokens, as the file says
    assert [tokenizer.tokens[i] for i in ids] == ["▁s", "<", "/", "s", ">"]
    assert tokenizer.encode_batch(["s</s>"]) == [ids]
    assert tokenizer.decode(ids) == "s</s>"
    assert tokenizer.encode("s</s>", special=True) == [7, 1]
    assert tokenizer.encode("sx") == [7, 0]  # an unknown character stays unknown
    assert tokenizer.token_bytes(7) == b" s"


def test_adding_tokens_survives_saving_and_transformers(tokenizer: Tokenizer, tmp_path: Path):
    from transformers import AutoTokenizer

    grown = Tokenizer.from_spec(tokenizer.spec, tokenizer.config)
    size = grown.vocab_size
    assert grown.add_tokens(["<|tool|>", "<|im_end|>"], special=True) == 1
    assert grown.add_tokens(["the cat", "吾輩は", "the cat", "naïve"]) == 3
    assert grown.vocab_size == size + 4
    assert grown.special_tokens["<|tool|>"] == size
    assert grown.encode("x the cat<|tool|>")[-1] != size
    assert grown.encode("<|tool|>the cat", special=True) == [size, size + 1]
    assert size + 1 in grown.encode("the cat")
    assert grown.decode([size + 3, size + 2]) == "naïve吾輩は"
    grown.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    assert grown.stop_ids == {grown.eos_id, grown.special_tokens["<|im_end|>"]}
    assert tokenizer.vocab_size == size  # the first one is as it was

    grown.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.spec == grown.spec
    assert again.fingerprint == grown.fingerprint != tokenizer.fingerprint
    assert again.chat_template == grown.chat_template
    for model_type in (None, "llama", "gpt2", "qwen3"):
        if model_type:
            (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        assert len(theirs) == grown.vocab_size
        assert theirs.eos_token_id == grown.eos_id
        assert theirs.unk_token_id == grown.unk_id
        assert theirs.chat_template == grown.chat_template
        for text in [*SAMPLES, "the cat and 吾輩は<|tool|>"]:
            assert theirs(text)["input_ids"] == grown.encode(text, special=True)
            ids = grown.encode(text, special=True)
            if "naïve" not in text:
                assert theirs.decode(ids) == grown.decode(ids)


def test_what_transformers_saves_is_read_back(tokenizer: Tokenizer, tmp_path: Path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path / "ours")
    AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = Tokenizer.load(tmp_path / "theirs")
    assert again.eos_id == tokenizer.eos_id
    assert again.kind == tokenizer.kind
    for text in SAMPLES:
        assert again.encode(text) == tokenizer.encode(text)
        assert again.encode(text, special=True) == tokenizer.encode(text, special=True)


def test_characters_without_an_unknown_token():
    tokenizer = make("char", unknown=False)
    assert tokenizer.unk_id is None
    with pytest.raises(UserError, match=r"character '漢' \(number 4 of the text\)"):
        tokenizer.encode("cat漢")
    with pytest.raises(UserError, match="number 14"):
        tokenizer.encode("<|endoftext|>漢", special=True)
    with pytest.raises(UserError, match="'<'"):
        tokenizer.encode_batch(["cat", "<|endoftext|>"])
    assert tokenizer.encode("<|endoftext|>c", special=True)[0] == 0
    text = "The cat\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    tiny = train_tokenizer(["abc"], kind="char", special=(), unknown=False)
    assert tiny.vocab_size == 3
    assert tiny.eos_id is None
    assert tiny.encode("cab") == [2, 0, 1]


def test_rare_characters_give_way_to_the_unknown():
    tokenizer = train_tokenizer(["aaabbc"], kind="char", vocab_size=4)
    assert tokenizer.tokens == ["<|endoftext|>", "<|unk|>", "a", "b"]
    assert tokenizer.encode("abc") == [2, 3, 1]


def test_lone_surrogates_and_ids_without_a_token(tokenizer: Tokenizer):
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
    assert ReadableEncoder(tokenizer.spec).encode("a\ud800") == tokenizer.encode("a\ud800")
    assert tokenizer.decode([10**6, -1]) == ""
    assert tokenizer.token_bytes(10**6) == tokenizer.token_bytes(-1) == b""


def test_tokens_to_print():
    tokenizer = make("bpe")
    first, *_ = tokenizer.encode("漢")
    assert tokenizer.token_bytes(first) == "漢".encode()[:1]
    assert tokenizer.token_text(first) == "\\xe6"
    assert tokenizer.token_text(tokenizer.encode("\n")[0]) == "\\n"
    assert tokenizer.token_text(0) == "<|endoftext|>"
    assert tokenizer.decode([0, first], skip_special=True) == "\ufffd"
    assert tokenizer.token_id("Ġthe") == tokenizer.encode(" the")[0]
    assert repr(tokenizer) == "Tokenizer(kind='bpe', vocab_size=340)"


def test_stages_of_a_word():
    ranks = {(b"a", b"b"): 0, (b"ab", b"c"): 1}
    assert explain_word("abcab", ranks) == [
        [b"a", b"b", b"c", b"a", b"b"],
        [b"ab", b"c", b"ab"],
        [b"abc", b"ab"],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 256}, "too small: the 256 bytes and 1 special"),
        ({}, "needs a vocabulary size"),
        ({"vocab_size": 300, "kind": "bpee"}, "Did you mean 'bpe'"),
        ({"vocab_size": 300, "special": ("<s>", "<s>")}, "given twice"),
        ({"vocab_size": 300, "special": ("",)}, "is empty"),
        ({"vocab_size": 300, "special": ("x",)}, "also a piece of ordinary words"),
        ({"vocab_size": 300, "language": "jp"}, "Did you mean 'ja'"),
        ({"vocab_size": 300, "texts": []}, "no text"),
        ({"kind": "char", "texts": ["<|endoftext|>"]}, "no text"),
        ({"kind": "char", "vocab_size": 3, "unknown": False}, "too small: the text has"),
        ({"kind": "char", "vocab_size": 2}, "too small"),
    ],
)
def test_training_asked_wrongly(options: dict, message: str):
    texts = options.pop("texts", ["some text"])
    with pytest.raises(UserError, match=message):
        train_tokenizer(texts, **options)


def test_empty_added_tokens_are_refused(tokenizer: Tokenizer):
    with pytest.raises(UserError, match="is empty"):
        tokenizer.add_tokens([""])


def test_turn_ends_are_spelt_once():
    assert len(set(END_OF_TURN)) == len(END_OF_TURN)
