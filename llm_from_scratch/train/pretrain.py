"""Pretraining: from files of text to a run folder with a model in it.

read and split documents -> tokenizer -> token shards -> loop -> model, figures, picture
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_from_scratch.core.config import from_dict, read_yaml, to_dict, to_yaml
from llm_from_scratch.core.device import (
    environment,
    memory_bytes,
    pick_device,
    pick_precision,
)
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import (
    human_bytes,
    remove_asides,
    writable_folder,
    write_aside,
)
from llm_from_scratch.core.runlog import LiveLine, plot_losses, write_json
from llm_from_scratch.data.loader import IGNORED, Batch, PackedTokens, evaluation_batches
from llm_from_scratch.evaluate.bits_per_byte import bits_per_byte, nats_of
from llm_from_scratch.generate.generate import complete
from llm_from_scratch.model.config import ModelConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.flops import parameter_count, training_flops_per_token
from llm_from_scratch.model.inventory import active_parameter_count
from llm_from_scratch.model.memory import Pass
from llm_from_scratch.model.presets import resolve
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.train.loop import Hooks, Loop
from llm_from_scratch.train.losses import LossSum, next_token_loss_sum, with_balance
from llm_from_scratch.train.memory import training_memory
from llm_from_scratch.train.parallel import join_world, leave_world, wait_for_all
from llm_from_scratch.train.prepare import PYTHON, Prepared, prepare, reopen
from llm_from_scratch.train.settings import PretrainConfig
from llm_from_scratch.weights.families import family_of
from llm_from_scratch.weights.folder import load_folder, save_folder

PREPARATION = ("tokenizer", "tokens", "environment.json")  # what is there before config.yaml
IDENTITY_FREE = ("stop_after",)  # train settings that do not change what a run computes


# May change the settings once the text is prepared (quickstart sets the steps there).
Tune = Callable[[PretrainConfig, Prepared, LiveLine], PretrainConfig]


class NextToken:
    """Predict every next token: the method of pretraining."""

    def step(self, model: nn.Module, batch: Batch) -> LossSum:
        assert isinstance(model, Decoder)
        hidden = model.hidden(batch.tokens, document_ids_bt=batch.document_ids)
        targets = batch.targets
        loss_sum = next_token_loss_sum(model, hidden, targets)
        result = LossSum(loss_sum, (targets != IGNORED).sum())
        return with_balance(result, model, targets) if model.training else result


# --- the run -------------------------------------------------------------------------------------


def completions(model: Decoder, tokenizer: Tokenizer, prompts: list[str], seed: int) -> str:
    """Some continuations as Markdown."""
    results = complete(
        model, tokenizer, prompts, max_new_tokens=60, temperature=0.7, top_p=0.95, seed=seed
    )
    parts = [
        f"**{prompt!r}**\n\n```text\n{prompt}{result.text}\n```\n"
        for prompt, result in zip(prompts, results, strict=True)
    ]
    return "\n".join(parts)


def prompts_for(config: PretrainConfig, prepared: Prepared) -> list[str]:
    """Beginnings to continue: known ones for the embedded corpus, else from the text itself."""
    if tuple(config.data.paths) == (PYTHON,):
        return ["def ", "class Test", "import os\n", "The "]
    store = prepared.val or prepared.train
    ids = [int(i) for i in itertools.islice(store.slice(0, min(len(store), 200)), 200)]
    text = prepared.tokenizer.decode(ids, skip_special=True).strip()
    return [text[:16] or " "]


class Sampler:
    """Appends completions to samples.md."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, prompts: list[str], seed: int) -> None:
        self.folder, self.tokenizer, self.prompts, self.seed = folder, tokenizer, prompts, seed

    def __call__(self, model: nn.Module, step: int) -> None:
        assert isinstance(model, Decoder)
        path = self.folder / "samples.md"
        old = path.read_text(encoding="utf-8") if path.is_file() else "# Samples\n"
        # A resumed run writes the samples of its steps again: each step stands there once.
        old = old.split(f"\n## Step {step}\n")[0]
        text = completions(model, self.tokenizer, self.prompts, self.seed)
        with write_aside(path) as file:
            file.write(f"{old.rstrip()}\n\n## Step {step}\n\n{text}")


