"""The benchmark of sums and differences is what its page says it is."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def arithmetic() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("arithmetic", BENCHMARKS / "arithmetic.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCHMARKS))


def test_the_two_writers(arithmetic: ModuleType) -> None:
    for problem, right, careless in (
        ((47, "+", 38), 85, 75), ((57, "+", 61), 118, 18), ((12, "+", 34), 46, 46),
        ((52, "-", 38), 14, 26), ((38, "-", 52), -14, 26), ((78, "-", 32), 46, 46),
    ):  # fmt: skip
        assert arithmetic.right(*problem) == right
        assert arithmetic.careless(*problem) == careless
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    problems = arithmetic.problems_of(pairs)
    agree = sum(arithmetic.right(*p) == arithmetic.careless(*p) for p in problems)
    assert 0.25 < agree / len(problems) < 0.30  # what a model that writes as most do gets right


def test_what_is_held_out_is_nowhere_else(arithmetic: ModuleType, tmp_path: Path) -> None:
    counts = arithmetic.write_data(tmp_path, seed=3)

    def operands(name: str, key: str) -> set[frozenset[str]]:
        lines = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == counts[f"{name}_lines"]
        sums = (json.loads(line)[key].split("=")[0].replace("-", "+") for line in lines)
        return {frozenset(text.split("+")) for text in sums}  # neither way round

    held_out = operands("test", "prompt")
    assert len(held_out) == 1000
    for name, key in (("start", "text"), ("train", "prompt"), ("val", "prompt")):
        assert not held_out & operands(name, key)
    assert operands("start", "text") == operands("train", "prompt")
    assert not operands("val", "prompt") & operands("start", "text")
    assert arithmetic.divided(3) == arithmetic.divided(3) != arithmetic.divided(4)
