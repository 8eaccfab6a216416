"""The rows of a fine-tuning run: read, checked, rid of duplicates, and divided.

What is tested stays as it was given, so that a figure can be compared with published ones; what is
like it is not learnt from. Files under data.avoid (the tests of other tasks) are treated the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.runlog import LiveLine
from llm_from_scratch.data.near_duplicates import Duplicate, find_duplicates, plain
from llm_from_scratch.data.records import BadRow, BadRows, Row, read_rows
from llm_from_scratch.data.split import drawing_order
from llm_from_scratch.train.methods.base import FinetuneConfig, FinetuneMethod

PARTS = ("train", "val", "test")
SHOWN = 8  # broken rows and conflicts named on the terminal; the run folder has them all
LABEL_LENGTH = 12  # one word of fewer characters is a label, not a text that can be avoided


@dataclass
class Gathered:
    """The rows of each part, what was counted on the way, and a sentence on each duplicate."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    duplicates: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)


def gather(
    method: FinetuneMethod, config: FinetuneConfig, bad: BadRows, line: LiveLine
) -> Gathered:
    """The checked rows of each part, without what is like others or like what is to be avoided."""
    data, found = config.data, Gathered()
    if not data.paths:
        raise UserError("No data was given; name a file with --data.")
    for flag, paths in (
        ("data", data.paths), ("val", data.val), ("test", data.test), ("data.avoid", data.avoid),
    ):  # fmt: skip
        for path in paths:
            if not Path(path).exists():
                raise UserError(f"{path} does not exist; check the path given as --{flag}.")
    for part, paths in zip(PARTS, (data.paths, data.val, data.test), strict=True):
        found.rows[part] = [row for path in paths for row in checked(method, path, bad, line)]
        if paths and not found.rows[part]:
            raise UserError(f"{', '.join(paths)}: no row can be used{reason(bad)}")
    avoid = [text for path in data.avoid for text in texts_in(path)]
    line.show(f"Looking for duplicates among {sum(map(len, found.rows.values())):,} rows")
    rows = found.rows
    if data.drop_duplicates:
        _leave_out(method, found, config, "val", rows["test"], [], among=False)
    held_out = [*rows["test"], *rows["val"]] if data.drop_duplicates else []
    if data.drop_duplicates or avoid:
        _leave_out(method, found, config, "train", held_out, avoid, among=data.drop_duplicates)
    chosen = method.select(rows["train"])
    if len(chosen) < len(rows["train"]):
        found.counts["rows_not_selected"] = len(rows["train"]) - len(chosen)
        rows["train"] = chosen
    total, seed = len(rows["train"]), config.train.seed
    for part, paths, share in (
        ("test", data.test, data.test_fraction), ("val", data.val, data.val_fraction),
    ):  # fmt: skip
        if not paths and share:
            groups = [plain(method.group_of(row.values)) for row in rows["train"]]
            count = round(share * total)
            rows["train"], rows[part] = split_rows(rows["train"], groups, count, seed)
    return found


def checked(method: FinetuneMethod, path: str, bad: BadRows, line: LiveLine) -> list[Row]:
    """The rows of a file in the method's shape."""
    rows = []
    for row in method.read(path, bad):
        line.show(f"Reading {row.place}")
        try:
            rows.append(Row(method.check(row.values), row.place))
        except BadRow as error:
            bad(f"{row.place}: {error}")
    return rows


# --- duplicates ----------------------------------------------------------------------------------


def _leave_out(
    method: FinetuneMethod,
    found: Gathered,
    config: FinetuneConfig,
    part: str,
    held_out: list[Row],
    avoid: list[str],
    among: bool,
) -> None:
    """Take rows out of a part that are like `held_out`, like `avoid` or (`among`) each other."""
    rows = found.rows[part]
    if not rows:
        return
    texts = [method.text_of(row.values) for row in rows]
    against = [*(method.text_of(row.values) for row in held_out), *avoid]
    alike = find_duplicates(texts, config.data.similarity, against=against, among=among, exact=True)
    counts = found.counts
    for name in ("exact_duplicates", "near_duplicates"):
        counts.setdefault(name, 0)
    if avoid:
        counts |= {"avoided_exact": 0, "avoided_near": 0}
    for one in alike:
        kind = "exact" if one.exact else "near"
        row, other = rows[one.number], _other(one, rows, held_out, len(avoid))
        if other is None:
            counts[f"avoided_{kind}"] += 1
            found.duplicates.append(f"{row.place}: {_alike(one)} a text in data.avoid.")
            continue
        counts[f"{kind}_duplicates"] += 1
        found.duplicates.append(f"{row.place}: {_alike(one)} {other.place}.")
        wants, wanted = method.label_of(row.values), method.label_of(other.values)
        if one.exact and wants != wanted:
            sentence = (
                f"{row.place}: has the text of {other.place}, but '{wants}' in place of "
                f"'{wanted}'; it was left out. Decide which of the two is right."
            )
            if config.data.on_bad == "stop":
                raise UserError(sentence)
            found.conflicts.append(sentence)
            counts["label_conflicts"] = counts.get("label_conflicts", 0) + 1
    out = {one.number for one in alike}
    kept = [row for number, row in enumerate(rows) if number not in out]
    found.rows[part] = _of_other_groups(method, kept, held_out, found)


