"""The main job: a model from nothing in minutes, held against gzip, bz2 and xz."""

from __future__ import annotations

import copy
import dataclasses
import time
from pathlib import Path
from typing import Any

from llm_from_scratch.core.device import synchronise
from llm_from_scratch.core.runlog import LiveLine, write_json
from llm_from_scratch.evaluate.bits_per_byte import compressor_bits_per_byte
from llm_from_scratch.train.prepare import PYTHON, Prepared
from llm_from_scratch.train.pretrain import build, make_loop, pretrain
from llm_from_scratch.train.run import Run
from llm_from_scratch.train.settings import PretrainConfig

SECONDS = 216.0  # what the whole quickstart may take
AFTERWARDS = 30.0  # of which for evaluation, compressors, samples and picture
PROBE_STEPS = 4
MOST_EPOCHS = 6  # more passes over a small text would learn it by heart
PRIMER_BYTES = 32_000_000  # what xz reads first; its memory is about 11 times its window
FEWEST_STEPS = 200  # but so many steps are taken, however small the text is


def defaults(language: str, paths: tuple[str, ...]) -> dict[str, Any]:
    """The settings of the quickstart, as far as they differ from those of `pretrain`."""
    return {
        "data": {"paths": paths or (PYTHON,), "language": language, "seq_len": 256},
        "tokenizer": {"vocab_size": 4096 if language == "en" else 6144},
        "model": {"family": "qwen3", "d_model": 192, "n_layers": 4, "n_heads": 3},
        "train": {
            "batch_size": 8,
            "learning_rate": 6e-3,
            "schedule": "wsd",
            "decay_share": 0.8,
            "eval_every": 0,
            "keep_best": False,  # nothing is chosen on the text that is reported
            "sample_every": 0,
            "checkpoint_every": 0,
            "eval_tokens": 40_000,
        },
    }


def steps_that_fit(config: PretrainConfig, prepared: Prepared, seconds: float) -> tuple[int, float]:
    """(steps, seconds per step) that fit into `seconds`, from a few real steps on a copy."""
    quick = dataclasses.replace(config.train, max_steps=10_000)
    probe_config = dataclasses.replace(config, train=quick)
    model = build(probe_config, prepared)
    loop = make_loop(probe_config, prepared, copy.deepcopy(model), None, quiet=True)
    loop.model.train()
    loop.step()
    times = []
    for _ in range(PROBE_STEPS):
        synchronise(loop.device)
        start = time.perf_counter()
        loop.step()
        synchronise(loop.device)
        times.append(time.perf_counter() - start)
    step_s = sorted(times)[len(times) // 2]
    return max(20, int(seconds / step_s)), step_s


def quickstart(
    config: PretrainConfig,
    *,
    seconds: float = SECONDS,
    quiet: bool = False,
    given: dict[str, Any] | None = None,
) -> tuple[Run, dict[str, float]]:
    """Train within `seconds` and measure; returns the run and all bits-per-byte figures.

    `given` are the settings that were asked for (nested): they stand. Without train.max_steps a
    speed probe sets it, and config.yaml says what it became.
    """
    asked = given or {}
    began = time.monotonic()
    texts: list[bytes] = []

    def tune(config: PretrainConfig, prepared: Prepared, line: LiveLine) -> PretrainConfig:
        assert prepared.documents is not None
        for documents in prepared.documents:
            texts.append("\n".join(document.text for document in documents).encode())
        prepared.documents = None  # not needed while training
        if {"max_steps", "epochs"} & set(asked.get("train", {})):
            return config
        left = seconds - AFTERWARDS - (time.monotonic() - began)
        steps, step_s = steps_that_fit(config, prepared, 0.95 * max(left, 1.0))
        epoch = len(prepared.train) / (config.train.batch_size * config.data.seq_len)
        steps = min(steps, max(FEWEST_STEPS, round(MOST_EPOCHS * epoch)))
        line.say(
            f"Speed probe: {step_s * 1000:.0f} ms a step; {steps} steps fit, which is "
            f"{steps / epoch:.1f} times the text."
        )
        found = {"max_steps": steps, "eval_every": -(-steps // 4)}
        found = {k: v for k, v in found.items() if k not in asked.get("train", {})}
        train = dataclasses.replace(config.train, **found)  # type: ignore[arg-type]
        model = config.model
        if steps > 1.5 * epoch and "dropout" not in asked.get("model", {}):
            model = dataclasses.replace(model, dropout=0.1)
        return dataclasses.replace(config, train=train, model=model)

    run = pretrain(config, quiet=quiet, tune=tune)
    if "bits_per_byte" not in run.summary:
        return run, {}
    line = LiveLine(quiet=quiet)
    line.show("Compressing the held-out text with gzip, bz2 and xz ...", force=True)
    primer, text = texts
    rivals = compressor_bits_per_byte(text, primer[-PRIMER_BYTES:])
    figures = {f"{name}_bits_per_byte": value for name, value in rivals.items()}
    run.summary.update(figures)
    write_json(Path(config.out) / "summary.json", run.summary)
    return run, {"ours": run.summary["bits_per_byte"], **rivals}
