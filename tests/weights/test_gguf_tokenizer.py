"""Vocabularies in GGUF files: in, out, and the same ids as those who made them."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer, BertTokenizerFast

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.formats import added_token, bpe_spec
from llm_from_scratch.text.pretokenize import JAPANESE_PATTERN
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.wordpiece_spec import wordpiece_spec
from llm_from_scratch.weights.gguf import GGUF
from llm_from_scratch.weights.gguf_cuts import CUTS, apply_cut
from llm_from_scratch.weights.gguf_tokenizer import read_tokenizer
from llm_from_scratch.weights.gguf_tokenizer_write import tokenizer_metadata
from llm_from_scratch.weights.gguf_write import write_gguf
from tests.weights.conftest import MERGES, SPECIAL, VOCABULARY
from tests.weights.real_files import FOLDER

CORPUS = [
    "The cat sat on the mat, and the rat sat on the cat.", "In 2024 the theatre's doors opened.",
    "吾輩は猫である。名前はまだ無い。", "どこで生れたかとんと見当がつかぬ。",
    "Über die Brücke, naïve café", "def f(x):\n    return x + 1", "one two  three   four",
    "ａｂｃ ＡＢＣ １２３ ﾊﾝｶｸ", "!!! ... ???",
]  # fmt: skip
TEXTS = [
    *CORPUS, "", " ", "  leading and trailing  ", "don't DON'T", "a\tb\r\n\n\nc", "12345 67",
    "🍣🙂 unseen ж", "the <s> end </s> <|im_end|> [CLS]", "x" * 120,
]  # fmt: skip


def through_a_file(tokenizer: Tokenizer, path: Path, padding: int = 3) -> Tokenizer:
    write_gguf(path, tokenizer_metadata(tokenizer, tokenizer.vocab_size + padding), [])
    back = read_tokenizer(GGUF(path))
    assert back is not None
    return back


def read(path: Path, **metadata: Any) -> Tokenizer:
    values = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    write_gguf(path, values, [])
    tokenizer = read_tokenizer(GGUF(path))
    assert tokenizer is not None
    return tokenizer


def trained(kind: str, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """A small SentencePiece model, trained by its own package."""
    random.seed(3)
    lines = [" ".join(random.sample(CORPUS, 3)).replace("\n", " ") for _ in range(200)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=options.pop("size", 320),
        model_type=kind, character_coverage=1.0, minloglevel=2, num_threads=1,
        hard_vocab_limit=False, **options,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def pieces_of(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """What llama.cpp's converter writes of a SentencePiece model."""

    def kind(i: int) -> int:
        marks = (model.is_unknown(i), model.is_control(i), model.is_unused(i), model.is_byte(i))
        return next((k for k, mark in zip((2, 3, 5, 6), marks, strict=True) if mark), 1)

    count = range(model.get_piece_size())
    return {
        "tokens": [model.id_to_piece(i) for i in count],
        "scores": [float(model.get_score(i)) for i in count],
        "token_type": [kind(i) for i in count],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


@pytest.mark.parametrize("prefix", [True, False])
def test_llama_vocabularies_cut_as_sentencepiece_does(prefix: bool, tmp_path: Path) -> None:
    model = trained(
        "bpe", size=560, byte_fallback=True, normalization_rule_name="identity",
        add_dummy_prefix=prefix, remove_extra_whitespaces=False,
    )  # fmt: skip
    ours = read(tmp_path / "v.gguf", model="llama", add_space_prefix=prefix, **pieces_of(model))
    assert ours.kind == "bpe"
    back = through_a_file(ours, tmp_path / "back.gguf")
    assert back.spec == ours.spec and back.config == ours.config
    for text in TEXTS:
        assert ours.encode(text) == model.encode(text), text
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode("a</s>", special=True)[-1] == 2
    assert ours.config["add_bos_token"] and ours.bos_id == 1


@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
def test_t5_vocabularies_cut_as_sentencepiece_does(rule: str, tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    model = trained("unigram", normalization_rule_name=rule)
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.serialized_model_proto())
    ours = read(
        tmp_path / "v.gguf", model="t5", add_space_prefix=True, remove_extra_whitespaces=True,
        precompiled_charsmap=proto.normalizer_spec.precompiled_charsmap, **pieces_of(model),
    )  # fmt: skip
    assert ours.kind == "unigram"
    back = through_a_file(ours, tmp_path / "back.gguf")
    assert back.spec == ours.spec and back.config == ours.config
    for text in TEXTS:
        wanted = model.encode(text)
        assert ours.encode(text) == back.encode(text) == wanted, text
        assert ours.decode(wanted) == model.decode(wanted).replace(" ⁇ ", "<unk>")


def wordpiece(lowercase: bool) -> Tokenizer:
    letters = [chr(c) for c in range(97, 123)] + ["猫", "名", "前", ",", "."]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    tokens += [f"##{c}" for c in letters] + ["the", "cat", "##re", "##s", "T", "##he", "é"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    spec = wordpiece_spec(vocab, lowercase=lowercase)
    spec["added_tokens"] = [added_token(t, i, special=True) for i, t in enumerate(tokens[:5])]
    roles = ("pad", "unk", "cls", "sep", "mask")
    return Tokenizer.from_spec(spec, {f"{r}_token": t for r, t in zip(roles, tokens, strict=False)})


@pytest.mark.parametrize("lowercase", [True, False])
def test_bert_vocabularies(lowercase: bool, tmp_path: Path) -> None:
    tokenizer = wordpiece(lowercase)
    back = through_a_file(tokenizer, tmp_path / "v.gguf")
    assert back.kind == "wordpiece"
    theirs = BertTokenizerFast(
        vocab={t: i for i, t in enumerate(tokenizer.tokens)}, do_lower_case=lowercase
    )
    for text in (*TEXTS[:-2], "the theres cat, CAT cafés", "猫の名前"):
        wanted = theirs(text, add_special_tokens=False)["input_ids"]
        assert back.encode(text) == tokenizer.encode(text) == wanted, text
    ids = back.spec["post_processor"]["special_tokens"]
    assert {ids["[CLS]"]["ids"][0], ids["[SEP]"]["ids"][0]} == {2, 3}
    tokens = GGUF(tmp_path / "v.gguf").metadata["tokenizer.ggml.tokens"]
    assert tokens[:2] == ["[PAD]", "[UNK]"]
    assert {"▁the", "re", "▁猫", "猫"} <= set(tokens)
    assert tokens[-1] == f"[PAD{len(tokens) - 1}]"


@pytest.mark.parametrize("name", CUTS)
def test_every_way_to_cut_text_has_its_name(name: str, tmp_path: Path) -> None:
    spec = bpe_spec(VOCABULARY, MERGES, special=SPECIAL)
    apply_cut(spec, CUTS[name])
    tokenizer = Tokenizer.from_spec(spec, {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2]})
    metadata = tokenizer_metadata(tokenizer, tokenizer.vocab_size)
    assert CUTS[metadata["tokenizer.ggml.pre"]] == CUTS[name]
    back = through_a_file(tokenizer, tmp_path / "v.gguf")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert back.encode(text) == ids
        if not CUTS[name].normalizer:
            assert back.decode(ids) == text


def test_everything_beside_the_vocabulary(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.add_tokens(["<tool>", "  "])
    tokenizer.config["add_bos_token"] = True
    tokenizer.extra_stop_ids.add(1)
    back = through_a_file(tokenizer, tmp_path / "v.gguf")
    assert back.config == tokenizer.config
    assert back.stop_ids == tokenizer.stop_ids == {1, 2}
    assert back.vocab_size == tokenizer.vocab_size
    text = "the <tool>  in <|im_end|>"
    assert back.encode(text) == tokenizer.encode(text)
    assert back.encode(text, special=True) == tokenizer.encode(text, special=True)
    back.save(tmp_path / "folder")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert theirs("the in")["input_ids"] == [0, *back.encode("the in")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda spec: spec.update(bpe_spec(VOCABULARY, MERGES, pattern=JAPANESE_PATTERN)),
            "no name for this way to cut text into words",
        ),
        (lambda spec: spec.update(normalizer={"type": "NFKC"}), "the normalisation NFKC"),
        (
            lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True),
            "no name for the pre-tokenizer ByteLevel",
        ),
        (
            lambda spec: spec["added_tokens"].append(added_token("[PAD267]", 265, special=False)),
            "Two tokens have the same text",
        ),
    ],
)
def test_what_llama_cpp_would_cut_otherwise_is_refused(change: Any, words: str) -> None:
    spec = bpe_spec(VOCABULARY, MERGES, special=SPECIAL)
    change(spec)
    with pytest.raises(UserError, match=words):
        tokenizer_metadata(Tokenizer.from_spec(spec), 270)


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    from llm_from_scratch.text.formats import char_spec

    with pytest.raises(UserError, match="no vocabularies of the kind 'char'"):
        tokenizer_metadata(Tokenizer.from_spec(char_spec("abc")), 3)
    odd = wordpiece(True)
    odd.front = object()  # type: ignore[assignment]
    with pytest.raises(UserError, match="with MeCab or as Marian does"):
        tokenizer_metadata(odd, odd.vocab_size)
    odd = Tokenizer.from_spec({**odd.spec, "pre_tokenizer": {"type": "Whitespace"}})
    with pytest.raises(UserError, match="WordPiece vocabularies as BERT does"):
        tokenizer_metadata(odd, odd.vocab_size)
    model = trained("bpe", size=560, byte_fallback=True, normalization_rule_name="identity")
    mixed = read(tmp_path / "v.gguf", model="llama", **pieces_of(model))
    spec = mixed.spec
    del spec["model"]["merges"][0]
    mixed = Tokenizer.from_spec(spec)
    with pytest.raises(UserError, match="do not follow from scores"):
        tokenizer_metadata(mixed, mixed.vocab_size)
    unigram = read(tmp_path / "v.gguf", model="t5", **pieces_of(trained("unigram")))
    unigram = Tokenizer.from_spec({**unigram.spec, "normalizer": {"type": "NFKC"}})
    with pytest.raises(UserError, match="no step NFKC"):
        tokenizer_metadata(unigram, unigram.vocab_size)


