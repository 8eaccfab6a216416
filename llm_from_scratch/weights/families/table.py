"""What a family's table consists of: fields of config.json, names of tensors, styles of heads.

A family is a group of model classes of the `transformers` library. Its table holds two
translations, each usable in both directions: `config.json` <-> our config, and the names of the
stored tensors <-> the names of our parameters. Every field of the class's config is translated
(`settings`), held to the one value that we can express (`required`), or listed in `unused` with the
reason; a field in none of these is refused by its name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llm_from_scratch.model.heads import HeadStyle
from llm_from_scratch.weights.families.settings import Group, dropout

# Fields of every config class that do not change what a model computes.
UNUSED_EVERYWHERE = {
    "_attn_implementation": "which kernel computes attention, not what it computes",
    "_name_or_path": "where the folder came from",
    "_num_labels": "belongs to classification heads, which read it themselves",
    "architectures": "chooses the head",
    "attn_implementation": "which kernel computes attention, not what it computes",
    "bos_token_id": "belongs to the tokenizer",
    "cls_token_id": "belongs to the tokenizer",
    "chunk_size_feed_forward": "trades memory for time, not values",
    "classif_dropout": "acts in the training of classification heads only",
    "classifier_dropout": "acts in the training of classification heads only",
    "dtype": "the tensors say their type themselves",
    "eos_token_id": "belongs to the tokenizer and generation_config.json",
    "finetuning_task": "what the head was trained on",
    "gradient_checkpointing": "trades time for memory, not values",
    "id2label": "belongs to classification heads, which read it themselves",
    "is_llama_config": "a mark that some published folders carry",
    "label2id": "belongs to classification heads, which read it themselves",
    "language": "a mark that some published folders carry",
    "model_type": "chooses the table",
    "name": "a mark that some published folders carry",
    "num_labels": "belongs to classification heads, which read it themselves",
    "output_attentions": "changes what is returned, not what is computed",
    "output_hidden_states": "changes what is returned, not what is computed",
    "output_past": "changes what is returned, not what is computed",
    "pad_token_id": "belongs to the tokenizer",
    "prefix": "belongs to the tokenizer",
    "problem_type": "belongs to classification heads, which read it themselves",
    "return_dict": "changes what is returned, not what is computed",
    "sep_token_id": "belongs to the tokenizer",
    "task_specific_params": "settings of generation that nobody applies by themselves",
    "tokenizer_class": "belongs to the tokenizer",
    "torch_dtype": "the tensors say their type themselves",
    "torchscript": "another way of running the same values",
    "transformers.js_config": "settings of another library",
    "transformers_version": "who wrote the file",
    "use_cache": "caching is the caller's decision",
}  # fmt: skip
# Settings of generation, which older folders keep in config.json.
GENERATION = (
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens", "cache_implementation", "guidance_scale",
    "max_new_tokens", "min_new_tokens", "max_time", "penalty_alpha", "epsilon_cutoff",
    "eta_cutoff", "min_p", "renormalize_logits", "constraints", "force_words_ids",
    "sequence_bias", "force_bos_token_to_be_generated", "low_memory", "output_logits",
)  # fmt: skip
# Fields with one value that we can express; any other would change what the model computes.
REQUIRED_EVERYWHERE: dict[str, Any] = {
    "quantization_config": None,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "tf_legacy_loss": False,
    "use_bfloat16": False,
}


@dataclass(frozen=True)
class Entry:
    """One stored tensor and the parameters of ours that it holds.

    `layout` is "plain" (ours stacked along their outputs), "transposed" (the same, stored as
    (inputs, outputs)), "by_head" (query, key and value of one head after the other's) or "row" (a
    vector, stored as a matrix of one row). With an `index` it is that slice of our tensor. What is
    `optional` is zero where it is not stored.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: str = "plain"
    index: int | None = None
    optional: bool = False


