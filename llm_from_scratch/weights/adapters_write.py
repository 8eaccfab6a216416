"""Adapters written as folders of the PEFT library; see `adapters.py`, which reads them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import folder_aside
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.model.heads import Head
from llm_from_scratch.model.lora import layers_of, switch_of
from llm_from_scratch.model.low_rank import Adapted, AdaptedEmbedding, LowRank
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.adapter_config import (
    CONFIG,
    HEAD,
    KINDS,
    TASKS,
    TENSORS,
    TOKENIZER,
    AdapterConfig,
    adapter_config_json,
)
from llm_from_scratch.weights.adapters import ROOT, Layout, layout_of, parameter_of, shape_of
from llm_from_scratch.weights.assemble import Model
from llm_from_scratch.weights.families import Entry
from llm_from_scratch.weights.folder_checks import heads_of
from llm_from_scratch.weights.generation_config import generation_config_json
from llm_from_scratch.weights.layouts import put_together


def save_adapter(
    model: Model, folder: Path | str, base: str | None = None, name: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:  # fmt: skip
    """Write an adapter, and whatever was trained beside it, as a folder that PEFT loads.

    `base` is where the base model is: a folder, or a name that the reader knows. `name` None is
    the adapter that acts. The `tokenizer` with its chat template comes to lie beside it: whoever
    loads the adapter speaks to it as it was spoken to in training. An earlier adapter in the folder
    is replaced; nothing else is.
    """
    folder = Path(folder)
    switch = switch_of(model)
    name = switch.active if switch is not None and name is None else name
    parts = {
        place: adapter for place, layer in layers_of(model, heads=True).items()
        if isinstance(layer, Adapted) and (adapter := layer.named(name)) is not None
    }  # fmt: skip
    if not parts:
        raise UserError(f"The model has no adapter{f' {name!r}' if name else ''} to save.")
    known = (CONFIG, TENSORS, HEAD, "README.md", "ner.safetensors", *TOKENIZER)
    entries = folder.iterdir() if folder.is_dir() else ()
    foreign = [one.name for one in entries if not any(one.match(name) for name in known)]
    if foreign:
        raise UserError(
            f"{folder} holds '{foreign[0]}', which is no part of an adapter; choose an empty or "
            "new folder."
        )
    layout, tensors = layout_of(model), dict[str, Tensor]()
    ranks: dict[str, int] = {}
    for module, entry in layout.modules.items():
        places = [one.removesuffix(".weight") for one in entry.ours]
        if any(place in parts for place in places):
            written = combined(model, entry, [parts.get(place) for place in places], places)
            ranks[module] = len(written["a"])
            table = isinstance(model.get_submodule(places[0]), AdaptedEmbedding)
            keys = ("lora_embedding_A", "lora_embedding_B", "")
            keys = keys if table else ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
            for key, part in zip(keys, ("a", "b", "lengths"), strict=True):
                if part in written:
                    tensors[f"{ROOT}{module}.{key}"] = written[part]
    whole = trained_whole(model, layout)
    tensors |= {ROOT + one: tensor for one, tensor in whole.items()}
    described = describe(model, parts, ranks, [*whole], layout, base)
    with folder_aside(folder) as aside:
        (aside / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        if isinstance(model, Head):
            (aside / HEAD).write_text(json.dumps(head_json(model), indent=2, ensure_ascii=False))
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, aside / TENSORS)
        if tokenizer is not None:
            tokenizer.save(aside)
            if isinstance(model, Decoder | EncoderDecoder):
                ends = generation_config_json(model.config, tokenizer)
                (aside / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")


def combined(
    model: Model, entry: Entry, adapters: Sequence[LowRank | None], places: Sequence[str]
) -> dict[str, Tensor]:
    """The adapters of the matrices that a class keeps in one, as one: a, b and lengths."""
    there = [adapter for adapter in adapters if adapter is not None]
    first = there[0]
    if len(adapters) == 1:
        found = {"a": first.a.detach(), "b": first.b.detach()}
        return found if first.lengths is None else {**found, "lengths": first.lengths.detach()}
    same = all(torch.equal(one.a, first.a) for one in there)
    total = first.rank if same else sum(one.rank for one in there)
    b_parts, lengths, start = [], [], 0
    for place, adapter in zip(places, adapters, strict=True):
        layer = model.get_submodule(place)
        rows = shape_of(layer)[0]
        b = torch.zeros(rows, total)
        if adapter is not None:
            b[:, start : start + adapter.rank] = adapter.b.detach().cpu()
            start += 0 if same else adapter.rank
        b_parts.append(b)
        if first.lengths is not None:
            lengths.append(_lengths(layer, adapter))
    rows_of = replace(entry, layout="by_head" if entry.layout == "by_head" else "plain")
    heads = heads_of(model.config)
    a = first.a.detach() if same else torch.cat([one.a.detach() for one in there])
    found = {"a": a, "b": put_together(rows_of, b_parts, heads)}
    return {**found, "lengths": put_together(rows_of, lengths, heads)} if lengths else found


def _lengths(layer: nn.Module, adapter: LowRank | None) -> Tensor:
    """DoRA's lengths; of a part without an adapter those that change nothing."""
    if adapter is not None and adapter.lengths is not None:
        return adapter.lengths.detach().cpu()
    any_layer: Any = layer
    packed = getattr(any_layer, "dequantize", None)
    weight: Tensor = packed() if packed is not None else any_layer.weight
    return weight.detach().float().norm(dim=1).cpu()


