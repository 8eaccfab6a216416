"""Reading what others wrote: tokenizer.json, older layouts, tiktoken; every text in the data."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiktoken
from tokenizers import Tokenizer as FastTokenizer

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.encoder import ReadableEncoder
from llm_from_scratch.text.files import read_tokenizer, read_vocab_and_merges
from llm_from_scratch.text.formats import TIKTOKEN_PATTERNS, bpe_spec, read_tiktoken
from llm_from_scratch.text.pretokenize import GPT2_PATTERN, byte_letters, from_letters
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer

TEXT = "Hello world, it's 2023!  naïve 吾輩は猫である。😀\n\n\tx <|endoftext|> y"


@pytest.fixture(scope="module")
def gpt2_spec(data_dir: Path) -> dict:
    folder = data_dir / "bpe-reference"
    return read_vocab_and_merges(folder / "gpt2_vocab.json", folder / "gpt2_merges.txt")


@pytest.fixture(scope="module")
def gpt2_ranks(data_dir: Path) -> dict[bytes, int]:
    vocab = json.loads((data_dir / "bpe-reference" / "gpt2_vocab.json").read_text("utf-8"))
    return {from_letters(token): i for token, i in vocab.items() if token != "<|endoftext|>"}


def texts_under(folder: Path, limit: int | None) -> Iterator[tuple[str, str]]:
    """Every file that holds text, however encoded: what is not UTF-8 is replaced."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix not in (".png", ".jpg", ".zip"):
            data = path.read_bytes()
            if path.suffix == ".gz":
                data = gzip.decompress(data)
            if limit is not None:
                data = data[:limit] + data[-limit:]
            yield path.name, data.decode("utf-8", "replace")


def check_every_text(folder: Path, spec: dict, tmp_path: Path, limit: int | None) -> None:
    """Their ids of our file, our ids of our file, and the readable encoder's, on every text."""
    Tokenizer.from_spec(spec).save(tmp_path)
    ours = Tokenizer.load(tmp_path)
    theirs = FastTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    readable = ReadableEncoder(ours.spec)
    count = 0
    for name, text in texts_under(folder, limit):
        ids = theirs.encode_batch_fast([text], add_special_tokens=False)[0].ids
        assert ours.encode(text, special=True) == ids, name
        assert readable.encode(text, special=True) == ids, name
        if "<|endoftext|>" in text:
            assert readable.encode(text) == ours.encode(text), name
        assert ours.decode(ids) == text, name
        count += 1
    assert count > 300


def test_gpt2s_ids_on_every_text(data_dir: Path, gpt2_spec: dict, tmp_path: Path):
    check_every_text(data_dir, gpt2_spec, tmp_path, 800)


def test_japanese_ids_on_every_text(data_dir: Path, tmp_path: Path):
    name = data_dir / "aozora" / "aozora_clean.jsonl.gz"
    with gzip.open(name, "rt", encoding="utf-8") as file:
        texts = [json.loads(next(file))["text"] for _ in range(10)]
    spec = train_tokenizer(texts, vocab_size=600, language="ja").spec
    check_every_text(data_dir, spec, tmp_path, 800)


@pytest.mark.full
def test_gpt2s_ids_on_every_whole_text(data_dir: Path, gpt2_spec: dict, tmp_path: Path):
    check_every_text(data_dir, gpt2_spec, tmp_path, None)


def test_a_file_of_the_tokenizers_package(tmp_path: Path):
    """Trained and written by it, with merges as it writes them, read and encoded by us."""
    from tokenizers import models, pre_tokenizers, processors, trainers

    theirs = FastTokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    theirs.post_processor = processors.ByteLevel(trim_offsets=False)
    theirs.enable_truncation(5)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator([TEXT] * 3, trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path / "tokenizer.json")
    theirs.no_truncation()
    ids = theirs.encode(TEXT).ids
    assert ours.encode(TEXT) == ReadableEncoder(ours.spec).encode(TEXT) == ids
    assert (ours.bos_id, ours.eos_id) == (0, 1)


