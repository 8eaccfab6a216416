"""Fine-tuning on real data: every task of finetune_tasks.py, each run in a process of its own.

All data are divided first, so that the test rows of every task are known; then each run leaves out
of its training what is like another task's test (--data.avoid), and counts it. What is reported is
the run's own summary.json, with its time from the start of the command to its end and the most
memory that its process held. Finished runs in --work are not repeated (--again does).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from common import commit, data_file, parser, record
from finetune_tasks import DATA, TASKS, Data, Task

from llm_from_scratch.core.config import from_dict, merge
from llm_from_scratch.core.runlog import LiveLine, read_json, write_json
from llm_from_scratch.data.records import BadRows
from llm_from_scratch.train.finetune_rows import PARTS, gather
from llm_from_scratch.train.methods import method_named

LIMIT_S = 600  # a run may take so long


# --- the data ------------------------------------------------------------------------------------


def divide(
    data: Data, others: dict[str, dict[str, list[dict[str, Any]]]], seed: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """The rows of each part as they stand in the files, and what was counted."""
    files = {part: [str(data_file(name)) for name in getattr(data, part)] for part in PARTS}
    values = merge(
        data.settings,
        {
            "data": {"paths": files["train"], "val": files["val"], "test": files["test"]},
            "train": {"seed": seed},
        },
    )
    if data.like:
        values = merge(values, {"data": {"val_fraction": 0, "test_fraction": 0}})
    cls = method_named(data.method)
    config = from_dict(cls.Config, values)
    method, bad = cls(config), BadRows()
    raw = {
        row.place: row.values
        for paths in files.values()
        for path in paths
        for row in method.read(path, BadRows())
    }
    found = gather(method, config, bad, LiveLine(quiet=True))
    rows = {part: [raw[row.place] for row in found.rows[part]] for part in PARTS}
    if data.like:
        rows = as_in(rows["train"], others[data.like], data.key)
    counts = {**found.counts, "skipped": len(bad.sentences)}
    return rows, counts | {part: len(rows[part]) for part in PARTS}


def as_in(
    rows: list[dict[str, Any]], other: dict[str, list[dict[str, Any]]], key: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Rows in the part in which `other` has a row with the same key; new ones are learnt from."""

    def key_of(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(" ".join(str(row.get(name, "")).split()) for name in key)

    parts = {key_of(row): part for part in PARTS for row in other[part]}
    found: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    for row in rows:
        found[parts.get(key_of(row), "train")].append(row)
    return found


def seeds_of(name: str) -> list[int]:
    """The seeds by which data are divided: those of its tasks where that matters, else 1."""
    tasks = [task for task in TASKS.values() if task.data == name]
    return sorted({seed for task in tasks for seed in task.seeds}) if DATA[name].by_seed else [1]


def rows_folder(work: Path, name: str, seed: int) -> Path:
    return work / "data" / (f"{name}-{seed}" if DATA[name].by_seed else name)


def prepare(work: Path, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """work/data/NAME/{train,val,test}.jsonl for all data; counts by name (of the last seed: they
    are the same for all)."""
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    counts = {}
    for name in names:
        for seed in seeds_of(name):
            print(f"dividing {name} ...", end=" ", flush=True)
            rows[name], counts[name] = divide(DATA[name], rows, seed)
            for part in PARTS:
                path = rows_folder(work, name, seed) / f"{part}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows[name][part])
                path.write_text("".join(lines), encoding="utf-8")
            print(counts[name], flush=True)
    write_json(work / "data" / "counts.json", counts)
    return counts


# --- the runs ------------------------------------------------------------------------------------


def relatives(name: str) -> set[str]:
    """Data that are divided as this one is: their tests hold the same prompts."""
    root = DATA[name].like or name
    return {other for other, data in DATA.items() if (data.like or other) == root}


def settings_of(task: Task, work: Path, names: Sequence[str], seed: int, out: Path) -> Any:
    """The complete settings of a run, as they go into its --config."""
    data = DATA[task.data]
    folder = rows_folder(work, task.data, seed)
    rows: dict[str, Any] = {
        "paths": [str(folder / "train.jsonl")], "val": [str(folder / "val.jsonl")],
        "test": [str(folder / "test.jsonl")], "columns": [], "val_fraction": 0, "test_fraction": 0,
        "avoid": [
            str(rows_folder(work, name, other) / "test.jsonl")
            for name in names if name not in relatives(task.data) for other in seeds_of(name)
        ],
    }  # fmt: skip
    values = merge(data.settings, task.settings) if task.method == data.method else task.settings
    if "balance" in values.get("classify", {}):
        values = merge(values, {"classify": {"balance": False}})  # the rows are balanced already
    model = str(run_folder(work, task.after, seed)) if task.after else task.model
    top = {"method": task.method, "model": model, "out": str(out)}
    return merge(values, {**top, "data": rows, "train": {"seed": seed}})


def run_folder(work: Path, name: str, seed: int) -> Path:
    plain = "".join(char if char.isalnum() else "-" for char in name.lower())
    return work / "runs" / f"{plain}-{seed}"


def carry_out(name: str, seed: int, work: Path, names: Sequence[str], again: bool) -> Any:
    """One run in its own process; what it reported, its seconds and its memory."""
    task, out = TASKS[name], run_folder(work, name, seed)
    done = out / "measured.json"
    if done.is_file() and not again:
        return read_json(done)
    shutil.rmtree(out, ignore_errors=True)
    config = work / "runs" / f"{out.name}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    values = settings_of(task, work, names, seed, out)
    config.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    command = [sys.executable, "-m", "llm_from_scratch", "finetune", task.method]
    print(f"\n== {name}, seed {seed}", flush=True)
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--config", str(config)], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{name}, seed {seed}, ended with {process.returncode}.")
    found = {
        "task": name, "seed": seed, "wall_seconds": round(seconds, 1),
        "peak_bytes": used.ru_maxrss * 1024, "commit": commit(), "summary": read_json(
            out / "summary.json"
        ),
    }  # fmt: skip
    write_json(done, found)
    figures = {figure: found["summary"].get(figure) for figure in task.figures}
    print(f"   {figures} in {seconds:.0f} s, {used.ru_maxrss / 1024:,.0f} MiB", flush=True)
    if seconds > LIMIT_S:
        print(f"   longer than {LIMIT_S} s", flush=True)
    return found


def portable(values: Any, work: Path) -> Any:
    """Settings without the paths of this machine."""
    if isinstance(values, dict):
        return {name: portable(value, work) for name, value in values.items()}
    if isinstance(values, list):
        return [portable(value, work) for value in values]
    return values.replace(f"{work}/", "") if isinstance(values, str) else values


def chosen(args: argparse.Namespace) -> list[str]:
    """The tasks to run, those before them included, in their order."""
    wanted = set(args.only or TASKS)
    unknown = wanted - set(TASKS)
    if unknown:
        sys.exit(f"There is no task {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}.")
    for name in reversed(TASKS):
        if name in wanted and TASKS[name].after:
            wanted.add(TASKS[name].after)
    return [name for name in TASKS if name in wanted]


def main() -> None:
    arguments = parser(__doc__, "finetune.json")
    arguments.add_argument("--work", type=Path, required=True, help="folder of data and runs")
    arguments.add_argument("--only", nargs="+", metavar="TASK", help="these tasks alone")
    arguments.add_argument("--again", action="store_true", help="repeat finished runs")
    arguments.add_argument("--divide", action="store_true", help="divide the data and stop")
    args = arguments.parse_args()
    work = args.work.resolve()
    names = list(DATA)
    counts = prepare(work, names)
    if args.divide:
        return
    runs = []
    for name in chosen(args):
        for seed in TASKS[name].seeds:
            runs.append(carry_out(name, seed, work, names, args.again))
    tasks = {
        name: {
            "data": task.data, "figures": task.figures, "target": task.target,
            "published": task.published, "method": task.method, "model": task.model,
            "after": task.after, "settings": task.settings,
        }
        for name, task in TASKS.items()
    }  # fmt: skip
    results = {"data": counts, "tasks": tasks, "runs": portable(runs, work), "limit_s": LIMIT_S}
    files = sorted({f for data in DATA.values() for part in PARTS for f in getattr(data, part)})
    record(args.out, results, files, [])


if __name__ == "__main__":
    main()