def _of_other_groups(
    method: FinetuneMethod, rows: list[Row], held_out: list[Row], found: Gathered
) -> list[Row]:
    """The rows without those of a group that is held out: the same prompt with another answer."""
    places: dict[str, str] = {}
    for row in held_out:
        if group := plain(method.group_of(row.values)):
            places.setdefault(group, row.place)
    kept = []
    for row in rows:
        place = places.get(plain(method.group_of(row.values))) if places else None
        if place is None:
            kept.append(row)
        else:
            found.duplicates.append(f"{row.place}: asks the same as {place}.")
    if len(kept) < len(rows):
        counts = found.counts
        counts["held_out_prompts"] = counts.get("held_out_prompts", 0) + len(rows) - len(kept)
    return kept


def _other(one: Duplicate, rows: list[Row], held_out: list[Row], avoided: int) -> Row | None:
    """The row that one is like; None for a text that is to be avoided."""
    if one.of >= 0:
        return rows[one.of]
    place = one.of + avoided + len(held_out)  # from 0 among [*held_out, *avoid]
    return held_out[place] if place < len(held_out) else None


def _alike(one: Duplicate) -> str:
    return "the same as" if one.exact else f"{one.similarity:.0%} like"


def texts_in(path: str) -> Iterator[str]:
    """All texts in a file's rows, whatever their fields are called; labels left out."""
    for number, row in enumerate(read_rows(path, BadRows("stop"))):
        if number == 0:  # of a table without a header the first row is taken for one
            yield from filter(_is_text, row.values)
        yield from _leaves({name: v for name, v in row.values.items() if name != "place"})


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if _is_text(value):
            yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _leaves(one)


def _is_text(text: str) -> bool:
    return len(text.split()) > 1 or len(text) >= LABEL_LENGTH


def split_rows(
    rows: list[Row], groups: Sequence[str], count: int, seed: int
) -> tuple[list[Row], list[Row]]:
    """(the rest, about `count` rows drawn by `seed`), both in their order.

    Rows of one group ("" is none) stay together: one that is drawn brings the others, unless so
    many rows would be farther from `count` than without them. Where every group is too large for
    that, the smallest is drawn. The rest is never empty for the sake of a group.
    """
    names = [group or f" {number}" for number, group in enumerate(groups)]  # none begins so
    members: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        members.setdefault(name, []).append(number)
    drawn = set[int]()
    for number in drawing_order(len(rows), seed):
        size = len(drawn) + len(members[names[number]])
        nearer = abs(size - count) < abs(len(drawn) - count)
        if number not in drawn and nearer and size < len(rows):
            drawn.update(members[names[number]])
    smallest = min(members.values(), key=len, default=[])
    if not drawn and count and len(smallest) < len(rows):
        drawn.update(smallest)
    rest = [row for number, row in enumerate(rows) if number not in drawn]
    return rest, [row for number, row in enumerate(rows) if number in drawn]


# --- what is said of it --------------------------------------------------------------------------


def tell(sentences: list[str], file: str, line: LiveLine) -> None:
    """The first rows that were left out, on the terminal."""
    for sentence in sentences[:SHOWN]:
        line.say(f"Left out: {sentence}")
    if len(sentences) > SHOWN:
        line.say(f"Left out: {len(sentences) - SHOWN:,} more, see {file}.")


def unseen_sentence(part: str, count: int, wants: str) -> str:
    """That rows of a part are not measured, since training never saw what they want."""
    named = f"1 {part} row has" if count == 1 else f"{count:,} {part} rows have"
    return f"{named} {wants} that training never saw: left out, so figures are of the others."


def reason(bad: BadRows) -> str:
    """The end of a sentence that says that no row is left."""
    return f" (the first reason: {bad.sentences[0].rstrip('.')})." if bad.sentences else "."
