"""The number formats of GGUF files: how a block of bytes becomes numbers, and numbers bytes.

A quantised tensor is a row of blocks. Each block stores a few small integers q and the scale that
turns them back into numbers: x = d * q (with an offset m or -32 in some formats). Layouts follow
`ggml-common.h` of the ggml project; all numbers are little-endian. The arithmetic is in fp32, in
the same order as the reference, so values and bytes are bitwise those of the `gguf` package.

All formats that llama.cpp writes without an importance matrix can be read; F32, F16, BF16, Q8_0 and
Q4_0, which need no search for the best scale, can be written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_from_scratch.core.errors import UserError

CHUNK_VALUES = 1 << 16  # converted at a time: intermediates are small beside any tensor


@dataclass(frozen=True)
class Format:
    """`values` numbers stored in `bytes` bytes; `number` is GGUF's name for it (enum ggml_type).

    `decode(blocks, out)` fills (n, values) from (n, bytes) of uint8, rounding to the type of `out`.
    `encode(x, out)` is the inverse, from fp32; None for what can only be read.
    """

    number: int
    name: str
    values: int
    bytes: int
    decode: Callable[[Tensor, Tensor], None]
    encode: Callable[[Tensor, Tensor], None] | None = None


def _halves(blocks: Tensor, start: int, count: int = 1) -> Tensor:
    """`count` fp16 numbers at byte `start` of each block, as fp32 (n, count)."""
    return blocks[:, start : start + 2 * count].contiguous().view(torch.float16).float()


def bit_fields(data: Tensor, width: int) -> Tensor:
    """The 8 / width numbers in each byte, lowest bits first: (..., b) -> (..., 8 / width, b)."""
    mask = (1 << width) - 1
    return torch.stack([(data >> shift) & mask for shift in range(0, 8, width)], dim=-2)


# ------------------------------------------------------------------------- plain numbers


def _plain(dtype: torch.dtype) -> Callable[[Tensor, Tensor], None]:
    def decode(blocks: Tensor, out: Tensor) -> None:
        out.copy_(blocks.contiguous().view(dtype))

    return decode


def _to_plain(dtype: torch.dtype) -> Callable[[Tensor, Tensor], None]:
    def encode(x: Tensor, out: Tensor) -> None:
        rounded = x.to(dtype)
        _refuse_overflow(rounded)
        out.copy_(rounded.view(torch.uint8).view(out.shape))

    return encode


def _refuse_overflow(rounded: Tensor) -> None:
    if not torch.isfinite(rounded).all():
        raise UserError(
            "it holds values that are not finite or too large for the format; repair the model, "
            "or write BF16 or F32, whose range is larger"
        )


# ------------------------------------------------------------------------- blocks of 32


def _decode_q8_0(blocks: Tensor, out: Tensor) -> None:
    """fp16 d, int8 q[32]: x = d q."""
    out.copy_(blocks[:, 2:].view(torch.int8).float().mul_(_halves(blocks, 0)))


def _encode_q8_0(x: Tensor, out: Tensor) -> None:
    """The largest value becomes 127; halves are rounded away from zero, as C's `roundf` does."""
    d = x.abs().amax(dim=1, keepdim=True) / 127
    q = x * torch.where(d == 0, 0.0, 1 / d)
    size = q.abs()
    whole = size.floor()
    q = q.sign() * (whole + (2 * (size - whole)).floor())
    _put_scale(d, out)
    out[:, 2:] = q.to(torch.int8).view(torch.uint8)


def _put_scale(d: Tensor, out: Tensor) -> None:
    rounded = d.half()
    _refuse_overflow(rounded)
    out[:, :2] = rounded.view(torch.uint8)


def _decode_q4_0(blocks: Tensor, out: Tensor) -> None:
    """fp16 d, 16 bytes q: x = d (q - 8). Low nibbles are values 0-15, high nibbles 16-31."""
    d, q = _halves(blocks, 0), blocks[:, 2:]
    out[:, :16] = (q & 15).float().sub_(8).mul_(d)
    out[:, 16:] = (q >> 4).float().sub_(8).mul_(d)


def _encode_q4_0(x: Tensor, out: Tensor) -> None:
    """The value of largest magnitude becomes -8, the far end of what four bits hold."""
    largest = x.gather(1, x.abs().argmax(dim=1, keepdim=True))
    d = largest / -8
    q = (x * torch.where(d == 0, 0.0, 1 / d)).add_(8.5).to(torch.uint8).clamp_(max=15)
    _put_scale(d, out)
    out[:, 2:] = q[:, :16] | (q[:, 16:] << 4)


def _decode_q4_1(blocks: Tensor, out: Tensor) -> None:
    """fp16 d, fp16 m, 16 bytes q: x = d q + m. Nibbles as in Q4_0."""
    d, m = _halves(blocks, 0, 2).split(1, dim=1)
    q = blocks[:, 4:]
    out[:, :16] = (q & 15).float().mul_(d).add_(m)
    out[:, 16:] = (q >> 4).float().mul_(d).add_(m)


