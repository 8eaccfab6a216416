"""Run folders as the page shows them: /api/runs lists them, /api/runs/one gives the curves of one.

Nothing is kept between two requests and no file is read whole: the list needs the end of each
`metrics.jsonl`, and a client that knows the steps up to N gets what comes after, which is found by
bisection (steps grow down the file). A long run is thinned to what a screen can show.

Folders may come from anywhere. Names are taken from the listing alone, links are not followed,
sizes are bounded, and a broken line is one line less.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response

from llm_from_scratch.core.errors import nearest, shown
from llm_from_scratch.serve.errors import ApiError
from llm_from_scratch.serve.service import Service

METRICS = "metrics.jsonl"
MOST_RUNS, MOST_ENTRIES = 1000, 20_000  # folders that are listed, and entries that are looked at
LINE, CHUNK = 1 << 16, 1 << 20  # bytes of the longest line that is read, and of a read
POINTS = 4000  # records that a client is sent at once; of a longer run every n-th
LOOK_BACK = 8 * CHUNK  # how far from the end the last val_loss is searched
TEXT = 1 << 18  # bytes of samples.md and config.yaml that are shown
FIELDS = 64  # figures of a record
EXACT = 1 << 53  # from here on JavaScript's numbers do not hold every integer
QUIET_SECONDS = 120.0  # a run that has written nothing for so long is not running
MAX_STEPS = re.compile(r"^train:\n(?:(?:[ #].*)?\n)*?  max_steps: *(\d{1,15}) *$", re.MULTILINE)


@dataclass(frozen=True)
class Run:
    """A run folder: its name in the listing, and when and how long its metrics were."""

    name: str
    folder: Path
    updated: float
    size: int


# --- finding -------------------------------------------------------------------------------------


def find_runs(root: Path) -> dict[str, Run]:
    """The run folders at most two levels below `root` (or itself), the latest first."""
    found: dict[str, Run] = {}
    budget = [MOST_ENTRIES]

    def look(folder: Path, name: str, depth: int) -> None:
        run = run_at(folder, name or folder.name)
        if run is not None:
            found.setdefault(run.name, run)
            return  # what lies in a run is no other run
        if depth == 2 or len(found) >= MOST_RUNS:
            return
        for child in folders_in(folder, budget):
            look(folder / child, f"{name}/{child}" if name else child, depth + 1)

    look(root.resolve(), "", 0)
    return dict(sorted(found.items(), key=lambda item: -item[1].updated))


def folders_in(folder: Path, budget: list[int]) -> list[str]:
    """The names of the folders in a folder: no links, nothing hidden."""
    names = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                budget[0] -= 1
                if budget[0] < 0:
                    break
                if entry.name.startswith(".") or not entry.is_dir(follow_symlinks=False):
                    continue
                names.append(entry.name)
    except OSError:  # gone, or not ours to read
        return []
    return sorted(names)


def run_at(folder: Path, name: str) -> Run | None:
    try:
        found = (folder / METRICS).lstat()
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode) or not name.isprintable():
        return None  # half a character in a name, say, cannot be sent
    return Run(name, folder, found.st_mtime, found.st_size)


def open_regular(path: Path) -> IO[bytes] | None:
    """A file to read, or None: no link, no pipe that would wait, nothing that is not there."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        return os.fdopen(os.open(path, flags | getattr(os, "O_BINARY", 0)), "rb")
    except OSError:
        return None


def text_of(path: Path, *, end: bool = False) -> str | None:
    """The beginning (or the `end`) of a text file, as far as it is shown; None if there is none."""
    file = open_regular(path)
    if file is None:
        return None
    with file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TEXT) if end else 0)
        text = file.read(TEXT).decode("utf-8", "replace")
    if end and size > TEXT:  # from the first whole part on
        text = text[max(0, text.find("\n## ")) :]
    return text