@dataclass(frozen=True)
class Rule:
    """Where one of our modules is stored; `{}` is a block's number, `{e}` an expert's.

    A module's weight and bias follow it as `.weight` and `.bias`. With `exact`, both names are of a
    tensor and complete. The rule holds only in models that also have the module `beside`.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: str = "plain"
    exact: bool = False
    beside: str = ""
    optional: bool = False

    def entries(self, parameters: Collection[str], layers: int, experts: int) -> Iterator[Entry]:
        """The stored tensors of this rule, for those parameters of ours that exist."""
        for layer in range(layers) if "{}" in self.ours[0] else (0,):
            ours = tuple(name.replace("{}", str(layer)) for name in self.ours)
            theirs = self.theirs.replace("{}", str(layer))
            beside = self.beside.replace("{}", str(layer))
            if beside and f"{beside}.weight" not in parameters:
                continue
            if "{e}" in theirs:
                if ours[0] in parameters:
                    for e in range(experts):
                        yield Entry(theirs.replace("{e}", str(e)), ours, self.layout, e)
            elif self.exact:
                if ours[0] in parameters:
                    yield Entry(theirs, ours, self.layout, optional=self.optional)
            else:
                for kind in ("weight", "bias"):
                    mine = tuple(f"{name}.{kind}" for name in ours)
                    if mine[0] in parameters:
                        plain = kind == "bias" and self.layout == "transposed"
                        layout = "plain" if plain else self.layout
                        yield Entry(f"{theirs}.{kind}", mine, layout)


def rules(
    theirs: str,
    ours: str,
    modules: dict[str, str],
    layout: str = "plain",
    exact: bool = False,
    beside: str = "",
) -> tuple[Rule, ...]:
    """A rule per module, their name -> ours, behind a prefix each.

    A stored tensor that holds several of our parameters names them with spaces between.
    """
    beside = beside and ours + beside
    return tuple(
        Rule(theirs + name, tuple(ours + part for part in parts.split()), layout, exact, beside)
        for name, parts in modules.items()
    )


@dataclass(frozen=True)
class HeadTable:
    """One kind of head in a family's own style: its parts, and where their tensors are stored.

    `settings` are the fields of config.json that change the style. `prefix` is what the names of
    the backbone's tensors begin with under this head and under no other.
    """

    style: HeadStyle
    tensors: tuple[Rule, ...]
    settings: tuple[Group, ...] = ()
    copies: dict[str, str] = field(default_factory=dict)  # stored again: their name -> original's
    prefix: str = ""

    @property
    def defaults(self) -> dict[str, Any]:
        """The class's own values for the fields that a config.json leaves out."""
        return {name: value for group in self.settings for name, value in group.fields.items()}


# One matrix, on the last token or on each; and as the classes of older decoders call it.
DECODER_HEADS = {
    "classification": HeadTable(
        HeadStyle(pooling="last", bias=False, dropout=0.0), rules("", "", {"score": "out"})
    ),
    "token_classification": HeadTable(HeadStyle(dropout=0.1), rules("", "", {"score": "out"})),
}
OLDER_HEADS = {
    **DECODER_HEADS,
    "token_classification": HeadTable(
        HeadStyle(), rules("", "", {"classifier": "out"}), (dropout("classifier_dropout", 0.1),)
    ),
}


def pair_heads(prefix: str = "") -> dict[str, HeadTable]:
    """The heads of encoder-decoders: on the decoder's last state, on each of the encoder's."""
    inner = rules("classification_head.", "", {"dense": "dense", "out_proj": "out"})
    style = HeadStyle(pooling="last", dense=True, activation="tanh", dropout_first=True)
    kinds = {
        "classification": (style, inner),
        "token_classification": (HeadStyle(), rules("", "", {"classifier": "out"})),
    }
    settings = (dropout("classifier_dropout"),)
    return {kind: HeadTable(*what, settings, prefix=prefix) for kind, what in kinds.items()}


# How classes are called that have a head of this kind, behind the family's name.
SUFFIXES = {
    "lm": "ForCausalLM",
    "base": "Model",
    "classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "multiple_choice": "ForMultipleChoice",
    "masked_lm": "ForMaskedLM",
}
DECODER = ("lm", "base", "classification", "token_classification")
PAIR = ("base", "classification", "token_classification")
ENCODER = ("base", "classification", "token_classification", "multiple_choice", "masked_lm")


