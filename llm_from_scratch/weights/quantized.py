"""Quantised model folders, read: compressed-tensors' `pack-quantized` and bitsandbytes' NF4.

Both keep a matrix under the name that it would have as numbers, with a few tensors around it:

    compressed-tensors   X.weight_packed (int32), X.weight_scale, X.weight_shape, and where groups
                         have zero points X.weight_zero_point (int32)
    bitsandbytes         X.weight (uint8), X.weight.absmax, X.weight.quant_map and
                         X.weight.quant_state.bitsandbytes__nf4, which is JSON; where the magnitudes
                         are quantised once more also X.weight.nested_absmax and nested_quant_map

`QuantizedTensors` shows such a folder as if X.weight were stored as numbers. What
`quantization_config` says is checked field by field before a weight is read: a field or value that
we do not know could change what the codes mean. Specifications: the libraries' own code,
compressed-tensors 0.20 and bitsandbytes 0.50.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llm_from_scratch.core.errors import UserError, nearest, shown
from llm_from_scratch.quant.nf4 import BLOCK, NF4Blocks
from llm_from_scratch.quant.rtn import BITS, Grouped
from llm_from_scratch.quant.tiles import NF4_VALUES
from llm_from_scratch.weights.config_json import LARGEST_WEIGHT
from llm_from_scratch.weights.families.table import Entry
from llm_from_scratch.weights.stored import StoredTensors

FIELD = "quantization_config"
PACKED, STATE = ".weight_packed", ".weight.quant_state.bitsandbytes__nf4"
STATE_BYTES = 1 << 16
_NOTHING: tuple[Any, ...] = (None, False, [], {}, "")
_PRECISE = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

# Field -> the values that it may have; None: whatever it says changes nothing here.
_COMPRESSED: dict[str, tuple[Any, ...] | None] = {
    "quant_method": ("compressed-tensors",),
    "format": ("pack-quantized",),
    "quantization_status": ("compressed",),
    "config_groups": None,  # checked below
    "ignore": None,  # the tensors say which matrices are quantised
    "global_compression_ratio": None,
    "version": None,
    "kv_cache_scheme": _NOTHING,
    "sparsity_config": _NOTHING,
    "transform_config": _NOTHING,
    "run_compressed": None,
    "dequantize": None,
    "use_optimized_inference": _NOTHING,
}
_GROUP: dict[str, tuple[Any, ...] | None] = {
    "weights": None,  # checked below
    "targets": None,
    "format": ("pack-quantized", None),
    "input_activations": _NOTHING,
    "output_activations": _NOTHING,
}
_WEIGHTS: dict[str, tuple[Any, ...] | None] = {
    "num_bits": BITS,
    "type": ("int",),
    "symmetric": (True, False),
    "strategy": ("group", "channel"),
    "group_size": None,
    "dynamic": _NOTHING,
    "block_structure": _NOTHING,
    "actorder": (None, False, "weight", "static"),
    "observer": None,  # how the scales were found
    "observer_kwargs": None,
    "scale_dtype": None,  # the tensors say it
    "zp_dtype": None,
}
_BITSANDBYTES: dict[str, tuple[Any, ...] | None] = {
    "quant_method": ("bitsandbytes",),
    "load_in_4bit": (True,),
    "_load_in_4bit": (True,),
    "load_in_8bit": _NOTHING,
    "_load_in_8bit": _NOTHING,
    "bnb_4bit_quant_type": ("nf4",),
    "bnb_4bit_quant_storage": ("uint8", None),
    "bnb_4bit_use_double_quant": None,  # the tensors say it
    "bnb_4bit_compute_dtype": None,  # ours is that of the activations
    "llm_int8_enable_fp32_cpu_offload": None,
    "llm_int8_has_fp16_weight": None,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": None,
}


@dataclass(frozen=True)
class Scheme:
    """What a `quantization_config` means: the kinds of matrices that there may be.

    `kinds` are (bits, inputs in a group or None for the whole row, with zero points), none for NF4.
    """

    kind: str  # "int4", "int8", "nf4"; with several bits the smaller
    kinds: frozenset[tuple[int, int | None, bool]] = frozenset()


def take_scheme(values: dict[str, Any], where: str) -> Scheme | None:
    """Take `quantization_config` out of a config.json's content; None where there is none.

    Raises `UserError` naming the field that cannot be read.
    """
    given = values.pop(FIELD, None)
    if given is None:
        return None
    if not isinstance(given, dict):
        raise UserError(f"{where}: '{FIELD}' is {shown(given)}; it must be an object.")
    method = given.get("quant_method", "bitsandbytes" if "load_in_4bit" in given else None)
    if method == "bitsandbytes":
        _check(given, _BITSANDBYTES, f"{where}: '{FIELD}'")
        if given.get("bnb_4bit_quant_type") != "nf4" or not given.get("load_in_4bit"):
            raise UserError(
                f"{where}: '{FIELD}' is bitsandbytes' of a kind other than NF4, which alone can be "
                "read (load_in_4bit true, bnb_4bit_quant_type nf4); take the original model."
            )
        return Scheme("nf4")
    if method != "compressed-tensors":
        raise UserError(
            f"{where}: the 'quant_method' of '{FIELD}' is {shown(method)}; compressed-tensors "
            "(pack-quantized) and bitsandbytes (NF4) can be read. Take the original model or a "
            "GGUF file." + nearest(str(method), ("compressed-tensors", "bitsandbytes"))
        )
    _check(given, _COMPRESSED, f"{where}: '{FIELD}'")
    for name in ("format", "quantization_status"):
        if name not in given:
            raise UserError(f"{where}: '{FIELD}' has no '{name}', so it cannot be read.")
    groups = given.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise UserError(f"{where}: '{FIELD}' has no 'config_groups', so it cannot be read.")
    kinds = frozenset(
        _kind(group, f"{where}: '{FIELD}', {shown(n)}") for n, group in groups.items()
    )
    return Scheme(f"int{min(bits for bits, _, _ in kinds)}", kinds)


def _check(given: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    for name, value in given.items():
        allowed = known.get(name, _NOTHING)
        if allowed is None or any(value is one or value == one for one in allowed):
            continue
        if name not in known:
            raise UserError(
                f"{where} has the field {shown(name)} ({shown(value)}), which is not known, so it "
                f"cannot be said what the weights are.{nearest(name, known)}"
            )
        raise UserError(
            f"{where}: '{name}' is {shown(value)}, which cannot be read; it must be "
            + " or ".join(json.dumps(one) for one in allowed[:3])
            + "."
        )


def _kind(group: Any, where: str) -> tuple[int, int | None, bool]:
    """Bits, group and zero points of one of the `config_groups`."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise UserError(f"{where} has no 'weights', so it cannot be read.")
    _check(group, _GROUP, where)
    _check(weights, _WEIGHTS, where)
    bits, size = weights.get("num_bits"), weights.get("group_size")
    strategy = weights.get("strategy", "channel" if size in (None, -1) else "group")
    if type(bits) is not int or bits not in BITS or "type" not in weights:
        raise UserError(f"{where} says no 'num_bits' and 'type' that can be read: 4 or 8, int.")
    if strategy == "channel":
        if size not in (None, -1):
            raise UserError(f"{where}: 'group_size' is {shown(size)}, but 'strategy' is channel.")
        return bits, None, not weights.get("symmetric", True)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UserError(f"{where}: 'group_size' is {shown(size)}; it must be a whole number.")
    return bits, size, not weights.get("symmetric", True)


