"""The families of models that are read and written: one table each, in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_from_scratch.core.errors import UserError, nearest, shown
from llm_from_scratch.model.config import EncoderDecoderConfig, ModelConfig
from llm_from_scratch.weights.config_json import Fields, check_weights
from llm_from_scratch.weights.families.bart import BART
from llm_from_scratch.weights.families.bert import BERT
from llm_from_scratch.weights.families.distilbert import DISTILBERT
from llm_from_scratch.weights.families.gemma2 import GEMMA2
from llm_from_scratch.weights.families.gemma3 import GEMMA3
from llm_from_scratch.weights.families.gpt2 import GPT2
from llm_from_scratch.weights.families.gpt_neox import GPT_NEOX
from llm_from_scratch.weights.families.llama import LLAMA
from llm_from_scratch.weights.families.marian import MARIAN
from llm_from_scratch.weights.families.mistral import MISTRAL
from llm_from_scratch.weights.families.modernbert import MODERNBERT
from llm_from_scratch.weights.families.mpnet import MPNET
from llm_from_scratch.weights.families.mt5 import MT5
from llm_from_scratch.weights.families.olmo2 import OLMO2
from llm_from_scratch.weights.families.pairs import read_pair, under_name, write_pair
from llm_from_scratch.weights.families.qwen2 import QWEN2
from llm_from_scratch.weights.families.qwen3 import QWEN3
from llm_from_scratch.weights.families.qwen3_moe import QWEN3_MOE
from llm_from_scratch.weights.families.roberta import ROBERTA
from llm_from_scratch.weights.families.t5 import T5
from llm_from_scratch.weights.families.table import Entry, Family
from llm_from_scratch.weights.families.xlm_roberta import XLM_ROBERTA

__all__ = [
    "FAMILIES", "AnyConfig", "Entry", "Family", "config_fields", "family_named", "family_of",
    "read_config",
]  # fmt: skip

AnyConfig = ModelConfig | EncoderDecoderConfig

FAMILIES = {
    family.name: family
    for family in (
        LLAMA, QWEN3, GPT2, GPT_NEOX, MISTRAL, QWEN2, QWEN3_MOE, GEMMA2, GEMMA3, OLMO2,
        BERT, ROBERTA, XLM_ROBERTA, DISTILBERT, MPNET, MODERNBERT,
        T5, MT5, BART, MARIAN,
    )
}  # fmt: skip


def family_named(model_type: object, where: str) -> Family:
    """The table of a config.json's `model_type`."""
    if isinstance(model_type, str) and f"{model_type}_text" in FAMILIES:
        raise UserError(
            f"{where}: 'model_type' is '{model_type}', a model of text and images; of these only "
            f"the models of text alone, '{model_type}_text', can be read."
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"{where}: 'model_type' is {shown(model_type)}; 'scratchlm models' lists the families "
            "that can be read." + nearest(str(model_type), FAMILIES)
        )
    return FAMILIES[model_type]


def read_config(values: Mapping[str, Any], where: str) -> tuple[Family, AnyConfig]:
    """The family and architecture that a config.json's content means.

    `where` names the file in errors. A field that we do not know, or a value that we cannot
    express, is refused by its name.
    """
    family = family_named(values.get("model_type"), where)
    known = family.known()
    for name, value in values.items():
        # null, false and nothing are what a field that is not in use looks like.
        if name not in known and value not in (None, False, [], {}, ""):
            raise UserError(
                f"{where}: the field {shown(name)} ({shown(value)}) is not known for "
                f"{family.name}, so it cannot be said what the model computes. If it changes "
                "nothing, remove it."
            )
    fields = Fields(values, family.defaults, where)
    for name, must in family.must(values.get("architectures")).items():
        # null is what a field that was never set looks like.
        if fields.values.get(name, must) not in (must, None):
            remedy = f"{must!r}; other values are not supported for {family.name}"
            if name == "quantization_config":
                remedy = "left out: without weights it cannot be read"
            raise fields.refuse(name, remedy)
    config = _architecture(family, fields)
    check_weights(config, where)
    return family, config


def _architecture(family: Family, fields: Fields) -> AnyConfig:
    if family.kind == "encoder-decoder":
        return read_pair(family, fields)
    known: dict[str, Any] = {}
    for group in family.settings:
        known |= group.read(fields, known)
    try:
        return ModelConfig(family=family.name, **family.constants, **known)
    except UserError as error:  # values that are sound alone, but not together
        raise UserError(f"{fields.where}: {error}") from error


def config_fields(family: Family, config: AnyConfig) -> dict[str, Any]:
    """The inverse of `read_config`: config.json's fields that say what the model computes."""
    if family.kind == "encoder-decoder":
        return write_pair(family, config)  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for group in family.settings:
        values |= group.write(config)  # type: ignore[arg-type]
    return values


def _unpooled(family: Family, config: AnyConfig) -> AnyConfig:
    """The config as config.json has it: that there is a pooler is known by its tensors alone."""
    pooler = any(rule.ours == ("pooler",) for rule in family.tensors)
    return replace(config, pooler=False) if pooler and isinstance(config, ModelConfig) else config


def family_of(config: AnyConfig) -> Family:
    """The family that can express `config`: its own, or another; a `UserError` when none can.

    A family can express what it reads back unchanged from what it has written.
    """
    own = FAMILIES.get(config.family)
    for family in (*([own] if own else []), *FAMILIES.values()):
        try:
            values = {"model_type": family.name, **config_fields(family, config)}
            back = read_config(values, "config.json")[1]
        except (UserError, AttributeError, TypeError):
            continue
        if under_name(back, config.family) == _unpooled(family, config):
            return family
    raise UserError(
        "No Hugging Face class can express this combination of norm, positions, heads and "
        "feed-forward; take one of the families that 'scratchlm models' lists without changing "
        "these."
    )
