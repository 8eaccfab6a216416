"""Reports of runs: tables, pictures and examples, as Markdown and as one HTML file.

report.html needs nothing beside it: pictures are drawn into it as SVG whose letters are the
browser's (any script, dark or light), so it can be mailed. report.md shows the same pictures from
the folder pictures/. Whatever comes from data is escaped in both.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_from_scratch.core.files import write_aside

LONG = 24  # characters from which a cell is given room
LONGEST_CELL = 1500  # characters of a cell; the whole text stands in the data
INK = "#010203"  # what matplotlib draws in this colour takes the page's text colour
COLOURS = ("#3b7dd8", "#d9722e", "#3a9d5d", "#b0509e", "#8a8f98", "#c7a008")

# The size of a picture in inches; 96 pixels each.
Size = tuple[float, float]


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; numbers are written with the digits that they need."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Section:
    """A part of a report: a title, a sentence or two, a picture, a table, text as it stands.

    `draw` gets matplotlib axes; `name` is the picture's file name without its ending. `verbatim`
    is shown letter by letter, with its line ends.
    """

    title: str
    text: str = ""
    table: Table | None = None
    draw: Callable[[Any], None] | None = None
    name: str = ""
    size: Size = (7.0, 3.8)
    verbatim: str = ""


def write_report(folder: Path, title: str, sections: Sequence[Section]) -> None:
    """report.md, report.html and pictures/NAME.svg in `folder`."""
    pictures: list[str] = []
    for number, section in enumerate(sections):
        pictures.append(picture(section, number) if section.draw is not None else "")
        if pictures[-1]:
            path = folder / "pictures" / f"{picture_name(section)}.svg"
            path.parent.mkdir(exist_ok=True)
            with write_aside(path) as file:
                file.write(alone(pictures[-1]))
    with write_aside(folder / "report.md") as file:
        file.write(markdown(title, sections))
    with write_aside(folder / "report.html") as file:
        file.write(page(title, sections, pictures))


def picture_name(section: Section) -> str:
    """The file name of a section's picture, without its ending."""
    name = section.name or section.title
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-") or "picture"


def number_text(value: Any) -> str:
    """A cell as text: 0.98765 -> 0.9877, 12345 -> 12,345, 1.2e-7 -> 1.2e-07, None -> -."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value and abs(value) < 0.001:
        return f"{value:.3g}"
    return f"{value:,.4f}" if abs(value) < 100 else f"{value:,.1f}"


def _cell(value: Any) -> str:
    text = number_text(value)
    return text if len(text) <= LONGEST_CELL else f"{text[:LONGEST_CELL]} …"


# --- Markdown ------------------------------------------------------------------------------------


def markdown(title: str, sections: Sequence[Section]) -> str:
    """The report as Markdown."""
    parts = [f"# {plain_md(title)}\n"]
    for section in sections:
        parts.append(f"## {plain_md(section.title)}\n")
        if section.text:
            parts.append(f"{plain_md(section.text)}\n")
        if section.draw is not None:
            parts.append(f"![{plain_md(section.title)}](pictures/{picture_name(section)}.svg)\n")
        if section.table is not None:
            header, rows = section.table.header, section.table.rows
            rule = f"|{'---|' * len(header)}"
            lines = [f"| {' | '.join(map(plain_md, header))} |", rule]
            lines += [f"| {' | '.join(plain_md(_cell(value)) for value in row)} |" for row in rows]
            parts.append("\n".join(lines) + "\n")
        if section.verbatim:
            parts.append(fenced(section.verbatim.rstrip()))
    return "\n".join(parts)


def fenced(text: str) -> str:
    """Text that Markdown shows letter by letter, between fences longer than any in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}\n"


def plain_md(text: str) -> str:
    """Text that Markdown shows as it stands, on one line."""
    escaped = re.sub(r"([\\`*_\[\]|#])", r"\\\1", html.escape(text, quote=False))
    return re.sub(r"\r\n?|\n", "<br>", escaped)


