"""How a byte-level BPE vocabulary cuts text into words: llama.cpp's names for it.

A GGUF file has only a name (`tokenizer.ggml.pre`); the expressions behind it are in llama.cpp's
`llama-vocab.cpp`. Here they stand as the models' own tokenizer.json have them, with the
normalisation that goes with them, and serve both ways: from the name to a specification, and from
a specification to the name that means the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tokenizers

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.text.checks import Spec
from llm_from_scratch.text.formats import byte_level
from llm_from_scratch.text.pretokenize import GPT2_PATTERN

DIGIT = r"\p{N}"


@dataclass(frozen=True)
class Cut:
    """Each expression cuts what the one before left whole.

    `whole_words`: a word that is in the vocabulary is one token, whatever the merges say.
    """

    patterns: tuple[str, ...] = (GPT2_PATTERN,)
    normalizer: str | None = None
    whole_words: bool = False


_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ONE_DIGIT = _LLAMA3.replace("{1,3}", "")
_MARKS = (
    _SUFFIX + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = (  # a word begins anew at a capital letter
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_HAN = "[一-龥ࠀ-一가-퟿]+"
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|%s]+"
_THREE_DIGITS = "[0-9][0-9][0-9]"

# Of several names for the same cut the first is written.
CUTS: dict[str, Cut] = {
    "gpt-2": Cut(),
    "smollm": Cut((DIGIT, GPT2_PATTERN)),
    "llama-bpe": Cut((_LLAMA3,), whole_words=True),
    "qwen2": Cut((_ONE_DIGIT,), "NFC"),
    "olmo": Cut(normalizer="NFC"),
    "dbrx": Cut((_LLAMA3,)),
    "starcoder": Cut((DIGIT, GPT2_PATTERN)),
    "refact": Cut((DIGIT, GPT2_PATTERN)),
    "codeshell": Cut((DIGIT, GPT2_PATTERN)),
    "command-r": Cut((DIGIT, GPT2_PATTERN), "NFC"),
    "mpt": Cut(normalizer="NFC"),
    "roberta-bpe": Cut(),
    "modern-bert": Cut(normalizer="NFC"),
    "llama3": Cut((_LLAMA3,), whole_words=True),
    "smaug-bpe": Cut((_LLAMA3,)),
    "glm4": Cut((_LLAMA3,), whole_words=True),
    "chatglm-bpe": Cut((_LLAMA3,)),
    "stablelm2": Cut((_ONE_DIGIT,), "NFC"),
    "qwen35": Cut((_MARKS,)),
    "tekken": Cut((_CASED % ("", "", ""),), whole_words=True),
    "gpt-4o": Cut((_CASED % (f"{_SUFFIX}?", f"{_SUFFIX}?", "{1,3}"),)),
    "falcon": Cut((_PUNCTUATION % "`", GPT2_PATTERN, _THREE_DIGITS)),
    "deepseek-coder": Cut(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_HAN, DIGIT)),
    "default": Cut((_PUNCTUATION % "", GPT2_PATTERN, r"\p{N}+", _THREE_DIGITS)),
}  # fmt: skip


def cut_named(name: str, where: object) -> Cut:
    """The cut behind a `tokenizer.ggml.pre` of the file `where`."""
    if name not in CUTS:
        raise UserError(
            f"{where}: 'tokenizer.ggml.pre' is '{name}'; known are {', '.join(CUTS)}."
            + nearest(name, CUTS)
        )
    return CUTS[name]


def apply_cut(spec: Spec, cut: Cut) -> None:
    """Let the specification of a byte-level BPE vocabulary cut text so."""
    *first, last = cut.patterns
    steps: list[dict[str, Any]] = [_split(pattern) for pattern in first]
    if last == GPT2_PATTERN:
        steps.append(byte_level())
    else:
        steps += [_split(last), {**byte_level(), "use_regex": False}]
    spec["pre_tokenizer"] = (
        steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
    )
    spec["normalizer"] = {"type": cut.normalizer} if cut.normalizer else None
    spec["model"]["ignore_merges"] = cut.whole_words


def _split(pattern: str) -> dict[str, Any]:
    if pattern == DIGIT:
        return {"type": "Digits", "individual_digits": True}
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def name_of_cut(spec: Spec) -> str:
    """llama.cpp's name for how a byte-level BPE specification cuts text; a `UserError` if none.

    llama.cpp never normalises, as most texts are NFC already: NFC or nothing is left to the name.
    """
    patterns: list[str] = []
    for step in flat_steps(spec.get("pre_tokenizer")):
        if (pattern := _pattern(step)) is None:
            raise _no_name(f"the pre-tokenizer {step.get('type')}")
        if pattern:
            patterns.append(_plain(pattern))
    normalizer = "+".join(part["type"] for part in flat_steps(spec.get("normalizer")))
    if normalizer not in ("", "NFC"):
        raise _no_name(f"the normalisation {normalizer}")
    words = bool(spec["model"].get("ignore_merges"))
    same = {name: cut for name, cut in CUTS.items() if [*map(_plain, cut.patterns)] == patterns}
    for name, cut in same.items():
        if cut.whole_words == words and (cut.normalizer or "") == normalizer:
            return name
    for name, cut in same.items():
        if cut.whole_words == words or _merges_reach_every_token(spec):
            return name
    raise _no_name("this way to cut text into words")


def _no_name(what: str) -> UserError:
    return UserError(
        f"llama.cpp has no name for {what}, so it would cut text into other tokens; save the model "
        "as a Hugging Face folder, or train a tokenizer for English text, which cuts as GPT-2 does."
    )


def flat_steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences taken apart."""
    if not part:
        return []
    inner = part.get("pretokenizers", part.get("normalizers"))
    return [part] if inner is None else [step for one in inner for step in flat_steps(one)]


def _pattern(step: dict[str, Any]) -> str | None:
    """The expression of one step; "" for none, None for what no expression says."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return GPT2_PATTERN if step.get("use_regex", True) else ""
        case {"type": "Digits", "individual_digits": True}:
            return DIGIT
        case {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": pattern}}:
            return str(pattern) if not step.get("invert") else None
        case {"type": "Split", "behavior": "Removed", "invert": True, "pattern": {"Regex": str(p)}}:
            return p  # GPT-4o's: what matches is kept, and everything matches
    return None


def _plain(pattern: str) -> str:
    """Without the possessive marks, which make an expression quicker but match the same."""
    return pattern.replace("?+", "?").replace("++", "+")


def _merges_reach_every_token(spec: Spec) -> bool:
    """Whether the merges make each token, so that looking up whole words adds nothing."""
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    split = (m.split(" ") if isinstance(m, str) else m for m in merges)
    pairs = [(str(left), str(right)) for left, right in split]
    model = tokenizers.models.BPE(vocab, pairs)
    added = {token["content"] for token in spec["added_tokens"]}
    return all(len(model.tokenize(token)) == 1 for token in vocab if token not in added)
