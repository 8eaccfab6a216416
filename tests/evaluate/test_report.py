"""Reports: the same parts in both formats, nothing from the data comes alive, and they open."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_from_scratch.evaluate.report import (
    LONGEST_CELL,
    Section,
    Table,
    markdown,
    number_text,
    page,
    picture,
    write_report,
)
from llm_from_scratch.evaluate.report_parts import (
    Mistake,
    calibration_error,
    calibration_section,
    confusion_section,
    counts_section,
    curves_sections,
    errors_section,
    examples_section,
    histogram_section,
    reliability,
    scatter_section,
)
from tests.serve.browser.browsers import launch_options, why_no_browser

HOSTILE = '<script>alert(1)</script> & "quotes" | `code` *x* $5 $6 [a](b)\n# <b>次の行</b>'


class Reader(HTMLParser):
    """The tags and the text of a page, as a browser takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_numbers_have_the_digits_that_they_need() -> None:
    wanted = {
        0.98765: "0.9877", 12345: "12,345", 1234.56: "1,234.6", 1.2e-7: "1.2e-07", 0.0: "0.0000",
        "x": "x", None: "-", True: "True",
    }  # fmt: skip
    assert [number_text(value) for value in wanted] == list(wanted.values())
    assert number_text(float("nan")) == "nan"


def test_nothing_from_the_data_comes_alive() -> None:
    sections = [
        Section(HOSTILE, HOSTILE, Table((HOSTILE,), [(HOSTILE,)]), verbatim=f"{HOSTILE}\n```\n")
    ]
    found = Reader()
    found.feed(page(HOSTILE, sections, [""]))
    assert "script" not in found.tags and "b" not in found.tags
    assert found.text.count("<script>alert(1)</script>") == 7
    text = markdown(HOSTILE, sections)
    table = next(line for line in text.split("\n") if line.startswith("| &lt;script"))
    assert table.count("|") - table.count("\\|") == 2 and "<br>" in table
    assert "\n````text\n" in text  # the fence is longer than what stands in it


def test_long_cells_are_cut() -> None:
    long = "x" * (LONGEST_CELL + 1)
    assert f"{'x' * LONGEST_CELL} …" in markdown("t", [Section("s", table=Table(("a",), [[long]]))])


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=60), st.integers(1, 20))
def test_the_bins_are_those_of_the_definition(answers: list[tuple[float, bool]], bins: int) -> None:
    sure, right = [a[0] for a in answers], [a[1] for a in answers]
    found = reliability(sure, right, bins)
    error, places = 0.0, [min(int(c * bins), bins - 1) for c in sure]
    for number in sorted(set(places)):
        inside = [i for i, place in enumerate(places) if place == number]
        mean = sum(sure[i] for i in inside) / len(inside)
        share = sum(right[i] for i in inside) / len(inside)
        one = found.pop(0)
        assert (one.count, one.confidence, one.accuracy) == (
            len(inside), pytest.approx(mean), pytest.approx(share),
        )  # fmt: skip
        error += len(inside) / len(answers) * abs(mean - share)
    assert found == []
    assert calibration_error(reliability(sure, right, bins)) == pytest.approx(error)


def test_the_tables_of_the_parts() -> None:
    counts = counts_section({"train": {"ham": 3, "spam": 1}, "test": {"spam": 2}}).table
    assert counts is not None
    assert [list(row) for row in counts.rows] == [
        ["ham", 3, 0, "75.0%"], ["spam", 1, 2, "25.0%"], ["all", 4, 2, "100.0%"],
    ]  # fmt: skip
    confused = confusion_section(["a", "b", "c"], [[5, 1, 0], [4, 4, 0], [0, 0, 0]]).table
    assert confused is not None
    assert confused.rows == [("b", "a", 4, "50.0%"), ("a", "b", 1, "16.7%")]
    with pytest.raises(ValueError, match="labels"):
        confusion_section(["a"], np.zeros((2, 2)))
    wide = confusion_section([str(n) for n in range(50)], np.eye(50, dtype=int))
    assert wide.draw is None and wide.table is None
    mistakes = [Mistake("r", "t", "a", "b", n / 30) for n in range(30)]
    errors = errors_section(mistakes, most=2)
    assert errors.table is not None and errors.text == "30 errors, the first 2."
    assert [row[-1] for row in errors.table.rows] == [29 / 30, 28 / 30]
    rows = examples_section(
        [{"place": "1", "got": "old"}], [{"place": "1", "given": "g", "wanted": "w", "got": "new"}]
    ).table
    assert rows is not None and rows.rows == [("1", "g", "w", "old", "new")]


