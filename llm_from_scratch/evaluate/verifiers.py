"""Verifiers: rules that say how good an answer is, without a judge and without a model.

A verifier takes what a model wrote and the row that it was asked for, and gives a number: 1.0 for
right, 0.0 for wrong. Only what can be checked by a rule can be rewarded this way; whatever the rule
does not see, a model that learns from it will sooner or later leave out.

    rules = make_verifiers(("number", "format"), Finding(r"<answer>(.*?)</answer>"))
    score(rules, "<answer>42</answer>", {"answer": "42"})     # {"number": 1.0, "format": 1.0}
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import regex as patterns  # the one of PyPI, whose searches can be given a time

from llm_from_scratch.core.errors import RunError, UserError, nearest, shown

Row = Mapping[str, Any]
Verifier = Callable[[str, Row], float]

# A sign belongs to a number only where no number or word stands before it: 7-3 holds 7 and 3.
NUMBER = re.compile(
    r"(?:(?<![0-9A-Za-z_.)])[-+])?"
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
)
DIGITS = 300  # a number of more digits is none
BACKTRACKS = 1_000_000  # the same for a schema's patterns
SEARCH_S = 2.0  # a pattern that has found nothing by then finds nothing: some would search for ages
MINUS = str.maketrans({"−": "-", "–": "-", "﹣": "-"})


@dataclass(frozen=True)
class Finding:
    """Where in a text the answer stands, and what form a text must have.

    Attributes:
        answer: a pattern whose last match is the answer, or its first group if it has one; without
            a pattern the answer is the whole text.
        pattern: what `regex` asks the answer to be from end to end, where a row has no `pattern`.
    """

    answer: str | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        for pattern in (self.answer, self.pattern):
            if pattern is not None:
                compiled(pattern)

    def find(self, text: str) -> str | None:
        """The answer in a text, without white space around it; None where there is none."""
        if self.answer is None:
            return text.strip()
        try:
            matches = list(compiled(self.answer).finditer(text, timeout=SEARCH_S))
        except TimeoutError:
            return None
        if not matches:
            return None
        found = matches[-1].group(1 if matches[-1].re.groups else 0)
        return None if found is None else str(found).strip()


def compiled(pattern: str) -> patterns.Pattern[str]:
    """A pattern, in which a dot takes line ends too; `UserError` for what is none."""
    try:
        return patterns.compile(pattern, patterns.DOTALL)
    except (patterns.error, OverflowError, RecursionError) as error:
        raise UserError(f"{shown(pattern)} is no regular expression: {error}.") from error


def plain(text: str) -> str:
    """The text with full-width letters and digits as narrow ones, and one kind of minus."""
    return unicodedata.normalize("NFKC", text).translate(MINUS)


def numbers_in(text: str) -> list[Fraction]:
    """The numbers in a text, exactly: 1,234 and -3.5 and 2e3, in digits of any width."""
    found = []
    for match in NUMBER.finditer(plain(text)):
        digits = match.group().replace(",", "")
        mantissa, _, exponent = digits.lower().partition("e")
        if len(mantissa) <= DIGITS and abs(int(exponent or 0)) <= DIGITS:
            found.append(Fraction(digits))
    return found


def wanted_number(answer: Any) -> Fraction | None:
    """The number that a row asks for: the last one in it, such as that behind `####` in GSM8K."""
    if isinstance(answer, bool) or answer is None:
        return None
    if isinstance(answer, int | float):
        return Fraction(answer) if math.isfinite(answer) else None
    numbers = numbers_in(str(answer))
    return numbers[-1] if numbers else None


# --- the rules -----------------------------------------------------------------------------------


def number(answer: str | None, row: Row, finding: Finding) -> bool:
    """The last number of the answer is the last one of the row's answer; how it is written (1,000,
    1000.0, １０００) makes no difference."""
    found = numbers_in(answer) if answer is not None else []
    return bool(found) and found[-1] == wanted_number(row["answer"])


def exact(answer: str | None, row: Row, finding: Finding) -> bool:
    """The answer is the row's, or one of them if that is a list, white space and width apart."""
    wanted = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    if answer is None:
        return False
    return " ".join(plain(answer).split()) in {" ".join(plain(str(w)).split()) for w in wanted}


def is_json(answer: str | None, row: Row, finding: Finding) -> bool:
    """The answer is JSON, and fits the row's `schema` (JSON Schema) where it has one."""
    parsed, value = parse_json(answer)
    return parsed and ("schema" not in row or fits_schema(value, row["schema"]))


def json_equal(answer: str | None, row: Row, finding: Finding) -> bool:
    """The answer is JSON of the same value as the row's answer, in whatever order and spacing."""
    parsed, value = parse_json(answer)
    wanted = row["answer"]
    if isinstance(wanted, str):
        wanted = parse_json(wanted)[1]
    return parsed and same(value, wanted)


def regex(answer: str | None, row: Row, finding: Finding) -> bool:
    """The answer from end to end is what the row's `pattern` (or the setting's) describes."""
    if answer is None:
        return False
    pattern = compiled(str(row.get("pattern", finding.pattern)))
    try:
        return pattern.fullmatch(answer, timeout=SEARCH_S) is not None
    except TimeoutError:
        return False


def form(answer: str | None, row: Row, finding: Finding) -> bool:
    """There is an answer where the answer pattern looks for it."""
    return answer is not None


