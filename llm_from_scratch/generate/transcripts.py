"""Conversations in files: JSON Lines, `{"messages": [...]}` a line, as fine-tuning reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import explain_os_error, write_aside
from llm_from_scratch.text.chat import Message, check_messages
from llm_from_scratch.text.tokenizer import without_surrogates

REMEDY = 'each line must be a conversation, {"messages": [...]}'
LIMIT = 64 << 20  # bytes of a file of conversations that is read whole


def read_conversations(path: Path | str) -> list[list[dict[str, Any]]]:
    """The messages of each conversation in a file; other fields of a line are passed over.

    Raises `UserError`, which names the file and the line, for whatever is no such file.
    """
    found = [messages for _, messages in _rows(Path(path))]
    if not found:
        raise UserError(f"{path} has no conversations; {REMEDY}.")
    return found


def add_conversation(path: Path | str, messages: Sequence[Message]) -> int:
    """Put a conversation at the end of a file, which need not exist; how many it then has.

    Where the file's last conversation is the beginning of this one, this takes its place: who keeps
    a conversation, goes on and keeps it again has it once. A file that holds anything else is
    refused (`UserError`) and stays as it is.
    """
    path = Path(path)
    checked = check_messages(messages)
    try:
        known = path.exists()
    except OSError as error:
        raise explain_os_error(error, path) from error
    if "\0" in str(path):
        raise UserError("The name of a file cannot be used: it has a NUL character.")
    rows = _rows(path) if known else []
    if rows and rows[-1][1] == checked[: len(rows[-1][1])]:
        rows.pop()
    new = without_surrogates(json.dumps({"messages": checked}, ensure_ascii=False))
    with write_aside(path) as file:
        for line in [*(line for line, _ in rows), new]:
            file.write(line + "\n")
    return len(rows) + 1


def _rows(path: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """(line, its messages) of each line that is not empty."""
    try:
        if not path.is_file():
            raise UserError(f"There is no file {path}; give one of conversations.")
        if path.stat().st_size > LIMIT:
            raise UserError(f"{path} is larger than {LIMIT >> 20} MiB; give a part of it.")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); {REMEDY}.") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read ({error}).") from None
    return [
        (line, _messages(line, f"{path}, line {number}"))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]


def _messages(line: str, place: str) -> list[dict[str, Any]]:
    try:
        row = json.loads(line)
        # JSON can spell halves of characters, which no tokenizer and no server takes.
        row = json.loads(without_surrogates(json.dumps(row, ensure_ascii=False)))
    except (ValueError, RecursionError):  # an integer of thousands of digits is a ValueError
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise UserError(f"{place}: {REMEDY}.")
    try:
        return check_messages(row["messages"])
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
