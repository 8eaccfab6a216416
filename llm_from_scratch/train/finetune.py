"""Fine-tuning: from rows of data and a model to a run folder with a better model in it.

read rows -> check -> leave out near-duplicates -> split -> encode -> loop -> figures, report, model

What differs from method to method is asked of its class (`methods/base.py`); the rest is here.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from llm_from_scratch.core.config import from_dict, merge, read_yaml
from llm_from_scratch.core.device import pick_device
from llm_from_scratch.core.errors import RunError, UserError
from llm_from_scratch.core.files import ASIDE, write_aside
from llm_from_scratch.core.runlog import LiveLine, plot_losses, read_json, write_json
from llm_from_scratch.data.records import BadRow, BadRows, Row, stored_rows, write_rows
from llm_from_scratch.evaluate.report import fenced, plain_md
from llm_from_scratch.train.adapt import adapt, check_adaptation, write_adapter
from llm_from_scratch.train.base_model import model_hash, refuse_other_model
from llm_from_scratch.train.checkpoint import own_parameters
from llm_from_scratch.train.finetune_report import finite, write_run_report
from llm_from_scratch.train.finetune_rows import PARTS, gather, reason, tell, unseen_sentence
from llm_from_scratch.train.loop import Hooks, Loop
from llm_from_scratch.train.methods import method_named
from llm_from_scratch.train.methods.base import FinetuneConfig, FinetuneMethod, Outcome
from llm_from_scratch.train.methods.names import METHODS
from llm_from_scratch.train.run import Run, carry_out, steps_of, with_train, write_card
from llm_from_scratch.weights.folder_write import save_folder

SAMPLES = 3  # validation rows that samples.md follows through the training


def finetune(
    method: str,
    config: FinetuneConfig | Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    quiet: bool = False,
    given: dict[str, Any] | None = None,
) -> Run:
    """Fine-tune `config.model` by the method of that name, into the folder `config.out`.

    `config` is of the method's own class (`method_named("sft").Config`), or a nested mapping such
    as a YAML file holds: `{"model": "smollm2-135m", "data": {"paths": ["chats.jsonl"]}, "out":
    "runs/chat"}`. See `run.carry_out` for `resume` and `given`.
    """
    cls = method_named(method)
    if isinstance(config, Mapping):
        given = dict(config) if given is None else given
        config = from_dict(cls.Config, config if resume else steps_meant(config))
    config = cls.Config() if config is None else config
    if not isinstance(config, cls.Config):
        raise UserError(
            f"The settings are a {type(config).__name__}; {method} needs a {cls.Config.__name__}."
        )
    config = dataclasses.replace(config, method=method)
    if resume:
        refuse_other_run(method, config.out)
    work = Finetuning(method, cls)
    return carry_out(work, config, resume=resume, quiet=quiet, given=given)


def steps_meant(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings in which given steps win over the epochs that a method takes by default."""
    train = values.get("train")
    if isinstance(train, Mapping) and train.get("max_steps") is not None:
        return merge({"train": {"epochs": None}}, values)
    return dict(values)


def refuse_other_run(method: str, out: str) -> None:
    """A run is gone on with by the method that began it."""
    path = Path(out) / "config.yaml"
    if not out or not path.is_file():
        return  # `carry_out` says so
    began = read_yaml(path).get("method")
    if began != method:
        verb = f"finetune {began}" if began in METHODS else "pretrain"
        raise UserError(
            f"{out} is no run of finetune {method}; go on with it: scratchlm {verb} --out {out} "
            "--resume"
        )