SMALL = {"model": "llama", "tokens": ["<unk>", "<s>", "</s>", "a"], "token_type": [2, 3, 3, 1]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scores": [0.0]}, "scores' has 1 entries, but there are 4 tokens"),
        ({"scores": ["x"] * 4}, "scores' is not a list of sound numbers"),
        ({"token_type": ["x"] * 4}, "token_type' is not a list of sound numbers"),
        ({"scores": [0.0, 0.0, 0.0, float("nan")]}, "scores' is not a list of sound numbers"),
        ({"tokens": ["a"] * 4}, "the same piece twice"),
        ({"tokens": [1, 2]}, "tokens' is not a list of texts"),
        ({"unknown_token_id": 9}, "unknown_token_id' is 9"),
        ({"model": "t5", "precompiled_charsmap": b"xyz"}, "broken"),
        ({"model": "bert", "tokens": ["▁x"] * 4, "unknown_token_id": 0}, "the same token twice"),
        ({"model": "rwkv"}, "'tokenizer.ggml.model' is 'rwkv'"),
        ({"add_space_prefix": 3}, "add_space_prefix' is not of the type bool"),
    ],
)
def test_broken_vocabularies_are_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path / "v.gguf", **{**SMALL, **changes})
    assert "v.gguf" in str(caught.value)