def test_digits_normal_form_and_whole_words():
    letters = sorted(byte_letters())
    spec = bpe_spec(
        [*letters, "12", "Ġ1", "Ġ12"],
        ["1 2", "Ġ 1"],
        individual_digits=True,
        normalizer="NFC",
        ignore_merges=True,
    )
    tokenizer = Tokenizer.from_spec(spec)
    for text in ("a 12 12", "e\u0301", "か\u3099 7"):
        assert ReadableEncoder(spec).encode(text) == tokenizer.encode(text)
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")
    assert len(tokenizer.encode("12")) == 2
    spec = bpe_spec([*letters, "Ġ12"], [], ignore_merges=True)
    assert Tokenizer.from_spec(spec).encode(" 12") == ReadableEncoder(spec).encode(" 12") == [256]


def test_gpt2s_ids_are_tiktokens(gpt2_spec: dict, gpt2_ranks: dict, data_dir: Path):
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=gpt2_ranks,
        special_tokens={"<|endoftext|>": 50256},
    )
    tokenizer = Tokenizer.from_spec(gpt2_spec)
    assert tokenizer.vocab_size == 50257
    assert tokenizer.eos_id == 50256
    assert tokenizer.encode("Hello world") == [15496, 995]
    names = ("corpus.en", "german.txt", "address.txt", "tinystories_sample.txt")
    texts = [(data_dir / "bpe-reference" / name).read_text("utf-8") for name in names]
    for text in [*texts, TEXT]:
        assert tokenizer.encode(text) == encoding.encode_ordinary(text)
        expected = encoding.encode(text, allowed_special="all")
        assert tokenizer.encode(text, special=True) == expected
    ids = list(range(0, 50257, 7))
    assert tokenizer.decode(ids) == encoding.decode(ids)
    for i in ids:
        assert tokenizer.token_bytes(i) == encoding.decode_single_token_bytes(i)


def test_tiktoken_rank_files(gpt2_spec: dict, gpt2_ranks: dict, tmp_path: Path):
    lines = [b"%s %d" % (base64.b64encode(token), rank) for token, rank in gpt2_ranks.items()]
    path = tmp_path / "gpt2.tiktoken"
    path.write_bytes(b"\n".join(lines) + b"\n")
    spec = read_tiktoken(path, pattern="gpt2", special={"<|endoftext|>": 50256})
    assert spec["model"]["vocab"] == gpt2_spec["model"]["vocab"]
    assert spec["model"]["merges"] == gpt2_spec["model"]["merges"]
    tokenizer = Tokenizer.from_tiktoken(path, special={"<|endoftext|>": 50256})
    assert tokenizer.encode(TEXT) == Tokenizer.from_spec(gpt2_spec).encode(TEXT)
    assert tokenizer.eos_id == 50256


def test_another_tiktoken_pattern(gpt2_ranks: dict, tmp_path: Path):
    """GPT-4's pattern, some ranks, and a rank that no merge reaches: equal to tiktoken itself."""
    ranks = {token: rank for token, rank in gpt2_ranks.items() if rank < 3000}
    ranks[b" unreachable"] = 3000
    encoding = tiktoken.Encoding(
        "test",
        pat_str=TIKTOKEN_PATTERNS["cl100k"],
        mergeable_ranks=ranks,
        special_tokens={"<|im_end|>": 3100},
    )
    path = tmp_path / "ranks"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(t), r) for t, r in ranks.items()))
    tokenizer = Tokenizer.from_tiktoken(path, pattern="cl100k", special={"<|im_end|>": 3100})
    assert tokenizer.vocab_size == 3101
    assert tokenizer.tokens[3050] is None
    for text in (TEXT, "I'M unreachable unreachable12345\r\n\r\n x<|im_end|>", "   \n a"):
        assert tokenizer.encode(text) == encoding.encode_ordinary(text)
        assert ReadableEncoder(tokenizer.spec).encode(text) == encoding.encode_ordinary(text)
        assert tokenizer.encode(text, special=True) == encoding.encode(text, allowed_special="all")


def test_the_older_layout(tmp_path: Path):
    tokenizer = train_tokenizer([TEXT] * 3, vocab_size=300, special=("<|endoftext|>", "<pad>"))
    model = tokenizer.spec["model"]
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""])
    (tmp_path / "merges.txt").write_text(merges, "utf-8")
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    roles = {"eos_token": {"content": "<|endoftext|>", "lstrip": False}, "pad_token": "<pad>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(roles))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|new|>": 300}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null, "chat_template": "old"}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    for path in (tmp_path, tmp_path / "vocab.json"):
        older = Tokenizer.load(path)
        assert (older.eos_id, older.pad_id, older.vocab_size) == (0, 1, 301)
        assert older.chat_template == "{{ messages }}"
        assert older.stop_ids == {0, 5}
        assert older.encode(TEXT) == tokenizer.encode(TEXT)
        assert older.encode("<|new|><pad>", special=True) == [300, 1]


