"""What all fine-tuning runs share: rows, duplicates, splits, resuming, reports; with a toy method.

What a method learns is tested beside the method; here its loss is that of a tiny decoder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llm_from_scratch.core.config import from_dict
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.runlog import LiveLine, read_json, read_metrics
from llm_from_scratch.data.loader import IGNORED, Batch
from llm_from_scratch.data.records import BadRow, Row
from llm_from_scratch.evaluate.report import Section
from llm_from_scratch.train.finetune import Finetuning, finetune, steps_meant
from llm_from_scratch.train.finetune_rows import texts_in
from llm_from_scratch.train.losses import LossSum, next_token_loss_sum
from llm_from_scratch.train.methods.base import FinetuneConfig, FinetuneMethod, Outcome, tuned
from llm_from_scratch.train.run import Run, carry_out
from llm_from_scratch.train.settings import TrainSettings
from llm_from_scratch.weights.sources import load
from tests.train.tiny_folders import decoder_folder


def usual() -> TrainSettings:
    return tuned(
        epochs=None, max_steps=6, batch_size=4, precision="fp32", device="cpu", eval_every=2,
        checkpoint_every=2, learning_rate=1e-2, sample_every=3,
    )  # fmt: skip


@dataclass(frozen=True)
class ToyConfig(FinetuneConfig):
    method: str = "toy"
    train: TrainSettings = field(default_factory=usual)


class Toy(FinetuneMethod):
    """Learns texts by heart; a label must be known from the training rows."""

    Config = ToyConfig
    shows_before = True

    def check(self, values: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(values.get("text"), str):
            raise BadRow("has no text; add one.")
        return {"text": values["text"], "label": values.get("label", "")}

    def text_of(self, values: dict[str, Any]) -> str:
        return str(values["text"])

    def learn(self, rows: Sequence[Row]) -> None:
        self.labels = sorted({row.values["label"] for row in rows})

    def check_against(self, values: dict[str, Any]) -> None:
        if values["label"] not in self.labels:
            raise BadRow(f"has the label '{values['label']}', which is not learnt; leave it out.")

    def encode(self, values: dict[str, Any]) -> list[int]:
        ids = self.tokenizer.encode(values["text"])
        if len(ids) > 40:
            raise BadRow("has more than 40 tokens; cut it.")
        return [*ids, self.labels.index(values["label"])]

    def collate(self, items: list[list[int]]) -> Batch:
        longest = max(map(len, items))
        rows = [item + [0] * (longest - len(item)) for item in items]
        targets = [item[1:] + [IGNORED] * (longest - len(item)) for item in items]
        return Batch(torch.tensor(rows)[:, :-1], torch.tensor(targets))

    def step(self, model: nn.Module, batch: Batch) -> LossSum:
        loss = next_token_loss_sum(model, model.hidden(batch.tokens), batch.targets)  # type: ignore[operator, arg-type]
        count = (batch.targets != IGNORED).sum()
        return LossSum(loss, count, {"twice": 2 * loss.detach()}, int(count))

    def evaluate(
        self, model: nn.Module, rows: Sequence[Row], items: Sequence[Any], line: LiveLine
    ) -> Outcome:
        total = sum(float(self.step(model, self.collate([item])).loss_sum) for item in items)
        examples = [
            {"place": r.place, "given": r.values["text"], "wanted": "", "got": f"{total:.3f}"}
            for r in rows[:3]
        ]
        return Outcome({"nats": total, "none": float("nan")}, examples, [Section("Own", "words")])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return decoder_folder(tmp_path_factory.mktemp("base") / "model")


def rows(path: Path, texts: Sequence[Any]) -> str:
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            row = text if isinstance(text, dict) else {"text": text, "label": "x"}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return str(path)


def numbers(count: int, start: int = 0) -> list[str]:
    """Texts none of which is like another."""
    words = "zero one two three four five six seven eight nine".split()
    return [
        " ".join(words[int(d)] for d in f"{n * 7919 % 10007:05d}")
        for n in range(start, start + count)
    ]


def config(folder: Path, base: str, data: dict[str, Any], **train: Any) -> ToyConfig:
    return from_dict(
        ToyConfig, {"model": base, "out": str(folder / "run"), "data": data, "train": train}
    )


def run(config: ToyConfig, **settings: Any) -> Run:
    usual = {"resume": False, "quiet": True, "given": None}
    return carry_out(Finetuning("toy", Toy), config, **{**usual, **settings})


def stored(config: ToyConfig, part: str) -> list[dict[str, Any]]:
    path = Path(config.out) / "data" / f"{part}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- a run ---------------------------------------------------------------------------------------


def test_a_run_folder_has_everything(tmp_path: Path, base: str) -> None:
    file = rows(tmp_path / "d.jsonl", [*numbers(40), {"label": "no text"}])
    done = run(config(tmp_path, base, {"paths": [file]}))
    folder, summary = done.folder, done.summary
    assert summary == read_json(folder / "summary.json")
    assert {name: summary[name] for name in (
        "steps", "train_rows", "val_rows", "test_rows", "skipped_rows", "exact_duplicates",
    )} == {
        "steps": 6, "train_rows": 32, "val_rows": 4, "test_rows": 4, "skipped_rows": 1,
        "exact_duplicates": 0,
    }  # fmt: skip
    assert summary["test_nats"] < summary["base_test_nats"]
    assert summary["best_val_loss"] <= summary["val_loss"]
    assert summary["test_none"] is None  # JSON has no NaN
    assert (folder / "data/skipped.txt").read_text() == f"{file}:41: has no text; add one.\n"
    text = (folder / "report.md").read_text(encoding="utf-8")
    titles = [line[3:] for line in text.split("\n") if line.startswith("## ")]
    assert titles == [
        "Results", "Run", "Loss", "Twice", "Own", "Examples", "Data", "Rows that could not be used",
    ]  # fmt: skip
    assert "| test nats | " in text and "| row | given | wanted | before | after |" in text
    assert (folder / "report.html").stat().st_size > 10_000
    assert "## Step 3" in (folder / "samples.md").read_text(encoding="utf-8")
    for name in ("loss.png", "config.yaml", "environment.json", "model/README.md"):
        assert (folder / name).is_file()
    # The best model is the one that is saved: its loss is the best one that was logged.
    best = min(r["val_loss"] for r in read_metrics(folder) if "val_loss" in r)
    assert best == summary["best_val_loss"]
    model, tokenizer = load(folder, dtype=torch.float32)
    toy = Toy(done.config)
    toy.tokenizer, toy.labels = tokenizer, ["x"]
    items = [toy.encode(row) for row in stored(done.config, "val")]
    with torch.no_grad():
        found = toy.step(model, toy.collate(items))
    assert float(found.loss_sum) / float(found.count) == pytest.approx(best, rel=1e-5)


def test_resumed_is_straight_bit_by_bit(tmp_path: Path, base: str) -> None:
    file = rows(tmp_path / "d.jsonl", numbers(30))
    whole, parts = (config(tmp_path / name, base, {"paths": [file]}) for name in "ab")
    run(whole)
    stopped = from_dict(ToyConfig, {
        "model": base, "out": parts.out, "data": {"paths": [file]}, "train": {"stop_after": 3},
    })  # fmt: skip
    assert run(stopped).interrupted
    before = (Path(parts.out) / "before.json").read_bytes()
    assert run(ToyConfig(out=parts.out), resume=True).summary["steps"] == 6
    assert (Path(parts.out) / "before.json").read_bytes() == before
    for name in ("checkpoints/step-6/model.safetensors", "model/model.safetensors"):
        ours, theirs = (load_file(Path(c.out) / name) for c in (whole, parts))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs)
    figures = [read_metrics(Path(c.out)) for c in (whole, parts)]
    for records in figures:
        for record in records:
            record.pop("tokens_per_second", None)
    assert figures[0] == figures[1]


def test_steps_that_are_given_win_over_default_epochs() -> None:
    assert steps_meant({"train": {"max_steps": 5}})["train"] == {"max_steps": 5, "epochs": None}
    for values in (
        {"train": {"max_steps": 5, "epochs": 2}}, {"train": {"seed": 1}}, {"train": 3}, {},
    ):  # fmt: skip
        assert steps_meant(values) == values


def test_what_cannot_be_resumed(tmp_path: Path, base: str) -> None:
    settings = config(tmp_path, base, {"paths": [rows(tmp_path / "d.jsonl", numbers(30))]})
    run(from_dict(ToyConfig, {
        "model": base, "out": settings.out, "data": {"paths": list(settings.data.paths)},
        "train": {"stop_after": 2},
    }))  # fmt: skip
    with pytest.raises(UserError, match="no run of finetune sft; go on with it: scratchlm"):
        finetune("sft", from_dict_of("sft", out=settings.out), resume=True, quiet=True)
    with pytest.raises(UserError, match="already holds a run"):
        run(settings)
    with pytest.raises(UserError, match=r"--data\.similarity is 0\.5, but the run"):
        given = {"data": {"similarity": 0.5}}
        run(from_dict(ToyConfig, {"out": settings.out, **given}), resume=True, given=given)
    path = Path(settings.out) / "data" / "val.jsonl"
    path.write_text(path.read_text()[:-2] + " }\n")
    with pytest.raises(UserError, match="was changed since the run began"):
        run(ToyConfig(out=settings.out), resume=True)
    path.write_text("not JSON\n")
    with pytest.raises(UserError, match="is damaged"):
        run(ToyConfig(out=settings.out), resume=True)
    path.unlink()
    with pytest.raises(UserError, match=r"val\.jsonl is missing; put it back"):
        run(ToyConfig(out=settings.out), resume=True)


def from_dict_of(method: str, **values: Any) -> Any:
    from llm_from_scratch.train.methods import method_named

    return from_dict(method_named(method).Config, values)


# --- rows ----------------------------------------------------------------------------------------


def prepared(config: ToyConfig) -> dict[str, int]:
    """The counts of a run's data, without training."""
    work = Finetuning("toy", Toy)
    folder = Path(config.out)
    folder.mkdir(parents=True)
    work.prepare(config, folder, LiveLine(quiet=True))
    found: dict[str, int] = read_json(folder / "data" / "counts.json")
    return found


