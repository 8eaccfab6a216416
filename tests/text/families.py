"""Small vocabularies of every kind that families use, trained by the packages they come from."""

from __future__ import annotations

import io
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers, pre_tokenizers, trainers

from llm_from_scratch.text.training import train_tokenizer

TEXT = """The cat sat on the mat; it's 2023, and 1,000 dogs bark. def f(x):\n    return x + 1\n
吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所でニャーニャー泣いていた事だけは記憶している。\n"""
# What goes wrong somewhere: spaces, special tokens, combining marks, looks that deceive.
ODD = [
    "", " ", " lead", "trail ", "  two  spaces ", "\n\n\r\n\t x", "▁", "a▁b",
    "\u3000全角　空白\u3000", "か\u3099 ｶﾞ ①㌔ ﬁ", "e\u0301 É naïve Ångström İ ΩΣς", "🇯🇵👨‍👩‍👧 😀",
    "한국어 \u1100\u1161\u11a8", "ع ﷺ",
    "\x01\u200b\ufeff\u2028\x85x", "aaaaaaaaaaaaaaa ------------- ======", "x" * 150 + " y",
    "5, 10,000, 3,", "<0x41><0x0A>", "``quoted'' [MA SK]",
    "</s>a<s> b<unk>c<pad> [MASK] [CLS]x<mask> y <extra_id_3>z<|endoftext|> <bos>w",
    ">>jpn<< Hello there", ">>xyz<< Hi", ">> not a << code", "a >>jpn<< b",
]  # fmt: skip
BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


@dataclass(frozen=True)
class Kind:
    """How a folder of one kind is made; `config` is its tokenizer_config.json."""

    build: Callable[[Path, list[str]], None]
    config: dict[str, Any] = field(default_factory=dict)
    model_type: str | None = None

    def make(self, folder: Path, corpus: list[str]) -> Path:
        folder.mkdir(parents=True)
        (folder / "tokenizer_config.json").write_text(json.dumps(self.config), "utf-8")
        if self.model_type:
            (folder / "config.json").write_text(json.dumps({"model_type": self.model_type}))
        self.build(folder, corpus)
        return folder


# ------------------------------------------------------------------------- SentencePiece


UP_TO = {"hard_vocab_limit": False}  # a small corpus has fewer pieces to give


def train_pieces(corpus: Iterable[str], **options: Any) -> bytes:
    lines = [line for text in corpus for line in text.split("\n") if line.strip()]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, minloglevel=2, num_threads=1,
        max_sentence_length=100_000, **{"character_coverage": 0.98, **UP_TO, **options},
    )  # fmt: skip
    return out.getvalue()


def pieces(name: str, **options: Any) -> Callable[[Path, list[str]], None]:
    def build(folder: Path, corpus: list[str]) -> None:
        (folder / name).write_bytes(train_pieces(corpus, **options))

    return build


LLAMA_OPTIONS = {
    "model_type": "bpe", "vocab_size": 3000, "byte_fallback": True, "split_digits": True,
    "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
}  # fmt: skip
T5_OPTIONS = {
    "model_type": "unigram", "vocab_size": 1500,
    "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1,
}  # fmt: skip


def marian(folder: Path, corpus: list[str]) -> None:
    """Two models and a table that lacks some pieces of both, and orders the rest anew."""
    names = []
    for name, texts in (("source.spm", corpus[::2]), ("target.spm", corpus[1::2])):
        data = train_pieces(texts, model_type="unigram", vocab_size=1800)
        (folder / name).write_bytes(data)
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        names += [model.id_to_piece(i) for i in range(3, len(model))]
    kept = [name for i, name in enumerate(dict.fromkeys(names)) if i % 23]
    tokens = ["</s>", "<unk>", *reversed(kept), ">>jpn<<", "<pad>"]
    table = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(table, ensure_ascii=False), "utf-8")


# ------------------------------------------------------------------------- WordPiece


def words(special: list[str], lowercase: bool = True) -> Callable[[Path, list[str]], None]:
    def build(folder: Path, corpus: list[str]) -> None:
        tokenizer = FastTokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        write_words(folder, tokenizer, corpus, special)

    return build


