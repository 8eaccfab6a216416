"""The number formats of GGUF files: how a block of bytes becomes numbers.

A quantised tensor is a row of blocks. Each block stores a few small integers q and the scale that
turns them back into numbers: x = d * q (with an offset m or -32 in some formats). Layouts follow
`ggml-common.h` of the ggml project; all numbers are little-endian. The arithmetic is in fp32, in
the same order as the reference, so the values are bitwise those of the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_VALUES = 1 << 18  # decoded at a time: intermediates stay in the processor's cache


@dataclass(frozen=True)
class Format:
    """`values` numbers stored in `bytes` bytes. `decode(blocks, out)` fills (n, values) from
    (n, bytes) of uint8, rounding to the type of `out`."""

    name: str
    values: int
    bytes: int
    decode: Callable[[Tensor, Tensor], None]


def _halves(blocks: Tensor, start: int, count: int = 1) -> Tensor:
    """`count` fp16 numbers at byte `start` of each block, as fp32 (n, count)."""
    return blocks[:, start : start + 2 * count].contiguous().view(torch.float16).float()


def _plain(dtype: torch.dtype) -> Callable[[Tensor, Tensor], None]:
    def decode(blocks: Tensor, out: Tensor) -> None:
        out.copy_(blocks.contiguous().view(dtype))

    return decode


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    """fp16 d, int8 q[32]: x = d q."""
    out.copy_(blocks[:, 2:].view(torch.int8).float().mul_(_halves(blocks, 0)))


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    """fp16 d, 16 bytes q: x = d (q - 8). Low nibbles are values 0-15, high nibbles 16-31."""
    d, q = _halves(blocks, 0), blocks[:, 2:]
    out[:, :16] = (q & 15).float().sub_(8).mul_(d)
    out[:, 16:] = (q >> 4).float().sub_(8).mul_(d)


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    """fp16 d, fp16 m, 16 bytes q: x = d q + m. Nibbles as in Q4_0."""
    d, m = _halves(blocks, 0, 2).split(1, dim=1)
    q = blocks[:, 4:]
    out[:, :16] = (q & 15).float().mul_(d).add_(m)
    out[:, 16:] = (q >> 4).float().mul_(d).add_(m)


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    """fp16 d, fp16 dmin, 12 bytes of scales, 128 bytes q: x = d s q - dmin m.

    Eight sub-blocks of 32 values have a 6-bit scale s and a 6-bit minimum m each. The 12 bytes
    hold: s0-s3 (low 6 bits of bytes 0-3), m0-m3 (of bytes 4-7); s4-s7 and m4-m7 have their low 4
    bits in the nibbles of bytes 8-11 and their high 2 bits atop bytes 0-3 and 4-7. Each 32 bytes
    of q are two sub-blocks: low nibbles, then high nibbles.
    """
    n = len(blocks)
    first, second, third = blocks[:, 4:16].split(4, dim=1)
    s = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], dim=1)
    m = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], dim=1)
    scale = s.float().mul_(_halves(blocks, 0))[..., None]
    least = m.float().mul_(_halves(blocks, 2))[..., None]
    q = blocks[:, 16:].reshape(n, 4, 1, 32)
    q = torch.cat([q & 15, q >> 4], dim=2).view(n, 8, 32)
    out.copy_(q.float().mul_(scale).sub_(least).view(n, 256))


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    """128 bytes ql, 64 bytes qh, int8 s[16], fp16 d: x = d s (q - 32), one s per 16 values.

    Per half of 128 values: value 32 g + l (g in 0-3, l in 0-31) has its low 4 bits in byte
    l + 32 (g mod 2) of that half's 64 bytes ql, low nibble for g < 2 and high nibble for g >= 2,
    and its high 2 bits at position 2 g of byte l of that half's 32 bytes qh.
    """
    n = len(blocks)
    low = blocks[:, :128].reshape(n, 2, 1, 64)
    low = torch.cat([low & 15, low >> 4], dim=2).view(n, 2, 4, 32)
    high = blocks[:, 128:192].reshape(n, 2, 32)
    high = torch.stack([(high >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2)
    q = (low | (high << 4)).float().sub_(32).view(n, 16, 16)
    scale = blocks[:, 192:208].view(torch.int8).float().mul_(_halves(blocks, 208))
    out.copy_(q.mul_(scale[..., None]).view(n, 256))


# The number by which GGUF names each type (enum ggml_type).
FORMATS = {
    0: Format("F32", 1, 4, _plain(torch.float32)),
    1: Format("F16", 1, 2, _plain(torch.float16)),
    2: Format("Q4_0", 32, 18, _q4_0),
    3: Format("Q4_1", 32, 20, _q4_1),
    8: Format("Q8_0", 32, 34, _q8_0),
    12: Format("Q4_K", 256, 144, _q4_k),
    14: Format("Q6_K", 256, 210, _q6_k),
    30: Format("BF16", 1, 2, _plain(torch.bfloat16)),
}


def dequantise(raw: Tensor, form: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode whole blocks: uint8 (n * form.bytes,) -> `dtype` (n * form.values,)."""
    blocks = raw.view(-1, form.bytes)
    out = torch.empty(len(blocks), form.values, dtype=dtype)
    step = CHUNK_VALUES // form.values
    for part, place in zip(blocks.split(step), out.split(step), strict=True):
        form.decode(part, place)
    return out.view(-1)
