"""Text of a given form: JSON that a schema describes, what a pattern matches, one of some texts.

At each step a grammar says which tokens of the vocabulary may come next, and the chooser draws
among those alone. The grammar engine is `llguidance` (the extra `structured`); here it is given
our tokenizers' bytes, and kept to JSON without endless white space: one space at most after a
comma or a colon, and none elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from llm_from_scratch.core.errors import UserError, shown
from llm_from_scratch.generate.settings import SamplingSettings
from llm_from_scratch.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}

LEXER_FUEL = 200_000  # a pattern that would keep everybody waiting for seconds is refused

# By tokenizer; a tokenizer can be given more tokens, so what was read of it is part of the key.
_Key = tuple[int, frozenset[int], frozenset[int]]
_read: WeakKeyDictionary[Tokenizer, dict[_Key, tuple[_Vocabulary, LLTokenizer]]]
_read = WeakKeyDictionary()


class Constraint:
    """Where one text stands in its grammar. `make_constraint` makes one; copies are independent.

    Attributes:
        finished: whether nothing can come any more: the end token was accepted, or only the end
            token could follow. The text may then be ended at once.
    """

    def __init__(self, matcher: LLMatcher, stop_ids: Collection[int]) -> None:
        self._matcher = matcher
        self._stop_ids = frozenset(stop_ids)
        self.finished = False

    @property
    def complete(self) -> bool:
        """Whether the text so far has the form that was asked for; it may yet be able to grow."""
        return bool(self._matcher.is_accepting()) and not self._matcher.is_error()

    @property
    def error(self) -> str | None:
        """Why the grammar gave up (it can grow too complex), or None; it then allows the end
        alone, and the text is not `complete`."""
        return _first_line(self._matcher.get_error()) if self._matcher.is_error() else None

    def allowed(self, vocab_size: int) -> Tensor:
        """Which tokens may come next: boolean (vocab_size,), on the CPU.

        `vocab_size` is that of the logits, which may be wider than the tokenizer's.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        found = np.unpackbits(bits, count=min(vocab_size, 8 * len(bits)), bitorder="little")
        allowed_v = torch.zeros(vocab_size, dtype=torch.bool)
        allowed_v[: len(found)] = torch.from_numpy(found.view(np.bool_))
        return allowed_v

    def accept(self, token: int) -> None:
        """Take note that `token` was written."""
        if self.finished:
            return
        if token not in self._stop_ids:
            self._matcher.consume_token(token)
        self.finished = token in self._stop_ids or bool(self._matcher.is_stopped())

    def copy(self) -> Constraint:
        """One more that goes on from here by itself."""
        twin = Constraint(self._matcher.deep_copy(), self._stop_ids)
        twin.finished = self.finished
        return twin


def make_constraint(
    settings: SamplingSettings,
    tokenizer: Tokenizer,
    *,
    stop_ids: Collection[int] | None = None,
    previous: int | None = None,
) -> Constraint | None:
    """The constraint that the settings ask for; None where they ask for none.

    `stop_ids` end the text (as a rule, and if None, the tokenizer's). `previous` is the token
    after which the text begins. Raises `UserError` where the schema or pattern is wrong or not
    supported, or the vocabulary cannot write what it asks for.
    """
    if not wants_form(settings):
        return None
    rule = tokenizer.bytes_rule
    if not rule.exact:
        raise UserError(
            "This model's tokenizer does not say which text its tokens stand for (spaces are "
            "guessed when text is put together), so the form of a text cannot be assured. Use a "
            "model with a byte-level or SentencePiece vocabulary."
        )
    stop_ids = tokenizer.stop_ids if stop_ids is None else stop_ids
    vocabulary, tree = _vocabulary(tokenizer, stop_ids)
    matcher = _matcher(settings, tree, False)
    constraint = Constraint(matcher, stop_ids)
    possible = constraint.allowed(tree.vocab_size).nonzero()[:, 0].tolist()
    if not possible or (constraint.error or "").startswith("NoExtension"):
        raise UserError(
            f"This model's vocabulary cannot begin what {_form(settings)} asks for: it lacks the "
            "characters, or no text has that form."
        )
    # What every such text begins with can be half a character: the whole ones are looked at.
    forced = matcher.compute_ff_bytes().decode("utf-8", "ignore")
    for text in (*settings.choice, forced):
        if not vocabulary.spells(text):
            raise UserError(
                f"This model's vocabulary cannot write {shown(text)}, as {_form(settings)} asks: "
                "it lacks one of the characters."
            )
    first = constraint.copy()
    first.accept(possible[0])  # a pattern that is too large may show it only now
    if error := constraint.error or first.error:
        raise UserError(f"{_refusal(settings)}: {error}")
    # Where the first space of a text is not shown (T5, Llama 2), a text may begin with one.
    begins = previous is None or previous in tokenizer.special_tokens.values()
    if begins and (rule.strip or rule.first_space):
        return Constraint(_matcher(settings, tree, True), stop_ids)
    return constraint


def _matcher(settings: SamplingSettings, tree: LLTokenizer, drops_space: bool) -> LLMatcher:
    engine = _engine()
    limits = engine.LLParserLimits(initial_lexer_fuel=LEXER_FUEL, verbose_errors=False)
    matcher: LLMatcher = engine.LLMatcher(
        tree, _grammar(settings, drops_space), log_level=0, limits=limits
    )
    return matcher