LONG = "one two three four five six seven eight nine ten"


def test_duplicates_are_left_out_and_counted_apart(tmp_path: Path, base: str) -> None:
    texts = [
        *numbers(20), LONG, LONG.upper(), f"{LONG} and more",
        {"text": numbers(1)[0], "label": "y"}, {"text": "good words of another kind", "label": "y"},
    ]  # fmt: skip
    settings = config(tmp_path, base, {"paths": [rows(tmp_path / "d.jsonl", texts)]})
    found = prepared(settings)
    assert (found["exact_duplicates"], found["near_duplicates"]) == (2, 1)
    assert found["label_conflicts"] == 1
    assert (
        found["train_rows"] + found["val_rows"] + found["test_rows"] + found["skipped_rows"] == 22
    )
    folder = Path(settings.out) / "data"
    (conflict,) = (folder / "conflicts.txt").read_text().splitlines()
    assert "d.jsonl:24: has the text of " in conflict and "but 'y' in place of 'x'" in conflict
    kinds = [
        line.split(": ")[1][:8] for line in (folder / "duplicates.txt").read_text().splitlines()
    ]
    assert kinds == ["100% lik", "the same", "the same"]
    stop = config(tmp_path / "stop", base, {**vars_of(settings), "on_bad": "stop"})
    with pytest.raises(UserError, match="Decide which of the two is right"):
        prepared(stop)
    keep = config(tmp_path / "keep", base, {**vars_of(settings), "drop_duplicates": False})
    assert "exact_duplicates" not in prepared(keep)


