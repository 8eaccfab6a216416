"""A prompt for messages: line editing, several lines, history between sessions, completion."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from llm_from_scratch.cli.commands import COMMANDS, OTHER_NAMES, setting_names
from llm_from_scratch.core.files import cache_folder

MOST_MESSAGES = 2000
MOST_BYTES = 4 << 20


def history_path() -> Path:
    return cache_folder() / "chat_history.jsonl"


class PrivateHistory(History):
    """What was typed, in a file that only its owner can read: one JSON text a line.

    Nothing depends on it: where the file cannot be read or written, the history is that of this
    session alone.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def load_history_strings(self) -> Iterable[str]:
        """The messages of earlier sessions, newest first."""
        found = []
        with contextlib.suppress(OSError):
            self._shorten()
            for line in self.path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    if isinstance(text := json.loads(line), str):
                        found.append(text)
        return reversed(found[-MOST_MESSAGES:])

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # At once and in one write, so that two sessions can share the file.
            with self._open(os.O_APPEND) as number:
                os.write(number, json.dumps(string).encode() + b"\n")

    def _shorten(self) -> None:
        """Forget the older half of a file that has grown large."""
        if self.path.stat().st_size > MOST_BYTES:
            with self.path.open("rb") as file:
                file.seek(-MOST_BYTES // 2, os.SEEK_END)
                rest = file.read().partition(b"\n")[2]
            with self._open(os.O_TRUNC) as number:
                os.write(number, rest)

    @contextlib.contextmanager
    def _open(self, how: int) -> Iterator[int]:
        number = os.open(self.path, os.O_WRONLY | os.O_CREAT | how, 0o600)
        try:
            if hasattr(os, "fchmod"):  # it may be older than this rule
                os.fchmod(number, 0o600)
            yield number
        finally:
            os.close(number)


class CommandCompleter(Completer):
    """Names of commands, of settings behind /set, and of files."""

    def __init__(self) -> None:
        self.files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or text.startswith("//") or "\n" in text:
            return
        command, space, rest = text.partition(" ")
        if not space:
            for name in (*COMMANDS, *OTHER_NAMES):
                if name.startswith(command):
                    _, meaning = COMMANDS[OTHER_NAMES.get(name, name)]
                    yield Completion(name, start_position=-len(command), display_meta=meaning)
        elif command == "/set" and " " not in rest:
            for name in setting_names():
                if name.startswith(rest):
                    yield Completion(name, start_position=-len(rest))
        elif command in ("/export", "/load", "/import"):
            yield from self.files.get_completions(Document(rest), event)


def key_bindings() -> KeyBindings:
    """Enter sends, unless a backslash stands before it; Alt+Enter begins a new line."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        document = buffer.document
        if document.char_before_cursor == "\\" and not document.current_line_after_cursor:
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return bindings


class Terminal:
    """Reads messages from a person. With `keep`, what is typed is there in the next session."""

    def __init__(self, *, keep: bool) -> None:
        self.session: PromptSession[str] = PromptSession(
            "\n> ",
            multiline=True,
            prompt_continuation="  ",
            history=PrivateHistory(history_path()) if keep else InMemoryHistory(),
            completer=CommandCompleter(),
            complete_while_typing=False,
            key_bindings=key_bindings(),
            output=create_output(always_prefer_tty=True),  # the answers may go to a file
        )

    def read(self, draft: str = "") -> str:
        """A message; `EOFError` for Ctrl-D, `KeyboardInterrupt` for Ctrl-C."""
        return self.session.prompt(default=draft)
