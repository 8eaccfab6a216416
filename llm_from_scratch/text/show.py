"""Tokens in colours, for terminals of any kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

    from llm_from_scratch.text.compare import Comparison

COLOURS = (
    "bright_white on #264653", "bright_white on #5f3b0f", "bright_white on #1f4d2b",
    "bright_white on #4a2545",
)  # fmt: skip
# Sixteen colours: the darks above would all become the same one.
PLAIN_COLOURS = ("white on blue", "black on yellow", "black on cyan", "white on magenta")


def painted(tokens: Sequence[tuple[str, int | None]], color_system: str | None) -> Text:
    """Each token's text on the next colour, and its id behind it if there is one.

    `color_system` is what `rich.console.Console` calls the terminal's colours. Where there are none
    brackets say where a token begins and ends. A line ends behind a token that does.
    """
    from rich.text import Text

    few = color_system in ("standard", "windows")
    colours = PLAIN_COLOURS if few else COLOURS
    line = Text()
    for number, (piece, token) in enumerate(tokens):
        style = colours[number % len(colours)] if color_system else ""
        line.append(piece if color_system else f"[{piece}]", style=style)
        if token is not None:
            line.append(f"{token} ", style="dim")
        if piece.endswith("\\n"):
            line.append("\n")
    return line


def print_compared(found: Sequence[Comparison], shown: Sequence[Sequence[dict[str, Any]]]) -> None:
    """The excerpt as each tokenizer cuts it, and the table; on standard output."""
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    from llm_from_scratch.text.compare import HEADS, short_names

    console = Console(highlight=False, soft_wrap=True)
    for comparison, tokens in zip(found, shown, strict=True):
        if not tokens:
            continue
        console.print(Text(comparison.name, style="bold"))
        pieces = [(token["text"], None) for token in tokens]
        console.print(painted(pieces, console.color_system), end="\n\n")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, head in enumerate(HEADS.values()):
        table.add_column(head, justify="right" if number else "left", no_wrap=True)
    names = short_names([comparison.name for comparison in found])
    for name, comparison in zip(names, found, strict=True):
        table.add_row(Text(name), *map(Text, comparison.row()[1:]))
    # Numbers and names that are cut off say nothing: rather a line longer than the terminal.
    whole = Measurement.get(console, console.options.update(width=10_000), table).maximum
    console.width = max(console.width, whole)
    console.print(table)
    if any(comparison.unknown or not comparison.round_trip for comparison in found):
        console.print(
            "Unknown tokens count as one; rows with round trip 'no' lose text.", style="dim"
        )