def vars_of(config: ToyConfig) -> dict[str, Any]:
    return {"paths": list(config.data.paths)}


def test_what_is_tested_stays_and_is_not_learnt(tmp_path: Path, base: str) -> None:
    new = numbers(10, start=100)
    data = {
        "paths": [rows(tmp_path / "train.jsonl", [*numbers(20), new[0].upper(), new[5]])],
        "val": [rows(tmp_path / "val.jsonl", [*new[5:], new[1]])],
        "test": [rows(tmp_path / "test.jsonl", [*new[:5], new[0]])],
    }
    settings = config(tmp_path, base, data)
    found = prepared(settings)
    assert [row["text"] for row in stored(settings, "test")] == [
        *new[:5],
        new[0],
    ]  # as it was given
    assert [row["text"] for row in stored(settings, "val")] == new[5:]
    assert [row["text"] for row in stored(settings, "train")] == numbers(20)
    assert found["exact_duplicates"] == 3


@pytest.mark.parametrize("drop", [True, False])
def test_texts_to_avoid(tmp_path: Path, base: str, drop: bool) -> None:
    known = numbers(30)
    (tmp_path / "avoid.tsv").write_text(
        f"{known[3].title()}\tx\n{known[4]} {known[5]}\tx\nx\ty\n", encoding="utf-8"
    )
    avoid = [rows(tmp_path / "a.jsonl", [{"messages": [{"content": known[7]}], "n": 3}])]
    data = {
        "paths": [rows(tmp_path / "d.jsonl", [*known, known[3], known[9]])],
        "avoid": [*avoid, str(tmp_path / "avoid.tsv")], "drop_duplicates": drop,
    }  # fmt: skip
    settings = config(tmp_path, base, data)
    found = prepared(settings)
    left = {row["text"] for part in ("train", "val", "test") for row in stored(settings, part)}
    assert left == set(known) - {known[n] for n in (3, 4, 5, 7)}
    assert (found["avoided_exact"], found["avoided_near"]) == (3, 2)
    assert found["exact_duplicates"] == (1 if drop else 0)


