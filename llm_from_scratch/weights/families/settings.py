"""The fields of config.json, alone and in groups, each read into our config and written back.

A group names the fields it takes (with the class's defaults), turns their checked values into
fields of `ModelConfig`, and does the reverse. What it reads it can write: `family_of` relies on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from llm_from_scratch.model.config import ExpertsConfig, ModelConfig
from llm_from_scratch.weights.config_json import MOST_EXPERTS, MOST_LAYERS, Fields

FULL, SLIDING = "full_attention", "sliding_attention"


class Group:
    """Some fields of config.json that belong together."""

    fields: dict[str, Any]
    old_names: tuple[str, ...] = ()  # what older files call the same
    # Of a model of two stacks: "encoder", "decoder", "pair" (what is of neither) or None, both.
    part: str | None = None

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        """Fields of our config; `known` are those that earlier groups have read."""
        raise NotImplementedError

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The inverse."""
        raise NotImplementedError


@dataclass
class Setting(Group):
    """One field that means one of ours; `kind` is the method of `Fields` that checks it.

    Where it decides about several of ours, `ours` names them all, with spaces between. Where it is
    null, the field `like` stands for it.
    """

    theirs: str
    ours: str
    default: Any
    kind: str = "integer"
    aliases: tuple[str, ...] = ()
    like: str = ""

    def __post_init__(self) -> None:
        self.fields = {self.theirs: self.default}
        self.old_names = self.aliases

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        for alias in self.aliases:
            if alias in fields.values:
                fields.values[self.theirs] = fields.values[alias]
        if self.like and fields.values.get(self.theirs) is None:
            fields.values[self.theirs] = fields.values[self.like]
        if self.ours == "d_ff" and fields.values.get(self.theirs) is None:
            return {"d_ff": 4 * known["d_model"]}
        if self.ours == "n_layers":
            return {self.ours: fields.integer(self.theirs, MOST_LAYERS)}
        return dict.fromkeys(self.ours.split(), getattr(fields, self.kind)(self.theirs))

    def write(self, config: ModelConfig) -> dict[str, Any]:
        value = getattr(config, self.ours.split()[0])
        if self.kind == "activation" and value == "gelu_tanh":
            value = "gelu_pytorch_tanh"
        return {self.theirs: value}


def size(theirs: str, ours: str, default: int | None, *aliases: str) -> Setting:
    """A whole number above 0."""
    return Setting(theirs, ours, default, "integer", aliases)


def number(theirs: str, ours: str, default: float | None) -> Setting:
    """A number that is not negative."""
    return Setting(theirs, ours, default, "number")


def maybe(theirs: str, ours: str, default: float | None) -> Setting:
    """A number above 0, or null."""
    return Setting(theirs, ours, default, "maybe_number")


def flag(theirs: str, ours: str, default: bool) -> Setting:
    """True or false."""
    return Setting(theirs, ours, default, "flag")


def dropout(theirs: str, default: float = 0.0) -> Setting:
    """The field whose value stands for all dropouts of the model."""
    return Setting(theirs, "dropout", default, "share_of_one")


def activation(theirs: str, default: str) -> Setting:
    """A name from `config_json.ACTIVATIONS`."""
    return Setting(theirs, "activation", default, "activation")


def of(part: str | None, *groups: Group) -> tuple[Group, ...]:
    """The groups as those of one part of an encoder-decoder."""
    for group in groups:
        group.part = part
    return groups


def with_defaults(groups: tuple[Group, ...], *others: Group, **values: Any) -> tuple[Group, ...]:
    """The same settings with some of the class's own defaults changed.

    `others` replace the group of their kind.
    """
    changed = []
    for group in groups:
        same = [other for other in others if type(other) is type(group)]
        group = same[0] if same else group
        if isinstance(group, Setting) and group.theirs in values:
            group = of(group.part, replace(group, default=values[group.theirs]))[0]
        changed.append(group)
    return tuple(changed)