class QuantizedTensors(StoredTensors):
    """The tensors of a quantised folder, as if the matrices in it were stored as numbers.

    `codes` gives a matrix as it is stored, `read` as numbers. Every header is checked at once.
    """

    def __init__(self, stored: StoredTensors, scheme: Scheme) -> None:
        self.stored, self.scheme = stored, scheme
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the quantised matrices
        self._kinds: dict[str, tuple[int, int | None, bool]] = {}
        hidden: set[str] = set()
        ending = STATE if scheme.kind == "nf4" else PACKED
        for name in list(stored.files):
            if name.endswith(ending):
                base = name.removesuffix(ending) + ".weight"
                hidden |= self._add_nf4(base) if scheme.kind == "nf4" else self._add_ints(base)
        if not self.shapes:
            raise UserError(
                f"The config.json says '{FIELD}', but no tensor is quantised so: none ends in "
                f"'{ending}'. The folder is not what it says; copy the model anew."
            )
        visible = [name for name in stored.files if name not in hidden]
        for name in self.shapes:
            if name in visible and scheme.kind != "nf4":
                raise self._broken(name, "is stored as numbers and quantised")
        # Any of its files stands for a matrix that is put together out of several tensors.
        any_file = next(iter(stored.files.values()))
        self.files = {name: stored.files[name] for name in visible}
        self.files |= dict.fromkeys(self.shapes, any_file)
        path = next(iter(stored.paths.values()))
        self.paths = {name: stored.paths.get(name, path) for name in self.files}

    def _broken(self, name: str, what: str) -> UserError:
        path = self.stored.paths.get(name) or next(iter(self.stored.paths.values()))
        return UserError(f"{path}: '{name}' {what}; copy the model anew.")

    def _header(self, name: str) -> tuple[str, tuple[int, ...]]:
        if name not in self.stored.files:
            raise self._broken(name, "is missing")
        part = self.stored.files[name].get_slice(name)
        return str(part.get_dtype()), tuple(part.get_shape())

    def _raw(self, name: str) -> Tensor:
        tensor: Tensor = self.stored.files[name].get_tensor(name)
        return tensor

    def _is(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
        found = self._header(name)
        if found[0] not in dtypes or found[1] != shape:
            wanted = f"{' or '.join(dtypes)} of the shape {shape}"
            raise self._broken(
                name, f"is {found[0]} of the shape {found[1]} and should be {wanted}"
            )

    # ------------------------------------------------------------------- compressed-tensors

    def _add_ints(self, base: str) -> set[str]:
        """Check the tensors of one matrix; returns their names."""
        packed, scale, shape, zero = (
            f"{base}{part}" for part in ("_packed", "_scale", "_shape", "_zero_point")
        )
        self._is(shape, ("I64", "I32"), (2,))
        rows, columns = (int(size) for size in self._raw(shape))
        self._size(shape, (rows, columns))
        dtype, scales = self._header(scale)
        if len(scales) != 2 or dtype not in _PRECISE or not 1 <= scales[1] <= columns:
            raise self._broken(scale, f"is {dtype} of the shape {scales}, which is not understood")
        if columns % scales[1]:
            raise self._broken(scale, f"has {scales[1]} groups for {columns} inputs")
        size = columns // scales[1]
        words = self._header(packed)[1][-1:]
        for kind in self.scheme.kinds:
            bits, group, has_zeros = kind
            fits = (group or columns) == size and words == (math.ceil(columns * bits / 32),)
            if fits and has_zeros == (zero in self.stored.files):
                break
        else:
            raise self._broken(packed, f"fits none of the 'config_groups' of '{FIELD}'")
        self._is(packed, ("I32",), (rows, math.ceil(columns * bits / 32)))
        self._is(scale, (dtype,), (rows, scales[1]))
        if has_zeros:
            self._is(zero, ("I32",), (math.ceil(rows * bits / 32), scales[1]))
        self.shapes[base], self._kinds[base] = (rows, columns), kind
        return {packed, scale, shape, *([zero] if has_zeros else [])}

    def _size(self, name: str, shape: tuple[int, ...]) -> None:
        if len(shape) != 2 or min(shape) < 1 or math.prod(shape) > LARGEST_WEIGHT:
            raise self._broken(name, f"says a shape of {shape}, which no matrix has")

    def _grouped(self, base: str) -> Grouped:
        rows, columns = self.shapes[base]
        bits, _, has_zeros = self._kinds[base]
        codes = unpack_words(self._raw(f"{base}_packed"), bits)[:, :columns]
        zeros = None
        if has_zeros:
            zeros = unpack_words(self._raw(f"{base}_zero_point").t(), bits)[:, :rows].t()
        scales = self._raw(f"{base}_scale")
        if not torch.isfinite(scales).all():
            raise self._broken(f"{base}_scale", "holds scales that are not finite")
        zeros = None if zeros is None else zeros.contiguous()
        return Grouped(codes.contiguous(), scales, zeros, bits)

    # ------------------------------------------------------------------- bitsandbytes

    def _add_nf4(self, base: str) -> set[str]:
        """Check the tensors of one matrix; returns their names but for its own."""
        state_name = base.removesuffix(".weight") + STATE
        dtype, shape = self._header(state_name)
        if dtype != "U8" or len(shape) != 1 or shape[0] > STATE_BYTES:
            raise self._broken(state_name, f"is {dtype} of the shape {shape}, and no state")
        state = self._state(state_name)
        size = state.get("shape")
        if not isinstance(size, list) or not all(type(n) is int for n in size):
            raise self._broken(state_name, f"says the shape {shown(size)}")
        self._size(state_name, tuple(size))
        blocks = math.prod(size) // BLOCK
        if state.get("quant_type") != "nf4" or state.get("blocksize") != BLOCK or size[1] % BLOCK:
            raise self._broken(
                state_name, f"says {shown(state)}; NF4 in blocks of {BLOCK} in a row can be read"
            )
        self._is(base, ("U8",), (math.prod(size) // 2, 1))
        self._is(f"{base}.quant_map", ("F32",), (16,))
        if not torch.equal(self._raw(f"{base}.quant_map"), torch.tensor(NF4_VALUES)):
            raise self._broken(f"{base}.quant_map", "holds other values than NF4's")
        hidden = {state_name, f"{base}.quant_map", f"{base}.absmax"}
        if "nested_blocksize" in state:
            nested = state["nested_blocksize"]
            if type(nested) is not int or nested < 1 or not _finite(state.get("nested_offset")):
                raise self._broken(state_name, f"says {shown(state)}, which is not understood")
            self._is(f"{base}.absmax", ("U8",), (blocks,))
            self._is(f"{base}.nested_absmax", ("F32",), (math.ceil(blocks / nested),))
            self._is(f"{base}.nested_quant_map", ("F32",), (256,))
            hidden |= {f"{base}.nested_absmax", f"{base}.nested_quant_map"}
        else:
            self._is(f"{base}.absmax", ("F32",), (blocks,))
        self.shapes[base] = (size[0], size[1])
        return hidden

    def _state(self, name: str) -> dict[str, Any]:
        try:
            state = json.loads(bytes(self._raw(name).tolist()))
        except (ValueError, RecursionError):
            state = None
        if not isinstance(state, dict):
            raise self._broken(name, "is not JSON")
        return state

    def _blocks(self, base: str) -> NF4Blocks:
        shape = self.shapes[base]
        state = self._state(base.removesuffix(".weight") + STATE)
        raw = self._raw(base).view(shape[0], -1)
        codes = torch.stack([raw >> 4, raw & 15], dim=-1).flatten(1)  # the first in the high half
        absmax = self._raw(f"{base}.absmax")
        if "nested_blocksize" in state:
            repeats = min(state["nested_blocksize"], len(absmax))
            scale = self._raw(f"{base}.nested_absmax").repeat_interleave(repeats)
            absmax = self._raw(f"{base}.nested_quant_map")[absmax.int()] * scale[: len(absmax)]
            absmax = absmax + state["nested_offset"]
        if not torch.isfinite(absmax).all():
            raise self._broken(f"{base}.absmax", "holds magnitudes that are not finite")
        return NF4Blocks(codes, absmax.view(shape[0], -1))

    # ------------------------------------------------------------------- what is asked

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name] if name in self.shapes else self.stored.shape(name)

    def codes(self, name: str) -> Grouped | NF4Blocks | None:
        """A matrix as it is stored; None for what is stored as numbers."""
        if name not in self.shapes:
            return None
        return self._blocks(name) if self.scheme.kind == "nf4" else self._grouped(name)

    def outputs_first(self, entries: list[Entry], names: Mapping[str, str]) -> list[Entry]:
        return [
            replace(entry, layout="plain")
            if entry.layout == "transposed" and names.get(entry.theirs) in self.shapes
            else entry
            for entry in entries
        ]

    def read(self, name: str) -> Tensor:
        """A matrix as fp32 numbers; anything else as it is stored."""
        codes = self.codes(name)
        return self.stored.read(name) if codes is None else codes.dequantize()


def _finite(value: object) -> bool:
    """Whether it is a number that fp32 can hold."""
    return isinstance(value, int | float) and abs(value) <= torch.finfo(torch.float32).max


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 words (rows, n) -> the unsigned codes of 4 or 8 bits in them, lowest first, uint8."""
    raw = words.flatten().view(torch.uint8).view(len(words), -1)
    return raw if bits == 8 else torch.stack([raw & 15, raw >> 4], dim=-1).flatten(1)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack_words`; rows are filled up with zeros to whole words."""
    per_word = 32 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word))
    if bits == 4:
        codes = codes[:, ::2] | (codes[:, 1::2] << 4)
    return codes.flatten().view(torch.int32).view(len(codes), -1)
