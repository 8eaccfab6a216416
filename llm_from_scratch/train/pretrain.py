"""Pretraining: from files of text to a run folder with a model in it.

read and split documents -> tokenizer -> token shards -> loop -> model, figures, picture
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_from_scratch.core.device import (
    memory_bytes,
    pick_device,
)
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import (
    human_bytes,
    write_aside,
)
from llm_from_scratch.core.runlog import LiveLine, plot_losses
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
from llm_from_scratch.train.prepare import PYTHON, Prepared, prepare, reopen
from llm_from_scratch.train.run import Run, carry_out, steps_of, with_train, write_card
from llm_from_scratch.train.settings import PretrainConfig
from llm_from_scratch.weights.families import family_of
from llm_from_scratch.weights.folder import load_folder, save_folder

# May change the settings once the text is prepared (quickstart sets the steps there).
Tune = Callable[[PretrainConfig, Prepared, LiveLine], PretrainConfig]


class NextToken:
    """Predict every next token: the method of pretraining."""

    def step(self, model: nn.Module, batch: Batch) -> LossSum:
        assert isinstance(model, Decoder)
        hidden = model.hidden(batch.tokens, document_ids_bt=batch.document_ids)
        targets = batch.targets
        loss_sum = next_token_loss_sum(model, hidden, targets)
        count = (targets != IGNORED).sum()
        result = LossSum(loss_sum, count, tokens=targets.numel())
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


def make_loop(
    config: PretrainConfig, prepared: Prepared, model: Decoder, folder: Path | None, quiet: bool
) -> Loop:
    """The loop of a pretraining run, with evaluation, samples and the best model."""
    seq_len, batch = config.data.seq_len, config.train.batch_size
    source = PackedTokens(prepared.train, seq_len, config.train.seed)
    hooks = Hooks(flops_per_token=training_flops_per_token(model.config, seq_len))
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


class Pretraining:
    """The run that `pretrain` carries out: text, tokenizer and shards become a model."""

    command = "scratchlm pretrain"
    preparation: tuple[str, ...] = ("tokenizer", "tokens")

    def __init__(self, tune: Tune | None = None) -> None:
        self.tune = tune

    def prepare(
        self, config: PretrainConfig, folder: Path, line: LiveLine
    ) -> tuple[PretrainConfig, dict[str, Any]]:
        # What can be known to be wrong comes out before the work.
        shape = resolve(config.model, config.tokenizer.vocab_size, config.data.seq_len)
        memory = memory_bytes(pick_device(config.train.device))
        refuse_too_large(shape, config.train.optimizer, memory)
        family_of(shape)  # what cannot be saved need not be trained
        if config.tokenizer.path is not None:
            Tokenizer.load(Path(config.tokenizer.path))
        self.prepared = prepare(config, folder, line)
        windows = PackedTokens(self.prepared.train, config.data.seq_len, config.train.seed)
        config = with_train(config, steps_of(config.train, len(windows)))
        if self.tune is not None:
            config = self.tune(config, self.prepared, line)
        self.prepared.documents = None  # the text is not needed while training
        return config, {"data_sha256": self.prepared.hashes}

    def reopen(self, config: PretrainConfig, folder: Path, line: LiveLine) -> None:
        self.prepared = reopen(folder)

    def make_loop(self, config: PretrainConfig, folder: Path, quiet: bool) -> Loop:
        model = build(config, self.prepared)
        loop = make_loop(config, self.prepared, model, folder, quiet)
        loop.line.say(
            f"Model: {config.model.family}, {_sizes(model)}, "
            f"{config.train.precision} on {config.train.device}."
        )
        return loop

    def finish(
        self,
        config: PretrainConfig,
        folder: Path,
        loop: Loop,
        line: LiveLine,
        summary: dict[str, Any],
    ) -> None:
        """The figures, the picture and the model card of a run that reached its end."""
        p, prepared, model = loop.progress, self.prepared, loop.model
        assert isinstance(model, Decoder)
        if prepared.val is None or len(prepared.val) < 2:
            save_folder(model, prepared.tokenizer, folder / "model")
        else:
            summary |= {"val_loss": p.val_loss, "best_val_loss": p.best_val_loss}
            if prepared.val_bytes:
                if config.train.keep_best and p.best_step != p.step:
                    model = kept_model(folder, loop)  # the figures are those of what is kept
                summary["bits_per_byte"] = held_out_bits_per_byte(config, prepared, model, line)
        title = f"{folder.name}: {config.model.family}, {summary['parameters'] / 1e6:.2f} M"
        plot_losses(folder, title)
        write_card(
            folder, summary,
            f"A {config.model.family} language model trained from scratch with scratchlm.",
            facts_of(config, prepared), "text-generation",
        )  # fmt: skip


def pretrain(
    config: PretrainConfig,
    *,
    resume: bool = False,
    quiet: bool = False,
    tune: Tune | None = None,
    given: dict[str, Any] | None = None,
) -> Run:
    """Train a model from text, into the folder `config.out`; see `run.carry_out`."""
    return carry_out(Pretraining(tune), config, resume=resume, quiet=quiet, given=given)


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


def kept_model(folder: Path, loop: Loop) -> Decoder:
    """The best model, from the run's `model/`, where and as precise as the trained one."""
    best = load_folder(folder / "model")[0]
    assert isinstance(best, Decoder)
    best.to(loop.device)
    best.compute_dtype = loop.model.compute_dtype  # type: ignore[assignment]
    return best


def held_out_bits_per_byte(
    config: PretrainConfig, prepared: Prepared, model: Decoder, line: LiveLine
) -> float:
    """Bits per byte of the validation text, each token with at least half a window before it."""
    assert prepared.val is not None
    seq_len, nats, targets = config.data.seq_len, 0.0, 0
    for part, count in nats_of(model, prepared.val, seq_len, max(1, seq_len // 2)):
        nats, targets = nats + part, targets + count
        line.show(f"Evaluating: {targets:,} of {len(prepared.val):,} tokens")
    if prepared.tokenizer.eos_id is None:
        # Nothing stands before a document's first token: it is charged as a uniform draw.
        nats += prepared.val.documents * math.log(prepared.tokenizer.vocab_size)
    return bits_per_byte(nats, prepared.val_bytes)


def facts_of(config: PretrainConfig, prepared: Prepared) -> list[str]:
    """What the model card says of text and tokenizer."""
    source = (
        "the Python standard library and its help topics (PSF licence)"
        if tuple(config.data.paths) == (PYTHON,)
        else "the user's own files; their licence holds for what is made of them"
    )
    return [
        f"Training text: {source}; SHA-256 `{prepared.hashes['train']}`",
        f"Validation text: SHA-256 `{prepared.hashes['val']}`",
        f"Tokenizer: {prepared.tokenizer.kind}, {prepared.tokenizer.vocab_size} entries",
    ]