@dataclass
class Choice(Group):
    """One field whose few values each mean one value of ours."""

    theirs: str
    ours: str
    default: Any
    meanings: dict[Any, Any]

    def __post_init__(self) -> None:
        self.fields = {self.theirs: self.default}

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        value = fields.values.get(self.theirs)
        if not isinstance(value, str | int | None) or value not in self.meanings:
            raise fields.refuse(self.theirs, "one of " + ", ".join(map(repr, self.meanings)))
        return {self.ours: self.meanings[value]}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        back = {ours: theirs for theirs, ours in self.meanings.items()}
        return {self.theirs: back.get(getattr(config, self.ours), self.default)}


@dataclass
class Other(Group):
    """Fields that are checked and written with a value of ours, but not kept apart.

    Every published model has its dropouts equal; one value of ours stands for all.
    """

    fields: dict[str, Any]
    ours: str = "dropout"
    kind: str = "share_of_one"

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        for name in self.fields:
            if fields.values.get(name) is not None:
                getattr(fields, self.kind)(name)
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return dict.fromkeys(self.fields, getattr(config, self.ours))


@dataclass
class Heads(Group):
    """Numbers of heads and their width. Without a field for it, the width is d_model / heads.

    `divides`: the class wants a d_model that the heads divide even where it is told their width.
    """

    width: str = "hidden_size"
    heads: str = "num_attention_heads"
    default: int = 32
    kv: str | None = "num_key_value_heads"
    kv_default: int | None = None
    dim: str | None = "head_dim"
    dim_default: int | None = None
    even: bool = True
    divides: bool = False
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.fields = {self.heads: self.default}
        self.old_names = self.aliases
        if self.kv is not None:
            self.fields[self.kv] = self.kv_default
        if self.dim is not None:
            self.fields[self.dim] = self.dim_default

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        for alias in self.aliases:
            if alias in fields.values:
                fields.values[self.heads] = fields.values[alias]
        heads = kv = fields.integer(self.heads)
        if self.kv is not None and fields.values.get(self.kv) is not None:
            kv = fields.integer(self.kv)
            fields.share(self.heads, self.kv)
        if self.dim is not None and fields.values.get(self.dim) is not None:
            dim = fields.integer(self.dim)
            if self.divides:
                fields.share(self.width, self.heads)
        else:
            dim = fields.share(self.width, self.heads)
        if self.even and dim % 2:
            must = "even, because rotary positions turn pairs of features"
            if self.dim is not None and fields.values.get(self.dim) is not None:
                raise fields.refuse(self.dim, must)
            raise fields.refuse(self.width, f"'{self.heads}' times an even number")
        return {"n_heads": heads, "n_kv_heads": kv, "head_dim": dim}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        values = {self.heads: config.n_heads}
        if self.kv is not None:
            values[self.kv] = config.n_kv_heads
        if self.dim is not None:
            values[self.dim] = config.head_dim
        return values


@dataclass
class PositionsBehindPadding(Group):
    """A table of learned positions of which those up to the padding's id are never used.

    RoBERTa gives padding the position that is its id and counts the text's from the next one on.
    With `pad` that id is the class's own and no field.
    """

    pad: int | None = None

    def __post_init__(self) -> None:
        self.fields = {"max_position_embeddings": 512}
        if self.pad is None:
            self.fields["pad_token_id"] = 1

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        offset = (fields.token_id("pad_token_id") if self.pad is None else self.pad) + 1
        rows = fields.integer("max_position_embeddings")
        if rows <= offset:
            must = f"above {offset}, where the positions of the text begin"
            raise fields.refuse("max_position_embeddings", must)
        return {"max_seq_len": rows - offset, "position_offset": offset}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        values = {"max_position_embeddings": config.max_seq_len + config.position_offset}
        if self.pad is None:
            values["pad_token_id"] = config.position_offset - 1
        return values