def trained_whole(model: Model, layout: Layout) -> dict[str, Tensor]:
    """What is no adapter and is trained: the class's name -> its tensor."""
    found = {}
    for name, entry in layout.entries.items():
        owners = [parameter_of(model, one) for one in entry.ours]
        if all(owner is not None and owner.requires_grad for owner in owners):
            values = [owner.detach() for owner in owners if owner is not None]
            found[name] = put_together(entry, values, heads_of(model.config)).clone()
    return found


def describe(
    model: Model, parts: Mapping[str, LowRank], ranks: Mapping[str, int], whole: list[str],
    layout: Layout, base: str | None,
) -> dict[str, Any]:  # fmt: skip
    """adapter_config.json: one rank and alpha for most layers, and patterns for the others."""
    first = next(iter(parts.values()))
    rank = max({*ranks.values()}, key=[*ranks.values()].count)
    scales = {
        module: next(
            parts[place].scale for name in layout.modules[module].ours
            if (place := name.removesuffix(".weight")) in parts
        ) for module in ranks
    }  # fmt: skip

    def alpha_of(module: str) -> float:
        return scales[module] * (math.sqrt(ranks[module]) if first.rooted else ranks[module])

    alpha = alpha_of(next(module for module, r in ranks.items() if r == rank))
    alphas = {
        re.escape(module): own
        for module in ranks
        if abs((own := alpha_of(module)) - alpha) > 1e-6 * alpha
    }
    config = AdapterConfig(
        base=base,
        rank=rank,
        alpha=round(alpha, 9),
        kind=KINDS[first.rooted, first.lengths is not None],
        dropout=first.dropout,
        alphas=alphas,
        task=task_of(model),
    )
    owners = sorted({owner_of(name) for name in whole})
    others = {re.escape(module): r for module, r in ranks.items() if r != rank}
    return adapter_config_json(
        config, short_names([*ranks], layout), short_names(owners, layout), others,
        layout.transposed,
    )  # fmt: skip


def task_of(model: Model) -> str | None:
    """PEFT's word for what the model is for."""
    if isinstance(model, Head):
        return TASKS.get(model.head_config.kind)
    if isinstance(model, EncoderDecoder):
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if isinstance(model, Decoder) else "FEATURE_EXTRACTION"


def owner_of(name: str) -> str:
    """The module that PEFT is told to keep whole for the sake of this tensor.

    PEFT always keeps what is called classifier or score; a part of it must not be named besides.
    """
    pieces = name.split(".")[:-1]
    for word in ("classifier", "score"):
        if word in pieces:
            return ".".join(pieces[: pieces.index(word) + 1])
    return ".".join(pieces)


def short_names(modules: Sequence[str], layout: Layout) -> list[str]:
    """The shortest ends of these modules' names that no other module's name has.

    PEFT compares what is kept whole without regard to the dots.
    """
    everything = {name.rpartition(".")[0] for name in layout.entries}
    others = [
        name for name in everything if not f"{name}.".startswith(tuple(f"{m}." for m in modules))
    ]
    found: set[str] = set()
    for module in modules:
        pieces = module.split(".")
        ends = (".".join(pieces[start:]) for start in range(len(pieces) - 1, -1, -1))
        clear = (end for end in ends if not any(name.endswith(end) for name in others))
        found.add(next(clear, module))
    return sorted(found)


def head_json(head: Head) -> dict[str, Any]:
    """What PEFT does not store of a head: its kind and what its outputs mean."""
    about = head.head_config
    return {"kind": about.kind, "labels": [*about.labels], "problem_type": about.problem_type}
