"""The tokenizer inside a GGUF file, from its `tokenizer.ggml.*` metadata.

GGUF knows four kinds of vocabulary that we have, each under a historical name: `gpt2` is byte-level
BPE, `llama` SentencePiece's BPE (with scores instead of merges), `t5` its Unigram, and `bert`
WordPiece. What each becomes here is a specification like that of a `tokenizer.json`.
"""

from __future__ import annotations

from typing import Any

from llm_from_scratch.core.errors import UserError, nearest, shown
from llm_from_scratch.text.checks import Spec
from llm_from_scratch.text.formats import added_token, bpe_spec
from llm_from_scratch.text.inputs import template
from llm_from_scratch.text.sentencepiece_spec import (
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    sentencepiece_spec,
)
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.wordpiece_spec import CONTINUES, wordpiece_spec
from llm_from_scratch.weights.gguf import GGUF
from llm_from_scratch.weights.gguf_cuts import apply_cut, cut_named

PREFIX = "tokenizer.ggml."
# GGUF's name of a special token's role -> that of a tokenizer_config.json.
ROLES = {
    "bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token",
    "cls": "cls_token", "seperator": "sep_token", "mask": "mask_token",
}  # fmt: skip
# What llama.cpp assumes where the file is silent.
DEFAULT_IDS = {
    "gpt2": {},
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "t5": {"eos": 1, "unknown": 2, "padding": 0},
    "bert": {"unknown": 100, "cls": 101, "seperator": 102, "mask": 103, "padding": 0},
}
ADDS_BOS = ("llama-bpe", "llama3", "tekken")  # of the BPE vocabularies, by `pre`


def padding_name(number: int) -> str:
    """What stands in a GGUF vocabulary for an id that no token has."""
    return f"[PAD{number}]"


def read_tokenizer(file: GGUF) -> Tokenizer | None:
    """The tokenizer of a GGUF file, with its special tokens and chat template; None without one.

    Raises `UserError` naming the key for a vocabulary of another kind or an unknown pre-tokeniser.
    """
    kind = _get(file, "model", str)
    if kind in ("none", "no_vocab"):
        return None
    if kind not in DEFAULT_IDS:
        raise UserError(
            f"{file.path}: 'tokenizer.ggml.model' is {shown(kind)}; vocabularies of the kinds "
            f"{', '.join(DEFAULT_IDS)} can be read.{nearest(kind, DEFAULT_IDS)} Take the model as "
            "a Hugging Face folder instead."
        )
    tokens, types = _vocabulary(file)
    config = _config(file, kind, tokens)
    try:
        spec = _spec(file, kind, tokens, types)
        spec["post_processor"] = _around(spec, config, kind)
        tokenizer = Tokenizer.from_spec(spec, config)
        tokenizer.source = file.path
    except UserError as error:
        if str(error).startswith(str(file.path)):
            raise
        raise UserError(f"{file.path}: {error}") from error
    if (end_of_turn := _token_id(file, "eot", len(tokens))) is not None:
        tokenizer.extra_stop_ids.add(end_of_turn)
    return tokenizer


def _vocabulary(file: GGUF) -> tuple[list[str], list[int]]:
    """The tokens and their types, without the padding up to the rows of the embedding."""
    tokens = _texts(file, "tokens")
    types = _numbers(file, "token_type", len(tokens), NORMAL)
    end = len(tokens)
    while end and types[end - 1] == UNUSED and tokens[end - 1] == padding_name(end - 1):
        end -= 1
    return tokens[:end], [int(kind) for kind in types[:end]]


def _spec(file: GGUF, kind: str, tokens: list[str], types: list[int]) -> Spec:
    if kind == "gpt2":
        return _bpe(file, tokens, types)
    if kind == "bert":
        return _wordpiece(file, tokens, types)
    scores = _numbers(file, "scores", len(tokens), 0.0)
    unknown = _token_id(file, "unknown", len(tokens), DEFAULT_IDS[kind]["unknown"])
    if unknown is not None:  # some files call all kinds of reserved tokens unknown
        types = [CONTROL if kind_ == UNKNOWN else kind_ for kind_ in types]
        types[unknown] = UNKNOWN
    charsmap = _get(file, "precompiled_charsmap", list, [])
    if not all(isinstance(byte, int) for byte in charsmap):
        raise UserError(
            f"{file.path}: '{PREFIX}precompiled_charsmap' is not a list of bytes. Download it anew."
        )
    return sentencepiece_spec(
        tokens,
        [float(score) for score in scores],
        types,
        kind="bpe" if kind == "llama" else "unigram",
        prefix=_get(file, "add_space_prefix", bool, kind == "llama"),
        merge_spaces=_get(file, "remove_extra_whitespaces", bool, False),
        charsmap=bytes(byte & 255 for byte in charsmap),
    )


def _bpe(file: GGUF, tokens: list[str], types: list[int]) -> Spec:
    """Byte-level BPE, as GPT-2 has it: its merges are in the file, its cuts have a name."""
    cut = cut_named(_get(file, "pre", str, "default"), file.path)
    spec = bpe_spec(tokens, _texts(file, "merges"))
    apply_cut(spec, cut)
    spec["added_tokens"] = _added(tokens, types)
    return spec