@dataclass
class Windows(Group):
    """Which layers see a window only, and how wide it is.

    `every` n: all but each n-th layer slide where the file does not list them (the last of each n
    is full, or with `first_full` the first). `half`: the field counts both sides. `switch` is the
    flag without which no window is in use; `first` names the field that says from which layer on
    windows begin.
    """

    window: str = "sliding_window"
    default: int | None = None
    types: bool = True  # whether the class lists the layers' kinds
    every: int | None = None
    first_full: bool = False
    half: bool = False
    switch: str | None = None
    first: str | None = None
    old_every: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.fields = {self.window: self.default}
        self.old_names = self.old_every
        if self.types:
            self.fields["layer_types"] = None
        if self.switch is not None:
            self.fields[self.switch] = False
        if self.first is not None:
            self.fields[self.first] = 28

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        n = known["n_layers"]
        kinds = fields.values.get("layer_types") if self.types else None
        on = fields.values.get(self.window) is not None
        switched = self.switch is None or fields.flag(self.switch)
        on = on and switched
        if kinds is not None:
            known_kinds = isinstance(kinds, list) and all(k in (FULL, SLIDING) for k in kinds)
            if not known_kinds or len(kinds) != n:
                raise fields.refuse(
                    "layer_types", f"'{FULL}' or '{SLIDING}' for each of {n} layers"
                )
            layers = tuple(i for i, kind in enumerate(kinds) if kind == SLIDING)
            if layers and self.switch is not None and not switched:
                raise fields.refuse(self.switch, "true, because 'layer_types' has windows")
            if layers and not on:
                raise fields.refuse(self.window, "a number, because 'layer_types' has windows")
        elif on:
            layers = self._layers(fields, n)
        else:
            layers = ()
        window = fields.integer(self.window) if layers else None
        if window is not None and self.half:
            if window < 2:
                raise fields.refuse(self.window, "at least 2, because it counts both sides")
            window //= 2
        return {"window": window, "window_layers": layers}

    def _layers(self, fields: Fields, n: int) -> tuple[int, ...]:
        if self.first is not None:
            first = fields.values.get(self.first)
            if isinstance(first, bool) or not isinstance(first, int) or first < 0:
                raise fields.refuse(self.first, "a whole number that is not negative")
            return tuple(range(min(first, n), n))
        every = self.every
        for name in self.old_every:
            if fields.values.get(name) is not None:
                every = fields.integer(name)
        if every is None:
            return tuple(range(n))
        full = 0 if self.first_full else every - 1
        return tuple(i for i in range(n) if i % every != full)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        width = config.window
        values: dict[str, Any] = {self.window: 2 * width if width and self.half else width}
        if width is None and self.every is not None:
            values[self.window] = self.default  # such a class computes with it whatever its layers
        if self.types:
            slide = set(config.window_layers)
            values["layer_types"] = [
                SLIDING if layer in slide else FULL for layer in range(config.n_layers)
            ]
        if self.switch is not None:
            values[self.switch] = config.window is not None
        if self.first is not None:
            values[self.first] = min(config.window_layers, default=config.n_layers)
        return values


@dataclass
class Mixture(Group):
    """The experts of Qwen3's larger models."""

    def __post_init__(self) -> None:
        self.fields = {
            "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
            "norm_topk_prob": False, "router_aux_loss_coef": 0.001, "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }  # fmt: skip
        self.old_names = ("num_local_experts",)

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        if "num_local_experts" in fields.values:
            fields.values["num_experts"] = fields.values["num_local_experts"]
        dense = fields.values.get("mlp_only_layers") or []
        if not isinstance(dense, list) or any(not isinstance(i, int) for i in dense):
            raise fields.refuse("mlp_only_layers", "a list of layer numbers")
        skipped, step = set(dense), fields.integer("decoder_sparse_step")
        if fields.integer("num_experts", MOST_EXPERTS) < fields.integer("num_experts_per_tok"):
            raise fields.refuse("num_experts_per_tok", "at most 'num_experts'")
        layers = [i for i in range(known["n_layers"]) if (i + 1) % step == 0 and i not in skipped]
        return {
            "experts": ExpertsConfig(
                n_experts=fields.integer("num_experts"),
                n_active=fields.integer("num_experts_per_tok"),
                d_ff=fields.integer("moe_intermediate_size"),
                normalise=fields.flag("norm_topk_prob"),
                balance=fields.number("router_aux_loss_coef"),
                layers=tuple(layers),
            )
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        experts = config.experts
        if experts is None:
            return {}  # which reads back as another model: the class cannot express it
        return {
            "num_experts": experts.n_experts,
            "num_local_experts": experts.n_experts,
            "num_experts_per_tok": experts.n_active,
            "moe_intermediate_size": experts.d_ff,
            "norm_topk_prob": experts.normalise,
            "router_aux_loss_coef": experts.balance,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i in range(config.n_layers) if i not in experts.layers],
        }
