"""Adapters as the PEFT library stores them: `adapter_config.json` and `adapter_model.safetensors`.

Their names are those of the `transformers` classes; the families' tables translate them. Where a
class keeps several of our matrices in one (GPT-2's c_attn), an adapter of it becomes one for each
part, with the same A; written, the parts become one again, exactly: with A once where all are
equal, else side by side in a detour of the ranks' sum.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llm_from_scratch.core.errors import UserError, nearest, shown
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.heads import Head
from llm_from_scratch.model.lora import freeze_backbones, layers_of, put_adapter, switch_of, wrap
from llm_from_scratch.model.low_rank import DEFAULT, Adapted
from llm_from_scratch.weights.adapter_config import (
    CONFIG,
    TENSORS,
    AdapterConfig,
    is_adapter_folder,
    read_adapter_config,
)
from llm_from_scratch.weights.assemble import Model, empty_model
from llm_from_scratch.weights.families import Entry, family_of
from llm_from_scratch.weights.folder_checks import heads_of
from llm_from_scratch.weights.heads import name_in_class, stored_entries
from llm_from_scratch.weights.layouts import stored_shape, take_apart

__all__ = ["Layout", "attach", "is_adapter_folder", "layout_of", "parameter_of", "shape_of"]

ROOT = "base_model.model."  # what PEFT puts in front of every name
PARTS = {
    "lora_A.weight": "a", "lora_B.weight": "b", "lora_embedding_A": "a", "lora_embedding_B": "b",
    "lora_magnitude_vector": "lengths", "lora_magnitude_vector.weight": "lengths",
}  # fmt: skip
PART = re.compile("(.+)\\.(" + "|".join(map(re.escape, PARTS)) + ")")
LARGEST_RANK = 1 << 16


@dataclass(frozen=True)
class Layout:
    """How a class of `transformers` stores a model: the module's full name there -> its weight's
    entry, and all entries."""

    modules: dict[str, Entry]
    entries: dict[str, Entry]
    prefix: str
    transposed: bool


def layout_of(model: Model) -> Layout:
    """The names that the model's class has for its matrices."""
    family = family_of(model.config)
    plain = empty_model(model.config, model.head_config if isinstance(model, Head) else None)
    entries = stored_entries(family, plain)
    known = {name for entry in entries for name in entry.ours}
    for rule in family.tensors:  # an output that is the embedding is stored there alone
        if rule.ours == ("head",) and isinstance(model, Decoder) and "head.weight" not in known:
            entries.append(Entry(f"{rule.theirs}.weight", ("head.weight",)))
    named = {name_in_class(family, plain, entry.theirs): entry for entry in entries}
    modules = {
        name.removesuffix(".weight"): entry for name, entry in named.items()
        if name.endswith(".weight")
    }  # fmt: skip
    turned = any(entry.layout == "transposed" for entry in modules.values())
    return Layout(modules, named, family.prefix, turned)


# --- reading -------------------------------------------------------------------------------------


def attach(
    model: Model, folder: Path | str, name: str = DEFAULT, *, alone: bool = True
) -> list[str]:
    """Put the adapter of a PEFT folder around a model's layers, under a name; it acts from then on.

    With `alone` it may also bring layers that were trained whole, such as a classifier; where a
    base is shared by several adapters it may not. Gives back the names of these tensors. Raises
    `UserError`, naming file and field, for whatever does not fit the model.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    layout = layout_of(model)
    tensors = read_tensors(folder)
    parts, whole = sort_tensors(tensors, layout, folder)
    if not parts:
        raise UserError(f"{folder / TENSORS} holds no adapter of any layer.")
    layers = layers_of(model, heads=True)
    planned = [
        piece for module, found in parts.items()
        for piece in plan(module, found, layout, config, layers, heads_of(model.config), folder)
    ]  # fmt: skip
    fitting = fit_whole(model, whole, layout, folder, alone)
    freeze_backbones(model)  # from here on nothing is refused
    put_whole(fitting)
    device = next(model.parameters()).device
    for place, tensors_of, scale in planned:
        layer = wrap(model, place)
        made = put_adapter(
            layer,
            name,
            len(tensors_of["a"]),
            scale,
            config.dropout,
            "lengths" in tensors_of,
            config.rooted,
        )
        with torch.no_grad():
            for key, value in tensors_of.items():
                made.get_parameter(key).copy_(value)
        made.to(device)
    switch = switch_of(model)
    assert switch is not None
    switch.active = name
    return [*whole]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the folder's one file, fp32."""
    path = folder / TENSORS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise UserError(
            f"{folder} has no {TENSORS}"
            + (
                ", only a pickle, which can run any program when it is opened; save the adapter "
                "anew with PEFT."
                if pickled
                else "; the folder is incomplete, copy it anew."
            )
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            found = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is truncated or not a safetensors file ({error}); copy it anew."
        ) from error
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            raise UserError(f"{path}: '{name}' holds {tensor.dtype} numbers; copy it anew.")
    return {name: tensor.float() for name, tensor in found.items()}


