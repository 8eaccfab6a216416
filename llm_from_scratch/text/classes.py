"""What the tokenizer classes of `transformers` make of their vocabulary files: one row each.

A folder without a `tokenizer.json` has the vocabulary alone, and a name in its
`tokenizer_config.json` that says the rest: how text is cut, which tokens are special and what is
put around a text. Here is that rest. With a `tokenizer.json` the file itself says it all (with two
exceptions, `as_class`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.checks import Config, Spec, token_text
from llm_from_scratch.text.formats import TIKTOKEN_PATTERNS, added_token, bpe_spec, is_byte_level
from llm_from_scratch.text.inputs import template
from llm_from_scratch.text.pretokenize import GPT2_PATTERN
from llm_from_scratch.text.sentencepiece_model import SentencePieceModel
from llm_from_scratch.text.sentencepiece_spec import (
    CONTROL,
    SPACE,
    UNKNOWN,
    sentencepiece_spec,
)
from llm_from_scratch.text.wordpiece_spec import wordpiece_spec

END = "<|endoftext|>"
MOST_EXTRA = 10_000
QWEN_PATTERN = TIKTOKEN_PATTERNS["cl100k"].replace("{1,3}", "")
Build = Callable[[Any, Config], Spec]


@dataclass(frozen=True)
class TokenizerClass:
    """One class.

    Attributes:
        files: what its vocabulary comes in: "pieces" (a SentencePiece model), "words" (a
            `vocab.txt`) or "merges" (`vocab.json` and `merges.txt`).
        build: from that and the config to a specification, without special tokens.
        config: what holds where `tokenizer_config.json` is silent.
        single, pair: what is put around one text (A) and around two (A, B), by role or name; None:
            `add_bos_token` and `add_eos_token` of the config say it.
        segments: whether the second text of a pair has the segment 1.
        eats_space: special tokens, by role, that take the spaces before them with them.
    """

    files: str
    build: Build
    config: Config = field(default_factory=dict)
    single: str | None = None
    pair: str = ""
    segments: bool = False
    eats_space: tuple[str, ...] = ()


# ------------------------------------------------------------------------- the builders


def _bytes(normalizer: str | None = None, pattern: str = GPT2_PATTERN) -> Build:
    def build(files: tuple[dict[str, int], list[str]], config: Config) -> Spec:
        vocab, merges = files
        prefix = bool(config.get("add_prefix_space") or False)
        return bpe_spec(
            vocab, merges, pattern=pattern, normalizer=normalizer, add_prefix_space=prefix
        )

    return build


def _words(vocab: dict[str, int], config: Config) -> Spec:
    return wordpiece_spec(
        vocab,
        unknown=config["unk_token"],
        lowercase=bool(config.get("do_lower_case", True)),
        strip_accents=config.get("strip_accents"),
        chinese_apart=bool(config.get("tokenize_chinese_chars", True)),
    )


def plain_pieces(model: SentencePieceModel, config: Config) -> Spec:
    """As the model file itself says; `config` may name user-defined pieces that are special."""
    return sentencepiece_spec(
        model.pieces,
        model.scores,
        model.types,
        kind=model.kind,
        prefix=model.add_dummy_prefix,
        merge_spaces=model.remove_extra_whitespaces,
        charsmap=model.charsmap,
        special=special_names(config),
    )


def _llama(model: SentencePieceModel, config: Config) -> Spec:
    spec = sentencepiece_spec(
        model.pieces, model.scores, model.types, kind="bpe", special=special_names(config)
    )
    return llama_steps(spec, config)


def llama_steps(spec: Spec, config: Config) -> Spec:
    """`spec`, cutting text as `transformers` 5 does for the class `LlamaTokenizer`.

    That class passes over the steps in `tokenizer.json` (which are SentencePiece's): a space is
    put before a text only if there is none yet, and after a special token never.
    """
    prefix = config.get("add_prefix_space")
    scheme = "never" if prefix is False else "always" if config.get("legacy") else "first"
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if scheme != "never":
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    spaces = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    decoder = {"type": "Sequence", "decoders": decoders}
    return {**spec, "normalizer": None, "pre_tokenizer": spaces, "decoder": decoder}


def _gemma(model: SentencePieceModel, config: Config) -> Spec:
    special = {"<start_of_turn>", "<end_of_turn>", *special_names(config)}
    return sentencepiece_spec(
        model.pieces, model.scores, model.types, kind="bpe", prefix=False, special=special
    )


def _t5(model: SentencePieceModel, config: Config) -> Spec:
    count = int(config.get("extra_ids", 100))
    if not 0 <= count <= MOST_EXTRA:
        raise UserError(f"'extra_ids' is {count}; it must be a number up to {MOST_EXTRA:,}.")
    extra = [f"<extra_id_{i}>" for i in range(count - 1, -1, -1)]
    entries = list(zip(model.pieces, model.scores, model.types, strict=True))
    return _unigram([*entries, *((piece, 0.0, CONTROL) for piece in extra)], model, config)


def _xlm_roberta(model: SentencePieceModel, config: Config) -> Spec:
    first = [("<s>", CONTROL), ("<pad>", CONTROL), ("</s>", CONTROL), ("<unk>", UNKNOWN)]
    entries = list(zip(model.pieces, model.scores, model.types, strict=True))
    pieces = (
        [(piece, 0.0, kind) for piece, kind in first] + entries[3:] + [("<mask>", 0.0, CONTROL)]
    )
    return _unigram(pieces, model, config)


def _unigram(
    entries: list[tuple[str, float, int]], model: SentencePieceModel, config: Config
) -> Spec:
    spec = sentencepiece_spec(
        [piece for piece, _, _ in entries],
        [score for _, score, _ in entries],
        [kind for _, _, kind in entries],
        kind="unigram",
        charsmap=model.charsmap,
        special=special_names(config),
    )
    spec["model"]["byte_fallback"] = False
    return unigram_steps(spec, config)


def unigram_steps(spec: Spec, config: Config) -> Spec:
    """`spec`, cutting text as the classes of T5 and XLM-R do: at white space, then word by word."""
    normalizer = spec.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    charsmap = [step for step in steps if step and step.get("type") == "Precompiled"]
    scheme = "never" if config.get("add_prefix_space") is False else "always"
    spaces = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": True}
    return {
        **spec,
        "normalizer": charsmap[0] if charsmap else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, spaces],
        },
        "decoder": spaces,
    }


# ------------------------------------------------------------------------- the classes


def _roles(**tokens: str) -> Config:
    return {f"{role}_token": token for role, token in tokens.items()}


_BERT = _roles(unk="[UNK]", sep="[SEP]", pad="[PAD]", cls="[CLS]", mask="[MASK]")
_ROBERTA = _roles(
    bos="<s>", eos="</s>", sep="</s>", cls="<s>", unk="<unk>", pad="<pad>", mask="<mask>"
)
_LEFT = {"padding_side": "left"}
_SEGMENTS = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
BERT = TokenizerClass(
    "words", _words, {**_BERT, **_SEGMENTS}, "cls A sep", "cls A sep B sep", segments=True
)
ROBERTA = TokenizerClass("merges", _bytes(), _ROBERTA, "cls A sep", "cls A sep sep B sep")
CLASSES: dict[str, TokenizerClass] = {
    "GPT2Tokenizer": TokenizerClass("merges", _bytes(), _roles(unk=END, bos=END, eos=END)),
    "GPTNeoXTokenizer": TokenizerClass(
        "merges", _bytes("NFC"), _roles(unk=END, bos=END, eos=END, pad="<|padding|>")
    ),
    "Qwen2Tokenizer": TokenizerClass(
        "merges", _bytes("NFC", QWEN_PATTERN), _roles(unk=END, eos=END, pad=END)
    ),
    "RobertaTokenizer": ROBERTA,
    "BartTokenizer": ROBERTA,
    "BertTokenizer": BERT,
    "DistilBertTokenizer": replace(BERT, config=_BERT),
    "MPNetTokenizer": TokenizerClass(
        "words",
        _words,
        {**_ROBERTA, "unk_token": "[UNK]"},
        "cls A sep",
        "cls A sep sep B sep",
        eats_space=("mask_token",),
    ),
    "LlamaTokenizer": TokenizerClass(
        "pieces", _llama, {**_roles(unk="<unk>", bos="<s>", eos="</s>"), **_LEFT}
    ),
    "GemmaTokenizer": TokenizerClass(
        "pieces",
        _gemma,
        {**_roles(unk="<unk>", bos="<bos>", eos="<eos>", pad="<pad>", mask="<mask>"), **_LEFT},
    ),
    "T5Tokenizer": TokenizerClass(
        "pieces", _t5, _roles(eos="</s>", unk="<unk>", pad="<pad>"), "A eos", "A eos B eos"
    ),
    "XLMRobertaTokenizer": TokenizerClass(
        "pieces", _xlm_roberta, _ROBERTA, "bos A eos", "bos A eos eos B eos"
    ),
}
# The class of a folder whose tokenizer_config.json names none, by `model_type` of its config.json.
OF_MODEL = {
    "gpt2": "GPT2Tokenizer", "gpt_neox": "GPTNeoXTokenizer", "llama": "LlamaTokenizer",
    "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "qwen3_moe": "Qwen2Tokenizer",
    "gemma": "GemmaTokenizer", "gemma2": "GemmaTokenizer", "gemma3": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer", "bert": "BertTokenizer", "distilbert": "BertTokenizer",
    "roberta": "RobertaTokenizer", "bart": "RobertaTokenizer", "mpnet": "MPNetTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer", "t5": "T5Tokenizer", "mt5": "T5Tokenizer",
    "marian": "MarianTokenizer",
}  # fmt: skip
# Classes that are no more than the file they read, and what is assumed of such a file.
UNSPOKEN = {None, "PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend"}
PLAIN = {
    "pieces": TokenizerClass("pieces", plain_pieces),
    "words": BERT,
    "merges": CLASSES["GPT2Tokenizer"],
}


def class_name(config: Config) -> str | None:
    """The class of a folder, by its tokenizer_config.json or else the kind of model beside it."""
    name = config.get("tokenizer_class") or OF_MODEL.get(str(config.get("model_type")))
    if name is None or not isinstance(name, str):
        return None
    return name if name == "PreTrainedTokenizerFast" else name.removesuffix("Fast")


def class_for(config: Config, files: str, where: object) -> TokenizerClass:
    """The class that reads vocabularies of the kind `files` in the folder `where`."""
    name = class_name(config)
    if name == "LlamaTokenizer" and files == "pieces" and not _as_llama(config):
        return PLAIN[files]
    if name in CLASSES and CLASSES[name].files == files:
        return CLASSES[name]
    # Byte-level vocabularies are cut alike whatever the class; of others the ids would be wrong.
    if name in UNSPOKEN or files == "merges":
        return PLAIN[files]
    raise UserError(
        f"{where} has no tokenizer.json, and how the class '{name}' reads its vocabulary is not "
        f"known (known are {', '.join(CLASSES)}). Take a version of the model with a "
        "tokenizer.json."
    )


def build(kind: TokenizerClass, files: Any, config: Config) -> tuple[Spec, Config]:
    """The specification and the completed config of a vocabulary that was read as `kind`."""
    config = kind.config | {key: value for key, value in config.items() if value is not None}
    spec = kind.build(files, config)
    add_special(spec, kind, config)
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    if kind.single is None:
        single, pair = "bos A eos", "bos A eos bos B eos"
        wanted = [role for role in ("bos", "eos") if config.get(f"add_{role}_token")]
        names = {role: str(config.get(f"{role}_token")) for role in wanted}
    else:
        single, pair = kind.single, kind.pair
        names = {role.removesuffix("_token"): token for role, token in _role_tokens(config)}
    spec["post_processor"] = template(single, pair, names, ids, kind.segments)
    return spec, config


def _role_tokens(config: Config) -> list[tuple[str, str]]:
    return [
        (role, token)
        for role, token in config.items()
        if role.endswith("_token") and isinstance(token, str)
    ]


def special_names(config: Config) -> list[str]:
    """All tokens that the config calls special, whatever their role."""
    extra: list[Any] = list(config.get("additional_special_tokens") or [])
    more = config.get("extra_special_tokens") or []
    extra += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
    names = [token for _, token in _role_tokens(config)]
    names += [token for entry in extra if (token := token_text(entry)) is not None]
    names += [
        str(token_text(token))
        for token in (config.get("added_tokens_decoder") or {}).values()
        if token.get("special")
    ]
    return list(dict.fromkeys(names))


def add_special(spec: Spec, kind: TokenizerClass, config: Config) -> None:
    """Mark what the config calls special, and add the tokens that were added later."""
    vocab = spec["model"]["vocab"]
    pairs = enumerate(p for p, _ in vocab) if isinstance(vocab, list) else _swapped(vocab)
    ids = {token: number for number, token in pairs}
    added = {token["content"]: token for token in spec["added_tokens"]}
    flags: dict[str, Mapping[str, Any]] = dict(config.get("token_flags") or {})
    special = set(special_names(config))
    later = dict(config.get("added_tokens.json") or {})
    for number, entry in (config.get("added_tokens_decoder") or {}).items():
        later[str(token_text(entry))] = int(number)
        flags[str(token_text(entry))] = entry
    eats = {config.get(role) for role in kind.eats_space}
    for token in dict.fromkeys([*special, *later]):
        number = ids.get(token, later.get(token))
        if number is None:
            continue  # a role that this vocabulary does not fill
        entry = {**added_token(token, number, special=token in special or token not in added)}
        if token in later and token not in special:
            entry["special"] = bool(flags.get(token, {}).get("special", True))
            entry["normalized"] = not entry["special"]
        entry["lstrip"] = token in eats
        for name in ("single_word", "lstrip", "rstrip", "normalized"):
            if isinstance(flag := flags.get(token, {}).get(name), bool):
                entry[name] = flag
        added[token] = entry
    spec["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])


def _swapped(vocab: Mapping[str, int]) -> Iterable[tuple[int, str]]:
    return ((number, token) for token, number in vocab.items())


def with_defaults(spec: Spec, config: Config) -> Config:
    """`config`, and for what it leaves out what its class assumes, if the vocabulary has it."""
    kind = CLASSES.get(class_name(config) or "")
    if kind is None:
        return config
    vocab = spec["model"]["vocab"]
    known = {token["content"] for token in spec.get("added_tokens") or []}
    if isinstance(vocab, list):
        known |= {p[0] for p in vocab if isinstance(p, list) and p and isinstance(p[0], str)}
    else:
        known |= set(vocab)
    assumed = {
        key: value
        for key, value in kind.config.items()
        if not key.endswith("_token") or value in known
    }
    return assumed | config


def as_class(spec: Spec, config: Config) -> Spec:
    """The content of a `tokenizer.json`, as the class that is named beside it reads it.

    `transformers` 5 takes the vocabulary from the file and the steps from the class, so where files
    of a family differ in their steps (some had been converted carelessly) ids do not. This is
    followed for SentencePiece's families. It is not for GPT-2's, where it would lose steps that
    models were trained with, such as cutting numbers into digits.
    """
    name, kind = class_name(config), spec["model"].get("type")
    if name == "LlamaTokenizer" and kind == "BPE" and _as_llama(config):
        named = config.get("tokenizer_class") is not None and not is_byte_level(spec)
        return llama_steps(spec, config) if named else spec
    if name in ("T5Tokenizer", "XLMRobertaTokenizer") and kind == "Unigram":
        return unigram_steps(spec, config)
    return spec


def rebuilds_the_same(spec: Spec, config: Config) -> bool:
    """Whether the class that is named makes of this `tokenizer.json` exactly what it says.

    Then its name may stay: such a class reads scores to the last digit, which taking the file as it
    is does not, and in rows of equal characters that decides.
    """
    unknown = {"T5Tokenizer": 2, "XLMRobertaTokenizer": 3}.get(class_name(config) or "")
    same = unknown is not None and spec["model"].get("unk_id") == unknown
    return same and as_class(spec, config) == spec


def _as_llama(config: Config) -> bool:
    """Mistral, for one, names the class as well, but is read as its files say."""
    return config.get("model_type") in (None, *OF_MODEL)