def five_bits(high: Tensor, low: Tensor) -> Tensor:
    """4 bytes of fifth bits, the first value's lowest, and 16 bytes of nibbles: (n, 32)."""
    fifth = bit_fields(high, 1).transpose(1, 2).reshape(-1, 32)
    return bit_fields(low, 4).view(-1, 32) | (fifth << 4)


def _decode_q5_0(blocks: Tensor, out: Tensor) -> None:
    """fp16 d, 4 bytes of fifth bits, 16 bytes q: x = d (q - 16). Nibbles as in Q4_0."""
    q = five_bits(blocks[:, 2:6], blocks[:, 6:])
    out.copy_(q.float().sub_(16).mul_(_halves(blocks, 0)))


def _decode_q5_1(blocks: Tensor, out: Tensor) -> None:
    """fp16 d, fp16 m, 4 bytes of fifth bits, 16 bytes q: x = d q + m."""
    d, m = _halves(blocks, 0, 2).split(1, dim=1)
    q = five_bits(blocks[:, 4:8], blocks[:, 8:])
    out.copy_(q.float().mul_(d).add_(m))


# Four bits as places on a curve that is denser near zero, where most weights are.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _curve(q: Tensor) -> Tensor:
    return torch.tensor(IQ4_VALUES, dtype=torch.float32)[q.int()]


def _decode_iq4_nl(blocks: Tensor, out: Tensor) -> None:
    """fp16 d, 16 bytes q: x = d curve(q). Nibbles as in Q4_0."""
    q = bit_fields(blocks[:, 2:], 4).view(-1, 32)
    out.copy_(_curve(q).mul_(_halves(blocks, 0)))


# ------------------------------------------------------------------------- blocks of 256


def _decode_q2_k(blocks: Tensor, out: Tensor) -> None:
    """16 bytes of scales, 64 bytes q, fp16 d, fp16 dmin: x = d s q - dmin m.

    Each of 16 sub-blocks has a scale s (low nibble) and a minimum m (high). Per half of 128 values:
    value 32 g + l is at position 2 g of byte l of that half's 32 bytes q.
    """
    s, m = bit_fields(blocks[:, :16], 4).float().unbind(1)
    scale = s.mul_(_halves(blocks, 80))[..., None]
    least = m.mul_(_halves(blocks, 82))[..., None]
    q = bit_fields(blocks[:, 16:80].reshape(-1, 2, 32), 2).view(-1, 16, 16)
    out.copy_(q.float().mul_(scale).sub_(least).view(-1, 256))


def _decode_q3_k(blocks: Tensor, out: Tensor) -> None:
    """32 bytes of high bits, 64 bytes q, 12 bytes of scales, fp16 d: x = d (s - 32) (q - 4).

    q has its low 2 bits as in Q2_K, its third at position i of byte l for value 32 i + l. The 6-bit
    scales have their low 4 bits in bytes 0-7 (low nibbles, then high), their high 2 in bytes 8-11.
    """
    low = bit_fields(blocks[:, 96:104], 4).view(-1, 16)
    high = bit_fields(blocks[:, 104:108], 2).view(-1, 16)
    scale = (low | (high << 4)).float().sub_(32).mul_(_halves(blocks, 108))
    third = bit_fields(blocks[:, :32], 1).view(-1, 256)
    q = bit_fields(blocks[:, 32:96].reshape(-1, 2, 32), 2).view(-1, 256)
    q = (q | (third << 2)).float().sub_(4).view(-1, 16, 16)
    out.copy_(q.mul_(scale[..., None]).view(-1, 256))


def small_scales_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The small scales and minima of the eight sub-blocks in Q4_K and Q5_K, each (n, 8) uint8.

    After fp16 d and dmin, 12 bytes hold 6-bit numbers: s0-s3 (low 6 bits of bytes 0-3), m0-m3 (of
    bytes 4-7); s4-s7 and m4-m7 have their low 4 bits in the nibbles of bytes 8-11 and their high 2
    bits atop bytes 0-3 and 4-7.
    """
    first, second, third = blocks[:, 4:16].split(4, dim=1)
    s = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], dim=1)
    m = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], dim=1)
    return s, m


def _scales_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum of the eight sub-blocks as numbers, each (n, 8, 1)."""
    s, m = small_scales_k(blocks)
    scale = s.float().mul_(_halves(blocks, 0))
    least = m.float().mul_(_halves(blocks, 2))
    return scale[..., None], least[..., None]


def _decode_q4_k(blocks: Tensor, out: Tensor) -> None:
    """fp16 d, fp16 dmin, 12 bytes of scales, 128 bytes q: x = d s q - dmin m.

    Each 32 bytes of q are two sub-blocks of 32 values: low nibbles, then high nibbles.
    """
    scale, least = _scales_k(blocks)
    q = bit_fields(blocks[:, 16:].reshape(-1, 4, 32), 4).view(-1, 8, 32)
    out.copy_(q.float().mul_(scale).sub_(least).view(-1, 256))


