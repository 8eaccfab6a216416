"""Reading an answer that may call tools, piece by piece as it is written.

`ToolReader` is given text and says what of it is said to the user, and what is a call: the name of
the function as soon as it is known, then its arguments as they come. What only looks like a call
(another name, no JSON) is text like any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from llm_from_scratch.text.stream import unsure_end
from llm_from_scratch.text.tokenizer import without_surrogates
from llm_from_scratch.text.tools import ToolForm

ARGUMENTS = ("arguments", "parameters")
SPACE = " \t\r\n"
BETWEEN = SPACE + "],;"  # what may stand around calls
LONGEST_NAME = 200  # characters
# weather[CALL_ID]a1b2c3d4e[ARGS]{...}: what stands in front of the arguments.
PLAIN_NAME = re.compile(r"([\w.:/-]+)\s*(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*")


@dataclass(frozen=True)
class Said:
    """More of an answer: either text, or something of the call number `call` (from 0).

    The first of a call has its `name`; `arguments` is more of its JSON.
    """

    text: str = ""
    call: int | None = None
    name: str | None = None
    arguments: str = ""


class _Json:
    """Follows one JSON value, character by character: how deep it is, and whether in a string."""

    def __init__(self) -> None:
        self.depth = 0
        self.quoted = False
        self._escaped = False

    def push(self, char: str) -> None:
        if self.quoted:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            else:
                self.quoted = char != '"'
        elif char == '"':
            self.quoted = True
        elif char in "{[":
            self.depth += 1
        elif char in "}]":
            self.depth -= 1


class _Call:
    """A call as it comes.

    Attributes:
        name: as soon as it is known.
        arguments: what has come of them and was not taken yet.
        done, broken: whether the call has ended, or is none.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.arguments = ""
        self.done = self.broken = False
        self.json = _Json()

    def push(self, char: str) -> None:
        raise NotImplementedError


