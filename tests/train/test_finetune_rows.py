"""How rows are divided: by the seed, a group in one part; and what is said of rows left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_from_scratch.core.config import from_dict
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.runlog import LiveLine
from llm_from_scratch.data.records import BadRows, Row
from llm_from_scratch.data.split import drawing_order
from llm_from_scratch.train.finetune_rows import Gathered, gather, split_rows
from llm_from_scratch.train.methods.dpo import Dpo, DpoConfig
from llm_from_scratch.train.methods.sft import Sft, SftConfig
from tests.train.test_finetune import ToyConfig, config, numbers, prepared, rows, run
from tests.train.tiny_folders import decoder_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return decoder_folder(tmp_path_factory.mktemp("base") / "model")


# --- splits --------------------------------------------------------------------------------------


def test_splits_are_drawn_by_the_seed_alone() -> None:
    every = [Row({"n": n}, f"r:{n}") for n in range(50)]
    alone = [f"{n}" for n in range(50)]
    rest, drawn = split_rows(every, alone, 10, seed=3)
    assert sorted([*rest, *drawn], key=lambda row: row.values["n"]) == every
    assert len(drawn) == 10 and drawn == sorted(drawn, key=lambda row: row.values["n"])
    assert split_rows(every, alone, 10, seed=3)[1] == drawn
    assert split_rows(every, alone, 10, seed=4)[1] != drawn
    # Without groups it is the beginning of the order that the seed gives, nothing else.
    first = sorted(drawing_order(50, 3)[:10])
    assert [row.values["n"] for row in drawn] == first
    assert split_rows(every, [""] * 50, 10, seed=3)[1] == drawn


@given(
    st.lists(st.sampled_from(["", "a", "b", "c", "d", "e"]), max_size=40),
    st.integers(0, 40),
    st.integers(0, 3),
)
def test_a_group_lands_in_one_part(groups: list[str], count: int, seed: int) -> None:
    every = [Row({"group": group}, f"r:{n}") for n, group in enumerate(groups)]
    rest, drawn = split_rows(every, groups, count, seed)
    assert sorted([*rest, *drawn], key=lambda row: int(row.place[2:])) == every
    sides = [{row.values["group"] for row in side if row.values["group"]} for side in (rest, drawn)]
    assert not sides[0] & sides[1]
    assert rest or not every
    if 0 < count < len(every) and len(groups) > groups.count(groups[0]):
        assert drawn  # where there are several groups, one of them can be held out


def test_groups_that_are_too_large_for_their_share() -> None:
    groups = ["a"] * 20 + ["b"] * 18 + ["c"] * 20
    every = [Row({}, f"r:{n}") for n in range(58)]
    assert split_rows(every, groups, 6, seed=0)[1] == every[20:38]
    assert split_rows(every, groups, 20, seed=0)[1] in (every[:20], every[20:38], every[38:])
    assert split_rows(every[:20], groups[:20], 6, seed=0)[1] == []


# --- prompts -------------------------------------------------------------------------------------


def chats(count: int, answers: int) -> list[dict[str, str]]:
    """Questions that are not alike, each with so many answers that are not."""
    words = "zero one two three four five six seven eight nine".split()

    def words_of(number: int) -> str:
        return " ".join(words[int(digit)] for digit in str(number))

    return [
        {
            "prompt": ("Ask " if a else "ask  ") + words_of(n * 7919 + 10**6),
            "response": words_of((n * 50 + a + 1) * 104729 * 10**9 + n * 31 + a),
        }
        for n in range(count)
        for a in range(answers)
    ]


def divided(folder: Path, values: list[dict[str, str]], **data: Any) -> Gathered:
    paths = {"paths": [rows(folder / "d.jsonl", values)], **data}
    method = Sft(from_dict(SftConfig, {"data": paths}))
    return gather(method, method.config, BadRows(), LiveLine(quiet=True))


def prompts(found: list[Row]) -> set[str]:
    return {" ".join(row.values["messages"][0]["content"].lower().split()) for row in found}


@pytest.mark.parametrize("drop", [True, False])
def test_a_prompt_with_several_answers_lands_in_one_part(tmp_path: Path, drop: bool) -> None:
    found = divided(tmp_path, chats(20, 3), drop_duplicates=drop)
    sides = [prompts(found.rows[part]) for part in ("train", "val", "test")]
    assert [len(side) for side in sides] == [16, 2, 2]  # of 20 prompts, each with all its answers
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    assert sum(map(len, found.rows.values())) == 60


def test_prompts_that_differ_are_divided_as_ever(tmp_path: Path) -> None:
    found = divided(tmp_path, chats(60, 1))
    places = [int(row.place.rpartition(":")[2]) - 1 for row in found.rows["test"]]
    assert places == sorted(drawing_order(60, ToyConfig().train.seed)[:6])


def test_what_is_asked_in_a_given_test_is_not_learnt(tmp_path: Path) -> None:
    every = chats(12, 2)
    test = rows(tmp_path / "test.jsonl", every[:4])  # two prompts, both answers
    other = [{**row, "response": row["response"][::-1]} for row in every[:2]]
    found = divided(tmp_path, [*every[4:], *other], test=[test], val_fraction=0.0)
    assert len(found.rows["test"]) == 4 and len(found.rows["train"]) == 20
    assert found.counts["held_out_prompts"] == 2
    assert found.duplicates == [
        f"{tmp_path}/d.jsonl:{n}: asks the same as {test}:1." for n in (21, 22)
    ]


def test_pairs_of_one_prompt_stay_together_though_duplicates_stay(tmp_path: Path) -> None:
    pairs = [
        {"prompt": row["prompt"], "chosen": row["response"], "rejected": "no"}
        for row in chats(20, 2)
    ]
    data = {"paths": [rows(tmp_path / "d.jsonl", pairs)], "drop_duplicates": False}
    method = Dpo(from_dict(DpoConfig, {"data": data}))
    found = gather(method, method.config, BadRows(), LiveLine(quiet=True)).rows
    sides = [
        {row.values["prompt"][0]["content"].lower().replace("  ", " ") for row in found[part]}
        for part in ("train", "val", "test")
    ]
    assert [len(side) for side in sides] == [16, 2, 2] and len(set.union(*sides)) == 20


# --- labels that training never saw --------------------------------------------------------------


def test_unseen_labels_are_counted(
    tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    new = numbers(12, start=100)
    test = [*new[:6], *({"text": text, "label": "y"} for text in new[6:9])]
    data = {
        "paths": [rows(tmp_path / "train.jsonl", numbers(20))],
        "test": [rows(tmp_path / "test.jsonl", test)],
        "val": [rows(tmp_path / "val.jsonl", [*new[9:11], {"text": new[11], "label": "y"}])],
    }
    settings = config(tmp_path, base, data)
    summary = run(settings, quiet=False).summary
    assert (summary["test_rows"], summary["unseen_test_rows"]) == (6, 3)
    assert (summary["val_rows"], summary["unseen_val_rows"], summary["skipped_rows"]) == (2, 1, 4)
    said = capsys.readouterr().err
    assert "3 test rows have labels that training never saw: left out" in said
    assert "1 val row has labels that training never saw" in said
    report = (Path(settings.out) / "report.md").read_text(encoding="utf-8")
    assert "| of these, to measure on: labels that training never saw | 3 |" in report
    skipped = (Path(settings.out) / "data" / "skipped.txt").read_text(encoding="utf-8")
    assert skipped.count("test.jsonl") == 3
    data["test"] = [rows(tmp_path / "known.jsonl", new[:6])]
    del data["val"]
    assert not [name for name in prepared(config(tmp_path / "b", base, data)) if "unseen" in name]
    with pytest.raises(UserError, match=r"test\.jsonl:7: has the label 'y'"):
        stop = {**data, "test": [str(tmp_path / "test.jsonl")], "on_bad": "stop"}
        run(config(tmp_path / "c", base, stop))
