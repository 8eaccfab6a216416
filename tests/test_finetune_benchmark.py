"""The benchmark of fine-tuning: data divided once, nothing of one task's test learnt in another."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llm_from_scratch.core.config import from_dict
from llm_from_scratch.core.runlog import LiveLine
from llm_from_scratch.data.records import BadRows
from llm_from_scratch.train.finetune_rows import gather
from llm_from_scratch.train.methods import method_named

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = {name: sys.modules.pop(name, None) for name in ("finetune", "finetune_tasks")}
    yield module("finetune")
    for name, old in before.items():
        sys.modules.pop(name, None)
        if old is not None:
            sys.modules[name] = old


def test_every_task_is_complete(benchmark: ModuleType) -> None:
    from llm_from_scratch.core.config import merge

    tasks, data = benchmark.TASKS, benchmark.DATA
    for number, (name, task) in enumerate(tasks.items()):
        assert task.data in data, name
        assert task.figures and task.seeds, name
        assert not task.after or list(tasks).index(task.after) < number, name
        cls = method_named(task.method)
        own = data[task.data].settings if task.method == data[task.data].method else {}
        from_dict(cls.Config, merge(own, task.settings))  # every setting exists
    import common

    for one in data.values():
        for file in (*one.train, *one.val, *one.test):
            assert file in common.SOURCES, file
        assert not one.like or list(data).index(one.like) >= 0


def test_no_task_learns_from_anothers_test(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "zero one two three four five six seven eight nine".split()
    texts = [" ".join(words[int(d)] for d in f"{n * 7919 % 100003:06d}") for n in range(60)]
    monkeypatch.setenv("SCRATCHLM_DATA", str(tmp_path))
    (tmp_path / "a.csv").write_text(
        "text,label\n" + "".join(f"{t},{'xy'[n % 2]}\n" for n, t in enumerate(texts)), "utf-8"
    )
    (tmp_path / "b.tsv").write_text(
        "".join(f"{'xy'[n % 2]}\t{t.upper()}\n" for n, t in enumerate(texts[20:])), "utf-8"
    )
    (tmp_path / "c.csv").write_text("text,label\n" + "".join(f"{t},z\n" for t in texts[::-1]))
    Data = benchmark.Data
    monkeypatch.setattr(benchmark, "DATA", {
        "a": Data("classify", ("a.csv",)),
        "b": Data("classify", ("b.tsv",), settings={"data": {"columns": ["label", "text"]}}),
        "c": Data("classify", ("c.csv",), like="a", key=("text",)),
    })  # fmt: skip
    counts = benchmark.prepare(tmp_path / "work", ["a", "b", "c"])
    assert (counts["a"]["train"], counts["a"]["val"], counts["a"]["test"]) == (48, 6, 6)

    def texts_of(name: str, part: str) -> set[str]:
        path = tmp_path / "work" / "data" / name / f"{part}.jsonl"
        return {json.loads(line)["text"].lower() for line in path.read_text().splitlines()}

    for part in ("train", "val", "test"):
        assert texts_of("c", part) == texts_of("a", part)  # divided alike
    for name in "abc":
        task = benchmark.Task(name, "classify", "model", {}, ("test_accuracy",))
        out = tmp_path / "out"
        values = benchmark.settings_of(task, tmp_path / "work", ["a", "b", "c"], 1, out)
        cls = method_named("classify")
        config = from_dict(cls.Config, values)
        assert config.model == "model" and config.out == str(out)
        found = gather(cls(config), config, BadRows("stop"), LiveLine(quiet=True))
        learnt = {row.values["text"].lower() for row in found.rows["train"]}
        other = "b" if name != "b" else "a"
        assert learnt and not learnt & texts_of(other, "test")
        assert found.counts["avoided_exact"] == len(
            texts_of(name, "train") & texts_of(other, "test")
        )
        assert {row.values["text"].lower() for row in found.rows["test"]} == texts_of(name, "test")


def test_the_tasks_that_are_run(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    first = next(iter(benchmark.TASKS.values()))
    monkeypatch.setattr(benchmark, "TASKS", {
        "one": first, "two": dataclasses.replace(first, after="one"), "three": first,
    })  # fmt: skip
    assert benchmark.chosen(argparse.Namespace(only=["two"])) == ["one", "two"]
    assert benchmark.chosen(argparse.Namespace(only=None)) == ["one", "two", "three"]
    with pytest.raises(SystemExit, match="There is no task four"):
        benchmark.chosen(argparse.Namespace(only=["four"]))


def result(seed: int, accuracy: float) -> dict[str, Any]:
    summary = {
        "test_accuracy": accuracy, "base_test_accuracy": 0.5, "test_loss": 0.1, "train_rows": 1000,
        "val_rows": 100, "test_rows": 200, "avoided_exact": 1, "avoided_near": 2,
    }  # fmt: skip
    return {
        "task": "t", "seed": seed, "wall_seconds": 60.0 + seed, "peak_bytes": 2**30,
        "summary": summary,
    }  # fmt: skip


@pytest.mark.parametrize("ja", [False, True])
def test_the_table_is_made_from_the_summaries(ja: bool) -> None:
    tables = module("tables")
    task = {
        "data": "d", "figures": ["test_accuracy", "test_loss"], "target": 0.9,
        "published": "95.67 %", "method": "classify", "model": "tiny", "after": "",
    }  # fmt: skip
    environment = {"processor": "p", "cores": 2, "python": "3", "versions": {"torch": "2"}}
    data = {
        "command": "python benchmarks/finetune.py --work w", "commit": "0" * 40, "date": "d",
        "environment": environment,
        "results": {
            "data": {"d": {"exact_duplicates": 3, "near_duplicates": 4}},
            "tasks": {"t": task, "not run": task}, "runs": [result(1, 0.95), result(2, 0.97)],
        },
    }  # fmt: skip
    lines = tables.finetune(data, ja).split("\n")
    assert lines[2] == (
        "| t (classify, tiny) | `test_accuracy` | 50.00 % (50.00 % … 50.00 %) | "
        "**96.00 % (95.00 % … 97.00 %)** | ≥ 90.00 % | 95.67 % |"
    )
    assert lines[3].startswith("|  | `test_loss` | - | **0.1000 (0.1000 … 0.1000)** |")
    assert "| t | 1,000 | 100 | 200 | 3 / 4 | 3 | 62 s | 1.1 GB |" in lines
    assert len({line.count("|") for line in lines[:4]}) == 1 and "not run" not in "".join(lines)