def wants_form(settings: SamplingSettings) -> bool:
    """Whether the settings ask for a form of the text."""
    return (settings.json_schema, settings.regex, settings.choice) != (None, None, ())


def check_form(settings: SamplingSettings) -> None:
    """Refuse a wrong schema or pattern while there is no model yet; `UserError` says why."""
    if not wants_form(settings):
        return
    error = _engine().LLMatcher.validate_grammar(_grammar(settings, False))
    if error and not error.startswith("WARNING"):
        raise UserError(f"{_refusal(settings)}: {_first_line(error)}")


def _engine() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise UserError(
            "Structured output needs the package llguidance: pip install 'scratchlm[structured]'."
        ) from error
    return llguidance


def _form(settings: SamplingSettings) -> str:
    if settings.json_schema is not None:
        return "the JSON schema"
    return "the choice" if settings.choice else f"the pattern {shown(settings.regex)}"


def _refusal(settings: SamplingSettings) -> str:
    form = _form(settings)
    return f"{form[0].upper()}{form[1:]} is wrong, or asks for what is not supported"


def _first_line(error: str) -> str:
    """The reason out of a message that goes on to draw where it stands."""
    if found := re.search(r"^error: (.+)$", error, re.MULTILINE):
        error = found[1]
    line = error.strip().split("\n")[0].removeprefix("ERROR: ")
    line = re.sub(r"^(at \d+\(\d+\): )?(failed to compile JSON schema: )?", "", line)
    return (line if len(line) <= 200 else line[:200] + "...").rstrip(".") + "."


def _grammar(settings: SamplingSettings, drops_space: bool) -> str:
    """The form in llguidance's dialect of Lark."""
    space = '" "? ' if drops_space else ""
    if settings.json_schema is not None:
        body = json.dumps({**_schema(settings.json_schema), "x-guidance": JSON_OPTIONS})
        return f"start: {space}body\nbody: %json {body}"
    if settings.regex is not None:
        # \d is 0-9: the digits of all scripts, which differ between versions of Unicode, surprise.
        pattern = _engine().regex_to_lark(settings.regex, "d")
        return f"start: TEXT\nTEXT: {space}/{pattern}/" if pattern else 'start: ""'
    texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in settings.choice)
    return f"start: TEXT\nTEXT: {space}({texts})"


def _schema(schema: Mapping[str, Any] | str) -> dict[str, Any]:
    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        if isinstance(schema, Mapping):
            # What JSON cannot say (a Python class, a set, a loop) comes to light here.
            return dict(json.loads(json.dumps(dict(schema), allow_nan=False)))
    except (TypeError, ValueError, RecursionError) as error:
        reason = "it nests too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"The JSON schema is not valid JSON: {reason}.") from error
    raise UserError(
        f"The JSON schema is {shown(schema)}; it must be an object such as "
        '{"type": "object", "properties": {"name": {"type": "string"}}}.'
    )


class _Vocabulary:
    """A tokenizer as llguidance wants to see it; b"" is a token that stands for no text."""

    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()
    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, silent: Collection[int]) -> None:
        size = len(tokenizer.tokens)
        self.tokens = [b"" if i in silent else tokenizer.token_bytes(i) for i in range(size)]
        self.tokens.append(b"")  # the end, for vocabularies that have no token for it
        self.eos_token_id = size
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        """The tokens of a text that must come, from its middle on: they spell it exactly."""
        data = text if isinstance(text, bytes) else text.encode()
        text = data.decode("utf-8", "replace")
        # SentencePiece puts a space before what it takes for a beginning, so there is a line first.
        for before in ("", "\n"):
            ids = self._tokenizer.encode(before + text)
            while ids and len(self._spelled(ids)) > len(data):
                ids = ids[1:]
            if self._spelled(ids) == data:
                return ids
        return self._longest(data)

    def spells(self, text: str) -> bool:
        """Whether there are tokens for all of it."""
        return self._spelled(self(text)) == text.encode()

    def _spelled(self, ids: list[int]) -> bytes:
        return b"".join(self.tokens[i] for i in ids)

    def _longest(self, data: bytes) -> list[int]:
        """The longest token each time."""
        ids: list[int] = []
        place = 0
        while place < len(data):
            ends = range(min(len(data), place + self._most), place, -1)
            end = next((end for end in ends if data[place:end] in self._by_bytes), None)
            if end is None:
                break
            ids.append(self._by_bytes[data[place:end]])
            place = end
        return ids

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        return {data: i for i, data in enumerate(self.tokens) if data}

    @cached_property
    def _most(self) -> int:
        return max(map(len, self.tokens))


def _vocabulary(tokenizer: Tokenizer, stop_ids: Collection[int]) -> tuple[_Vocabulary, LLTokenizer]:
    """The vocabulary, and the tree of its bytes; built once for a tokenizer."""
    silent = {*tokenizer.special_tokens.values(), *stop_ids}
    if tokenizer.unk_id is not None:
        silent.add(tokenizer.unk_id)
    key = tokenizer.vocab_size, frozenset(silent), frozenset(stop_ids)
    known = _read.setdefault(tokenizer, {})
    if key not in known:
        ends = sorted({i for i in stop_ids if i < tokenizer.vocab_size} or {tokenizer.vocab_size})
        vocabulary = _Vocabulary(tokenizer, silent)
        known[key] = vocabulary, _engine().LLTokenizer(cast(Any, vocabulary), eos_token=ends)
    return known[key]
