"""adapter_config.json of the PEFT library: read with every field accounted for, and written.

A field that we do not know, or a value that would change what the adapter computes, is refused by
its name. What the tensors say themselves (which layers, which ranks) is not read here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_from_scratch.core.errors import UserError, nearest, shown
from llm_from_scratch.core.json_files import read_json_object

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
HEAD = "head.json"  # which head and labels belong to the adapter, which PEFT does not say
# What it was trained with, beside it: a tokenizer with its chat template, and where texts end.
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.*", "vocab.json", "target_vocab.json", "merges.txt", "vocab.txt", "*.spm",
    "*.model", "generation_config.json",
)  # fmt: skip
# Fields that say nothing about what is computed, or that the tensors say as well.
UNUSED = {
    "auto_mapping": "how the base model's class is found",
    "base_model_name_or_path": "read, but not computed with",
    "eva_config": "how fresh weights were drawn",
    "exclude_modules": "the tensors say which layers have an adapter",
    "fan_in_fan_out": "how the base stores its matrices",
    "inference_mode": "whether the adapter is to be trained",
    "init_lora_weights": "how fresh weights were drawn (some ways are refused)",
    "layers_pattern": "the tensors say which layers have an adapter",
    "layers_to_transform": "the tensors say which layers have an adapter",
    "lora_dropout": "acts in training only",
    "megatron_core": "the name of a library",
    "modules_to_save": "the tensors say which layers were trained whole",
    "peft_version": "who wrote the file",
    "qalora_group_size": "belongs to use_qalora",
    "rank_pattern": "the tensors say their ranks",
    "revision": "which state of the base",
    "runtime_config": "how it is run",
    "target_modules": "the tensors say which layers have an adapter",
    "task_type": "read, but not computed with",
}
READ = ("peft_type", "r", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "bias")
# Off, or the base would have to be changed as well.
DRAWN = (True, False, None, "gaussian", "eva", "orthogonal")
OFF: tuple[Any, ...] = (None, False, [], {}, "")
KINDS = {  # by use_rslora and use_dora
    (False, False): "lora", (True, False): "rslora", (False, True): "dora", (True, True): "rsdora",
}  # fmt: skip
TASKS = {
    "classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "embedding": "FEATURE_EXTRACTION",
}


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter_config.json says.

    `alphas` are patterns of layers' names with an alpha of their own; `task` is PEFT's task_type.
    """

    base: str | None
    rank: int
    alpha: float
    kind: str = "lora"
    dropout: float = 0.0
    alphas: Mapping[str, float] = field(default_factory=dict)
    task: str | None = None

    def scale(self, layer: str, rank: int) -> float:
        """What the detour of the layer of that name is multiplied by."""
        alpha = self.alpha
        for pattern, value in self.alphas.items():
            if re.match(rf"(.*\.)?({pattern})$", layer):  # as PEFT does it
                alpha = value
                break
        return alpha / (math.sqrt(rank) if self.rooted else rank)

    @property
    def rooted(self) -> bool:
        """Whether alpha is divided by the root of the rank."""
        return self.kind in ("rslora", "rsdora")

    @property
    def stretched(self) -> bool:
        """Whether it is a DoRA."""
        return self.kind in ("dora", "rsdora")


def is_adapter_folder(path: Path) -> bool:
    """Whether `path` looks like the folder of an adapter."""
    return (path / CONFIG).is_file()


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The content of a folder's adapter_config.json, checked."""
    path = folder / CONFIG
    values = read_json_object(path)

    def refuse(name: str, must: str) -> UserError:
        return UserError(f"{path}: '{name}' is {shown(values.get(name))}; it must be {must}.")

    def number(name: str, default: float, owner: Mapping[str, Any] = values) -> float:
        value = owner.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
            raise refuse(name if owner is values else "alpha_pattern", "numbers, not negative")
        return float(value)

    def text(name: str) -> str | None:
        value = values.get(name)
        if value is not None and not isinstance(value, str):
            raise refuse(name, "a text or null")
        return value

    def switched(name: str) -> bool:
        value = values.get(name)
        if value is not None and not isinstance(value, bool):
            raise refuse(name, "true or false")
        return bool(value)

    if values.get("peft_type") != "LORA":
        raise refuse("peft_type", "LORA: other kinds of adapters are not supported")
    known = (*UNUSED, *READ)
    for name, value in values.items():
        if name not in known and value not in OFF:
            raise UserError(
                f"{path}: the field {shown(name)} ({shown(value)}) is not supported, so it cannot "
                f"be said what the adapter computes.{nearest(name, known)}"
            )
    if values.get("bias", "none") != "none":
        raise refuse("bias", "none: adapters that change biases are not supported")
    drawn = values.get("init_lora_weights")
    if not any(drawn is one or (isinstance(one, str) and drawn == one) for one in DRAWN):
        raise refuse(
            "init_lora_weights",
            "true, false, gaussian, orthogonal or eva: others change the base; save the adapter "
            "with path_initial_model_for_weight_conversion",
        )
    rank = values.get("r", 8)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank < 1 << 20:
        raise refuse("r", "a whole number above 0")
    patterns = values.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise refuse("alpha_pattern", "an object of names and numbers")
    for pattern in patterns:
        if not is_pattern(pattern):
            raise refuse("alpha_pattern", "an object whose keys are names of layers")
    return AdapterConfig(
        text("base_model_name_or_path"),
        rank,
        number("lora_alpha", 8),
        KINDS[switched("use_rslora"), switched("use_dora")],
        min(number("lora_dropout", 0.0), 0.999),
        {pattern: number(pattern, 0, patterns) for pattern in patterns},
        text("task_type"),
    )


def is_pattern(pattern: str) -> bool:
    """Whether a key of alpha_pattern is a name, or a pattern that cannot run for ages."""
    if not re.fullmatch(r"[\w.\\^$]{1,200}", pattern):
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def adapter_config_json(
    config: AdapterConfig,
    targets: list[str],
    whole: list[str],
    ranks: Mapping[str, int],
    transposed: bool,
) -> dict[str, Any]:
    """The content of adapter_config.json.

    `targets` and `whole` name the layers with an adapter and those that were trained as they are;
    `ranks` those whose rank differs.
    """
    return {
        "peft_type": "LORA",
        "task_type": config.task,
        "auto_mapping": None,
        "base_model_name_or_path": config.base,
        "revision": None,
        "inference_mode": True,
        "r": config.rank,
        "target_modules": targets,
        "exclude_modules": None,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "use_rslora": config.rooted,
        "use_dora": config.stretched,
        "modules_to_save": whole or None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": dict(ranks),
        "alpha_pattern": dict(config.alphas),
    }
