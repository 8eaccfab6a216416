"""Settings: what goes in comes out, and what is wrong is named."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_from_scratch.core.config import (
    describe,
    from_dict,
    from_flags,
    leaf_fields,
    merge,
    normalise_flags,
    read_yaml,
    to_dict,
    to_yaml,
)
from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.train.settings import PretrainConfig


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    """How fast."""
    steps: int = 3
    name: str | None = None
    on: bool = False


@dataclass(frozen=True)
class Outer:
    out: str = ""
    paths: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)


def test_flags_and_yaml_and_code_agree(tmp_path: Path) -> None:
    flags = "--inner.rate 2e-3 --inner.steps=1_000 --inner.on yes --paths a b --out x".split()
    by_flags = from_dict(Outer, from_flags(flags, Outer))
    in_code = Outer("x", ("a", "b"), Inner(0.002, 1000, None, True))
    assert by_flags == in_code
    (tmp_path / "run.yaml").write_text(to_yaml(in_code))
    assert from_dict(Outer, read_yaml(tmp_path / "run.yaml")) == in_code
    assert from_dict(Outer, to_dict(in_code)) == in_code


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(),
    st.none() | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
    st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1)),
)
def test_yaml_round_trip(rate: float, steps: int, name: str | None, paths: list[str]) -> None:
    import yaml

    config = Outer("o", tuple(paths), Inner(rate, steps, name, True))
    back = from_dict(Outer, yaml.safe_load(to_yaml(config)))
    if name in ("none", "null", "None"):
        return  # these words mean "not given" wherever a setting may be empty
    assert back == config


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"inner": {"rte": 1}}, "There is no setting 'inner.rte'. Did you mean 'inner.rate'?"),
        ({"inner": {"steps": 1.5}}, "inner.steps is '1.5'; it must be a whole number."),
        ({"inner": {"steps": True}}, "inner.steps is 'True'; it must be a whole number."),
        ({"inner": {"rate": "fast"}}, "inner.rate is 'fast'; it must be a number."),
        ({"inner": {"rate": float("nan")}}, "inner.rate is 'nan'; it must be a number."),
        ({"inner": {"on": "maybe"}}, "inner.on is 'maybe'; it must be true or false."),
        ({"inner": 3}, "inner must be a table of names and values."),
        ({"inner": {"steps": None}}, "inner.steps needs a value."),
        ({"out": {"a": 1}}, "out is a dict; it must be plain text."),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        from_dict(Outer, values)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--inner.stepz", "3"], "no setting --inner.stepz. Did you mean 'inner.steps'"),
        (["--inner.steps"], "needs a value"),
        (["--inner.steps", "3", "4"], "takes one value, but got 2"),
        (["stray"], "'stray' was not expected"),
    ],
)
def test_wrong_flags_are_named(flags: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        from_flags(flags, Outer)


def test_broken_yaml_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  max_steps: [3\n")
    with pytest.raises(UserError, match=r"run\.yaml, line 3 is not valid YAML"):
        read_yaml(path)
    path.write_text("- a\n- b\n")
    with pytest.raises(UserError, match="must hold a table"):
        read_yaml(path)
    with pytest.raises(UserError, match="There is no settings file"):
        read_yaml(tmp_path / "missing.yaml")


def test_merge_is_part_by_part() -> None:
    base = {"a": {"x": 1, "y": 2}, "b": 3}
    assert merge(base, {"a": {"y": 5}}) == {"a": {"x": 1, "y": 5}, "b": 3}
    assert base["a"] == {"x": 1, "y": 2}


def test_a_value_in_place_of_a_part_is_not_hidden_by_flags() -> None:
    with pytest.raises(UserError, match=r"^train must be a table of names and values\.$"):
        merge({"train": 3}, {"train": {"max_steps": 5}})
    with pytest.raises(UserError, match=r"^a\.b must be a table"):
        merge({"a": {"b": ["c"]}}, {"a": {"b": {"d": 1}}})
    # A part with nothing in it says nothing, with flags and without.
    assert merge({"inner": None}, {"inner": {"steps": 5}}) == {"inner": {"steps": 5}}
    assert from_dict(Outer, {"inner": None}) == Outer()


def test_hyphens_and_underscores_mean_the_same() -> None:
    given_flags = ["--max-new-tokens=5", "--top_k", "3", "--", "--as-is"]
    assert normalise_flags(given_flags) == ["--max_new_tokens=5", "--top_k", "3", "--", "--as-is"]


def test_every_setting_of_a_run_is_described() -> None:
    rows = describe(PretrainConfig)
    assert [flag for flag, _, _ in rows] == list(leaf_fields(PretrainConfig))
    assert all(text.endswith(".") for _, _, text in rows)


@dataclass(frozen=True)
class Swift(Outer):
    """A run of another kind: what it adds, and what it does by default."""

    inner: Inner = field(default_factory=lambda: Inner(rate=9.0, name="swift"))
    wings: int = 2
    """How many."""


def test_a_part_keeps_the_defaults_of_the_run_that_it_is_in() -> None:
    assert from_dict(Swift, {"inner": {"steps": 7}}).inner == Inner(9.0, 7, "swift")
    assert from_dict(Swift, {"inner": {"name": None}}).inner.name is None
    assert from_dict(Swift, to_dict(Swift(wings=4))) == Swift(wings=4)
    rows = {flag: (default, text) for flag, default, text in describe(Swift)}
    assert rows["inner.rate"] == ("9.0", "How fast.") and rows["wings"] == ("2", "How many.")


def test_nearest_says_nothing_when_nothing_is_near() -> None:
    assert nearest("xyz", ["learning_rate"]) == ""
    assert nearest("lerning_rate", ["learning_rate", "seed"]) == " Did you mean 'learning_rate'?"
