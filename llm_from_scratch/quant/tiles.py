"""How a quantised matrix lies in memory: tiles of 16 rows, in the order in which kernels read them.

A processor multiplies 16 rows at once when their numbers lie side by side. A tile is 16 rows of the
matrix; it is stored group after group (a group of inputs shares one scale per row), each a header
and its units of 32 inputs (16 in Q6_K):

    group   scales of the 16 rows | their offsets or zero points, if any | unit | unit | ...
    unit    in "super" layouts the small scales [and minima] of the 16 rows, a byte each | codes

A vector of codes is 64 bytes: four consecutive inputs of row 0, the same four of row 1, and so on.
With more than four bits the low four bits of all codes come first, then the rest:

    4 bits  vector v: the low nibbles are inputs 8v to 8v + 3, the high ones 8v + 4 to 8v + 7
    5 bits  four such vectors, then one in which bit i belongs to inputs 4i to 4i + 3
    6 bits  two such vectors, then one in which bits 2i and 2i + 1 belong to inputs 4i to 4i + 3
    8 bits  vector v: inputs 4v to 4v + 3

Matrices that are not quantised can lie in tiles as well (16 or 32 bits): for each input the numbers
of the 16 rows, nothing else.

Axes: t tiles, l the 16 rows (lanes) of a tile, g groups, u units of a group, i inputs of a unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LANES = 16
SCALE_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# NF4: the quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, arXiv:2305.14314).
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """What the bytes of a tile mean.

    A weight is scale * (code - zero); with `offset` "offset" it is scale * code + offset, with
    "zero" each group has its own zero point; with `table` it is scale * table[code]. In `super`
    layouts (GGUF's K formats) the scale of a unit is the group's, always fp16, times a small
    integer, and so is the minimum that `offset` "offset" then subtracts.
    """

    bits: int
    group: int
    scale: str = "fp16"
    offset: str = ""  # "", "zero" or "offset"
    zero: int = 0
    super: bool = False
    signed: bool = False  # the small scales of a super layout
    unit: int = 32
    table: tuple[float, ...] = ()

    @property
    def dense(self) -> bool:
        """Plain numbers of the type `scale`; one group and one unit, which is the row."""
        return self.bits >= 16

    @property
    def scale_bytes(self) -> int:
        return SCALE_TYPES[self.scale].itemsize

    @property
    def offset_bytes(self) -> int:
        return {"": 0, "zero": 1, "offset": self.scale_bytes}[self.offset]

    @property
    def small_bytes(self) -> int:
        """Bytes of small scales and minima that each row has in each unit."""
        return 0 if not self.super else 2 if self.offset else 1

    @property
    def unit_bytes(self) -> int:
        return LANES * (self.small_bytes + self.unit * self.bits // 8)

    @property
    def group_bytes(self) -> int:
        if self.dense:
            return LANES * self.group * self.bits // 8
        header = LANES * (self.scale_bytes + self.offset_bytes)
        return header + self.group // self.unit * self.unit_bytes

    def tile_bytes(self, in_features: int) -> int:
        return in_features // self.group * self.group_bytes


@dataclass
class Fields:
    """The parts of n rows: `scale` and `offset` (n, g, bytes), `small` (n, g, u, 1 or 2) and
    `codes` (n, g, u, bytes of a row's codes as they stand in the tile)."""

    scale: Tensor
    offset: Tensor | None
    small: Tensor | None
    codes: Tensor


def pack_codes(codes: Tensor, layout: Layout) -> Tensor:
    """(..., unit) codes, one a byte, into (..., unit * bits / 8) bytes as a row has them."""
    quads = codes.unflatten(-1, (-1, 4))
    if layout.bits == 8:
        return codes
    low = (quads[..., 0::2, :] & 15) | (quads[..., 1::2, :] << 4)
    if layout.bits == 4:
        return low.flatten(-2)
    width = layout.bits - 4
    high = torch.zeros_like(quads[..., 0, :])
    for i in range(quads.shape[-2]):
        high |= (quads[..., i, :] >> 4) << (width * i)
    return torch.cat([low.flatten(-2), high], dim=-1)


def unpack_codes(packed: Tensor, layout: Layout) -> Tensor:
    """The inverse of `pack_codes`."""
    if layout.bits == 8:
        return packed
    pairs = packed[..., : layout.unit // 2].unflatten(-1, (-1, 4))
    quads = torch.stack([pairs & 15, pairs >> 4], dim=-2).flatten(-3, -2)
    if layout.bits > 4:
        width = layout.bits - 4
        high = packed[..., layout.unit // 2 :]
        fields = [(high >> (width * i)) & ((1 << width) - 1) for i in range(quads.shape[-2])]
        quads = quads | (torch.stack(fields, dim=-2) << 4)
    return quads.flatten(-2)


def write_tiles(out_tb: Tensor, fields: Fields, layout: Layout) -> None:
    """Put rows (16 t of them) into `out_tb` (t, bytes of a tile)."""
    tiles, g = out_tb.shape[0], fields.codes.shape[1]
    groups = out_tb.view(tiles, g, layout.group_bytes)
    at = 0
    for part in (fields.scale, fields.offset):
        if part is not None:
            width = LANES * part.shape[-1]
            place = groups[:, :, at : at + width].unflatten(-1, (LANES, -1))
            place.copy_(part.unflatten(0, (tiles, LANES)).transpose(1, 2))
            at += width
    units = groups[:, :, at:].unflatten(-1, (-1, layout.unit_bytes))
    at = 0
    if fields.small is not None:
        at = LANES * layout.small_bytes
        place = units[..., :at].unflatten(-1, (layout.small_bytes, LANES))
        place.copy_(fields.small.unflatten(0, (tiles, LANES)).permute(0, 2, 3, 4, 1))
    quads = fields.codes.unflatten(0, (tiles, LANES)).unflatten(-1, (-1, 4))
    units[..., at:].unflatten(-1, (-1, LANES, 4)).copy_(quads.permute(0, 2, 3, 4, 1, 5))


def read_rows(data_tb: Tensor, rows: Tensor, layout: Layout) -> Fields:
    """The parts of the rows with these numbers, (n,) int64, on the device of `data_tb`."""
    tile, lane = rows // LANES, rows % LANES
    if layout.dense:
        width = layout.bits // 8
        return Fields(data_tb.unflatten(-1, (-1, LANES, width))[tile, :, lane], None, None, rows)
    groups = data_tb.unflatten(-1, (-1, layout.group_bytes))

    def header(start: int, width: int) -> Tensor:
        place = groups[:, :, start : start + LANES * width].unflatten(-1, (LANES, width))
        return place[tile, :, lane]

    scale = header(0, layout.scale_bytes)
    at = LANES * layout.scale_bytes
    offset = header(at, layout.offset_bytes) if layout.offset_bytes else None
    units = groups[:, :, at + LANES * layout.offset_bytes :]
    units = units.unflatten(-1, (-1, layout.unit_bytes))
    at = LANES * layout.small_bytes
    small = None
    if at:
        small = units[..., :at].unflatten(-1, (layout.small_bytes, LANES))[tile, ..., lane]
    codes = units[..., at:].unflatten(-1, (-1, LANES, 4))[tile, :, :, :, lane]
    return Fields(scale, offset, small, codes.flatten(-2))


def numbers(fields: Fields, layout: Layout) -> Tensor:
    """What the parts of n rows stand for: (n, in_features) fp32, in the arithmetic of GGUF."""
    dtype = SCALE_TYPES[layout.scale]
    if layout.dense:
        return fields.scale.flatten(1).view(dtype).float()
    scale = fields.scale.contiguous().view(dtype).float()[..., None]  # (n, g, 1, 1)
    codes = unpack_codes(fields.codes, layout)
    if layout.table:
        table = torch.tensor(layout.table, dtype=torch.float32, device=codes.device)
        return (table[codes.int()] * scale).flatten(1)
    if fields.small is not None:
        small = fields.small[..., 0].contiguous()
        scale = (small.view(torch.int8) if layout.signed else small)[..., None].float() * scale
    if layout.offset == "zero":
        assert fields.offset is not None
        return (codes.float().sub_(fields.offset[..., None]).mul_(scale)).flatten(1)
    if layout.offset == "":
        return codes.float().sub_(layout.zero).mul_(scale).flatten(1)
    assert fields.offset is not None
    offset = fields.offset.contiguous().view(dtype).float()[..., None]
    if fields.small is not None:
        offset = -(fields.small[..., 1:].float() * offset)
    return codes.float().mul_(scale).add_(offset).flatten(1)