class _Object(_Call):
    """{"name": "weather", "arguments": {...}}, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self._key: str | None = None  # that of the value which comes next
        self._raw = ""  # of the key or the value that is being read
        self._value = False  # whether it is a value

    def push(self, char: str) -> None:
        at_top = self.json.depth <= 1 and not self.json.quoted
        self.json.push(char)
        if at_top and char in SPACE:
            return
        if at_top and char in "{:,}" and not (char == "{" and self._value):
            self._separate(char)
            return
        self._raw += char
        if self._value and self._key in ARGUMENTS and self._raw[0] != '"':
            self.arguments += char
        self.broken |= self.json.depth < 1

    def _separate(self, char: str) -> None:
        """The punctuation of the object itself: what stands in front of it is complete."""
        if char == ":":
            self._key, self._value = _text(self._raw), True
            self.broken |= self._key is None
        elif char != "{":
            self.broken |= bool(self._raw) and not self._value
            if self._value and self._key == "name":
                self.name = _text(self._raw)
                self.broken |= self.name is None
            elif self._value and self._key in ARGUMENTS and self._raw[:1] == '"':
                said = _text(self._raw)  # JSON as text, as OpenAI has it
                self.arguments += said or ""
                self.broken |= said is None
            self._value = False
            self.done = char == "}"
        self._raw = ""


class _Named(_Call):
    """weather[ARGS]{...}: the name, then the arguments alone."""

    def __init__(self) -> None:
        super().__init__()
        self._before = ""

    def push(self, char: str) -> None:
        if self.name is None and char != "{":
            self._before += char
            self.broken = len(self._before) > LONGEST_NAME
            return
        if self.name is None:
            found = PLAIN_NAME.fullmatch(self._before)
            self.name, self.broken = (found[1], False) if found else ("", True)
        self.json.push(char)
        self.arguments += char
        self.done = self.json.depth == 0


def _text(raw: str) -> str | None:
    try:
        found = json.loads(raw, strict=False)
    except (ValueError, RecursionError):
        return None
    return without_surrogates(found) if isinstance(found, str) else None


class ToolReader:
    """Reads one answer.

    Args:
        form: that of the model (text/tools.py).
        names: the functions that it may call.
        forced: whether the answer is a call from its first character on, since what comes before
            one was already part of the prompt.
        single: whether the answer ends with its first call.

    Attributes:
        calls: how many calls have begun.
        over: whether nothing that follows is part of the answer.
    """

    def __init__(
        self,
        form: ToolForm,
        names: Collection[str],
        *,
        forced: bool = False,
        single: bool = False,
    ) -> None:
        self.form = form
        self.names = frozenset(names)
        self.single = single
        self.calls = 0
        self.over = False
        self._held = ""  # text that may yet become a mark
        self._said = False  # whether any text has come
        self._raw = ""  # since the mark of a call that may yet turn out to be none
        self._call: _Call | None = None
        self._told = False  # whether the call's name went out
        self._read = self._read_mark if forced else self._read_text

    def push(self, text: str) -> list[Said]:
        """What is certain now that `text` has come."""
        self._held += text
        said: list[Said] = []
        while self._held and not self.over:
            before = self._read, len(self._held)
            said += self._read()
            if before == (self._read, len(self._held)):
                break
        return said

    def finish(self) -> list[Said]:
        """What was held back until the end."""
        rest = "" if self.over else self._raw + self._held
        if self.calls and not rest.strip(BETWEEN):
            rest = ""
        self._held = self._raw = ""
        return [Said(rest)] if rest else []

    # Each of these reads from what is held, and says what to do with what is left: the next of
    # them, or the same one again, which then waits if it has read nothing.

    def _read_text(self) -> Iterator[Said]:
        """Text up to the next mark."""
        if self.form.bare and not self._said and self._held.lstrip(SPACE)[:1] == "{":
            self._read = self._read_mark
            return
        marks = [(at, mark) for mark in self.form.opens if (at := self._held.find(mark)) >= 0]
        if marks:
            at, mark = min(marks)
            text = self._held[:at].rstrip(SPACE)
            self._raw, self._held = self._held[len(text) : at] + mark, self._held[at + len(mark) :]
            self._read = self._read_mark
        else:
            keep = unsure_end(self._held, self.form.opens)
            text = self._held[: len(self._held) - keep].rstrip(SPACE)
            self._held = self._held[len(text) :]
        if text:
            self._said = True
            yield Said(text)

    def _read_mark(self) -> Iterator[Said]:
        """What stands between a mark and the call itself."""
        rest = self._held.lstrip(SPACE + "[")
        self._raw += self._held[: len(self._held) - len(rest)]
        self._held = rest
        if not rest:
            return
        self._told = False
        if rest[0] == "{":
            self._call, self._read = _Object(), self._read_call
        elif self.form.id_length is not None:  # only Mistral's names stand in front
            self._call, self._read = _Named(), self._read_call
        else:
            yield from self._no_call()

    def _read_call(self) -> Iterator[Said]:
        call = self._call
        assert call is not None
        read = 0
        while read < len(self._held) and not (call.broken or call.done):
            call.push(self._held[read])
            call.broken |= call.name is not None and call.name not in self.names
            read += 1
        self._raw += self._held[:read]
        self._held = self._held[read:]
        if call.name is not None and not self._told and not call.broken:
            self._told = True
            self.calls += 1
            yield Said(call=self.calls - 1, name=call.name)
        if self._told and call.arguments:
            yield Said(call=self.calls - 1, arguments=call.arguments)
            call.arguments = ""
        if self._told:
            self._raw = ""
            if call.broken or call.done:
                self._read, self.over = self._read_between, self.single
        elif call.broken or call.done:
            yield from self._no_call()

    def _no_call(self) -> Iterator[Said]:
        """What looked like a call is text."""
        text, self._raw = self._raw, ""
        self._said, self._read = True, self._read_text
        if text:
            yield Said(text)

    def _read_between(self) -> Iterator[Said]:
        """Behind a call: another one, or text again."""
        rest = self._held.lstrip(BETWEEN)
        for mark in self.form.closes:
            if rest.startswith(mark):
                self._held = rest[len(mark) :]
                return
        if rest and unsure_end(rest, self.form.closes + self.form.opens) < len(rest):
            self._said = True
            self._read = self._read_mark if rest[0] == "{" else self._read_text
        self._held = rest
        yield from ()
