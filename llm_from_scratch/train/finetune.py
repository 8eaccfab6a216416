"""Fine-tuning: from rows of data and a model to a run folder with a better model in it.

read rows -> check -> leave out near-duplicates -> split -> encode -> loop -> figures, report, model

What differs from method to method is asked of its class (`methods/base.py`); the rest is here.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llm_from_scratch.core.device import pick_device
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import write_aside
from llm_from_scratch.core.runlog import LiveLine, plot_losses, read_json, write_json
from llm_from_scratch.data.near_duplicates import drop_near_duplicates
from llm_from_scratch.data.read import Document
from llm_from_scratch.data.records import BadRow, BadRows, Row, stored_rows, write_rows
from llm_from_scratch.data.split import drawing_order
from llm_from_scratch.evaluate.report import Section, Table, write_report
from llm_from_scratch.model.lora import add_lora
from llm_from_scratch.train.checkpoint import own_parameters
from llm_from_scratch.train.loop import Hooks, Loop
from llm_from_scratch.train.methods import method_named
from llm_from_scratch.train.methods.base import FinetuneConfig, FinetuneMethod, Outcome
from llm_from_scratch.train.run import Run, carry_out, steps_of, with_train, write_card
from llm_from_scratch.weights.folder_write import save_folder

PARTS = ("train", "val", "test")
SHOWN = 8  # broken rows named on the terminal; data/skipped.txt has them all
SAMPLES = 3  # validation rows that samples.md follows through the training


def finetune(
    method: str,
    config: FinetuneConfig | None = None,
    *,
    resume: bool = False,
    quiet: bool = False,
    given: dict[str, Any] | None = None,
) -> Run:
    """Fine-tune `config.model` by the method of that name, into the folder `config.out`.

    `config` is of the method's own class (`method_named("sft").Config`). See `run.carry_out` for
    `resume` and `given`.
    """
    cls = method_named(method)
    config = cls.Config() if config is None else config
    if not isinstance(config, cls.Config):
        raise UserError(
            f"The settings are a {type(config).__name__}; {method} needs a {cls.Config.__name__}."
        )
    config = dataclasses.replace(config, method=method)
    work = Finetuning(method, cls)
    return carry_out(work, config, resume=resume, quiet=quiet, given=given)


class Finetuning:
    """The run that `finetune` carries out."""

    preparation: tuple[str, ...] = ("data",)

    def __init__(self, name: str, cls: type[FinetuneMethod]) -> None:
        self.name, self.cls = name, cls
        self.command = f"scratchlm finetune {name}"
        self.rows: dict[str, list[Row]] = {}
        self.items: dict[str, list[Any]] = {}
        self.method: FinetuneMethod
        self.model: Any

    # --- a new run and a resumed one -----------------------------------------------------------

    def prepare(
        self, config: FinetuneConfig, folder: Path, line: LiveLine
    ) -> tuple[FinetuneConfig, dict[str, str]]:
        if not config.model:
            raise UserError("No model was given; name the one to start from, as MODEL.")
        self.method = self.cls(config)
        bad = BadRows(config.data.on_bad)
        self.rows, counts = gather(self.method, config, bad, line)
        self.method.learn(self.rows["train"])
        for part in PARTS[1:]:
            kept = []
            for row in self.rows[part]:
                try:
                    self.method.check_against(row.values)
                    kept.append(row)
                except BadRow as error:
                    bad(f"{row.place}: {error}")
            self.rows[part] = kept
        self.model = self.method.open()
        self._encode(bad, line)
        tell(bad, line)
        if not self.rows["train"]:
            raise UserError("No row is left to learn from" + reason(bad))
        counts |= {f"{part}_rows": len(self.rows[part]) for part in PARTS}
        counts["skipped_rows"] = len(bad.sentences)
        line.say(", ".join(f"{name.replace('_', ' ')}: {n:,}" for name, n in counts.items()) + ".")
        for part in PARTS:
            write_rows(folder / "data" / f"{part}.jsonl", self.rows[part])
        with write_aside(folder / "data" / "skipped.txt") as file:
            file.write("".join(f"{sentence}\n" for sentence in bad.sentences))
        write_json(folder / "data" / "counts.json", counts)
        config = with_train(config, steps_of(config.train, len(self.items["train"])))
        self.method.config = config
        self._adapt(config)
        self.method.prepare(self.model, self.items, folder, line)
        hashes = {part: file_hash(folder / "data" / f"{part}.jsonl") for part in PARTS}
        return config, hashes

    def reopen(self, config: FinetuneConfig, folder: Path, line: LiveLine) -> None:
        known = read_json(folder / "environment.json")["data_sha256"]
        for part in PARTS:
            path = folder / "data" / f"{part}.jsonl"
            self.rows[part] = stored_rows(path)
            if file_hash(path) != known.get(part):
                raise UserError(f"{path} was changed since the run began; start a new run.")
        self.method = self.cls(config)
        self.method.learn(self.rows["train"])
        self.model = self.method.open()
        self._encode(BadRows("stop"), line)
        self._adapt(config)
        self.method.prepare(self.model, self.items, folder, line)

    def _encode(self, bad: BadRows, line: LiveLine) -> None:
        """The items of all rows; rows that cannot be encoded are left out."""
        for part in PARTS:
            kept, items = [], []
            for number, row in enumerate(self.rows[part]):
                line.show(f"Encoding: row {number + 1:,} of {len(self.rows[part]):,} ({part})")
                try:
                    items.append(self.method.encode(row.values))
                    kept.append(row)
                except BadRow as error:
                    bad(f"{row.place}: {error}")
            self.rows[part], self.items[part] = kept, items

    def _adapt(self, config: FinetuneConfig) -> None:
        """Adapters, or frozen layers."""
        if config.lora.rank:
            add_lora(self.model, config.lora, config.train.seed)

    # --- training ----------------------------------------------------------------------------

    def make_loop(self, config: FinetuneConfig, folder: Path, quiet: bool) -> Loop:
        method, items = self.method, self.items
        hooks = Hooks(save_best=lambda model: save_best(model, folder))
        if items["val"]:
            hooks.val_batches = lambda: method.val_batches(items["val"])
            hooks.sample = self._sampler(folder)
        loop = Loop(
            self.model, method, method.source(items["train"]), config.train,
            device=pick_device(config.train.device), folder=folder, hooks=hooks, quiet=quiet,
        )  # fmt: skip
        trained = sum(p.numel() for p in loop.parameters)
        total = sum(p.numel() for p in self.model.parameters())
        loop.line.say(
            f"Model: {config.model}, {total / 1e6:.2f} M parameters, of which "
            f"{trained / 1e6:.2f} M are trained; {config.train.precision} on {config.train.device}."
        )
        if self.cls.shows_before and not (folder / "before.json").is_file():
            before = self._outcome("test" if items["test"] else "val", loop.line)
            write_json(
                folder / "before.json", {"figures": before.figures, "examples": before.examples}
            )
        return loop

    def _outcome(self, part: str, line: LiveLine) -> Outcome:
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            found = self.method.evaluate(self.model, self.rows[part], self.items[part], line)
        self.model.train(training)
        return found

    def _sampler(self, folder: Path) -> Any:
        def sample(model: nn.Module, step: int) -> None:
            rows, items = self.rows["val"][:SAMPLES], self.items["val"][:SAMPLES]
            with torch.no_grad():
                found = self.method.evaluate(model, rows, items, LiveLine(quiet=True))
            if found.examples:
                append_sample(folder, step, found.examples)

        return sample

    # --- the end -----------------------------------------------------------------------------

    def finish(
        self,
        config: FinetuneConfig,
        folder: Path,
        loop: Loop,
        line: LiveLine,
        summary: dict[str, Any],
    ) -> None:
        p = loop.progress
        if self.items["val"]:
            summary |= {"val_loss": p.val_loss, "best_val_loss": p.best_val_loss}
            load_best(self.model, folder)
        summary["trainable_parameters"] = sum(q.numel() for q in loop.parameters)
        summary |= read_json(folder / "data" / "counts.json")
        sections: list[Section] = []
        after = Outcome()
        for part in ("val", "test"):
            if self.items[part]:
                after = self._outcome(part, line)
                summary |= {f"{part}_{name}": value for name, value in after.figures.items()}
        before = folder / "before.json"
        known = read_json(before) if before.is_file() else {"figures": {}, "examples": []}
        part = "test" if self.items["test"] else "val"
        summary |= {f"base_{part}_{name}": value for name, value in known["figures"].items()}
        sections += after.sections
        if after.examples:
            sections.append(examples_section(known["examples"], after.examples))
        save_folder(self.model, self.method.tokenizer, folder / "model")
        plot_losses(folder, f"{folder.name}: {self.name} of {config.model}")
        figures = Section("Figures", table=Table(("figure", "value"), list(summary.items())))
        write_report(folder, f"{folder.name}: {self.name} of {config.model}", [figures, *sections])
        write_card(
            folder, summary, f"{config.model}, fine-tuned with scratchlm ({self.name}).",
            [f"Training rows: {len(self.rows['train']):,}"], self.cls.pipeline,
        )  # fmt: skip


# --- rows ----------------------------------------------------------------------------------------


def gather(
    method: FinetuneMethod, config: FinetuneConfig, bad: BadRows, line: LiveLine
) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """The checked rows of each part without near-duplicates, and how many of those there were."""
    data, found = config.data, dict[str, list[Row]]()
    if not data.paths:
        raise UserError("No data was given; name a file with --data.")
    for part, paths in zip(PARTS, (data.paths, data.val, data.test), strict=True):
        found[part] = [row for path in paths for row in checked(method, path, bad, line)]
    if not any(found.values()):
        raise UserError(f"{', '.join(data.paths)}: no row can be used" + reason(bad))
    counts: dict[str, int] = {}
    if data.drop_duplicates:
        # What is tested stays; what is like it must not be learnt from.
        against: list[Row] = []
        for part in ("test", "val", "train"):
            before = len(found[part])
            found[part] = without_duplicates(method, found[part], against, data.similarity)
            against = [*against, *found[part]]
            if before:
                counts[f"{part}_duplicates"] = before - len(found[part])
    seed = config.train.seed
    for part, paths, share in (
        ("test", data.test, data.test_fraction), ("val", data.val, data.val_fraction),
    ):  # fmt: skip
        if not paths and share:
            total = len(found["train"]) + sum(
                len(found[q]) for q in ("test", "val") if not getattr(data, q)
            )
            found["train"], found[part] = split_rows(found["train"], round(share * total), seed)
    return found, counts


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


def without_duplicates(
    method: FinetuneMethod, rows: list[Row], against: list[Row], threshold: float
) -> list[Row]:
    """Rows that are like no other and like none of `against`."""

    def documents(some: list[Row]) -> list[Document]:
        return [Document(method.text_of(row.values), row.place) for row in some]

    kept, _ = drop_near_duplicates(documents(rows), threshold, against=documents(against))
    places = {document.source for document in kept}
    return [row for row in rows if row.place in places]


def split_rows(rows: list[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(the rest, `count` rows drawn by `seed`), both in their order."""
    drawn = set(drawing_order(len(rows), seed)[:count])
    rest = [row for number, row in enumerate(rows) if number not in drawn]
    return rest, [row for number, row in enumerate(rows) if number in drawn]