def sort_tensors(
    tensors: Mapping[str, Tensor], layout: Layout, folder: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(module -> its a, b and lengths, name -> tensor of a layer that was trained whole)."""
    parts: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}

    def full(name: str, known: Mapping[str, Entry]) -> str | None:
        # An adapter of the bare base model leaves the class's prefix out, or has it in addition.
        for one in (name, layout.prefix + name, name.removeprefix(layout.prefix)):
            if one in known:
                return one
        return None

    for stored, tensor in tensors.items():
        name = stored.removeprefix(ROOT)
        match = PART.fullmatch(name)
        if match is not None:
            module = full(match[1], layout.modules)
            if module is not None:
                parts.setdefault(module, {})[PARTS[match[2]]] = tensor
                continue
        else:
            entry = full(name.replace(".base_layer.", "."), layout.entries)
            if entry is not None:
                whole[entry] = tensor
                continue
        near = nearest(match[1] if match else name, layout.modules)
        raise UserError(
            f"{folder / TENSORS}: the tensor {shown(stored)} belongs to no layer of this model; "
            f"the adapter was made for another one.{near}"
        )
    return parts, whole


def plan(
    module: str, found: Mapping[str, Tensor], layout: Layout, config: AdapterConfig,
    layers: Mapping[str, nn.Module], heads: int, folder: Path,
) -> list[tuple[str, dict[str, Tensor], float]]:  # fmt: skip
    """What becomes of one stored adapter: our layers' names, their tensors, and the scale."""
    entry, path = layout.modules[module], folder / TENSORS
    wanted = {"a", "b", "lengths"} if config.stretched else {"a", "b"}
    if found.keys() != wanted:
        odd = sorted(found.keys() ^ wanted)[0]
        raise UserError(
            f"{path}: the adapter of '{module}' has {'no' if odd in wanted else 'a'} tensor "
            f"'{odd}', other than {CONFIG} says; copy it anew."
        )
    places = [name.removesuffix(".weight") for name in entry.ours]
    if any(place not in layers for place in places) or entry.index is not None:
        raise UserError(f"{path}: '{module}' is no layer around which an adapter can be led.")
    shapes = [shape_of(layers[place]) for place in places]
    rank = found["a"].shape[0] if found["a"].dim() == 2 else 0
    table = len(places) == 1 and hasattr(layers[places[0]], "num_embeddings")
    outputs = shapes[0][1] if table else sum(shape[0] for shape in shapes)
    must: dict[str, tuple[int, ...]] = {
        "a": (rank, shapes[0][0] if table else shapes[0][1]),
        "b": (outputs, rank),
    }
    must["lengths"] = (outputs,)
    for key, tensor in found.items():
        if tuple(tensor.shape) != must[key] or not 0 < rank <= LARGEST_RANK:
            raise UserError(
                f"{path}: the adapter of '{module}' has a tensor '{key}' of the shape "
                f"{tuple(tensor.shape)}, which does not fit the layer; the adapter was made for "
                "another model."
            )
    scale = config.scale(module, rank)
    if table and config.stretched:
        raise UserError(
            f"{path}: the adapter of '{module}' is a DoRA of an embedding, which is not supported; "
            "train it as LoRA, or merge it with PEFT (merge_and_unload) and load the result."
        )
    if table:
        return [(places[0], dict(found), scale)]
    rows = replace(entry, layout="by_head" if entry.layout == "by_head" else "plain")
    b_parts = take_apart(found["b"], rows, [torch.Size((s[0], rank)) for s in shapes], heads)
    made = [
        (place, {"a": found["a"], "b": b}, scale) for place, b in zip(places, b_parts, strict=True)
    ]
    if "lengths" in found:
        sizes = [torch.Size((shape[0],)) for shape in shapes]
        for piece, part in zip(made, take_apart(found["lengths"], rows, sizes, heads), strict=True):
            piece[1]["lengths"] = part
    return made


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a layer, or (entries, features) of a table."""
    any_layer: Any = layer
    if hasattr(layer, "in_features"):
        return any_layer.out_features, any_layer.in_features
    return any_layer.num_embeddings, any_layer.embedding_dim


def fit_whole(
    model: Model, whole: Mapping[str, Tensor], layout: Layout, folder: Path, alone: bool
) -> list[tuple[nn.Parameter, Tensor]]:
    """The parameters of layers that were trained as they are, each with its values; without those
    of layers that are the same in the base."""
    found: list[tuple[nn.Parameter, Tensor]] = []
    for name, tensor in whole.items():
        entry, path = layout.entries[name], folder / TENSORS
        owners = [parameter_of(model, one) for one in entry.ours]
        if any(owner is None for owner in owners):
            raise UserError(
                f"{path}: '{name}' is a layer that was trained whole, but the base keeps it in few "
                "bits; load the base with a dtype."
            )
        parameters = [owner for owner in owners if owner is not None]
        shapes = [parameter.shape for parameter in parameters]
        if tuple(tensor.shape) != stored_shape(entry, shapes):
            raise UserError(
                f"{path}: the tensor '{name}' has the shape {tuple(tensor.shape)}, but the model's "
                f"has {stored_shape(entry, shapes)}; the adapter was made for another model, or "
                "for another number of labels or tokens."
            )
        values = list(take_apart(tensor, entry, shapes, heads_of(model.config)))
        pairs = list(zip(parameters, values, strict=True))
        if all(torch.equal(p, v.to(p)) for p, v in pairs):
            continue
        if not alone:
            raise UserError(
                f"{folder} brings the layer '{name}' as a whole, which would change the base for "
                "all adapters; load it alone, or merge it into a model of its own."
            )
        found += pairs
    return found


@torch.no_grad()
def put_whole(fitting: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Take these values over; what they change goes on being trained."""
    for parameter, values in fitting:
        parameter.copy_(values)
        parameter.requires_grad_(True)


def parameter_of(model: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter of that name, looked for inside of wrappers; None where it is packed."""
    place, _, last = name.rpartition(".")
    owner: Any = model.get_submodule(place)
    found = getattr(owner.base if isinstance(owner, Adapted) else owner, last, None)
    return found if isinstance(found, nn.Parameter) else None
