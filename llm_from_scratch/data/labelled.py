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
        if kind != "choices":
            return found
        given, of = values[self.label], self._given_choices(values)
        # Where choices are texts, a row that has a number means the place.
        counts = not isinstance(given, str) and any(isinstance(one, str) for one in of)
        return choice_of(found, choices, self.label, counts=counts)

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

    def _given_choices(self, values: Mapping[str, Any]) -> list[Any]:
        """The choices as they stand in the row."""
        names = self.choices
        found = [self._field(values, name, "choices_fields") for name in names]
        if len(names) > 1:
            return found
        if not isinstance(found[0], list):
            raise BadRow(
                f"has no list in the field '{names[0]}'; name the fields of the single choices "
                f"with --{self.flags}choices_fields."
            )
        return list(found[0])

    def _choices(self, values: Mapping[str, Any]) -> list[str]:
        found = self._given_choices(values)
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


def choice_of(wanted: str, choices: Sequence[str], name: str, *, counts: bool = False) -> int:
    """Which choice: the one with this text, else by a number from 0 or a capital letter from A.

    With `counts` a number is the place even where another choice has it as its text. A letter that
    is the place of one choice and the text of another is refused, as is the text of several.
    """
    same = [number for number, text in enumerate(choices) if text.strip() == wanted]
    letter = len(wanted) == 1 and "A" <= wanted <= "Z"
    place = len(choices)
    if wanted.isascii() and wanted.isdigit() and len(wanted) < 10:
        place = int(wanted)
    elif letter:
        place = ord(wanted) - ord("A")
    placed = place < len(choices)
    if len(same) == 1 and placed and place != same[0] and letter:
        raise BadRow(
            f"has '{wanted}' as '{name}', which is the letter of one choice and the text of "
            "another; give a number from 0."
        )
    if len(same) == 1 and not (placed and counts):
        return same[0]
    if placed:
        return place
    if same:
        raise BadRow(
            f"has '{wanted}' as '{name}', which is the text of {len(same)} of its choices; give a "
            "number from 0, or a letter from A."
        )
    raise BadRow(
        f"has '{wanted}' as '{name}', which is none of its {len(choices)} choices; give a number "
        "from 0, a letter from A, or the text of one of them."
    )
