"""Quantised matrices that are computed with as they are: 4 to 8 bits a weight, never grown whole.

`PackedWeight` keeps the integers and scales of a matrix in tiles (tiles.py) and multiplies by it
through the compiled kernels (kernels.py), or, where there is no compiler, through the plain twin
that expands the matrix first. Both compute with exactly the weights that `dequantize` shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.quant import formats, kernels
from llm_from_scratch.quant.formats import Format
from llm_from_scratch.quant.tiles import (
    LANES,
    NF4_VALUES,
    SCALE_TYPES,
    Fields,
    Layout,
    numbers,
    pack_codes,
    read_rows,
    write_tiles,
)

CHUNK_BYTES = 1 << 22  # of codes: what is taken apart at a time while packing or expanding

_BLOCKS = {
    "Q4_0": Layout(4, 32, zero=8),
    "Q4_1": Layout(4, 32, offset="offset"),
    "Q5_0": Layout(5, 32, zero=16),
    "Q5_1": Layout(5, 32, offset="offset"),
    "Q8_0": Layout(8, 32, zero=128),
    "Q4_K": Layout(4, 256, offset="offset", super=True),
    "Q5_K": Layout(5, 256, offset="offset", super=True),
    "Q6_K": Layout(6, 256, zero=32, super=True, signed=True, unit=16),
    "IQ4_NL": Layout(4, 32, table=tuple(map(float, formats.IQ4_VALUES))),
}


def why_not_packed(form: Format, in_features: int) -> str | None:
    """Why a GGUF tensor cannot be kept packed, as a clause; None where it can."""
    layout = _BLOCKS.get(form.name)
    if layout is None:
        return f"{form.name} has no kernel"
    if in_features % layout.group:
        return f"its rows of {in_features} are not whole blocks of {layout.group}"
    return None


class PackedWeight:
    """A quantised matrix (out_features, in_features) on the CPU.

    Made by `from_blocks`, `from_groups` or `from_nf4`; its bytes are one uint8 tensor `data`
    (tiles, bytes of a tile). `kind` names what it was made from ("q4_0", "int4", "nf4", ...).
    """

    def __init__(
        self, kind: str, data: Tensor, layout: Layout, out_features: int, in_features: int
    ) -> None:
        tiles = -(-out_features // LANES)
        assert data.dtype == torch.uint8 and data.is_contiguous()
        assert data.shape == (tiles, layout.tile_bytes(in_features)), "the layout says otherwise"
        self.kind = kind
        self.data = data
        self.layout = layout
        self.out_features = out_features
        self.in_features = in_features
        self._copy: Tensor | None = None
        self.handle = kernels.matrix_handle(data, layout, out_features, in_features)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes, with its share of scales and padding."""
        return 8 * self.nbytes / (self.out_features * self.in_features)

    def __repr__(self) -> str:
        return (
            f"PackedWeight({self.kind}, {self.out_features} x {self.in_features}, "
            f"{self.bits_per_weight:.2f} bits a weight)"
        )

    # ------------------------------------------------------------------------- made from

    @staticmethod
    def from_blocks(raw: Tensor, form: Format, out_features: int, in_features: int) -> PackedWeight:
        """From the bytes of a GGUF tensor, uint8: the same integers in another order.

        Raises `UserError` where `why_not_packed` has a reason.
        """
        if (reason := why_not_packed(form, in_features)) is not None:
            raise UserError(f"This tensor cannot be kept packed: {reason}.")
        layout = _BLOCKS[form.name]
        blocks = raw.view(out_features, in_features // form.values, form.bytes)

        def rows(start: int, end: int) -> Fields:
            part = blocks[start:end]
            fields = _taken_apart(part.reshape(-1, form.bytes), form)
            return _by_group(fields, end - start)

        return _packed(form.name.lower(), layout, out_features, in_features, rows)

    @staticmethod
    def from_groups(
        codes_oi: Tensor, scales_og: Tensor, offsets_og: Tensor | None, bits: int
    ) -> PackedWeight:
        """From codes (out, in) uint8 of 4 or 8 bits: w = scale * code + offset.

        Scales (out, in / group) keep their type (fp16, bf16 or fp32); `offsets_og` has their shape
        or is None for zero. Offsets that are whole multiples of the scale, as zero points make
        them, are kept as such: a byte each, or nothing where all are the same, and the weight is
        then computed as scale * (code - zero). Groups are a multiple of 32.
        """
        out_features, in_features = codes_oi.shape
        group = in_features // scales_og.shape[1]
        if bits not in (4, 8) or group * scales_og.shape[1] != in_features or group % 32:
            raise UserError(
                f"A matrix of {in_features} inputs with {scales_og.shape[1]} scales a row cannot "
                f"be packed in {bits} bits: groups must be a multiple of 32, and bits 4 or 8."
            )
        offset, zero, stored = _offsets(scales_og, offsets_og)
        if offset == "offset" and stored is not None and stored.dtype != scales_og.dtype:
            scales_og, stored = scales_og.float(), stored.float()
        names = {dtype: name for name, dtype in SCALE_TYPES.items()}
        layout = Layout(bits, group, names[scales_og.dtype], offset, zero)
        return _packed(
            f"int{bits}",
            layout,
            out_features,
            in_features,
            _grouped(codes_oi, scales_og, stored),
        )

    @staticmethod
    def from_nf4(codes_oi: Tensor, absmax_og: Tensor) -> PackedWeight:
        """From 4-bit places in the NF4 table, (out, in) uint8, and the largest magnitude of each
        64 of them, (out, in / 64) fp32: w = absmax * NF4_VALUES[code] (arXiv:2305.14314)."""
        out_features, in_features = codes_oi.shape
        if absmax_og.shape != (out_features, in_features / 64):
            raise UserError(
                f"NF4 needs a scale for every 64 weights of a row; {in_features} inputs with "
                f"{absmax_og.shape[1]} scales a row cannot be packed."
            )
        layout = Layout(4, 64, "fp32", table=NF4_VALUES)
        rows = _grouped(codes_oi, absmax_og.float(), None)
        return _packed("nf4", layout, out_features, in_features, rows)

    @staticmethod
    def from_dense(weight_oi: Tensor) -> PackedWeight:
        """From plain numbers (fp32, bf16 or fp16), kept as they are: nothing is quantised, but one
        row of activations is multiplied at the speed of the memory."""
        out_features, in_features = weight_oi.shape
        names = {dtype: name for name, dtype in SCALE_TYPES.items()}
        kind = names[weight_oi.dtype]
        layout = Layout(8 * weight_oi.itemsize, in_features, kind, unit=in_features)
        tiles = -(-out_features // LANES)
        data = torch.zeros(tiles, in_features, LANES, dtype=weight_oi.dtype)
        whole = out_features // LANES
        source = weight_oi.detach()
        data[:whole] = source[: whole * LANES].unflatten(0, (whole, LANES)).transpose(1, 2)
        if whole < tiles:
            data[whole, :, : out_features - whole * LANES] = source[whole * LANES :].T
        data = data.view(tiles, -1).view(torch.uint8)
        return PackedWeight(kind, data, layout, out_features, in_features)

    @staticmethod
    def join(parts: Sequence[PackedWeight]) -> PackedWeight:
        """One matrix with the rows of all `parts`, of one layout: several products in one call.

        All but the last have a multiple of 16 rows; `narrow` gives the parts back, uncopied.
        """
        first = parts[0]
        assert all(p.layout == first.layout and p.in_features == first.in_features for p in parts)
        assert all(p.out_features % LANES == 0 for p in parts[:-1])
        out_features = sum(p.out_features for p in parts)
        data = torch.cat([p.data for p in parts])
        return PackedWeight(first.kind, data, first.layout, out_features, first.in_features)

    def narrow(self, start: int, count: int) -> PackedWeight:
        """Rows `start` (a multiple of 16) to `start + count`, sharing these bytes."""
        assert start % LANES == 0 and 0 < count <= self.out_features - start
        assert count % LANES == 0 or start + count == self.out_features
        data = self.data[start // LANES : -(-(start + count) // LANES)]
        return PackedWeight(self.kind, data, self.layout, count, self.in_features)

    # ------------------------------------------------------------------------- used as

    def dequantize(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The weights as numbers, (out_features, in_features)."""
        device = torch.device(device)
        out = torch.empty(self.out_features, self.in_features, dtype=dtype, device=device)
        step = max(1, CHUNK_BYTES // self.in_features)
        for start in range(0, self.out_features, step):
            end = min(start + step, self.out_features)
            out[start:end] = self.rows_plain(torch.arange(start, end, device=device))
        return out

    def rows(self, ids: Tensor) -> Tensor:
        """The rows with these numbers, as an embedding takes them: (n,) -> (n, in_features) fp32.

        Raises `IndexError` for numbers that no row has.
        """
        if ids.device.type == "cpu" and kernels.available():
            return kernels.rows(self.handle, ids)
        return self.rows_plain(ids)

    def rows_plain(self, ids: Tensor) -> Tensor:
        """The twin of `rows`, on any device."""
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.out_features:
            raise IndexError(f"a row was asked for that the {self.out_features} rows do not have")
        return numbers(read_rows(self._data_on(ids.device), ids, self.layout), self.layout)

    def linear(self, x: Tensor) -> Tensor:
        """x W^T: (..., in_features) fp32 or bf16 -> (..., out_features) of the same type."""
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        if needs_gradient or x.device.type != "cpu" or not kernels.available():
            return self.linear_plain(x)
        x_ni = x.detach().reshape(-1, self.in_features).float()
        y = kernels.linear(self.handle, x_ni if x_ni.stride(-1) == 1 else x_ni.contiguous())
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def linear_plain(self, x: Tensor) -> Tensor:
        """The twin of `linear`, on any device: expand the weights, then multiply."""
        return F.linear(x, self.dequantize(x.dtype, x.device))

    def _data_on(self, device: torch.device) -> Tensor:
        """The bytes on that device; beside the CPU's there is at most one other copy."""
        if device.type == "cpu":
            return self.data
        if self._copy is None or self._copy.device != device:
            self._copy = self.data.to(device)
        return self._copy

    def __deepcopy__(self, memo: object) -> PackedWeight:
        return self  # never changed, so never copied

    def __reduce__(self) -> str:
        raise TypeError("A packed weight is not pickled: save the model in its format instead.")


# ----------------------------------------------------------------------------- packing


def _packed(
    kind: str,
    layout: Layout,
    out_features: int,
    in_features: int,
    rows: Callable[[int, int], Fields],
) -> PackedWeight:
    """Pack what `rows(start, end)` gives, a few tiles at a time: no second copy of a matrix."""
    tiles = -(-out_features // LANES)
    data = torch.empty(tiles, layout.tile_bytes(in_features), dtype=torch.uint8)
    step = max(1, CHUNK_BYTES // (LANES * in_features))
    for first in range(0, tiles, step):
        last = min(first + step, tiles)
        start, end = first * LANES, min(last * LANES, out_features)
        fields = _padded(rows(start, end), (last - first) * LANES)
        codes = fields.codes.unflatten(-1, (-1, layout.unit))
        fields.codes = pack_codes(codes, layout)
        write_tiles(data[first:last], fields, layout)
    return PackedWeight(kind, data, layout, out_features, in_features)


def _padded(fields: Fields, rows: int) -> Fields:
    """Rows of zeros (their scales are zero) up to a whole number of tiles."""

    def fill(part: Tensor | None) -> Tensor | None:
        if part is None or part.shape[0] == rows:
            return part
        return torch.cat([part, part.new_zeros(rows - part.shape[0], *part.shape[1:])])

    scale, codes = fill(fields.scale), fill(fields.codes)
    assert scale is not None and codes is not None
    return Fields(scale, fill(fields.offset), fill(fields.small), codes)


def _grouped(
    codes_oi: Tensor, scales_og: Tensor, offsets_og: Tensor | None
) -> Callable[[int, int], Fields]:
    def as_bytes(part: Tensor) -> Tensor:
        return part.contiguous().view(torch.uint8).unflatten(1, (scales_og.shape[1], -1))

    def rows(start: int, end: int) -> Fields:
        offset = None if offsets_og is None else as_bytes(offsets_og[start:end])
        codes = codes_oi[start:end].unflatten(1, (scales_og.shape[1], -1))
        return Fields(as_bytes(scales_og[start:end]), offset, None, codes)

    return rows


def _offsets(scales: Tensor, offsets: Tensor | None) -> tuple[str, int, Tensor | None]:
    """(Layout.offset, Layout.zero, what is stored) for these offsets."""
    if offsets is None:
        return "", 0, None
    scale, wanted = scales.float(), offsets.float()
    zero = torch.where(scale == 0, 0.0, -wanted / scale).round()
    # Compared as both are rounded to the type in which the offsets come.
    whole = ((-(scale * zero)).to(offsets.dtype) == offsets).all() and (scale != 0).any()
    if whole and zero.min() >= 0 and zero.max() <= 255:
        constant = zero[scale != 0]
        if (constant == constant[0]).all():
            return "", int(constant[0]), None
        return "zero", 0, zero.to(torch.uint8)
    return "offset", 0, offsets


def _by_group(fields: Fields, rows: int) -> Fields:
    """Parts of blocks (n, ...) as parts of rows (rows, blocks of a row, ...)."""

    def shape(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.unflatten(0, (rows, -1))

    scale, codes = shape(fields.scale), shape(fields.codes)
    assert scale is not None and codes is not None
    return Fields(scale, shape(fields.offset), shape(fields.small), codes)


def _taken_apart(blocks: Tensor, form: Format) -> Fields:
    """Scales and codes of GGUF blocks (n, bytes), one code a byte; layouts as in formats.py."""
    nibbles, fields = formats.five_bits, formats.bit_fields
    match form.name:
        case "Q8_0":
            return Fields(blocks[:, :2], None, None, blocks[:, 2:] ^ 128)
        case "Q4_0" | "IQ4_NL":
            return Fields(blocks[:, :2], None, None, fields(blocks[:, 2:], 4).flatten(1))
        case "Q4_1":
            return Fields(blocks[:, :2], blocks[:, 2:4], None, fields(blocks[:, 4:], 4).flatten(1))
        case "Q5_0":
            return Fields(blocks[:, :2], None, None, nibbles(blocks[:, 2:6], blocks[:, 6:]))
        case "Q5_1":
            codes = nibbles(blocks[:, 4:8], blocks[:, 8:])
            return Fields(blocks[:, :2], blocks[:, 2:4], None, codes)
        case "Q4_K":
            codes = fields(blocks[:, 16:].reshape(-1, 4, 32), 4)
            return Fields(blocks[:, :2], blocks[:, 2:4], _small(blocks), codes.flatten(1))
        case "Q5_K":
            codes = fields(blocks[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
            codes = codes | (fields(blocks[:, 16:48], 1) << 4)
            return Fields(blocks[:, :2], blocks[:, 2:4], _small(blocks), codes.flatten(1))
    assert form.name == "Q6_K"
    low = fields(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 2, 4, 32)
    codes = low | (fields(blocks[:, 128:192].reshape(-1, 2, 32), 2) << 4)
    return Fields(blocks[:, 208:], None, blocks[:, 192:208, None], codes.flatten(1))


def _small(blocks: Tensor) -> Tensor:
    return torch.stack(formats.small_scales_k(blocks), dim=-1)