def write_words(
    folder: Path, tokenizer: FastTokenizer, corpus: Iterable[str], special: list[str]
) -> None:
    trainer = trainers.WordPieceTrainer(
        vocab_size=1500, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    vocab = tokenizer.get_vocab()
    lines = sorted(vocab, key=vocab.__getitem__)
    (folder / "vocab.txt").write_text("".join(f"{line}\n" for line in lines), "utf-8", newline="\n")


def japanese_words(texts: Iterable[str]) -> list[list[str]]:
    from llm_from_scratch.text.mecab import MeCab

    mecab = MeCab()
    return [mecab.words(unicodedata.normalize("NFKC", text)) for text in texts]


def japanese(folder: Path, corpus: list[str]) -> None:
    tokenizer = FastTokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    write_words(folder, tokenizer, map(" ".join, japanese_words(corpus)), BERT_TOKENS)


def japanese_characters(folder: Path, corpus: list[str]) -> None:
    counts = Counter(c for row in japanese_words(corpus) for word in row for c in word)
    lines = [*BERT_TOKENS, *(c for c, _ in counts.most_common(900) if c.strip())]
    (folder / "vocab.txt").write_text("".join(f"{line}\n" for line in lines), "utf-8", newline="\n")


# ------------------------------------------------------------------------- byte-level BPE


def merges(special: list[str]) -> Callable[[Path, list[str]], None]:
    def build(folder: Path, corpus: list[str]) -> None:
        model = train_tokenizer(corpus, vocab_size=1200, special=special).spec["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
        (folder / "merges.txt").write_text("\n".join(lines), "utf-8", newline="\n")

    return build


# ------------------------------------------------------------------------- the kinds

MASK = {
    "content": "<mask>", "lstrip": True, "rstrip": False, "normalized": False,
    "single_word": False, "__type": "AddedToken",
}  # fmt: skip
MECAB = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"}
KINDS: dict[str, Kind] = {
    "gpt2": Kind(merges(["<|endoftext|>"]), {"tokenizer_class": "GPT2Tokenizer"}, "gpt2"),
    "gpt2-bos": Kind(
        merges(["<|endoftext|>"]),
        {
            "tokenizer_class": "GPT2Tokenizer",
            "add_bos_token": True,
            "add_prefix_space": True,
            "pad_token": "<|endoftext|>",
        },
    ),
    "gpt-neox": Kind(
        merges(["<|endoftext|>", "<|padding|>"]), {"tokenizer_class": "GPTNeoXTokenizer"}
    ),
    "qwen2": Kind(merges(["<|endoftext|>"]), {"tokenizer_class": "Qwen2Tokenizer"}, "qwen2"),
    "qwen3": Kind(
        merges(["<|endoftext|>"]),
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "additional_special_tokens": ["<|im_start|>"],
            "added_tokens_decoder": {
                "1200": {"content": "<|im_start|>", "special": True, "normalized": False}
            },
        },
        "qwen3",
    ),
    "roberta": Kind(
        merges(ROBERTA_TOKENS), {"tokenizer_class": "RobertaTokenizer", "mask_token": MASK}
    ),
    "bart": Kind(merges(ROBERTA_TOKENS), {}, "bart"),
    "bert": Kind(words(BERT_TOKENS), {"tokenizer_class": "BertTokenizer"}, "bert"),
    "bert-cased": Kind(
        words(BERT_TOKENS, lowercase=False),
        {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "strip_accents": True},
    ),
    "distilbert": Kind(
        words(BERT_TOKENS),
        {
            "tokenizer_class": "DistilBertTokenizer",
            "strip_accents": False,
            "tokenize_chinese_chars": False,
        },
    ),
    "mpnet": Kind(
        words(["<s>", "<pad>", "</s>", "[UNK]", "<mask>"]), {"tokenizer_class": "MPNetTokenizer"}
    ),
    "llama": Kind(
        pieces("tokenizer.model", **LLAMA_OPTIONS),
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "pad_token": "</s>"},
        "llama",
    ),
    "llama-ends": Kind(
        pieces("tokenizer.model", **LLAMA_OPTIONS),
        {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": True,
            "add_eos_token": True,
            "pad_token": "<unk>",
        },
    ),
    "gemma": Kind(
        pieces(
            "tokenizer.model",
            **LLAMA_OPTIONS,
            add_dummy_prefix=False,
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            bos_piece="<bos>",
            eos_piece="<eos>",
            user_defined_symbols=["<mask>", "<start_of_turn>", "<end_of_turn>"],
        ),
        {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True},
        "gemma2",
    ),
    "t5": Kind(pieces("spiece.model", **T5_OPTIONS), {"tokenizer_class": "T5Tokenizer"}, "t5"),
    "mt5": Kind(pieces("spiece.model", **T5_OPTIONS), {"extra_ids": 0}, "mt5"),
    "xlm-roberta": Kind(
        pieces("sentencepiece.bpe.model", model_type="unigram", vocab_size=1500),
        {"tokenizer_class": "XLMRobertaTokenizer"},
    ),
    "marian": Kind(marian, {"tokenizer_class": "MarianTokenizer"}, "marian"),
    "japanese": Kind(japanese, {**MECAB, "mecab_kwargs": {"mecab_dic": "unidic_lite"}}, "bert"),
    "japanese-lower": Kind(
        japanese, {**MECAB, "do_lower_case": True, "mecab_kwargs": {"normalize_text": False}}
    ),
    "japanese-characters": Kind(
        japanese_characters, {**MECAB, "subword_tokenizer_type": "character"}
    ),
    "japanese-pieces": Kind(
        pieces(
            "spiece.model",
            model_type="unigram",
            vocab_size=1500,
            unk_piece="[UNK]",
            pad_piece="[PAD]",
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            control_symbols=["[CLS]", "[SEP]", "[MASK]"],
        ),
        {**MECAB, "subword_tokenizer_type": "sentencepiece"},
    ),
}
