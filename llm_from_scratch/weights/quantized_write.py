"""Quantised model folders, written: what `quantized.py` reads, and `transformers` as well.

Integers in groups become compressed-tensors' `pack-quantized`, NF4 becomes bitsandbytes' format. A
matrix that could not be quantised stays what it is, and `quantization_config` names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.quant.nf4 import BLOCK, NF4Blocks
from llm_from_scratch.quant.rtn import Grouped
from llm_from_scratch.quant.tiles import NF4_VALUES
from llm_from_scratch.weights.assemble import Model
from llm_from_scratch.weights.families import Entry, Family, family_of
from llm_from_scratch.weights.heads import name_in_class, stored_entries
from llm_from_scratch.weights.layouts import put_together
from llm_from_scratch.weights.quantized import STATE, pack_words

Codes = Grouped | NF4Blocks
SPECIFICATION = "0.15.0"  # of compressed-tensors, from which on transformers reads this


def matrices(model: Model) -> list[str]:
    """The parameters that a quantised folder can hold in few bits: the linear layers of the blocks.

    Their names, in the order in which they are stored.
    """
    names: list[str] = []
    for entry in stored_entries(family_of(model.config), model):
        for name in entry.ours:
            place = name.removesuffix(".weight")
            weight = "blocks." in name and place != name and entry.index is None
            if weight and isinstance(model.get_submodule(place), nn.Linear):
                names.append(name)
    return names


def refuse_conv1d(model: Model) -> None:
    """Raise `UserError` where the class keeps its matrices in a layer of its own (GPT-2)."""
    family = family_of(model.config)
    if any(entry.layout == "transposed" for entry in stored_entries(family, model)):
        raise UserError(
            f"The class of {family.title} keeps its matrices as Conv1D, which the integers of "
            "compressed-tensors are not made for; use --to nf4, or scratchlm convert --to gguf "
            "--kind Q8_0 (or Q4_0)."
        )


def codes_of(entry: Entry, codes: Mapping[str, Codes], heads: int) -> Codes | None:
    """The codes of one stored tensor, put together from those of our parameters; None if dense."""
    parts = [codes[name] for name in entry.ours if name in codes]
    if len(parts) < len(entry.ours):
        assert not parts, f"{entry.theirs} would be quantised in part"
        return None
    # These formats store the outputs first, whatever the class does.
    entry = replace(entry, layout="plain" if entry.layout == "transposed" else entry.layout)

    def join(tensors: Sequence[Tensor]) -> Tensor:
        return put_together(entry, tensors, heads)

    together = join([part.codes_oi for part in parts])
    if all(isinstance(part, NF4Blocks) for part in parts):
        return NF4Blocks(together, join([part.absmax_og for part in parts]))  # type: ignore[union-attr]
    grouped = [part for part in parts if isinstance(part, Grouped)]
    zeros = [part.zeros_og for part in grouped if part.zeros_og is not None]
    scales = join([part.scales_og for part in grouped])
    return Grouped(together, scales, join(zeros) if zeros else None, grouped[0].bits)


def stored_codes(name: str, codes: Codes, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors that stand for the matrix `name` ("X.weight"), whose class computes in `dtype`.

    They are on the CPU.
    """
    if isinstance(codes, NF4Blocks):
        state = {
            "quant_type": "nf4",
            "blocksize": BLOCK,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": list(codes.shape),
        }
        packed = (codes.codes_oi[:, ::2] << 4) | codes.codes_oi[:, 1::2]
        yield name, packed.reshape(-1, 1).cpu()
        yield f"{name}.absmax", codes.absmax_og.reshape(-1).cpu()
        yield f"{name}.quant_map", torch.tensor(NF4_VALUES)
        text = json.dumps(state).encode()
        yield name.removesuffix(".weight") + STATE, torch.tensor(list(text), dtype=torch.uint8)
        return
    yield f"{name}_packed", pack_words(codes.codes_oi, codes.bits).cpu()
    yield f"{name}_scale", codes.scales_og.contiguous().cpu()
    yield f"{name}_shape", torch.tensor(codes.shape)
    if codes.zeros_og is not None:
        # Packed along the outputs.
        words = pack_words(codes.zeros_og.t().contiguous(), codes.bits)
        yield f"{name}_zero_point", words.t().contiguous().cpu()


def quantization_config(model: Model, codes: Mapping[str, Codes]) -> dict[str, Any]:
    """The content of config.json's `quantization_config`."""
    family = family_of(model.config)
    kinds: dict[tuple[int, int | None, bool], list[str]] = {}
    dense = _output_matrices(family)
    nf4 = False
    whole_rows = all(isinstance(c, NF4Blocks) or c.scales_og.shape[1] == 1 for c in codes.values())
    for entry in stored_entries(family, model):
        theirs = name_in_class(family, model, entry.theirs)
        place = theirs.removesuffix(".weight")
        first = codes.get(entry.ours[0])
        if isinstance(first, NF4Blocks):
            nf4 = True
        elif first is not None:
            size = None if whole_rows else first.group_size
            kinds.setdefault((first.bits, size, first.zeros_og is not None), []).append(place)
        elif place != theirs and _is_linear(model, entry) and place not in dense:
            dense.append(place)
    if nf4:
        return _bitsandbytes(dense, next(model.parameters()).dtype)
    names = {kind: places if len(kinds) > 1 else ["Linear"] for kind, places in kinds.items()}
    # transformers 5.23 finds zero points in the way only where it expands the weights at once.
    expand = {"dequantize": True} if any(zeros for _, _, zeros in kinds) else {}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{n}": _group(*kind, targets=names[kind]) for n, kind in enumerate(kinds)
        },
        "ignore": dense,
        "kv_cache_scheme": None,
        "version": SPECIFICATION,
        **expand,
    }


def _is_linear(model: Model, entry: Entry) -> bool:
    if entry.index is not None:
        return False
    return isinstance(model.get_submodule(entry.ours[0].removesuffix(".weight")), nn.Linear)


def _output_matrices(family: Family) -> list[str]:
    """Heads, which may be the embedding once more and then are not stored.

    `transformers` calls some `lm_head` that it stores under another name.
    """
    heads = [rule.theirs for rule in family.tensors if rule.ours[0] in ("head", "decoder.head")]
    return list(dict.fromkeys([*heads, "lm_head"]))


def _group(bits: int, size: int | None, zeros: bool, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "weights": {
            "num_bits": bits,
            "type": "int",
            "symmetric": not zeros,
            "strategy": "channel" if size is None else "group",
            "group_size": size,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
    }


def _bitsandbytes(dense: list[str], dtype: torch.dtype) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "llm_int8_skip_modules": dense,
    }
