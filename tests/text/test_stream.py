"""Streams: never half a character, and joined exactly what a whole decode gives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_from_scratch.text.formats import added_token
from llm_from_scratch.text.stream import StreamDecoder
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer

TEXT = "吾輩は猫である。😀👨‍👩‍👧 The cat's naïve mat.\n\n" * 4


def base(model: dict, decoder: dict, special: list[str], **more) -> dict:
    vocab = model["vocab"]
    if isinstance(vocab, list):
        vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(token, vocab[token], special=True) for token in special],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
        **more,
    }


def sentencepiece_bpe() -> Tokenizer:
    """As Llama 2: pieces with ▁, all bytes as <0x..>, one leading space stripped."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", "▁the", "▁▁", "a", "b", "あ", "▁あ", "猫"]
    model = {
        "type": "BPE",
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": ["▁ ▁", "▁ あ"],
    }
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    normalizer = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    decoder = {"type": "Sequence", "decoders": steps}
    spec = base(model, decoder, ["<unk>", "<s>", "</s>"], normalizer=normalizer)
    return Tokenizer.from_spec(spec)


def metaspace_unigram() -> Tokenizer:
    """As T5."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁the", "a", "b", "▁▁x", "あ", "猫"]
    model = {"type": "Unigram", "unk_id": 2, "vocab": [[piece, -1.0] for piece in pieces]}
    decoder = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    spec = base(model, decoder, ["<pad>", "</s>", "<unk>"], pre_tokenizer=decoder)
    return Tokenizer.from_spec(spec)


def wordpiece() -> Tokenizer:
    """As BERT."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "the", "cat", "##s", "##ing", ".", "!", "don", "'", "t"]
    tokens += ["do", "not", "猫", "##猫", "n't"]
    model = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {token: i for i, token in enumerate(tokens)},
    }
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    pre_tokenizer = {"type": "BertPreTokenizer"}
    spec = base(model, decoder, ["[PAD]", "[UNK]", "[CLS]"], pre_tokenizer=pre_tokenizer)
    return Tokenizer.from_spec(spec)


MAKERS = {
    "bpe": lambda: train_tokenizer([TEXT], vocab_size=300),
    "bpe-ja": lambda: train_tokenizer([TEXT], vocab_size=300, language="ja"),
    "char": lambda: train_tokenizer([TEXT], kind="char"),
    "sentencepiece": sentencepiece_bpe,
    "metaspace": metaspace_unigram,
    "wordpiece": wordpiece,
}
TOKENIZERS = {name: make() for name, make in MAKERS.items()}


@settings(max_examples=500)
@given(
    st.sampled_from(sorted(TOKENIZERS)),
    st.lists(st.integers(0, 299), max_size=20),
    st.booleans(),
)
def test_any_ids_stream_to_their_decode(name, ids, skip_special):
    tokenizer = TOKENIZERS[name]
    ids = [i % tokenizer.vocab_size for i in ids]
    stream = StreamDecoder(tokenizer, skip_special=skip_special)
    for _ in range(2):  # after a flush the stream begins anew
        pieces = [stream.push(i) for i in ids]
        pieces.append(stream.flush())
        assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip_special)


@given(st.text(alphabet=TEXT + "犬é🎌 ", max_size=30), st.data())
def test_random_splits_of_characters_never_show_half_of_one(text, data):
    """Tokens cut anywhere, also inside characters: 256 byte tokens and chance merges."""
    tokenizer = TOKENIZERS["bpe"]
    content = text.encode()
    known = {tokenizer.token_bytes(i): i for i in range(1, tokenizer.vocab_size)}
    ids, at = [], 0
    while at < len(content):
        length = data.draw(st.integers(1, 4))
        while content[at : at + length] not in known:
            length -= 1
        ids.append(known[content[at : at + length]])
        at += length
    stream = StreamDecoder(tokenizer)
    shown = ""
    for i in ids:
        shown += stream.push(i)
        assert text.startswith(shown)
        assert "\ufffd" not in shown
    assert shown == text
    assert stream.flush() == ""


def test_a_character_appears_with_its_last_byte():
    tokenizer = train_tokenizer(["x"], vocab_size=257)
    stream = StreamDecoder(tokenizer)
    ids = tokenizer.encode("あ😀")
    assert [stream.push(i) for i in ids] == ["", "", "あ", "", "", "", "😀"]
    assert stream.push(ids[0]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_byte_fallback_is_bytes():
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = tokenizer.encode("a 犬")
    assert tokenizer.token_bytes(ids[-1]) == "犬".encode()[-1:]
    assert tokenizer.decode(ids) == "a 犬" == tokenizer._plain.decode(ids)
    assert tokenizer.token_bytes(tokenizer.token_id("▁the")) == b" the"
    assert tokenizer.token_bytes(tokenizer.token_id("<0x0A>")) == b"\n"
    stream = StreamDecoder(tokenizer)
    assert "".join(stream.push(i) for i in ids) == "a 犬"


@settings(max_examples=200)
@given(st.sampled_from(sorted(TOKENIZERS)), st.text(alphabet="the a猫あ犬b\n", max_size=15))
def test_decoding_is_that_of_the_tokenizers_package(name, text):
    """On the ids of real text; on broken UTF-8 the two differ in the number of U+FFFD."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer._plain.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("name", "token", "data"),
    [("wordpiece", "##ing", b"ing"), ("wordpiece", "cat", b"cat"), ("metaspace", "▁the", b" the")],
)
def test_bytes_of_a_token(name, token, data):
    tokenizer = TOKENIZERS[name]
    assert tokenizer.token_bytes(tokenizer.token_id(token)) == data


def test_what_wordpiece_does_not_know_stays_unknown():
    tokenizer = TOKENIZERS["wordpiece"]
    assert tokenizer.unk_id == tokenizer.special_tokens["[UNK]"] == 1
    assert tokenizer.encode("the dog [PAD]") == [3, 1, 1, 1, 1]


def test_wordpiece_streams_word_by_word():
    tokenizer = TOKENIZERS["wordpiece"]
    ids = tokenizer.encode("the cats.")
    stream = StreamDecoder(tokenizer)
    assert [stream.push(i) for i in ids] == ["", "the", "", ""]
    assert stream.flush() == " cats."