# --- HTML ----------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --soft: #5b6470; --back: #fff; --line: #d6dae0;
  --stripe: #f5f6f8 }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6ea; --soft: #9aa4b0; --back: #15181c;
  --line: #363c45; --stripe: #1c2026 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem 1rem 4rem; max-width: 62rem; color: var(--ink);
  background: var(--back); font: 16px/1.55 system-ui, "Hiragino Sans", "Noto Sans JP", sans-serif }
h1 { font-size: 1.5rem; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
p { margin: .4rem 0; color: var(--soft) }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem;
  border-bottom: 1px solid var(--line); white-space: pre-wrap; overflow-wrap: break-word }
th { color: var(--soft); font-weight: 600; white-space: nowrap }
td.long { min-width: 13rem; overflow-wrap: anywhere }
tr:nth-child(even) td { background: var(--stripe) }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap }
svg { width: 100%; min-width: 20rem; height: auto; color: var(--ink) }
pre { overflow-x: auto; padding: .8rem; background: var(--stripe); font-size: .85rem;
  white-space: pre-wrap; overflow-wrap: anywhere }
"""


def page(title: str, sections: Sequence[Section], pictures: Sequence[str]) -> str:
    """The report as one HTML page."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for section, drawn in zip(sections, pictures, strict=True):
        body.append(f"<section>\n<h2>{html.escape(section.title)}</h2>")
        if section.text:
            body.append(f"<p>{html.escape(section.text)}</p>")
        if drawn:
            width = f"margin:0;max-width:{section.size[0]}in"
            body.append(f'<figure class="wide" style="{width}">{drawn}</figure>')
        if section.table is not None:
            body.append(_html_table(section.table))
        if section.verbatim:
            body.append(f"<pre>{html.escape(section.verbatim.rstrip())}</pre>")
        body.append("</section>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _html_table(table: Table) -> str:
    header = "".join(f"<th>{html.escape(name)}</th>" for name in table.header)
    lines = []
    for row in table.rows:
        cells = []
        for value in row:
            text, kind = _cell(value), ""
            if isinstance(value, int | float):
                kind = ' class="number"'
            elif len(text) > LONG:
                kind = ' class="long"'
            cells.append(f"<td{kind}>{html.escape(text)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    rows = "\n".join(lines)
    return (
        f'<div class="wide"><table>\n<thead><tr>{header}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


# --- pictures ------------------------------------------------------------------------------------


def picture(section: Section, number: int = 0) -> str:
    """A section's picture as SVG in the colours of the page that it stands in.

    `number` keeps the inner names of several pictures in one page apart.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.rcsetup import cycler

    ink = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    )
    style: Any = {
        **ink, "svg.fonttype": "none", "svg.hashsalt": f"picture {number}", "font.size": 10,
        "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=list(COLOURS)), "legend.frameon": False,
        "grid.alpha": 0.25, "axes.titlesize": 11, "axes.unicode_minus": False,
        "text.parse_math": False,  # a label may hold two dollar signs
    }  # fmt: skip
    file = io.StringIO()
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")  # the browser has the letters
        figure, axes = plt.subplots(figsize=section.size, layout="constrained")
        try:
            assert section.draw is not None
            section.draw(axes)
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        finally:
            plt.close(figure)
    return _of_the_page(file.getvalue())


def _of_the_page(svg: str) -> str:
    """What matplotlib wrote, without a file's head, names that may clash, and its ink."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font: ([^;\"]*?)'[^;\"]*sans-serif", r"font: \1sans-serif", svg)
    return svg.replace(INK, "currentColor").strip()


def alone(svg: str) -> str:
    """A picture as a file of its own: dark letters on white, whatever the reader's page."""
    end = svg.index(">") + 1
    head = svg[:end].replace("<svg", '<svg style="color:#1c2128"', 1)
    white = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}{white}{svg[end:]}\n'
