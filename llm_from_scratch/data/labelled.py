"""Labelled rows: a text or a pair of texts, perhaps choices, and what is wanted of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_from_scratch.data.records import BadRow

KINDS = ("labels", "numbers", "choices")  # what may be wanted


@dataclass(frozen=True)
class LabelledFields:
    """Where in a row everything stands. `flags` comes before the settings' names: "classify."."""

    text: str = "text"
    pair: str | None = None
    label: str = "label"
    choices: tuple[str, ...] = ("choices",)
    flags: str = ""

    def texts(self, values: Mapping[str, Any], *, choices: bool = False) -> dict[str, Any]:
        """{"text"}, with "pair" and "choices" where they are asked for; `BadRow` without them."""
        row: dict[str, Any] = {"text": self._text(values, self.text, "text_field")}
        if self.pair is not None:
            row["pair"] = self._text(values, self.pair, "pair_field")
        if choices:
            row["choices"] = self._choices(values)
        return row

    def wanted(
        self, values: Mapping[str, Any], kind: str, choices: Sequence[str] = ()
    ) -> str | float | int:
        """A label, a number, or the number of the right choice from 0, by `kind` (`KINDS`)."""
        found = self._label(values)
        if kind == "numbers":
            return number_of(found, self.label)
        return choice_of(found, choices, self.label) if kind == "choices" else found

    def _field(self, values: Mapping[str, Any], name: str, setting: str) -> Any:
        if name not in values:
            there = ", ".join(f"'{key}'" for key in list(values)[:8]) or "nothing"
            raise BadRow(
                f"has no field '{name}' (there is {there}); name it with --{self.flags}{setting}."
            )
        if values[name] is None:
            raise BadRow(f"has nothing in the field '{name}'; fill it in or leave the row out.")
        return values[name]

    def _text(self, values: Mapping[str, Any], name: str, setting: str) -> str:
        found = self._field(values, name, setting)
        if isinstance(found, bool | list | dict):
            kind = type(found).__name__
            raise BadRow(f"has a {kind} in the field '{name}', where a text belongs.")
        text = str(found)
        if not text.strip():
            raise BadRow(
                f"has an empty text in the field '{name}'; fill it in or leave the row out."
            )
        return text

    def _label(self, values: Mapping[str, Any]) -> str:
        """What is wanted, as text: 1, 1.0 and "1" are the same."""
        found = self._field(values, self.label, "label_field")
        if isinstance(found, list | dict):
            kind = type(found).__name__
            raise BadRow(f"has a {kind} as '{self.label}', where one label belongs.")
        if isinstance(found, bool):
            return "true" if found else "false"
        if isinstance(found, float) and found.is_integer():
            found = int(found)
        text = str(found).strip()
        if not text or text == "nan":
            raise BadRow(f"has an empty '{self.label}'; fill it in or leave the row out.")
        return text

    def _choices(self, values: Mapping[str, Any]) -> list[str]:
        names = self.choices
        found = [self._field(values, name, "choices_fields") for name in names]
        if len(names) == 1:
            if not isinstance(found[0], list):
                raise BadRow(
                    f"has no list in the field '{names[0]}'; name the fields of the single choices "
                    f"with --{self.flags}choices_fields."
                )
            found = found[0]
        texts = [self._text({"choices": one}, "choices", "choices_fields") for one in found]
        if len(texts) < 2:
            raise BadRow("has fewer than two choices; add others or leave the row out.")
        return texts


def number_of(wanted: str, name: str) -> float:
    """A finite number, or `BadRow`."""
    try:
        number = float(wanted)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(f"has '{wanted}' as '{name}', where a number belongs.")
    return number


def choice_of(wanted: str, choices: Sequence[str], name: str) -> int:
    """Which choice: a number counts from 0, one capital letter from A, else it is the text."""
    if wanted.isascii() and wanted.isdigit():
        number = int(wanted) if len(wanted) < 10 else len(choices)
    elif len(wanted) == 1 and "A" <= wanted <= "Z":
        number = ord(wanted) - ord("A")
    else:
        number = list(choices).index(wanted) if wanted in choices else len(choices)
    if number >= len(choices):
        raise BadRow(
            f"has '{wanted}' as '{name}', which is none of its {len(choices)} choices; give a "
            "number from 0, a letter from A, or the text of one of them."
        )
    return number
