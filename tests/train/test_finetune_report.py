"""Reports of whole runs: what stands in labels and texts is shown, and never comes alive."""

from __future__ import annotations

import html
import json
import re
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from llm_from_scratch.core.config import from_dict
from llm_from_scratch.train.finetune import append_sample, finetune
from llm_from_scratch.train.methods.classify import ClassifyConfig
from tests.evaluate.test_report import Reader
from tests.train.tiny_folders import encoder_folder

SCRIPT, LINK = "<script>alert(1)</script>", "](http://evil.example) ![x](http://evil.example/a.png)"
LABELS = [f"{SCRIPT} |", f"`b` \\| {LINK}", "```\n<img src=x onerror=alert(1)>"]
ALIVE = {"script", "img", "a", "iframe", "object"}


class Links(Reader):
    """Every address in a page's tags."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        super().handle_starttag(tag, attrs)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hostile")
    words = "good bad fine poor red green blue film book song".split()
    rows = [
        {"text": f"{words[n % 10]} {words[n * 3 // 10 % 10]} {n} {SCRIPT} | `x` {LINK}", "label": l}
        for n, l in enumerate(LABELS * 12)
    ]  # fmt: skip
    rows += [{"text": rows[0]["text"], "label": LABELS[1]}, {"text": "", "label": SCRIPT}]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": encoder_folder(place / "base"), "out": str(place / "run"),
        "data": {"paths": [str(place / "rows.jsonl")], "similarity": 1.0, "test_fraction": 0.3},
        "train": {
            "max_steps": 2, "epochs": None, "precision": "fp32", "device": "cpu", "sample_every": 1,
        },
    }  # fmt: skip
    return finetune("classify", from_dict(ClassifyConfig, values), quiet=True).folder


def test_hostile_labels_and_texts_in_html(folder: Path) -> None:
    found = Links()
    found.feed((folder / "report.html").read_text(encoding="utf-8"))
    assert not ALIVE & set(found.tags)
    # What the pictures refer to is in the page itself.
    assert all(address.startswith(("#", "data:")) for address in found.addresses)
    for label in LABELS:
        assert label in found.text
    for path in (folder / "pictures").iterdir():
        tags = {one.tag.rpartition("}")[2] for one in xml.etree.ElementTree.parse(path).iter()}
        assert not {"script", "a", "foreignObject"} & tags


@pytest.mark.parametrize("name", ["report.md", "samples.md"])
def test_hostile_labels_and_texts_in_markdown(folder: Path, name: str) -> None:
    text = (folder / name).read_text(encoding="utf-8")
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    found = Links()
    found.feed(page)
    pictures = [f"pictures/{path.name}" for path in (folder / "pictures").iterdir()]
    assert set(found.addresses) <= set(pictures)
    assert not (ALIVE - {"img"}) & set(found.tags)
    assert SCRIPT in found.text and "](http://evil.example)" in found.text
    if name == "report.md":
        assert found.tags.count("img") == len(pictures) > 0
        for table in re.findall(r"<table>.*?</table>", page, re.S):  # no cell was cut in two
            header, *rows = re.findall(r"<tr>.*?</tr>", table, re.S)
            assert {row.count("<td") for row in rows} == {header.count("<th")}
        cells = [html.unescape(re.sub("<br ?/?>", "\n", one)) for one in re.findall(
            r"<td>(.*?)</td>", page, re.S)]  # fmt: skip
        assert set(LABELS) <= set(cells)


def test_samples_keep_their_fences(tmp_path: Path) -> None:
    got = f"```\n{SCRIPT}\n````\n# no heading"
    append_sample(tmp_path, 1, [{"given": f"**{SCRIPT}** `x`", "got": got}])
    append_sample(tmp_path, 2, [{"given": "next", "got": "fine"}])
    found = Reader()
    text = (tmp_path / "samples.md").read_text(encoding="utf-8")
    found.feed(MarkdownIt("commonmark", {"html": True}).render(text))
    assert found.tags.count("h2") == 2 and found.tags.count("h1") == 1
    assert "script" not in found.tags and found.text.count(SCRIPT) == 2