def tell(bad: BadRows, line: LiveLine) -> None:
    """The first broken rows on the terminal."""
    for sentence in bad.sentences[:SHOWN]:
        line.say(f"Left out: {sentence}")
    if len(bad.sentences) > SHOWN:
        line.say(f"Left out: {len(bad.sentences) - SHOWN:,} more, see data/skipped.txt.")


def reason(bad: BadRows) -> str:
    return f" (the first reason: {bad.sentences[0]})" if bad.sentences else "."


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- the best model, examples --------------------------------------------------------------------


def save_best(model: nn.Module, folder: Path) -> None:
    """What is trained, as it is now, into checkpoints/best.safetensors."""
    path = folder / "checkpoints" / "best.safetensors"
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(f".{path.name}")
    save_file({n: p.contiguous().cpu() for n, p in own_parameters(model).items()}, aside)
    aside.replace(path)


@torch.no_grad()
def load_best(model: nn.Module, folder: Path) -> None:
    """Put back what `save_best` kept."""
    stored = load_file(folder / "checkpoints" / "best.safetensors")
    for name, parameter in own_parameters(model).items():
        parameter.copy_(stored[name])


def append_sample(folder: Path, step: int, examples: list[dict[str, str]]) -> None:
    """What some rows give after a step, into samples.md."""
    path = folder / "samples.md"
    old = path.read_text(encoding="utf-8") if path.is_file() else "# Samples\n"
    old = old.split(f"\n## Step {step}\n")[0]  # a resumed run writes its steps again
    text = "\n".join(f"**{e['given']!r}**\n\n```text\n{e['got']}\n```\n" for e in examples)
    with write_aside(path) as file:
        file.write(f"{old.rstrip()}\n\n## Step {step}\n\n{text}")


def examples_section(before: list[dict[str, str]], after: list[dict[str, str]]) -> Section:
    """The same rows before and after."""
    earlier = {example["place"]: example["got"] for example in before}
    header = ("row", "given", "wanted", "before", "after")
    rows = [
        (e["place"], e["given"], e["wanted"], earlier.get(e["place"], ""), e["got"]) for e in after
    ]
    return Section("Examples", table=Table(header, rows))
