"""Verifiers: what counts as right, and what a row must have."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_from_scratch.core.errors import RunError, UserError
from llm_from_scratch.evaluate import verifiers
from llm_from_scratch.evaluate.verifiers import (
    Finding,
    make_verifiers,
    missing,
    numbers_in,
    register_verifier,
    score,
)


def verdict(name: str, text: str, row: dict[str, Any], **finding: Any) -> float:
    return score(make_verifiers((name,), Finding(**finding)), text, row)[name]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("It is 42.", [42]), ("-7", [-7]), ("7-3=4", [7, 3, 4]), ("x = −5", [-5]),
        ("答えは-12です", [-12]), ("１，２３４円", [1234]),
        ("1,234,567.50", [Fraction("1234567.5")]),
        ("1,23", [1, 23]), ("2e3 and 1.5E-1", [2000, Fraction(3, 20)]), ("(3)-4", [3, 4]),
        ("v2 a1b", [2, 1]), ("1/2", [1, 2]), ("none", []), ("3.", [3]), ("+8", [8]),
    ],
)  # fmt: skip
def test_numbers_are_found(text: str, wanted: list[Any]) -> None:
    assert numbers_in(text) == wanted


@given(st.integers(-(10**12), 10**12))
def test_every_integer_is_found_however_it_is_written(number: int) -> None:
    assert numbers_in(f"so {number}") == numbers_in(f"so {number:,}") == [number]


def test_monstrous_numbers_cost_nothing() -> None:
    assert numbers_in("1e999999999") == [1, 999999999]  # an exponent of nine digits is none
    assert numbers_in("9" * 100_000) == []
    assert numbers_in("1e999") == []


@given(st.text())
def test_no_text_breaks_a_verifier(text: str) -> None:
    rules = make_verifiers(("number", "exact", "json", "json_equal", "regex"), Finding(pattern="a"))
    for value in score(rules, text, {"answer": "1"}).values():
        assert value in (0.0, 1.0)


def test_number() -> None:
    assert verdict("number", "3 + 4 = 7", {"answer": "7"}) == 1
    assert verdict("number", "7 or 8", {"answer": 7}) == 0
    assert verdict("number", "So 1,000.0", {"answer": "He has 12 of them. #### 1000"}) == 1
    assert verdict("number", "no idea", {"answer": "7"}) == 0
    tag = {"answer": r"<answer>(.*?)</answer>"}
    assert verdict("number", "<answer>5</answer> 9", {"answer": "5"}, **tag) == 1
    assert verdict("number", "5", {"answer": "5"}, **tag) == 0


def test_exact() -> None:
    assert verdict("exact", "  New\nYork ", {"answer": "New York"}) == 1
    assert verdict("exact", "Ｂ", {"answer": ["A", "B"]}) == 1
    assert verdict("exact", "b", {"answer": "B"}) == 0


def test_the_last_match_is_the_answer() -> None:
    text = "Answer: 3\nno, Answer: 4"
    assert Finding(r"Answer: (\d+)").find(text) == "4"
    assert Finding(r"Answer: \d+").find(text) == "Answer: 4"
    assert Finding(r"Result").find(text) is None
    assert verdict("format", text, {}, answer="Answer") == 1
    assert verdict("format", "4", {}, answer="Answer") == 0


SCHEMA = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}


@pytest.mark.parametrize(
    ("text", "right"),
    [('{"name": "Ann"}', 1), ('{"name": 3}', 0), ("{}", 0), ('{"name": "Ann"', 0), ("[]", 0)],
)
def test_json_fits_its_schema(text: str, right: int) -> None:
    assert verdict("json", text, {"schema": SCHEMA}) == right
    assert verdict("json", text, {"schema": '{"required": ["name"], "type": "object"}'}) == (
        1 if text == '{"name": 3}' else right
    )


def test_json_without_a_schema_and_of_a_value() -> None:
    assert verdict("json", "[1, 2]", {}) == 1
    for broken in ("", "NaN", "{'a': 1}", "[" * 100_000, "1 2"):
        assert verdict("json", broken, {}) == 0
    assert verdict("json_equal", '{"b": [1.0], "a": true}', {"answer": '{"a": true, "b":[1]}'}) == 1
    assert verdict("json_equal", '{"a": 1}', {"answer": {"a": True}}) == 0
    assert verdict("json_equal", "[1]", {"answer": [1, 2]}) == 0


def test_a_schema_looks_nothing_up_elsewhere() -> None:
    row = {"schema": {"$ref": "http://localhost:9/schema.json"}}
    with pytest.raises(UserError, match="only what stands in the schema itself"):
        verdict("json", "{}", row)
    inside = {"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n"}
    assert verdict("json", "3", {"schema": inside}) == 1


def test_patterns_that_would_search_for_ages_give_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifiers, "SEARCH_S", 0.05)
    text, row = "a" * 5000 + "b", {"pattern": "(a|a)+", "schema": {"pattern": "^(?:(a|a)+(?=c))+$"}}
    assert verdict("regex", text, row) == 0
    assert verdict("format", text, {}, answer="(a|a)+c") == 0
    assert verdict("json", f'"{text}"', row) == 0


def test_deep_values_and_schemas_that_turn_in_circles() -> None:
    deep = "[" * 900 + "]" * 900
    assert verdict("json_equal", deep, {"answer": deep}) == 1
    assert verdict("json_equal", deep, {"answer": deep[1:-1]}) == 0
    items = {"type": "array", "items": {"$ref": "#/$defs/n"}}
    nested = {"$ref": "#/$defs/n", "$defs": {"n": items}}
    assert verdict("json", deep, {"schema": nested}) == 1
    circle = {"schema": {"$ref": "#/$defs/n", "$defs": {"n": {"$ref": "#/$defs/n"}}}}
    assert verdict("json", "3", circle) in (0, 1)  # it ends


def test_regex() -> None:
    assert verdict("regex", "2024-01-31", {}, pattern=r"\d{4}-\d\d-\d\d") == 1
    assert verdict("regex", "on 2024-01-31", {}, pattern=r"\d{4}-\d\d-\d\d") == 0
    assert verdict("regex", "yes", {"pattern": "yes|no"}, pattern="a") == 1


def test_what_a_row_lacks_is_said() -> None:
    nothing = Finding()
    assert missing("number", {"answer": "7"}, nothing) is None
    assert "no number" in str(missing("number", {"answer": "seven"}, nothing))
    assert "has no answer" in str(missing("exact", {}, nothing))
    assert "no JSON" in str(missing("json_equal", {"answer": "{"}, nothing))
    assert "'pattern'" in str(missing("regex", {}, nothing))
    assert missing("regex", {}, Finding(pattern="a")) is None
    for schema in ({"type": "nonsense"}, 3, "{", '"text"'):
        assert "cannot be used" in str(missing("json", {"schema": schema}, nothing))
    with pytest.raises(UserError, match="no regular expression"):
        Finding(pattern="(")
    assert "no regular expression" in str(missing("regex", {"pattern": "("}, nothing))


def test_unknown_names_and_a_format_without_a_pattern() -> None:
    with pytest.raises(UserError, match="Did you mean 'number'"):
        make_verifiers(("numbr",), Finding())
    with pytest.raises(UserError, match="give the pattern"):
        make_verifiers(("format",), Finding())


def test_functions_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifiers, "OWN", {})
    register_verifier("short", lambda text, row: 1 / (1 + len(text)))
    rules = make_verifiers(("short", "exact"), Finding())
    assert score(rules, "abc", {"answer": "abc"}) == {"short": 0.25, "exact": 1.0}
    with pytest.raises(UserError, match="already"):
        register_verifier("json", lambda text, row: 1.0)
    register_verifier("broken", lambda text, row: row["none"])
    with pytest.raises(RunError, match="'broken' failed on 'abc': KeyError"):
        score(make_verifiers(("broken",), Finding()), "abc", {})
    register_verifier("endless", lambda text, row: float("inf"))
    with pytest.raises(RunError, match="gave inf"):
        score(make_verifiers(("endless",), Finding()), "abc", {})
