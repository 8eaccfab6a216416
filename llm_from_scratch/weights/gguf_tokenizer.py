"""The tokenizer inside a GGUF file, from its `tokenizer.ggml.*` metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.text.checks import Spec
from llm_from_scratch.text.formats import added_token, bpe_spec, byte_level
from llm_from_scratch.text.pretokenize import GPT2_PATTERN
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.gguf import GGUF

CONTROL, USER_DEFINED = 3, 4  # of `tokenizer.ggml.token_type`: special, and added but ordinary


@dataclass(frozen=True)
class Cut:
    """How a pre-tokeniser named in `tokenizer.ggml.pre` cuts text into words.

    The file has the name only; the expressions are those of llama.cpp's `llama-vocab.cpp`, and
    `normalizer` and `ignore_merges` those of the models' own tokenizer.json.
    """

    patterns: tuple[str, ...] = (GPT2_PATTERN,)
    individual_digits: bool = False
    normalizer: str | None = None
    ignore_merges: bool = False


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PRE_TOKENIZERS = {
    "default": Cut((r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": Cut(),
    "smollm": Cut(individual_digits=True),
    "llama-bpe": Cut((_LLAMA3,), ignore_merges=True),
    "qwen2": Cut((_LLAMA3.replace("{1,3}", ""),), normalizer="NFC"),
}


def read_tokenizer(file: GGUF) -> Tokenizer:
    """The byte-level BPE tokenizer of a GGUF file, with its special tokens and chat template.

    Raises `UserError` naming the key for a vocabulary of another kind or an unknown
    pre-tokeniser.
    """
    kind = _get(file, "tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise UserError(
            f"{file.path}: 'tokenizer.ggml.model' is '{kind}'; byte-level BPE ('gpt2') can be "
            "read. Take the model as a Hugging Face folder instead."
        )
    name = _get(file, "tokenizer.ggml.pre", str, "default")
    if name not in PRE_TOKENIZERS:
        raise UserError(
            f"{file.path}: 'tokenizer.ggml.pre' is '{name}'; known are {', '.join(PRE_TOKENIZERS)}."
            + nearest(name, PRE_TOKENIZERS)
        )
    tokens = _texts(file, "tokenizer.ggml.tokens")
    types = _get(file, "tokenizer.ggml.token_type", list, [1] * len(tokens))
    if len(types) != len(tokens):
        raise UserError(
            f"{file.path}: 'tokenizer.ggml.token_type' has {len(types)} entries, but there are "
            f"{len(tokens)} tokens. Download it anew."
        )
    try:
        spec = _spec(PRE_TOKENIZERS[name], tokens, types, _texts(file, "tokenizer.ggml.merges"))
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from error
    tokenizer = Tokenizer.from_spec(spec, _config(file, tokens))
    if (end_of_turn := _token_id(file, "eot", len(tokens))) is not None:
        tokenizer.extra_stop_ids.add(end_of_turn)
    return tokenizer


def _spec(cut: Cut, tokens: list[str], types: list[int], merges: list[str]) -> Spec:
    spec = bpe_spec(
        tokens,
        merges,
        pattern=cut.patterns[0],
        special=[token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL],
        individual_digits=cut.individual_digits,
        normalizer=cut.normalizer,
        ignore_merges=cut.ignore_merges,
    )
    if len(cut.patterns) > 1:
        # Each expression cuts what the one before left whole.
        steps: list[dict[str, Any]] = [
            {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            }
            for pattern in cut.patterns
        ]
        letters = {**byte_level(), "use_regex": False}
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, letters]}
    for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == USER_DEFINED:
            spec["added_tokens"].append(added_token(token, number, special=False))
    spec["added_tokens"].sort(key=lambda token: token["id"])
    return spec


def _config(file: GGUF, tokens: list[str]) -> dict[str, Any]:
    """The `tokenizer_config.json` that says the same."""
    config: dict[str, Any] = {}
    for theirs, ours in {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}.items():
        if (number := _token_id(file, theirs, len(tokens))) is not None:
            config[f"{ours}_token"] = tokens[number]
    for key in ("add_bos_token", "add_eos_token"):
        if _get(file, f"tokenizer.ggml.{key}", bool, False):
            config[key] = True
    if template := _get(file, "tokenizer.chat_template", str, None):
        config["chat_template"] = template
    return config


def _token_id(file: GGUF, role: str, count: int) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    number: int | None = _get(file, key, int, None)
    if number is not None and not 0 <= number < count:
        raise UserError(
            f"{file.path}: '{key}' is {number}, but there are {count} tokens. Download it anew."
        )
    return number


_REQUIRED = object()


def _get(file: GGUF, key: str, kind: type, default: Any = _REQUIRED) -> Any:
    value = file.metadata.get(key, default)
    if value is _REQUIRED:
        raise UserError(f"{file.path} lacks '{key}', so it has no tokenizer that can be read.")
    if value is not default and not isinstance(value, kind):
        raise UserError(f"{file.path}: '{key}' is not of the type {kind.__name__}.")
    return value


def _texts(file: GGUF, key: str) -> list[str]:
    values = _get(file, key, list)
    if not all(isinstance(value, str) for value in values):
        raise UserError(f"{file.path}: '{key}' is not a list of texts. Download it anew.")
    return list(values)