def summary_of(folder: Path) -> dict[str, Any] | None:
    """summary.json as far as it can be shown."""
    text = text_of(folder / "summary.json")
    try:
        values = json.loads(text or "", parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    kinds = (str, int, float, bool, type(None))
    return {k: finite(v) for k, v in list(values.items())[:FIELDS] if isinstance(v, kinds)}


def finite(value: Any) -> Any:
    """The value, or None for a number that JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- the metrics of one run ----------------------------------------------------------------------


def record_of(line: bytes) -> dict[str, Any] | None:
    """The figures in a line of metrics.jsonl; None for one that is broken or has no step."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = values.get("step") if isinstance(values, dict) else None
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < EXACT:
        return None
    return {
        name: finite(value)
        for name, value in list(values.items())[:FIELDS]
        if type(value) is float or (type(value) is int and abs(value) < EXACT)
    }


def lines_from(file: IO[bytes], start: int, end: int) -> Iterator[bytes]:
    """The whole lines between two places; a last one without its line end is not whole yet.

    Lines longer than any record are left out, and never held.
    """
    file.seek(start)
    rest, too_long = b"", False
    while (left := end - file.tell()) > 0 and (chunk := file.read(min(CHUNK, left))):
        first, *more = chunk.split(b"\n")
        if not more:
            rest, too_long = (b"", True) if len(rest) > LINE else (rest + first, too_long)
            continue
        if not too_long and len(rest) + len(first) <= LINE:
            yield rest + first
        yield from (line for line in more[:-1] if len(line) <= LINE)
        rest, too_long = more[-1], False


def place_after(file: IO[bytes], step: int, size: int) -> int:
    """Where to read from to meet every record behind `step`: near the first of them."""
    low, high = 0, size
    while high - low > LINE:
        middle = (low + high) // 2
        records = map(record_of, whole_lines_near(file, middle, high))
        record = next((one for one in records if one is not None), None)
        if record is None or record["step"] > step:
            high = middle
        else:
            low = middle
    return line_start(file, low)


def whole_lines_near(file: IO[bytes], place: int, end: int) -> Iterator[bytes]:
    """The whole lines behind the first line end after a place, of some kilobytes."""
    file.seek(place)
    yield from file.read(min(2 * LINE, end - place)).split(b"\n")[1:-1]


def line_start(file: IO[bytes], place: int) -> int:
    """Where the line begins that a place is in, or the place itself in one that is too long."""
    back = min(place, LINE)
    file.seek(place - back)
    found = file.read(back).rfind(b"\n")
    return 0 if found < 0 and back == place else place - back + found + 1


def metrics_after(file: IO[bytes], step: int, size: int) -> tuple[list[dict[str, Any]], int]:
    """(records behind `step`, n): every one (n = 1), or of many each n-th and all evaluations."""
    start = place_after(file, step, size) if step >= 0 else 0
    count = sum(1 for _ in lines_from(file, start, size))
    every = max(1, -(-count // POINTS))
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines_from(file, start, size)):
        wanted = number % every == 0 or number == count - 1 or b'"val_loss"' in line
        if not wanted or len(records) >= 2 * POINTS:
            continue
        record = record_of(line)
        if record is not None and record["step"] > step:
            records.append(record)
    return records, every


def last_of(file: IO[bytes], size: int) -> tuple[int | None, float | None]:
    """(last step, last val_loss) in metrics.jsonl, read from its end."""
    step: int | None = None
    end = size
    while end > max(0, size - LOOK_BACK):
        start = max(0, end - CHUNK // 4)
        file.seek(start)
        block = file.read(end - start)
        cut = block.find(b"\n") + 1 if start else 0  # the first line may have begun before
        for line in reversed(block[cut:].split(b"\n")[:-1]):
            if (step is not None and b'"val_loss"' not in line) or len(line) > LINE:
                continue
            record = record_of(line)
            if record is None:
                continue
            step = record["step"] if step is None else step
            if record.get("val_loss") is not None:
                return step, record["val_loss"]
        end = start + cut if 0 < cut < len(block) else start
    return step, None


# --- what the page is told -----------------------------------------------------------------------


def is_running(run: Run, now: float) -> bool:
    """Whether it seems to be under way: it wrote lately, and not before its summary."""
    try:
        ended = (run.folder / "summary.json").lstat().st_mtime
    except OSError:
        ended = -math.inf
    return run.updated > ended and now - run.updated < QUIET_SECONDS


def row_of(run: Run, now: float) -> dict[str, Any]:
    """A run as the list has it."""
    step, val_loss = None, None
    if (file := open_regular(run.folder / METRICS)) is not None:
        with file:
            step, val_loss = last_of(file, run.size)
    found = MAX_STEPS.search(text_of(run.folder / "config.yaml") or "")
    return {
        "name": run.name,
        "steps": step or 0,
        "max_steps": int(found[1]) if found else None,
        "val_loss": val_loss,
        "running": is_running(run, now),
        "updated": run.updated,
    }


class Rows:
    """Rows of the list, each read again only when the run's metrics have changed."""

    def __init__(self) -> None:
        self.known: dict[Run, dict[str, Any]] = {}

    def of(self, runs: dict[str, Run], now: float) -> list[dict[str, Any]]:
        known = self.known
        rows = {run: known.get(run) or row_of(run, now) for run in runs.values()}
        self.known = rows
        return [row | {"running": is_running(run, now)} for run, row in rows.items()]


def one_run(run: Run, after: int, now: float) -> dict[str, Any]:
    """A run's figures behind a step, and all else that is shown of it."""
    records: list[dict[str, Any]] = []
    every = 1
    if (file := open_regular(run.folder / METRICS)) is not None:
        with file:
            records, every = metrics_after(file, after, run.size)
    return {
        "name": run.name,
        "metrics": records,
        "every": every,
        "summary": summary_of(run.folder),
        "samples": text_of(run.folder / "samples.md", end=True),
        "config": text_of(run.folder / "config.yaml"),
        "running": is_running(run, now),
    }


def router(service: Service) -> APIRouter:
    """The routes; they read files, so each runs in a thread of its own and not in the worker."""
    routes, rows = APIRouter(tags=["page"]), Rows()

    @routes.get("/api/runs")
    def runs() -> Response:
        """The run folders below --runs, the latest first."""
        found = {} if service.runs is None else find_runs(service.runs)
        return JSONResponse({"runs": rows.of(found, time.time())})

    @routes.get("/api/runs/one")
    def run(
        name: Annotated[str, Query(max_length=1000)],
        after: Annotated[int, Query(ge=-EXACT, lt=EXACT)] = -1,
    ) -> Response:
        """The records of one run behind a step, with its summary, samples and settings."""
        found = {} if service.runs is None else find_runs(service.runs)
        if name not in found:
            message = f"There is no run {shown(name)} here.{nearest(name, found)}"
            raise ApiError(404, message, code="run_not_found", param="name")
        return JSONResponse(one_run(found[name], after, time.time()))

    return routes