def parse_json(text: str | None) -> tuple[bool, Any]:
    """(whether it is JSON, its value). NaN and Infinity are none."""
    if text is None:
        return False, None

    def refuse(name: str) -> Any:
        raise ValueError(name)

    try:
        return True, json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False, None


def same(one: Any, other: Any) -> bool:
    """Equality of JSON values of any depth, in which true is not 1."""
    left = [(one, other)]
    while left:
        one, other = left.pop()
        if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
            left += [(value, other[key]) for key, value in one.items()]
        elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
            left += zip(one, other, strict=True)
        elif isinstance(one, bool | dict | list) or isinstance(other, bool | dict | list):
            if one is not other:
                return False
        elif one != other:
            return False
    return True


def schema_checker(schema: Any) -> Any:
    """A checker of JSON Schema that looks nothing up elsewhere, and whose patterns give up in time;
    `UserError` for what is none."""
    try:
        import jsonschema_rs
    except ImportError as error:
        raise UserError(
            "A JSON Schema is checked with the package jsonschema_rs: pip install "
            "'scratchlm[eval]'."
        ) from error

    def nowhere(uri: str) -> Any:
        raise ValueError("only what stands in the schema itself can be referred to")

    if isinstance(schema, str):
        schema = parse_json(schema)[1]
    if not isinstance(schema, dict | bool):
        raise UserError(f"The schema {shown(schema)} cannot be used: it is no object.")
    try:
        return jsonschema_rs.validator_for(
            schema, retriever=nowhere,
            pattern_options=jsonschema_rs.FancyRegexOptions(backtrack_limit=BACKTRACKS),
        )  # fmt: skip
    except (jsonschema_rs.ValidationError, ValueError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise UserError(f"The schema {shown(schema)} cannot be used: {reason}.") from error


def fits_schema(value: Any, schema: Any) -> bool:
    """Whether a JSON value is what a schema describes."""
    return bool(schema_checker(schema).is_valid(value))


Rule = Callable[[str | None, Row, Finding], bool]
# What each rule needs of a row; the sentence says what to do about a row without it.
RULES: dict[str, tuple[Rule, str]] = {
    "number": (number, "answer"),
    "exact": (exact, "answer"),
    "json": (is_json, ""),
    "json_equal": (json_equal, "answer"),
    "regex": (regex, "pattern"),
    "format": (form, ""),
}
OWN: dict[str, Verifier] = {}


def register_verifier(name: str, function: Verifier) -> None:
    """Let `name` stand for a function of your own: (what was written, the row) -> a number.

    For use from Python alone: no file and no command line can bring code. A run that is resumed
    needs it registered again.
    """
    if name in RULES:
        raise UserError(f"There is a verifier '{name}' already; choose another name.")
    OWN[name] = function


def make_verifiers(names: Sequence[str], finding: Finding) -> dict[str, Verifier]:
    """The verifiers of these names, by name; an unknown one is a `UserError`."""
    found: dict[str, Verifier] = {}
    for name in names:
        if name in OWN:
            found[name] = OWN[name]
        elif name in RULES:
            found[name] = _ruled(RULES[name][0], finding)
        else:
            known = [*RULES, *OWN]
            raise UserError(
                f"There is no verifier '{name}'; there are {', '.join(known)}."
                + nearest(name, known)
            )
    if "format" in found and finding.answer is None:
        raise UserError(
            "The verifier 'format' asks whether the answer pattern is there; give the pattern."
        )
    return found


def _ruled(rule: Rule, finding: Finding) -> Verifier:
    return lambda text, row: float(rule(finding.find(text), row, finding))


def missing(name: str, row: Row, finding: Finding) -> str | None:
    """What a row lacks for a verifier, as a sentence's end; None if nothing."""
    try:
        return _missing(name, row, finding)
    except UserError as error:  # a pattern or a schema that is none
        return f"cannot be judged by the verifier {name}. {error}"


def _missing(name: str, row: Row, finding: Finding) -> str | None:
    need = RULES[name][1] if name in RULES else ""
    if need == "pattern":
        if "pattern" not in row and finding.pattern is None:
            return "has no 'pattern', which the verifier regex needs; give one for all rows."
        if "pattern" in row:
            compiled(str(row["pattern"]))
    if need == "answer" and (row.get("answer") is None or row["answer"] == ""):
        return (
            f"has no answer, which the verifier {name} needs; name the column with "
            "--grpo.answer_field."
        )
    if name == "number" and wanted_number(row["answer"]) is None:
        return f"has the answer {shown(row['answer'])}, in which there is no number."
    if name == "json_equal" and isinstance(row["answer"], str) and not parse_json(row["answer"])[0]:
        return f"has the answer {shown(row['answer'])}, which is no JSON."
    if name == "json" and "schema" in row:
        schema_checker(row["schema"])
    return None


def score(verifiers: Mapping[str, Verifier], text: str, row: Row) -> dict[str, float]:
    """What each verifier gives for a text; a `RunError` where a function of your own fails."""
    found: dict[str, float] = {}
    for name, verifier in verifiers.items():
        try:
            found[name] = float(verifier(text, row))
        except UserError:
            raise
        except Exception as error:
            raise RunError(
                f"The verifier '{name}' failed on {shown(text)}: {type(error).__name__}: {error}."
            ) from error
        if not math.isfinite(found[name]):
            raise RunError(f"The verifier '{name}' gave {found[name]} for {shown(text)}.")
    return found