def named(family: str, *kinds: str, **others: str) -> dict[str, str]:
    """The classes of a family by the kind of their head; `others` do not follow the custom."""
    return {**{kind: family + SUFFIXES[kind] for kind in kinds}, **others}


@dataclass(frozen=True)
class Family:
    """What one family of model classes calls things.

    `constants` are the fields of `ModelConfig` that all its models share, `pair` those of
    `EncoderDecoderConfig`. `classes` maps the kind of a head ("lm" is the plain decoder, "base" the
    model without any) to the class that has it. Where several of the `tensors`' rules hold for a
    parameter, the first counts.
    """

    name: str  # model_type
    title: str
    kind: str  # decoder, encoder, encoder-decoder
    prefix: str  # of the base model's tensors, where a head stands on top of it
    classes: dict[str, str]
    settings: tuple[Group, ...]
    tensors: tuple[Rule, ...]
    constants: dict[str, Any] = field(default_factory=dict)
    pair: dict[str, Any] = field(default_factory=dict)
    required: dict[str, Any] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)  # stored again: their name -> original's
    surplus: tuple[str, ...] = ()  # endings of stored tensors that are not weights
    tied_as_stored: bool = False  # whether the weights and not config.json say if the head is tied
    heads: dict[str, HeadTable] = field(default_factory=lambda: DECODER_HEADS)  # by their kind
    other_heads: tuple[str, ...] = ()  # beginnings of the tensors of heads that we do not have

    @property
    def defaults(self) -> dict[str, Any]:
        """The class's own values for the fields that a config.json leaves out."""
        return {name: value for group in self.settings for name, value in group.fields.items()}

    def must(self, architectures: Any = None) -> dict[str, Any]:
        """Field -> the one value of it that we can express."""
        encoder_decoder = {"is_encoder_decoder": self.kind == "encoder-decoder"}
        # Classes that have no more than the encoder of such a model say that it is none.
        halves = [[self.classes.get(kind)] for kind in ("encoder", "token_classification")]
        if self.kind == "encoder-decoder" and architectures in halves:
            encoder_decoder = {}
        decoder = {"is_decoder": False} if self.kind != "decoder" else {}
        return {**REQUIRED_EVERYWHERE, **encoder_decoder, **decoder, **self.required}

    def known(self) -> set[str]:
        """Every field of config.json that this table says something about."""
        listed = (*UNUSED_EVERYWHERE, *GENERATION, *self.must(), *self.unused, *self.defaults)
        heads = [group for head in self.heads.values() for group in head.settings]
        return {
            "is_decoder",
            *listed,
            *(name for group in heads for name in group.fields),
            *(name for group in (*self.settings, *heads) for name in group.old_names),
        }

    def head_names(self) -> tuple[str, ...]:
        """What the names of the tensors of any head begin with; a model may do without them."""
        ours = ("head", "decoder.head", "logits_bias", "pooler")
        own = [rule for rule in self.tensors if rule.ours[0] in ours]
        heads = [rule for head in self.heads.values() for rule in head.tensors]
        modules = (rule.theirs + ("" if rule.exact else ".") for rule in (*own, *heads))
        copies = (name for head in self.heads.values() for name in head.copies)
        return (*modules, *copies, *self.other_heads)

    def entries(self, config: Any, parameters: Mapping[str, Any]) -> Iterator[Entry]:
        """Every stored tensor of a model with these parameters."""
        stacks = [config] if not hasattr(config, "encoder") else [config.encoder, config.decoder]
        layers = max(stack.n_layers for stack in stacks)
        experts = max(stack.experts.n_experts if stack.experts else 0 for stack in stacks)
        taken: set[str] = set()
        for rule in self.tensors:
            entries = list(rule.entries(parameters, layers, experts))
            yield from (entry for entry in entries if entry.ours[0] not in taken)
            taken.update(entry.ours[0] for entry in entries)