class Finetuning:
    """The run that `finetune` carries out."""

    preparation: tuple[str, ...] = ("data",)

    def __init__(self, name: str, cls: type[FinetuneMethod]) -> None:
        self.name, self.cls = name, cls
        self.command = f"scratchlm finetune {name}"
        self.rows: dict[str, list[Row]] = {}
        self.items: dict[str, list[Any]] = {}
        self.unseen = dict.fromkeys(PARTS[1:], 0)  # rows that want what training never saw
        self.method: FinetuneMethod
        self.model: Any
        self.told: dict[str, Any] = {}  # of the adaptation, for summary.json

    # --- a new run and a resumed one -----------------------------------------------------------

    def prepare(
        self, config: FinetuneConfig, folder: Path, line: LiveLine
    ) -> tuple[FinetuneConfig, dict[str, Any]]:
        if not config.model:
            raise UserError("No model was given; name the one to start from, as MODEL.")
        check_adaptation(config.lora, config.freeze)
        began_with = model_hash(config.model)  # a wrong name is said before the rows are read
        self.method = self.cls(config)
        bad = BadRows(config.data.on_bad)
        gathered = gather(self.method, config, bad, line)
        self.rows, counts = gathered.rows, gathered.counts
        self._open(config, bad, line)
        tell(bad.sentences, "data/skipped.txt", line)
        tell(gathered.conflicts, "data/conflicts.txt", line)
        for part, count in self.unseen.items():
            if count:
                counts[f"unseen_{part}_rows"] = count
                line.say(unseen_sentence(part, count, self.cls.wants))
        counts |= {f"{part}_rows": len(self.rows[part]) for part in PARTS}
        counts["skipped_rows"] = len(bad.sentences)
        line.say(", ".join(f"{name.replace('_', ' ')}: {n:,}" for name, n in counts.items()) + ".")
        for part in PARTS:
            write_rows(folder / "data" / f"{part}.jsonl", self.rows[part])
        for name, sentences in (
            ("skipped", bad.sentences), ("duplicates", gathered.duplicates),
            ("conflicts", gathered.conflicts),
        ):  # fmt: skip
            with write_aside(folder / "data" / f"{name}.txt") as file:
                file.write("".join(f"{sentence}\n" for sentence in sentences))
        write_json(folder / "data" / "counts.json", counts)
        sequences = self.method.sequences(self.items["train"])
        config = with_train(config, steps_of(config.train, sequences))
        self.method.config = config
        self._adapt(config, line)
        self.method.prepare(self.model, self.items, folder, line)
        hashes = {part: file_hash(folder / "data" / f"{part}.jsonl") for part in PARTS}
        return config, {"data_sha256": hashes, "model_sha256": began_with}

    def reopen(self, config: FinetuneConfig, folder: Path, line: LiveLine) -> None:
        about = read_json(folder / "environment.json")
        known = about["data_sha256"]
        for part in PARTS:
            path = folder / "data" / f"{part}.jsonl"
            self.rows[part] = stored_rows(path)
            if not path.is_file():
                raise UserError(f"{path} is missing; put it back, or start a new run.")
            if file_hash(path) != known.get(part):
                raise UserError(f"{path} was changed since the run began; start a new run.")
        refuse_other_model(config.model, about.get("model_sha256"), folder)
        self.method = self.cls(config)
        self.method.learn(self.rows["train"])
        self.model = self.method.open()
        self._encode(BadRows("stop"), line)
        self._adapt(config, line)
        self.method.prepare(self.model, self.items, folder, line)

    def _open(self, config: FinetuneConfig, bad: BadRows, line: LiveLine) -> None:
        """The model and the items of all rows, as they will be found again from the rows kept."""
        while True:
            learnt = len(self.rows["train"])
            if not learnt:
                raise UserError("No row is left to learn from" + reason(bad))
            self.method.learn(self.rows["train"])
            self._check_against(bad)
            self.model = self.method.open()
            self._encode(bad, line)
            if len(self.rows["train"]) == learnt:
                break
            # What is too long for the model must not have taught a label.
            self.method, self.model = self.cls(config), None
        for part, paths in (("val", config.data.val), ("test", config.data.test)):
            if paths and not self.rows[part]:  # a run without them would measure nothing
                raise UserError(f"{', '.join(paths)}: no row can be used{reason(bad)}")

    def _check_against(self, bad: BadRows) -> None:
        for part in PARTS[1:]:
            kept = []
            for row in self.rows[part]:
                try:
                    self.method.check_against(row.values)
                    kept.append(row)
                except BadRow as error:
                    bad(f"{row.place}: {error}")
            self.unseen[part] += len(self.rows[part]) - len(kept)
            self.rows[part] = kept

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

    def _adapt(self, config: FinetuneConfig, line: LiveLine) -> None:
        """Adapters, or frozen layers."""
        self.told = adapt(self.model, config.lora, config.freeze, config.train.seed, line)

    # --- training ----------------------------------------------------------------------------

    def make_loop(self, config: FinetuneConfig, folder: Path, quiet: bool) -> Loop:
        method, items = self.method, self.items
        hooks = Hooks(save_best=lambda model: save_best(model, folder))
        if items["val"]:
            hooks.val_batches = lambda: method.val_batches(items["val"])
            hooks.val_figures = lambda model: method.val_figures(model, items["val"])
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
        known = (folder / "before.json").is_file() or not (items["test"] or items["val"])
        if self.cls.shows_before and not known and loop.world.main:
            before = self._outcome("test" if items["test"] else "val", loop.line)
            write_json(
                folder / "before.json",
                {"figures": finite(before.figures), "examples": before.examples},
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
        if self.items["val"]:
            p = loop.progress
            summary |= {"val_loss": p.val_loss, "best_val_loss": p.best_val_loss}
            load_best(self.model, folder)
        summary["trainable_parameters"] = sum(q.numel() for q in loop.parameters)
        summary |= self.told
        summary |= read_json(folder / "data" / "counts.json")
        after = Outcome()
        for part in ("val", "test"):
            if self.items[part]:
                after = self._outcome(part, line)
                summary |= {f"{part}_{name}": value for name, value in after.figures.items()}
        path = folder / "before.json"
        before = read_json(path) if path.is_file() else {"figures": {}, "examples": []}
        part = "test" if self.items["test"] else "val"
        summary |= {f"base_{part}_{name}": value for name, value in before["figures"].items()}
        summary |= finite(summary)
        write_adapter(self.model, folder, config.model, self.method.tokenizer)
        save_folder(self.model, self.method.tokenizer, folder / "model")
        for made in ("adapter", "model"):
            if (folder / made).is_dir():
                self.method.save_beside(self.model, folder / made)
        title = f"{folder.name}: {self.name} of {config.model}"
        plot_losses(folder, title)
        write_run_report(folder, title, summary, before, after)
        write_card(
            folder, summary, f"{config.model}, fine-tuned with scratchlm ({self.name}).",
            [f"Training rows: {len(self.rows['train']):,}"], self.cls.pipeline,
        )  # fmt: skip


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- the best model, examples --------------------------------------------------------------------


def save_best(model: nn.Module, folder: Path) -> None:
    """What is trained, as it is now, into checkpoints/best.safetensors."""
    path = folder / "checkpoints" / "best.safetensors"
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(f"{ASIDE}{path.name}")
    try:
        save_file({n: p.contiguous().cpu() for n, p in own_parameters(model).items()}, aside)
        aside.replace(path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise RunError(f"Cannot write {path}: {error}. Make room, then --resume.") from error


@torch.no_grad()
def load_best(model: nn.Module, folder: Path) -> None:
    """Put back what `save_best` kept."""
    path = folder / "checkpoints" / "best.safetensors"
    if not path.is_file():
        return  # no loss was a number
    stored = load_file(path)
    for name, parameter in own_parameters(model).items():
        parameter.copy_(stored[name])


def append_sample(folder: Path, step: int, examples: list[dict[str, str]]) -> None:
    """What some rows give after a step, into samples.md."""
    path = folder / "samples.md"
    old = path.read_text(encoding="utf-8") if path.is_file() else "# Samples\n"
    old = old.split(f"\n## Step {step}\n")[0]  # a resumed run writes its steps again
    text = "\n".join(f"**{plain_md(repr(e['given']))}**\n\n{fenced(e['got'])}" for e in examples)
    with write_aside(path) as file:
        file.write(f"{old.rstrip()}\n\n## Step {step}\n\n{text}")
