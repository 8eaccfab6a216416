"""Runs: curves, samples and figures of run folders, growing while they train."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.serve.browser.conftest import Site

SAMPLES = (
    "# Samples\n\n## Step {step}\n\n**Once**\n\n```text\nOnce upon a <b>time</b> at {step}\n```\n"
)


class Run:
    """A run folder that grows as a training writes it."""

    def __init__(self, folder: Path, max_steps: int) -> None:
        self.folder, self.step = folder, 0
        folder.mkdir()
        (folder / "config.yaml").write_text(f"out: {folder}\ntrain:\n  max_steps: {max_steps}\n")

    def train(self, steps: int) -> None:
        with (self.folder / "metrics.jsonl").open("a") as file:
            for _ in range(steps):
                self.step += 1
                loss = 2 + 3 * math.exp(-self.step / 30) + 0.1 * math.sin(self.step)
                record = {"step": self.step, "loss": loss}
                file.write(json.dumps(record) + "\n")
            file.write(json.dumps({"step": self.step, "val_loss": 2.5}) + "\n")
        (self.folder / "samples.md").write_text(SAMPLES.format(step=self.step))

    def finish(self) -> None:
        summary = {"steps": self.step, "parameters": 123456, "val_loss": 2.5}
        (self.folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def run(site: Site) -> Iterator[Run]:
    """A run under way: 20 of 100 steps."""
    made = Run(site.runs / "small", 100)
    made.train(20)
    yield made
    for path in made.folder.iterdir():
        path.unlink()
    made.folder.rmdir()


def points(page: Any) -> int:
    return page.locator("#runs path.raw").get_attribute("d").count("L")


def test_a_run_grows_before_the_eyes(open_page: Callable[..., Any], run: Run) -> None:
    page = open_page("/#runs")
    row = page.locator("#run-list tr[data-run=small]")
    expect(row.locator(".steps")).to_have_text("20 / 100")
    expect(row.locator(".state")).to_contain_text("running")
    expect(page.locator("#run-details")).to_contain_text("Once upon a <b>time</b> at 20")
    few = points(page)
    assert few > 5
    run.train(50)
    expect(row.locator(".steps")).to_have_text("70 / 100")
    expect(row.locator(".val_loss")).to_have_text("2.500")
    expect(page.locator("#run-details")).to_contain_text("at 70")
    assert points(page) > few
    run.train(30)
    run.finish()
    expect(row.locator(".state")).to_contain_text("finished")
    expect(row.locator(".steps")).to_have_text(re.compile("^100( / 100)?$"))
    expect(page.locator("#run-details")).to_contain_text("123,456")


def test_a_chart_by_keyboard(open_page: Callable[..., Any], run: Run) -> None:
    page = open_page("/#runs")
    chart = page.get_by_label("Loss by step", exact=False)
    chart.focus()
    readout = page.locator("#run-readout")
    for key, step in (("Home", 1), ("End", 20), ("ArrowLeft", 20)):
        page.keyboard.press(key)
        expect(readout).to_contain_text(f"Step {step}")
    expect(readout).to_contain_text("small")
    whole = page.locator("#runs path.raw").get_attribute("d")
    page.keyboard.press("+")
    expect(page.locator("#runs path.raw")).not_to_have_attribute("d", whole)
    page.keyboard.press("Escape")
    expect(page.locator("#runs path.raw")).to_have_attribute("d", whole)


def test_two_runs_beside_each_other(open_page: Callable[..., Any], run: Run, site: Site) -> None:
    other = Run(site.runs / "other", 40)
    other.train(40)
    page = open_page("/#runs")
    expect(page.locator("#run-list tbody tr")).to_have_count(2)
    for name in ("small", "other"):
        page.locator(f"tr[data-run={name}] input").check()
    expect(page.locator("#runs path.raw")).to_have_count(2)
    page.locator("tr[data-run=small] th button").click()
    expect(page.locator("#run-details h3")).to_have_text("small")
    for path in other.folder.iterdir():
        path.unlink()
    other.folder.rmdir()
    page.locator("#runs-refresh").click()
    expect(page.locator("#run-list tbody tr")).to_have_count(1)


def test_no_runs_yet(open_page: Callable[..., Any]) -> None:
    page = open_page("/#runs")
    expect(page.locator("#runs-empty")).to_contain_text("scratchlm pretrain")
    expect(page.locator("#run-list")).to_be_hidden()