def build(config: PretrainConfig, prepared: Prepared) -> Decoder:
    """A fresh model on its device, in fp32 weights, computing in train.precision."""
    shape = resolve(config.model, prepared.tokenizer.vocab_size, config.data.seq_len)
    model = Decoder(shape)
    model.initialise(config.train.seed)
    device = pick_device(config.train.device)
    model.to(device)
    if config.train.precision == "bf16":
        model.compute_dtype = torch.bfloat16
    return model


def settle(config: PretrainConfig) -> PretrainConfig:
    """`auto` replaced by what it means here, so that config.yaml repeats the run."""
    device = pick_device(config.train.device)
    precision = pick_precision(config.train.precision, device)
    train = dataclasses.replace(config.train, device=str(device), precision=precision)
    return dataclasses.replace(config, train=train)


def make_loop(
    config: PretrainConfig, prepared: Prepared, model: Decoder, folder: Path | None, quiet: bool
) -> Loop:
    """The loop of a pretraining run, with evaluation, samples and the best model."""
    seq_len, batch = config.data.seq_len, config.train.batch_size
    source = PackedTokens(prepared.train, seq_len, config.train.seed)
    hooks = Hooks(
        tokens_per_step=batch * seq_len,
        flops_per_token=training_flops_per_token(model.config, seq_len),
    )
    val = prepared.val
    if val is not None and len(val) > 1:
        rows = min(batch, 16)
        few = max(1, config.train.eval_tokens // (rows * seq_len))
        hooks.val_batches = lambda: itertools.islice(evaluation_batches(val, seq_len, rows), few)
    if folder is not None:
        prompts = prompts_for(config, prepared)
        hooks.sample = Sampler(folder, prepared.tokenizer, prompts, config.train.seed)
        hooks.save_best = lambda best: save_folder(best, prepared.tokenizer, folder / "model")  # type: ignore[arg-type]
    return Loop(
        model, NextToken(), source, config.train,
        device=pick_device(config.train.device), folder=folder, hooks=hooks, quiet=quiet,
    )  # fmt: skip


@dataclass
class Run:
    """A finished or interrupted run."""

    folder: Path
    config: PretrainConfig
    summary: dict[str, Any]
    interrupted: bool = False
    as_asked: bool = False  # interrupted by train.stop_after

    @property
    def exit_code(self) -> int:
        """What a command ends with: 0, or 130 after Ctrl-C."""
        return 130 if self.interrupted and not self.as_asked else 0


def pretrain(
    config: PretrainConfig,
    *,
    resume: bool = False,
    quiet: bool = False,
    tune: Tune | None = None,
    given: dict[str, Any] | None = None,
) -> Run:
    """Train a model from text, into the folder `config.out`.

    With `resume`, config.yaml in that folder decides; what was asked for besides must not
    contradict it: `given` (nested, as from the flags), or whatever in `config` is no default.
    Raises `UserError` before any work for settings that cannot be, `RunError` for what fails later.
    """
    line = LiveLine(quiet=quiet)
    if not config.out:
        raise UserError("No run folder was given; name one with --out.")
    folder = Path(config.out)
    world = join_world(pick_device(config.train.device))
    if resume:
        if world.main and folder.is_dir():
            remove_asides(folder)
        config = resumed_config(folder, config, given)
        prepared = reopen(folder)
    elif world.main:
        config, prepared = start(config, folder, tune, line)
        wait_for_all(world)
    else:
        wait_for_all(world)
        config = resumed_config(folder, config, {})
        prepared = reopen(folder)
    model = build(config, prepared)
    loop = make_loop(config, prepared, model, folder, quiet)
    line.say(
        f"Model: {config.model.family}, {_sizes(model)}, "
        f"{config.train.precision} on {config.train.device}."
    )
    if resume and (step := loop.resume()):
        line.say(f"Resuming after step {step}.")
    progress = loop.train()
    if loop.interrupted:
        line.say(
            f"Saved at step {progress.step}. To go on: scratchlm pretrain --out {folder} --resume"
        )
        # Stopped where it was told to stop is not the same as stopped by Ctrl-C.
        asked = config.train.stop_after is not None and progress.step >= config.train.stop_after
        return Run(folder, config, {}, interrupted=True, as_asked=asked)
    summary = finish(config, prepared, model, loop, line) if loop.world.main else {}
    leave_world()
    return Run(folder, config, summary)


def start(
    config: PretrainConfig, folder: Path, tune: Tune | None, line: LiveLine
) -> tuple[PretrainConfig, Prepared]:
    """A new run folder with everything that is decided before the first step."""
    refuse_used_folder(folder)
    # What can be known to be wrong comes out before the work.
    shape = resolve(config.model, config.tokenizer.vocab_size, config.data.seq_len)
    config = settle(config)
    refuse_too_large(shape, config.train.optimizer, memory_bytes(pick_device(config.train.device)))
    family_of(shape)  # what cannot be saved need not be trained
    if config.tokenizer.path is not None:
        Tokenizer.load(Path(config.tokenizer.path))
    fresh = not folder.exists()
    writable_folder(folder)
    try:
        prepared = prepare(config, folder, line)
        PackedTokens(prepared.train, config.data.seq_len, config.train.seed)  # long enough?
        if tune is not None:
            config = tune(config, prepared, line)
    except BaseException:  # Ctrl-C, too: nothing half-made stays behind
        remove_preparation(folder)
        if fresh and folder.exists():
            folder.rmdir()
        raise
    prepared.documents = None  # the text is not needed while training
    train = dataclasses.replace(config.train, warmup_steps=config.train.warmup)
    config = dataclasses.replace(config, train=train)
    stored = dataclasses.replace(train, stop_after=None)
    write_json(folder / "environment.json", {**environment(), "data_sha256": prepared.hashes})
    with write_aside(folder / "config.yaml") as file:
        file.write(to_yaml(dataclasses.replace(config, train=stored)))
    return config, prepared


def _sizes(model: Decoder) -> str:
    total, active = parameter_count(model.config), active_parameter_count(model.config)
    text = f"{total / 1e6:.2f} M parameters"
    return text if active == total else f"{text} (a token meets {active / 1e6:.2f} M)"


def refuse_too_large(shape: ModelConfig, optimizer: str, memory: int | None) -> None:
    """Raise for a model that exceeds the memory even without any text to work on."""
    parts = training_memory(shape, Pass(1, 1), optimizer)
    needed = parts.weights + parts.gradients + parts.optimizer
    if memory is not None and needed > memory:
        raise UserError(
            f"The model has {parameter_count(shape) / 1e6:,.0f} M parameters; training it takes at "
            f"least {human_bytes(needed)}, but there are {human_bytes(memory)} of memory. Choose a "
            "smaller model.preset, model.depth or model.d_model."
        )


def finish(
    config: PretrainConfig, prepared: Prepared, model: Decoder, loop: Loop, line: LiveLine
) -> dict[str, Any]:
    """The figures, the picture and the model card of a run that reached its end."""
    p, folder = loop.progress, Path(config.out)
    rate = p.tokens / p.seconds if p.seconds else math.nan
    summary: dict[str, Any] = {
        "steps": p.step,
        "tokens": p.tokens,
        "parameters": parameter_count(model.config),
        "seconds": round(p.seconds, 2),
        "tokens_per_second": round(rate, 1),
        "mfu": round(loop.utilisation(rate), 4),
    }
    if prepared.val is not None and len(prepared.val) > 1:
        summary["val_loss"] = p.val_loss
        summary["best_val_loss"] = p.best_val_loss
    else:
        save_folder(model, prepared.tokenizer, folder / "model")
    if prepared.val is not None and prepared.val_bytes and len(prepared.val) > 1:
        seq_len = config.data.seq_len
        if config.train.keep_best and p.best_step != p.step:
            dtype = model.compute_dtype
            best = load_folder(folder / "model")[0]  # the figures are those of what is kept
            assert isinstance(best, Decoder)
            model = best
            model.to(loop.device)
            model.compute_dtype = dtype
        nats, targets = 0.0, 0
        stride = max(1, seq_len // 2)
        for part, count in nats_of(model, prepared.val, seq_len, stride):
            nats, targets = nats + part, targets + count
            line.show(f"Evaluating: {targets:,} of {len(prepared.val):,} tokens")
        if prepared.tokenizer.eos_id is None:
            # Nothing stands before a document's first token: it is charged as a uniform draw.
            nats += prepared.val.documents * math.log(prepared.tokenizer.vocab_size)
        summary["bits_per_byte"] = bits_per_byte(nats, prepared.val_bytes)
    write_json(folder / "summary.json", summary)
    plot_losses(
        folder, f"{folder.name}: {config.model.family}, {summary['parameters'] / 1e6:.2f} M"
    )
    write_card(folder, config, summary, prepared)
    remove_asides(folder)
    return summary


def write_card(
    folder: Path, config: PretrainConfig, summary: dict[str, Any], prepared: Prepared
) -> None:
    """model/README.md: what this model is, from what, how good, under which licence."""
    figures = "\n".join(
        f"| {name} | {value:.4f} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in summary.items()
    )
    source = (
        "the Python standard library and its help topics (PSF licence)"
        if tuple(config.data.paths) == (PYTHON,)
        else "the user's own files; their licence holds for what is made of them"
    )
    with write_aside(folder / "model" / "README.md") as file:
        file.write(
            f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
            f"# {folder.name}\n\nA {config.model.family} language model trained from scratch with "
            f"scratchlm.\n\n- Training text: {source}; SHA-256 `{prepared.hashes['train']}`\n"
            f"- Validation text: SHA-256 `{prepared.hashes['val']}`\n"
            f"- Tokenizer: {prepared.tokenizer.kind}, {prepared.tokenizer.vocab_size} entries\n\n"
            f"| figure | value |\n|---|---|\n{figures}\n"
        )


# --- folders and resuming ------------------------------------------------------------------------


def refuse_used_folder(folder: Path) -> None:
    """A run folder with something in it is never written over."""
    if (folder / "config.yaml").exists():
        raise UserError(
            f"{folder} already holds a run. Choose another --out, or go on with it: "
            f"scratchlm pretrain --out {folder} --resume"
        )
    if not folder.is_dir():
        return
    remove_asides(folder)
    if {entry.name for entry in folder.iterdir()} <= set(PREPARATION):
        remove_preparation(folder)  # a run that was killed before its first step
    if any(folder.iterdir()):
        raise UserError(f"The folder {folder} is not empty. Choose another --out.")


def remove_preparation(folder: Path) -> None:
    """Take away what `start` writes before config.yaml."""
    for name in PREPARATION:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def resumed_config(
    folder: Path, config: PretrainConfig, given: dict[str, Any] | None
) -> PretrainConfig:
    """The saved settings; a given one that contradicts them is refused by name."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{folder} holds no run to resume: there is no {path}. Check --out, or start a run "
            "without --resume."
        )
    saved = from_dict(PretrainConfig, read_yaml(path))
    was, now, usual = (flatten(to_dict(c)) for c in (saved, config, PretrainConfig()))
    asked = set(flatten(given)) if given is not None else {n for n in now if now[n] != usual[n]}
    for name in sorted(asked):
        value = now[name]
        settled = value == "auto" and name in ("train.device", "train.precision")
        free = name == "out" or name.removeprefix("train.") in IDENTITY_FREE or settled
        if not free and value != was[name]:
            raise UserError(
                f"--{name} is {value}, but the run in {folder} was started with {was[name]}. "
                "Leave the flag out to resume, or start a new run."
            )
    train = dataclasses.replace(saved.train, stop_after=config.train.stop_after)
    return dataclasses.replace(saved, out=str(folder), train=train)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'train': {'seed': 1}} -> {'train.seed': 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