def test_several_chat_templates(tmp_path: Path):
    train_tokenizer(["some text"], kind="char").save(tmp_path)
    templates = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.chat_template == "D"
    assert tokenizer.eos_id == 0  # by its name, since the config is silent


def test_saving_leaves_no_other_files(tmp_path: Path):
    train_tokenizer(["some text"], kind="char").save(tmp_path / "new")
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["tokenizer.json", "tokenizer_config.json"]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_bad_files_are_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        read_tokenizer(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        read_tokenizer(tmp_path / "nowhere")
    bad = write(tmp_path, "tokenizer.json", '{"a": 1,\n oops}')
    with pytest.raises(UserError, match=r"tokenizer\.json, line 2 is not valid JSON"):
        read_tokenizer(tmp_path)
    bad.write_text("{}")
    with pytest.raises(UserError, match="no model with a vocabulary"):
        Tokenizer.load(tmp_path)
    good = train_tokenizer(["some text"], kind="char").spec
    config = write(tmp_path, "tokenizer_config.json", "[1]")
    bad.write_text(json.dumps({key: good[key] for key in good if key != "added_tokens"}))
    with pytest.raises(UserError, match="must hold a JSON object"):
        read_tokenizer(tmp_path)
    config.unlink()
    assert Tokenizer.load(bad).special_tokens == {}
    bad.write_text(json.dumps({**good, "added_tokens": [{"content": "x"}]}))
    with pytest.raises(UserError, match=r"'added_tokens' .* is not a list of tokens"):
        Tokenizer.load(bad)
    bad.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_tokenizer(bad)
    bad.write_text('{"model": {"vocab": {"a": 0}, "type": "Magic"}, "added_tokens": []}')
    with pytest.raises(UserError, match="cannot be used"):
        Tokenizer.load(bad)
    with pytest.raises(UserError, match="line 2, is not a tiktoken rank"):
        read_tiktoken(write(tmp_path, "x.tiktoken", b"YQ== 0\nhello"))
    with pytest.raises(UserError, match="lack some of the 256 bytes"):
        read_tiktoken(write(tmp_path, "x.tiktoken", b"YQ== 0\n"))
    folder = tmp_path / "older"
    folder.mkdir()
    write(folder, "vocab.json", '{"a</w>": 0}')
    write(folder, "merges.txt", "a b\n")
    with pytest.raises(UserError, match="not a byte-level vocabulary"):
        read_tokenizer(folder)
    (folder / "vocab.json").unlink()
    write(folder, "vocab.bin", b"\x00")
    with pytest.raises(UserError, match=r"has no tokenizer\.json.* \(it has vocab\.bin\)"):
        read_tokenizer(folder)


def test_specs_that_do_not_fit():
    letters = sorted(byte_letters())
    with pytest.raises(UserError, match="does not fit the vocabulary"):
        Tokenizer.from_spec(bpe_spec(letters, ["a b"]))
    with pytest.raises(UserError, match="same token twice"):
        bpe_spec([*letters, "a"], [])
    with pytest.raises(UserError, match="not in the vocabulary"):
        bpe_spec(letters, [], special=["<s>"])


def test_the_readable_encoder_says_what_it_cannot_read():
    words = {"model": {"type": "WordLevel", "vocab": {"a": 0}}, "added_tokens": []}
    with pytest.raises(UserError, match="byte-level BPE, Unigram, WordPiece and characters only"):
        ReadableEncoder(words)
    spec = bpe_spec(sorted(byte_letters()), [])
    with pytest.raises(UserError, match="normalizer Lowercase"):
        ReadableEncoder({**spec, "normalizer": {"type": "Lowercase"}})
    cut = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, spec["pre_tokenizer"]]}
    with pytest.raises(UserError, match="pre-tokenizer Whitespace"):
        ReadableEncoder({**spec, "pre_tokenizer": cut})
