"""JSON files that strangers may have written: read whole, or refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm_from_scratch.core.errors import UserError


def read_json(path: Path | str, remedy: str = "copy it anew") -> Any:
    """The value in a JSON file (UTF-8, with or without a byte order mark).

    Raises `UserError`, which names the file and `remedy`, for whatever is no JSON: text in another
    encoding, a number of thousands of digits, lists nested a hundred thousand deep.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"There is no file {path}; {remedy}.") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}), as JSON must be; {remedy}."
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno} is not valid JSON ({error.msg}); {remedy}."
        ) from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be read as JSON; {remedy}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {remedy}.") from error
    except ValueError as error:  # an integer longer than Python converts
        raise UserError(f"{path} cannot be read as JSON ({error}); {remedy}.") from None


def read_json_object(path: Path | str, remedy: str = "copy it anew") -> dict[str, Any]:
    """The object in a JSON file; a `UserError` as in `read_json`, also for any other value."""
    value = read_json(path, remedy)
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {_kind(value)}; {remedy}.")
    return value


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", type(None): "null"}.get(type(value), repr(value)[:40])