def _added(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    return [
        # llama.cpp looks for both in the text as it is, before any normalisation.
        {**added_token(token, number, special=kind == CONTROL), "normalized": False}
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]


def _wordpiece(file: GGUF, tokens: list[str], types: list[int]) -> Spec:
    """BERT's WordPiece: GGUF marks the tokens that begin a word, we those that go on (`##`)."""
    unknown = _token_id(file, "unknown", len(tokens), DEFAULT_IDS["bert"]["unknown"])
    plain = [
        token
        if kind in (CONTROL, UNKNOWN) or number == unknown
        else token.removeprefix(SPACE)
        if token.startswith(SPACE)
        else CONTINUES + token
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
    ]
    vocab = {token: number for number, token in enumerate(plain)}
    if len(vocab) != len(plain) or unknown is None:
        raise UserError("The vocabulary has the same token twice, or none for unknown words.")
    lowercase = _get(file, "normalizer.lowercase", bool, True)
    accents = _get(file, "normalizer.strip_accents", bool, lowercase)
    spec = wordpiece_spec(vocab, unknown=plain[unknown], lowercase=lowercase, strip_accents=accents)
    spec["added_tokens"] = _added(plain, types)
    return spec


def _config(file: GGUF, kind: str, tokens: list[str]) -> dict[str, Any]:
    """The `tokenizer_config.json` that says the same."""
    config: dict[str, Any] = {}
    for role, name in ROLES.items():
        number = _token_id(file, role, len(tokens), DEFAULT_IDS[kind].get(role))
        if number is not None:
            config[name] = tokens[number]
    if kind == "bert":
        # A text begins with [CLS] and ends with [SEP]; files call the first bos, cls or both.
        if (first := _token_id(file, "bos", len(tokens))) is not None:
            config["cls_token"] = tokens[first]
        config.pop("bos_token", None)
        config.pop("eos_token", None)
    else:
        by_name = kind == "gpt2" and _get(file, "pre", str, "default") in ADDS_BOS
        for key, default in (
            ("add_bos_token", kind == "llama" or by_name),
            ("add_eos_token", kind == "t5"),
        ):
            if _get(file, key, bool, default):
                config[key] = True
    template = file.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{file.path}: 'tokenizer.chat_template' is not of the type str.")
    if template:
        config["chat_template"] = template
    return config


def _around(spec: Spec, config: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """The `post_processor` that puts the special tokens around a text, or a pair of texts."""
    if kind == "bert":
        names = {"first": config.get("cls_token"), "last": config.get("sep_token")}
        single, pair = "first A last", "first A last B last"
    else:
        names = {
            "first": config.get("bos_token") if config.get("add_bos_token") else None,
            "last": config.get("eos_token") if config.get("add_eos_token") else None,
        }
        single, pair = "first A last", "first A last first B last"
    vocab = spec["model"]["vocab"]
    own = vocab if isinstance(vocab, dict) else {}
    ids = {token: own[token] for token in map(str, names.values()) if token in own}
    ids |= {token["content"]: token["id"] for token in spec["added_tokens"]}
    known = {role: str(token) for role, token in names.items() if token in ids}
    return template(single, pair, known, ids, segments=kind == "bert") if known else None


def _token_id(file: GGUF, role: str, count: int, default: int | None = None) -> int | None:
    """The id of a special token; a default counts only where there is such a token."""
    number: int | None = _get(file, f"{role}_token_id", int, None)
    if number is None:
        return default if default is not None and default < count else None
    if not 0 <= number < count:
        raise UserError(
            f"{file.path}: '{PREFIX}{role}_token_id' is {number}, but there are {count} tokens. "
            "Download it anew."
        )
    return number


_REQUIRED = object()


def _get(file: GGUF, name: str, kind: type, default: Any = _REQUIRED) -> Any:
    key = PREFIX + name
    value = file.metadata.get(key, default)
    if value is _REQUIRED:
        raise UserError(f"{file.path} lacks '{key}', so it has no tokenizer that can be read.")
    if value is not default and not isinstance(value, kind):
        raise UserError(f"{file.path}: '{key}' is not of the type {kind.__name__}.")
    return value


def _texts(file: GGUF, name: str) -> list[str]:
    values = _get(file, name, list)
    if not all(isinstance(value, str) for value in values):
        raise UserError(f"{file.path}: '{PREFIX}{name}' is not a list of texts. Download it anew.")
    return list(values)


def _numbers(file: GGUF, name: str, count: int, default: float) -> list[Any]:
    values = _get(file, name, list, None)
    if values is None:
        return [default] * count
    if len(values) < count:
        raise UserError(
            f"{file.path}: '{PREFIX}{name}' has {len(values)} entries, but there are {count} "
            "tokens. Download it anew."
        )
    if not all(isinstance(value, int | float) and abs(value) < 1e30 for value in values):
        raise UserError(f"{file.path}: '{PREFIX}{name}' is not a list of sound numbers.")
    return list(values[:count])
