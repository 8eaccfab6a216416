"""What a model costs: everything that `scratchlm info` says, as one mapping, without any weight.

Every figure comes from where it belongs: parameters from `model/inventory.py`, arithmetic from
`model/flops.py`, memory from `model/memory.py` and `train/memory.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llm_from_scratch.core.config import from_dict, read_yaml
from llm_from_scratch.core.device import (
    PRECISIONS,
    free_memory_bytes,
    memory_bytes,
    pick_device,
    pick_precision,
)
from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.model.config import EncoderDecoderConfig
from llm_from_scratch.model.flops import Flops, decode_flops, prefill_flops, training_flops
from llm_from_scratch.model.inventory import (
    AnyConfig,
    active_parameter_count,
    parameter_count,
    parameters_by_part,
)
from llm_from_scratch.model.memory import Pass, inference_memory, kv_cache_bytes, largest
from llm_from_scratch.model.presets import resolve
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.train.memory import TrainingMemory, training_memory
from llm_from_scratch.train.settings import OPTIMIZERS, PretrainConfig, TrainSettings
from llm_from_scratch.weights.config_json import check_sizes
from llm_from_scratch.weights.describe import Description, describe, describe_preset
from llm_from_scratch.weights.sources import computes_bf16

USUAL_CONTEXT = 2048  # where nothing is asked for and the model's own is longer
# Processes took 1.06 to 1.23 times the bytes of their tensors (LAB_NOTES.md): allocators leave
# gaps, and kernels have buffers of their own.
SLACK = 1.25
ESTIMATES = ("inference.working", "training.logits", "training.optimizer_work", "machine.largest")


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked about a model; None is what its run was started with, or what is usual."""

    context: int | None = None
    batch: int | None = None
    optimizer: str | None = None
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("context", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value}; it must be at least 1.")
        for name, value, choices in (
            ("optimizer", self.optimizer or OPTIMIZERS[0], OPTIMIZERS),
            ("dtype", self.dtype, ("auto", *PRECISIONS)),
        ):
            if value not in choices:
                raise UserError(
                    f"--{name} is '{value}'; it must be one of {', '.join(choices)}."
                    + nearest(value, choices)
                )


def find(model: str | None, preset: str | None = None) -> tuple[Description, PretrainConfig | None]:
    """The model and, if it is one's, the settings of its run."""
    if model is not None and preset is not None:
        raise UserError("Give a MODEL or --preset, not both.")
    if model is None and preset is None:
        raise UserError("Name one model: a MODEL, or a size with --preset.")
    if preset is not None:
        return describe_preset(preset), None
    found = describe(str(model))
    if isinstance(found, Path):
        run = from_dict(PretrainConfig, read_yaml(found))
        return describe_run(run, found), run
    settings = Path(str(model)).expanduser() / "config.yaml"
    values = read_yaml(settings) if settings.is_file() else {"method": None}
    if "method" in values:  # fine-tuning has settings of another kind
        return found, None
    return found, from_dict(PretrainConfig, values)


def describe_run(run: PretrainConfig, where: Path) -> Description:
    """What a run trains, by its settings and by the tokenizer that it has made, if it has."""
    folder = where.parent / "tokenizer"
    if (folder / "tokenizer.json").is_file():
        vocab_size = Tokenizer.load(folder).vocab_size
    elif run.tokenizer.path is not None:
        vocab_size = Tokenizer.load(Path(run.tokenizer.path)).vocab_size
    else:
        vocab_size = run.tokenizer.vocab_size
    config = resolve(run.model, vocab_size, run.data.seq_len)
    check_sizes(config, str(where))
    return Description(str(where), config)


def longest(config: AnyConfig) -> int:
    """The longest context that the model takes, in tokens."""
    if isinstance(config, EncoderDecoderConfig):
        return min(config.encoder.max_seq_len, config.decoder.max_seq_len)
    return config.max_seq_len


def account(
    model: str | None, question: Question | None = None, *, preset: str | None = None
) -> dict[str, Any]:
    """All figures of the model that MODEL or a preset names.

    Numbers are FLOPs, bytes and tokens; `estimates` names those that are neither counted nor exact.
    """
    question = question or Question()
    found, run = find(model, preset)
    config, head = found.config, found.head
    train = run.train if run is not None else TrainSettings()
    context, batch = _sizes(config, question, run)
    optimizer = question.optimizer or train.optimizer
    device = pick_device(question.device)
    dtype, precision = _precisions(found, question.dtype, device, train)
    compute = PRECISIONS[precision]

    kept = found.kept and device.type == "cpu" and question.dtype == "auto"

    def infer(b: int, n: int) -> dict[str, float]:
        parts = inference_memory(config, b, n, PRECISIONS[dtype], device.type, head)
        if kept and found.stored_bytes is not None:
            parts["weights"] = float(found.stored_bytes)
        return parts

    def learn(b: int, n: int) -> TrainingMemory:
        # Training's batches hold padding, or several documents in a row, so they have masks.
        pair = isinstance(config, EncoderDecoderConfig)
        return training_memory(
            config,
            Pass(
                b, n, compute, device=device.type, masked=not pair or head is not None,
                source=n if pair else 0, source_masked=pair,
            ),
            optimizer,
            head,
        )  # fmt: skip

    inference, training = infer(batch, context), learn(batch, context)
    sizes: dict[str, Callable[[int, int], float]] = {
        "inference": lambda b, n: sum(infer(b, n).values()),
        "training": lambda b, n: learn(b, n).total,
    }
    return {
        "model": model if model is not None else preset,
        **_described(found),
        "asked": {
            "context": context, "longest_context": longest(config), "batch": batch,
            "optimizer": optimizer, "inference_dtype": dtype, "training_precision": precision,
        },
        "parameters": {
            "total": parameter_count(config, head),
            "active": active_parameter_count(config, head),
            "parts": parameters_by_part(config, head),
        },
        "flops": {
            "prefill": _flops(prefill_flops(config, context, head)),
            "decode": None if head is not None else _flops(decode_flops(config, context)),
            "training": _flops(training_flops(config, context, head)),
        },
        "kv_cache": _cache(found, PRECISIONS[dtype], context, batch),
        "inference": _whole({**inference, "total": sum(inference.values())}),
        "training": _training(training),
        "machine": _machine(device, sizes, context),
        "estimates": list(ESTIMATES),
    }  # fmt: skip