def test_all_texts_of_a_file_are_avoided_but_labels(tmp_path: Path) -> None:
    file = rows(tmp_path / "a.jsonl", [
        {"place": "a very long place", "q": "a question", "label": "entailment",
         "choices": ["first one", {"text": "日本語の長い文章を避けます"}], "n": 4},
    ])  # fmt: skip
    assert list(texts_in(file)) == ["a question", "first one", "日本語の長い文章を避けます"]


def test_a_row_that_is_too_long_teaches_no_label(tmp_path: Path, base: str) -> None:
    long = {"text": " ".join(numbers(12)), "label": "a"}
    data = {
        "paths": [rows(tmp_path / "d.jsonl", [long, *numbers(12, start=50)])],
        "val": [rows(tmp_path / "v.jsonl", [{"text": "good film", "label": "a"}, "bad song"])],
        "test_fraction": 0,
    }
    settings = config(tmp_path, base, data)
    work = Finetuning("toy", Toy)
    folder = Path(settings.out)
    folder.mkdir()
    work.prepare(settings, folder, LiveLine(quiet=True))
    assert isinstance(work.method, Toy) and work.method.labels == ["x"]
    said = (folder / "data" / "skipped.txt").read_text().splitlines()
    assert "d.jsonl:1: has more than 40" in said[0] and "v.jsonl:1: has the label 'a'" in said[1]
    assert len(said) == 2


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({}, "No data was given"),
        ({"paths": ["nowhere.jsonl"]}, r"nowhere\.jsonl does not exist"),
        ({"paths": ["d.jsonl"], "avoid": ["nowhere.csv"]}, r"nowhere\.csv does not exist"),
        ({"paths": ["bad.jsonl"]}, r"no row can be used \(the first reason: .*bad.jsonl:1: has no"),
        ({"paths": ["bad.jsonl"], "on_bad": "stop"}, r"bad\.jsonl:1: has no text; add one"),
        ({"paths": ["d.jsonl"], "test": ["bad.jsonl"]}, r"bad\.jsonl: no row can be used"),
        ({"paths": ["d.jsonl"], "test": ["y.jsonl"]}, r"y\.jsonl: no row can .*has the label 'Y'"),
        ({"paths": ["long.jsonl"]}, "No row is left to learn from .*more than 40 tokens"),
        ({"paths": ["d.jsonl"], "avoid": ["torn.jsonl"]}, r"torn\.jsonl:1: is not JSON"),
    ],
)
def test_data_that_cannot_be_used(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    rows(Path("d.jsonl"), numbers(12))
    rows(Path("bad.jsonl"), [{"label": "x"}])
    rows(Path("y.jsonl"), [{"text": "a text of its own", "label": "Y"}])
    rows(Path("long.jsonl"), [" ".join(numbers(12))])
    Path("torn.jsonl").write_text('{"text": \n')
    with pytest.raises(UserError, match=sentence):
        run(config(tmp_path, base, data))
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_there_is_said_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no-such-model"):
        run(config(tmp_path, "no-such-model", {"paths": ["nowhere.jsonl"]}))
    with pytest.raises(UserError, match="No model was given"):
        run(config(tmp_path, "", {"paths": ["nowhere.jsonl"]}))


def test_settings_of_another_method_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"The settings are a ToyConfig; sft needs a SftConfig"):
        finetune("sft", ToyConfig(out=str(tmp_path / "x")))
    with pytest.raises(UserError, match=r"There is no method 'stf'; .* Did you mean 'sft'"):
        finetune("stf")