def _decode_q5_k(blocks: Tensor, out: Tensor) -> None:
    """Q4_K with 32 bytes of fifth bits before q: value 32 i + l has its at bit i of byte l."""
    scale, least = _scales_k(blocks)
    fifth = bit_fields(blocks[:, 16:48], 1)
    q = bit_fields(blocks[:, 48:].reshape(-1, 4, 32), 4).view(-1, 8, 32)
    q = q | (fifth << 4)
    out.copy_(q.float().mul_(scale).sub_(least).view(-1, 256))


def _decode_q6_k(blocks: Tensor, out: Tensor) -> None:
    """128 bytes ql, 64 bytes qh, int8 s[16], fp16 d: x = d s (q - 32), one s per 16 values.

    Per half of 128 values: value 32 g + l (g in 0-3, l in 0-31) has its low 4 bits in byte
    l + 32 (g mod 2) of that half's 64 bytes ql, low nibble for g < 2 and high nibble for g >= 2,
    and its high 2 bits at position 2 g of byte l of that half's 32 bytes qh.
    """
    low = bit_fields(blocks[:, :128].reshape(-1, 2, 64), 4).view(-1, 2, 4, 32)
    high = bit_fields(blocks[:, 128:192].reshape(-1, 2, 32), 2)
    q = (low | (high << 4)).float().sub_(32).view(-1, 16, 16)
    scale = blocks[:, 192:208].view(torch.int8).float().mul_(_halves(blocks, 208))
    out.copy_(q.mul_(scale[..., None]).view(-1, 256))


def _decode_iq4_xs(blocks: Tensor, out: Tensor) -> None:
    """fp16 d, 2 + 4 bytes of scales, 128 bytes q: x = d (s - 32) curve(q), one s per 32 values.

    Scale i has its low 4 bits in nibble i of the 4 bytes, its high 2 bits in pair i of the 2.
    """
    high = bit_fields(blocks[:, 2:4], 2).transpose(1, 2).reshape(-1, 8)
    low = bit_fields(blocks[:, 4:8], 4).transpose(1, 2).reshape(-1, 8)
    scale = (low | (high << 4)).float().sub_(32).mul_(_halves(blocks, 0))
    q = bit_fields(blocks[:, 8:].reshape(-1, 8, 16), 4).view(-1, 8, 32)
    out.copy_(_curve(q).mul_(scale[..., None]).view(-1, 256))


# ------------------------------------------------------------------------- all of them

F32 = Format(0, "F32", 1, 4, _plain(torch.float32), _to_plain(torch.float32))
F16 = Format(1, "F16", 1, 2, _plain(torch.float16), _to_plain(torch.float16))
BF16 = Format(30, "BF16", 1, 2, _plain(torch.bfloat16), _to_plain(torch.bfloat16))
Q8_0 = Format(8, "Q8_0", 32, 34, _decode_q8_0, _encode_q8_0)
Q4_0 = Format(2, "Q4_0", 32, 18, _decode_q4_0, _encode_q4_0)

_ALL = (
    F32, F16, BF16, Q8_0, Q4_0,
    Format(3, "Q4_1", 32, 20, _decode_q4_1),
    Format(6, "Q5_0", 32, 22, _decode_q5_0),
    Format(7, "Q5_1", 32, 24, _decode_q5_1),
    Format(10, "Q2_K", 256, 84, _decode_q2_k),
    Format(11, "Q3_K", 256, 110, _decode_q3_k),
    Format(12, "Q4_K", 256, 144, _decode_q4_k),
    Format(13, "Q5_K", 256, 176, _decode_q5_k),
    Format(14, "Q6_K", 256, 210, _decode_q6_k),
    Format(20, "IQ4_NL", 32, 18, _decode_iq4_nl),
    Format(23, "IQ4_XS", 256, 136, _decode_iq4_xs),
)  # fmt: skip

FORMATS = {form.number: form for form in _ALL}


def dequantise(raw: Tensor, form: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode whole blocks: uint8 (n * form.bytes,) -> `dtype` (n * form.values,)."""
    blocks = raw.view(-1, form.bytes)
    out = torch.empty(len(blocks), form.values, dtype=dtype)
    step = CHUNK_VALUES // form.values
    for part, place in zip(blocks.split(step), out.split(step), strict=True):
        form.decode(part, place)
    return out.view(-1)


def quantise(values: Tensor, form: Format) -> Iterator[Tensor]:
    """Encode `values`, whose last axis is a multiple of `form.values`: uint8, part after part.

    The parts, joined, are the tensor's bytes. Raises `UserError` for values that the format cannot
    hold; its sentence goes on after the name of the tensor.
    """
    assert form.encode is not None and values.shape[-1] % form.values == 0
    step = CHUNK_VALUES // form.values
    for part in values.reshape(-1, form.values).split(step):
        x = part.detach().to("cpu", torch.float32)
        out = torch.empty(len(x), form.bytes, dtype=torch.uint8)
        form.encode(x, out)
        yield out.view(-1)