def _described(found: Description) -> dict[str, Any]:
    """What the model is, and where it was read."""
    return {
        "source": found.source,
        "stored": {"form": found.form, "bytes": found.stored_bytes},
        "kind": kind_of(found.config),
        "head": None if found.head is None else found.head.kind,
        "adapter": None if found.adapter is None else dataclasses.asdict(found.adapter),
        "family": found.config.family,
        "config": dataclasses.asdict(found.config),
    }


def _cache(found: Description, dtype: torch.dtype, context: int, batch: int) -> dict[str, int]:
    """Bytes of the key-value cache; under a head there is none."""
    per_token = kv_cache_bytes(found.config, 1, 1, dtype, 1) if found.head is None else 0
    return {
        "per_token": per_token,
        "per_sequence": per_token * context,
        "batch": per_token * context * batch,
    }


def _machine(
    device: torch.device, sizes: dict[str, Callable[[int, int], float]], context: int
) -> dict[str, Any]:
    """What this machine has, and the largest batch of each use that fits into what is free."""
    free = free_memory_bytes(device)
    fitting = None
    if free is not None:
        fitting = {name: _largest(size, free / SLACK, context) for name, size in sizes.items()}
    return {
        "device": device.type,
        "memory": memory_bytes(device),
        "free": free,
        "slack": SLACK,
        "largest": fitting,
    }


def kind_of(config: AnyConfig) -> str:
    """decoder, encoder or encoder-decoder."""
    if isinstance(config, EncoderDecoderConfig):
        return "encoder-decoder"
    return "decoder" if config.causal else "encoder"


def _sizes(config: AnyConfig, question: Question, run: PretrainConfig | None) -> tuple[int, int]:
    """Context and batch: what is asked, else the run's, else what is usual."""
    most = longest(config)
    if question.context is not None and question.context > most:
        raise UserError(
            f"--context is {question.context}, but the model's context is {most} tokens; ask for "
            "at most that."
        )
    context, batch = min(most, USUAL_CONTEXT), 1
    if run is not None:
        context = min(most, run.data.seq_len)
        batch = run.train.micro_batch_size or run.train.batch_size
    return question.context or context, question.batch or batch


def _precisions(
    found: Description, asked: str, device: torch.device, train: TrainSettings
) -> tuple[str, str]:
    """Of weights and cache in inference, and of the activations in training, by their names.

    `auto` is what `load` and the training loop would choose here.
    """
    if asked != "auto":
        return asked, "bf16" if asked == "fp16" else asked
    stored = found.dtype
    if stored is None:
        stored = torch.float32
        if found.form is not None and device.type == "cuda" and computes_bf16(device):
            stored = torch.bfloat16
    slow = stored == torch.float16 or (stored == torch.bfloat16 and not computes_bf16(device))
    if device.type == "cpu" and slow:
        stored = torch.float32
    name = next(name for name, dtype in PRECISIONS.items() if dtype == stored)
    return name, pick_precision(train.precision, device)


def _flops(work: Flops | None) -> dict[str, float] | None:
    if work is None:
        return None
    parts = {"total": work.total, **dataclasses.asdict(work)}
    hidden = parts.pop("hidden")
    return {"per_token": work.per_token, **_whole(parts), "hidden": hidden}


def _training(memory: TrainingMemory) -> dict[str, Any]:
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": sum(memory.activations.values()),
        "logits": memory.logits,
        "optimizer_work": memory.optimizer_work,
        "total": memory.total,
    }
    return {**_whole(parts), "activations_by_part": _whole(memory.activations)}


def _whole(parts: dict[str, float]) -> dict[str, int]:
    return {name: round(value) for name, value in parts.items()}


def _largest(size: Callable[[int, int], float], free: float, context: int) -> dict[str, int]:
    """The largest batch at this context and, where not even one text fits, the longest context."""
    batch = largest(lambda b: size(b, context) <= free)
    if batch:
        return {"batch": batch, "context": context}
    return {"batch": 0, "context": largest(lambda n: size(1, n) <= free, context)}
