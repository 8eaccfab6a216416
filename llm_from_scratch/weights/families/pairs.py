"""What config.json says of a model of two stacks, and the groups of fields that only these have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.config import EncoderDecoderConfig, ModelConfig
from llm_from_scratch.weights.config_json import ACTIVATIONS, Fields
from llm_from_scratch.weights.families.settings import Group
from llm_from_scratch.weights.families.table import Family


def read_pair(family: Family, fields: Fields) -> EncoderDecoderConfig:
    """Both stacks. A group without a part is read into each of them."""
    stack = {"family": family.name, **family.constants}
    known: dict[str, dict[str, Any]] = {
        "encoder": {**stack, "causal": False},
        "decoder": {**stack, "cross_attention": True},
        "pair": dict(family.pair),
    }
    for group in family.settings:
        for part in [group.part] if group.part else ["encoder", "decoder"]:
            known[part] |= group.read(fields, known[part])
    try:
        encoder, decoder = (ModelConfig(**known[part]) for part in ("encoder", "decoder"))
        return EncoderDecoderConfig(encoder, decoder, **known["pair"])
    except UserError as error:  # values that are sound alone, but not together
        raise UserError(f"{fields.where}: {error}") from error


def write_pair(family: Family, config: EncoderDecoderConfig) -> dict[str, Any]:
    """The inverse; what both stacks share is taken from the decoder."""
    parts: dict[str | None, Any] = {
        "encoder": config.encoder, "decoder": config.decoder, "pair": config, None: config.decoder,
    }  # fmt: skip
    values: dict[str, Any] = {}
    for group in family.settings:
        values |= group.write(parts[group.part])
    return values


def under_name(
    config: ModelConfig | EncoderDecoderConfig, family: str
) -> ModelConfig | EncoderDecoderConfig:
    """The same model as one of `family`."""
    if isinstance(config, ModelConfig):
        return replace(config, family=family)
    encoder, decoder = (replace(x, family=family) for x in (config.encoder, config.decoder))
    return replace(config, encoder=encoder, decoder=decoder)


@dataclass
class GatedActivation(Group):
    """T5's name of the feed-forward: "relu", or "gated-gelu", which means the approximate one."""

    default: str

    def __post_init__(self) -> None:
        self.fields = {"feed_forward_proj": self.default}
        self.old_names = ("dense_act_fn", "is_gated_act")  # what the class made of it

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        name = fields.values.get("feed_forward_proj")
        gate, _, last = name.rpartition("-") if isinstance(name, str) else ("?", "", "")
        if gate not in ("", "gated") or last not in ACTIVATIONS:
            known_names = ", ".join(ACTIVATIONS)
            raise fields.refuse("feed_forward_proj", f"one of {known_names}, or 'gated-' and one")
        if name == "gated-gelu":
            last = "gelu_new"
        for field, value in (("dense_act_fn", last), ("is_gated_act", gate == "gated")):
            if fields.values.get(field) is None:
                fields.values[field] = value
        return {
            "activation": fields.activation("dense_act_fn"),
            "gated": fields.flag("is_gated_act"),
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        names = {"gelu_tanh": "gelu_new", "gelu": "gelu_python"}
        name = names.get(config.activation, config.activation)
        short = "gelu" if name == "gelu_new" and config.gated else name
        return {
            "feed_forward_proj": f"gated-{short}" if config.gated else short,
            "dense_act_fn": name,
            "is_gated_act": config.gated,
        }


@dataclass
class T5Head(Group):
    """Whether logits are scaled: what older files said by the embeddings being tied.

    Versions from 5 on tie them unless the weights say otherwise, and have a field for the scale.
    """

    part: str | None = "decoder"

    def __post_init__(self) -> None:
        self.fields = {"tie_word_embeddings": True, "scale_decoder_outputs": None}

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        tied = fields.flag("tie_word_embeddings")
        given = fields.values.get("scale_decoder_outputs") is not None
        scale = fields.flag("scale_decoder_outputs") if given else tied
        return {"tie_embeddings": tied, "scale_logits": scale}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "tie_word_embeddings": config.tie_embeddings,
            "scale_decoder_outputs": config.scale_logits,
        }


@dataclass
class Sharing(Group):
    """Marian: whether one embedding matrix serves both stacks; then it is the head as well."""

    part: str | None = "pair"

    def __post_init__(self) -> None:
        self.fields = {"share_encoder_decoder_embeddings": True}

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        shared = fields.flag("share_encoder_decoder_embeddings")
        if shared and not fields.flag("tie_word_embeddings"):
            raise fields.refuse(
                "tie_word_embeddings", "true where 'share_encoder_decoder_embeddings' is true"
            )
        return {"share_embeddings": shared}

    def write(self, config: Any) -> dict[str, Any]:
        return {"share_encoder_decoder_embeddings": config.share_embeddings}