def all_parts(folder: Path) -> list[Section]:
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 40):
            record: dict[str, float] = {"step": step, "loss": 3 / step, "accuracy": 1 - 1 / step}
            if step % 10 == 0:
                record |= {"val_loss": 4 / step, "val_accuracy": 1 - 2 / step, "val_f1": 0.5}
            file.write(json.dumps(record) + "\n")
    sure: list[float] = np.linspace(0, 1, 50).tolist()
    right = [one > 0.4 for one in sure]
    return [
        *curves_sections(folder),
        confusion_section(["ham", "迷惑", HOSTILE], [[5, 1, 0], [2, 3, 0], [0, 0, 7]]),
        calibration_section(sure, right),
        scatter_section(sure, sure[::-1]),
        histogram_section({"before": sure, "after": [*sure, float("nan")]}, "Margins"),
        histogram_section({"nothing": []}, "Empty"),
        errors_section([Mistake("a:1", HOSTILE, "x", "y", 0.9)]),
    ]


def test_the_curves_are_those_of_the_run(tmp_path: Path) -> None:
    sections = all_parts(tmp_path)
    assert [section.title for section in sections[:3]] == ["Loss", "Accuracy", "F1"]


def test_pictures_are_sound_and_the_same_each_time(tmp_path: Path) -> None:
    sections = all_parts(tmp_path)
    for number, section in enumerate(sections):
        if section.draw is not None:
            drawn = picture(section, number)
            assert drawn == picture(section, number)
            root = xml.etree.ElementTree.fromstring(drawn)
            assert root.tag.endswith("svg")
            assert "currentColor" in drawn and "#010203" not in drawn
    texts = picture(sections[3])
    assert "迷惑" in texts  # letters, not outlines: the browser has the font
    assert "<script" not in texts


def test_the_files_of_a_report(tmp_path: Path) -> None:
    write_report(tmp_path, "title", all_parts(tmp_path))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for name in re.findall(r"\]\((pictures/[^)]+)\)", text):
        xml.etree.ElementTree.parse(tmp_path / name)
    assert len(re.findall(r"!\[", text)) == len(list((tmp_path / "pictures").iterdir())) == 8
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["']?(?!#|data:)[^>"' ]+""", html.replace("xlink:", ""))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if (missing := why_no_browser()) is not None:
        pytest.skip(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**launch_options())
        yield browser
        browser.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 360), ("dark", 1200)])
def test_it_opens_in_a_browser(chromium: Any, tmp_path: Path, scheme: str, width: int) -> None:
    write_report(tmp_path, HOSTILE, all_parts(tmp_path))
    opened = chromium.new_page(
        color_scheme=scheme, viewport={"width": width, "height": 800}, offline=True
    )
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("dialog", lambda dialog: said.append(dialog.message))
    opened.goto((tmp_path / "report.html").as_uri())
    assert said == []
    assert opened.locator("svg").count() == 8
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    # Dark letters on a light page, light ones on a dark page, in pictures, too.
    ink = opened.locator("svg").first.evaluate("one => getComputedStyle(one).color")
    back = opened.locator("body").evaluate("one => getComputedStyle(one).backgroundColor")
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, back)]
    assert (brightness[0] < brightness[1]) == (scheme == "light")
    assert abs(brightness[0] - brightness[1]) > 400
    opened.close()