# ------------------------------------------------------------------------- real vocabularies

REAL = (
    "bert-bge", "command-r", "deepseek-coder", "falcon", "gpt-2", "llama-bpe", "llama-spm", "mpt",
    "phi-3", "qwen2", "qwen35", "refact", "starcoder",
)  # fmt: skip


def real_vocabulary(name: str) -> Path:
    """One of the files with which llama.cpp tests its own tokenizers (its folder `models`)."""
    path = FOLDER / "llama-vocabs" / f"ggml-vocab-{name}.gguf"
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    return path


@pytest.mark.weights
@pytest.mark.parametrize("name", REAL)
def test_ids_are_those_that_llama_cpp_expects(name: str, tmp_path: Path) -> None:
    path = real_vocabulary(name)
    ours = read_tokenizer(GGUF(path))
    assert ours is not None
    back = through_a_file(ours, tmp_path / "back.gguf")
    mark = "\n__ggml_vocab_test__\n"
    texts = Path(f"{path}.inp").read_bytes().decode().split(mark)
    rows = Path(f"{path}.out").read_text().split("\n")
    for text, row in zip(texts, rows, strict=True):
        wanted = [int(number) for number in row.split()]
        assert ours.encode(text) == back.encode(text) == wanted, text


@pytest.mark.full
@pytest.mark.weights
@pytest.mark.parametrize("name", [*REAL, "aquila", "baichuan", "gpt-neox", "nomic-bert-moe"])
def test_llama_cpp_cuts_what_we_wrote_as_we_do(name: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    ours = read_tokenizer(GGUF(real_vocabulary(name)))
    assert ours is not None
    size = ours.vocab_size + 3
    metadata = {"general.architecture": "llama", "llama.vocab_size": size}
    write_gguf(tmp_path / "v.gguf", metadata | tokenizer_metadata(ours, size), [])
    theirs = llama_cpp.Llama(str(tmp_path / "v.gguf"), vocab_only=True, verbose=False)
    for text in TEXTS[:-2]:
        assert theirs.tokenize(text.encode(), add_bos=False) == ours.encode(text), text
