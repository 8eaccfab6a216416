"""/api/runs: run folders as they grow, broken and hostile ones included."""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from llm_from_scratch.core.config import to_yaml
from llm_from_scratch.core.runlog import RunLog
from llm_from_scratch.serve import runs
from llm_from_scratch.serve.runs import (
    CHUNK,
    LINE,
    POINTS,
    Rows,
    find_runs,
    last_of,
    lines_from,
    metrics_after,
    one_run,
)
from llm_from_scratch.serve.service import Service
from llm_from_scratch.train.settings import PretrainConfig, TrainSettings
from tests.serve.servers import Running

NOW = 2_000_000_000.0


def write_run(folder: Path, records: list[Any], **files: str) -> Path:
    """A run folder; records that are no dicts are written as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (line if isinstance(line, str) else json.dumps(line) for line in records)
    text = "".join(f"{line}\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content, encoding="utf-8")
    return folder


def steps(count: int, every: int = 10) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for step in range(1, count + 1):
        found.append({"step": step, "loss": 5.0 - step / count, "learning_rate": 1e-3})
        if step % every == 0:
            found.append({"step": step, "val_loss": 6.0 - step / count})
    return found


def at(folder: Path, seconds_ago: float, name: str = "metrics.jsonl") -> None:
    os.utime(folder / name, (NOW - seconds_ago, NOW - seconds_ago))


def rows(root: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in Rows().of(find_runs(root), NOW)}


def one(root: Path, name: str, after: int = -1) -> dict[str, Any]:
    return one_run(find_runs(root)[name], after, NOW)


# --- the list ------------------------------------------------------------------------------------


def test_the_list(tmp_path: Path) -> None:
    write_run(tmp_path / "old", steps(40), config_yaml="train:\n  seed: 1\n  max_steps: 40\n")
    (tmp_path / "old" / "summary.json").write_text("{}")
    at(tmp_path / "old", 500.0)
    write_run(tmp_path / "group" / "new", steps(7), config_yaml="model: {}\n")
    at(tmp_path / "group" / "new", 5.0)
    write_run(tmp_path / "a" / "b" / "too-deep", steps(3))
    write_run(tmp_path / "old" / "checkpoints", steps(3))  # in a run there is no other run
    write_run(tmp_path / ".hidden", steps(3))
    (tmp_path / "no-run").mkdir()
    found = rows(tmp_path)
    assert list(found) == ["group/new", "old"]  # the latest first
    assert found["old"] == {
        "name": "old", "steps": 40, "max_steps": 40, "val_loss": 5.0, "running": False,
        "updated": NOW - 500.0,
    }  # fmt: skip
    assert found["group/new"]["steps"] == 7
    assert found["group/new"]["max_steps"] is None and found["group/new"]["val_loss"] is None
    assert found["group/new"]["running"]


def test_running_or_not(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps(3))
    at(folder, 1.0)
    assert rows(tmp_path)["run"]["running"]
    at(folder, 121.0)  # it was killed
    assert not rows(tmp_path)["run"]["running"]
    (folder / "summary.json").write_text("{}")
    at(folder, 1.0)
    at(folder, 0.5, "summary.json")  # it ended
    assert not rows(tmp_path)["run"]["running"]
    at(folder, 0.2)  # it was resumed
    assert rows(tmp_path)["run"]["running"]


def test_rows_are_read_again_when_the_metrics_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        at(write_run(tmp_path / f"run-{number}", steps(10)), 10.0)
    read: list[str] = []
    inner = runs.row_of

    def row_of(run: runs.Run, now: float) -> dict[str, Any]:
        read.append(run.name)
        return inner(run, now)

    monkeypatch.setattr(runs, "row_of", row_of)
    table = Rows()
    table.of(find_runs(tmp_path), NOW)
    write_run(tmp_path / "run-3", steps(11))
    assert [row["steps"] for row in table.of(find_runs(tmp_path), NOW)].count(11) == 1
    assert sorted(read) == ["run-0", "run-1", "run-2", "run-3", "run-3", "run-4"]


def test_a_run_folder_itself_is_a_list_of_one(tmp_path: Path) -> None:
    write_run(tmp_path / "mine", steps(3))
    assert list(find_runs(tmp_path / "mine")) == ["mine"]


def test_the_last_evaluation_is_found_far_from_the_end(tmp_path: Path) -> None:
    records = [{"step": 1, "val_loss": 3.5}, *({"step": n, "loss": 1.0} for n in range(2, 30_000))]
    folder = write_run(tmp_path / "run", records)
    data = (folder / "metrics.jsonl").read_bytes()
    assert len(data) > CHUNK // 2
    assert last_of(io.BytesIO(data), len(data)) == (29_999, 3.5)
    assert last_of(io.BytesIO(data[:-3]), len(data) - 3) == (29_998, 3.5)  # half a line
    junk = data + b"x" * CHUNK + b"\n" + b"y" * CHUNK
    assert last_of(io.BytesIO(junk), len(junk)) == (29_999, 3.5)
    assert last_of(io.BytesIO(b""), 0) == (None, None)
    assert last_of(io.BytesIO(b'{"step": 4}'), 11) == (None, None)


# --- one run -------------------------------------------------------------------------------------


def test_a_run_that_grows(tmp_path: Path) -> None:
    log = RunLog(write_run(tmp_path / "run", []))
    for step in range(1, 6):
        log.write(step, loss=float(step))
    first = one(tmp_path, "run")
    assert first["metrics"] == [{"step": n, "loss": float(n)} for n in range(1, 6)]
    assert first["summary"] is first["samples"] is first["config"] is None
    path = tmp_path / "run" / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # on its way
    assert one(tmp_path, "run", after=4)["metrics"] == [{"step": 5, "loss": 5.0}]
    with path.open("a") as file:
        file.write('ss": 6.0}\n')
    assert one(tmp_path, "run", after=5)["metrics"] == [{"step": 6, "loss": 6.0}]
    assert one(tmp_path, "run", after=6)["metrics"] == []
    log.close()
    RunLog(tmp_path / "run", resumed_step=3).close()  # later records are dropped
    assert [record["step"] for record in one(tmp_path, "run")["metrics"]] == [1, 2, 3]


@pytest.mark.parametrize("after", [-1, 0, 1, 777, 19_999, 20_000, 10**15])
def test_what_comes_after_a_step_is_found_by_bisection(tmp_path: Path, after: int) -> None:
    records = steps(20_000, every=250)
    data = (write_run(tmp_path / "run", records) / "metrics.jsonl").read_bytes()
    assert len(data) > 10 * LINE

    class Counted(io.BytesIO):
        taken = 0

        def read(self, size: int | None = -1) -> bytes:
            found = super().read(size)
            self.taken += len(found)
            return found

    file = Counted(data)
    found, every = metrics_after(file, after, len(data))
    wanted = [record for record in records if record["step"] > after]
    if len(wanted) <= POINTS:
        assert (found, every) == (wanted, 1)
        assert file.taken < 40 * LINE
    else:  # each n-th, all evaluations and the last
        assert every == pytest.approx(len(wanted) / POINTS, abs=1)
        assert [r for r in found if "val_loss" in r] == [r for r in wanted if "val_loss" in r]
        place_of = {json.dumps(record): place for place, record in enumerate(wanted)}
        places = [place_of[json.dumps(record)] for record in found]
        assert places[0] < every and places[-1] == len(wanted) - 1
        assert max(b - a for a, b in itertools.pairwise(places)) <= every
        assert len(found) <= POINTS + 80 + 1


def test_lines_of_every_length(tmp_path: Path) -> None:
    long = b"x" * (LINE + 1)
    for lines in ([b"a"], [b"", b"b", b""], [long, b"c"], [b"d", long * 40, b"e", long, b"f"]):
        data = b"\n".join(lines) + b"\nhalf"
        kept = [line for line in lines if len(line) <= LINE]
        assert list(lines_from(io.BytesIO(data), 0, len(data))) == kept


def test_broken_metrics(tmp_path: Path) -> None:
    good = {"step": 9, "loss": 1.0}
    write_run(
        tmp_path / "run",
        [
            "", "{", "null", "[1]", '"step"', '{"loss": 1.0}', '{"step": "3"}', '{"step": true}',
            '{"step": -1}', '{"step": 1e3}', '{"step": 99999999999999999999}', "[" * 100_000,
            '{"step": 1, "loss": NaN, "val_loss": Infinity, "a": -Infinity, "b": 1e999}',
            '{"step": 2, "text": "no figure", "deep": {"x": 1}, "yes": true, "big": 1' + "0" * 30
            + "}",
            '{"step": 3, "x": 1' + "0" * 5000 + "}",
            '{"step": 4, ' + ", ".join(f'"f{n}": {n}' for n in range(200)) + "}",
            "\x00\x01", good,
        ],
    )  # fmt: skip
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n" + b"z" * (3 * CHUNK))
    found = one(tmp_path, "run")["metrics"]
    assert found[0] == {"step": 1, "loss": None, "val_loss": None, "a": None, "b": None}
    assert found[1] == {"step": 2}
    assert found[2]["step"] == 4 and len(found[2]) == 64
    assert found[3:] == [good]
    assert rows(tmp_path)["run"]["steps"] == 9
    json.dumps(found, allow_nan=False)


def test_texts_beside_the_metrics(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "run",
        steps(2),
        config_yaml="train:\n  max_steps: 2\n",
        samples_md="# Samples\n\n## Step 2\n\nむかし\n",
        summary_json='{"steps": 2, "mfu": NaN, "more": {"x": 1}, "name": "run"}',
    )
    found = one(tmp_path, "run")
    assert found["config"] == "train:\n  max_steps: 2\n"
    assert found["samples"].endswith("むかし\n")
    assert found["summary"] == {"steps": 2, "mfu": None, "name": "run"}
    for broken in ("", "[]", "{", "[" * 100_000, "\x00"):
        (folder / "summary.json").write_text(broken)
        assert one(tmp_path, "run")["summary"] is None
    parts = "".join(f"\n## Step {n}\n\n{'x' * 1000}\n" for n in range(500))
    (folder / "samples.md").write_bytes(b"# Samples\n" + parts.encode() + b"\xff")
    samples = one(tmp_path, "run")["samples"]
    assert samples.startswith("\n## Step ") and len(samples) <= runs.TEXT
    assert "## Step 499" in samples


@pytest.mark.skipif(not hasattr(os, "symlink") or sys.platform == "win32", reason="no links here")
def test_links_and_pipes_are_not_followed(tmp_path: Path) -> None:
    outside = write_run(tmp_path / "outside", steps(3), config_yaml="secret: 1\n")
    root = tmp_path / "runs"
    mine = write_run(root / "mine", steps(2))
    (root / "linked").symlink_to(outside)
    (root / "group").mkdir()
    (root / "group" / "up").symlink_to(tmp_path)
    (root / "file").mkdir()
    (root / "file" / "metrics.jsonl").symlink_to(outside / "metrics.jsonl")
    (root / "pipe").mkdir()
    os.mkfifo(root / "pipe" / "metrics.jsonl")
    (mine / "config.yaml").symlink_to(outside / "config.yaml")
    (mine / "samples.md").symlink_to("/etc/hostname")
    os.mkfifo(mine / "summary.json")
    write_run(Path(os.fsdecode(os.fsencode(root) + b"/half-\xff")), steps(1))
    assert list(find_runs(root)) == ["mine"]
    found = one(root, "mine")
    assert found["config"] is found["samples"] is found["summary"] is None
    # A root that is a link itself was named by who started the server.
    (tmp_path / "shortcut").symlink_to(root)
    assert list(find_runs(tmp_path / "shortcut")) == ["mine"]


def test_a_crowd_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MOST_RUNS", 7)
    for number in range(12):
        write_run(tmp_path / f"{number // 4}" / f"{number}", steps(1))
    assert len(find_runs(tmp_path)) < 12
    monkeypatch.setattr(runs, "MOST_ENTRIES", 2)
    assert len(find_runs(tmp_path)) <= 2
    assert find_runs(tmp_path / "nowhere") == {}


# --- the routes ----------------------------------------------------------------------------------


def test_the_routes(
    tmp_path: Path, service: Service, start: Callable[..., Running], monkeypatch: Any
) -> None:
    write_run(tmp_path / "runs" / "a" / "run 1 ラン", steps(12))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    service.runs = tmp_path / "runs"
    address = start(service).address
    with httpx2.Client(base_url=address) as client:
        assert client.get("/api/page").json()["runs"] is True
        (row,) = client.get("/api/runs").json()["runs"]
        assert row["name"] == "a/run 1 ラン" and row["val_loss"] == pytest.approx(6 - 10 / 12)
        answer = client.get("/api/runs/one", params={"name": row["name"], "after": 11}).json()
        assert answer["metrics"] == [{"step": 12, "loss": 4.0, "learning_rate": 1e-3}]
        names = (
            "", ".", "..", "../runs", "a/../a/run 1 ラン", "/a/run 1 ラン", "a//run 1 ラン",
            str(tmp_path / "runs" / "a"), "a", "\x00", "..\\runs", "%2e%2e", "x" * 900,
        )  # fmt: skip
        for name in names:
            refused = client.get("/api/runs/one", params={"name": name})
            assert refused.status_code == 404, name
            error = refused.json()["error"]
            assert error["code"] == "run_not_found" and len(error["message"]) < 300
        for query in ("", "name=a&after=x", "name=a&after=1" + "0" * 40, "name=" + "x" * 2000):
            refused = client.get(f"/api/runs/one?{query}")
            assert refused.status_code == 400, query
            assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
        service.runs = None
        assert client.get("/api/runs").json() == {"runs": []}
        assert client.get("/api/runs/one?name=a").status_code == 404


def test_the_settings_of_a_real_run(tmp_path: Path) -> None:
    """Where config.yaml says how many steps there are to be."""
    config = PretrainConfig(out="x", train=TrainSettings(max_steps=123, warmup_steps=7))
    write_run(tmp_path / "run", steps(1), config_yaml=to_yaml(config))
    assert rows(tmp_path)["run"]["max_steps"] == 123
    for text in ("max_steps: 5\n", "train:\nmodel:\n  max_steps: 5\n", "train:\n  max_steps: x\n"):
        write_run(tmp_path / "run", steps(1), config_yaml=text)
        assert rows(tmp_path)["run"]["max_steps"] is None
