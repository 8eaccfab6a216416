"""The compiled kernels (kernels.cpp), called through ctypes.

They are built on first use (build.py). `SCRATCHLM_KERNELS=off` turns them off; without them, or
without a compiler, everything runs on the plain twins in PyTorch. Threads are those of PyTorch
(`torch.set_num_threads`). All tensors are on the CPU; activations are fp32 with a last axis without
gaps.

Any thread may call them, also several at once: one has the workers, the others compute by
themselves what comes out the same. A forked process gets workers of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llm_from_scratch.quant import build
from llm_from_scratch.quant.tiles import SCALE_TYPES, Layout

OFFSETS = ("", "zero", "offset")


class MatrixHandle(ctypes.Structure):
    """`Matrix` in kernels.cpp: where a packed matrix lies and what its bytes mean."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in (
            "out_features", "in_features", "bits", "group", "unit", "scale", "offset", "zero",
            "super", "is_signed", "unit_bytes", "group_bytes",
        )),
    )  # fmt: skip


def matrix_handle(
    data: Tensor, layout: Layout, out_features: int, in_features: int
) -> MatrixHandle:
    """What the kernels know of a matrix; it keeps `data` alive."""
    table = (ctypes.c_float * len(layout.table))(*layout.table) if layout.table else None
    handle = MatrixHandle(
        data.data_ptr(), ctypes.cast(table, ctypes.c_void_p) if table else None,
        out_features, in_features, layout.bits, layout.group, layout.unit,
        list(SCALE_TYPES).index(layout.scale), OFFSETS.index(layout.offset), layout.zero,
        layout.super, layout.signed, layout.unit_bytes, layout.group_bytes,
    )  # fmt: skip
    handle.keep = (data, table)
    handle.address = ctypes.addressof(handle)
    return handle


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None (said once, with the reason) where there are none."""
    if os.environ.get("SCRATCHLM_KERNELS", "").lower() in ("off", "0", "no", "false"):
        return None
    try:
        return build.load()
    except build.NoKernels as reason:
        print(
            f"The compiled kernels are not used, because {reason}: plain PyTorch stands in and is "
            "slower. SCRATCHLM_KERNELS=off asks for that without this message.",
            file=sys.stderr,
        )
        return None


def available() -> bool:
    """Whether the compiled kernels are there; builds them at the first call."""
    return library() is not None


def instructions() -> str:
    """What the kernels were built for: "avx512", "avx2", "neon" or "plain"; "off" without them."""
    lib = library()
    if lib is None:
        return "off"
    lib.instructions.restype = ctypes.c_char_p
    return str(lib.instructions().decode())


@contextlib.contextmanager
def pytorch_alone() -> Iterator[None]:
    """PyTorch computes on the calling thread only, inside the block.

    For work between two passes. The threads that PyTorch wakes for a softmax over a vocabulary, or
    even for the cosines of a few positions, meet the kernels' workers on the same cores, and both
    wait for each other. (A thread that asks PyTorch for its first time while another is inside
    such a block goes on with one thread.)
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------- calls


def _struct(pointers: str, numbers: str, floats: str = "") -> type[ctypes.Structure]:
    """A struct of arguments as kernels.cpp has it: pointers, 64-bit integers, then floats."""
    fields: list[tuple[str, Any]] = [(name, ctypes.c_void_p) for name in pointers.split()]
    fields += [(name, ctypes.c_int64) for name in numbers.split()]
    fields += [(name, ctypes.c_float) for name in floats.split()]
    return type("Call", (ctypes.Structure,), {"_fields_": fields})


_Linear = _struct("matrix x y bias", "rows x_stride y_stride add threads")
_Rows = _struct("matrix ids y", "rows y_stride threads unknown")
_Norm = _struct("x weight y", "rows width x_stride y_stride plus_one threads", "eps")
_Angles = _struct("position frequencies cos_sin", "rows turned threads", "loudness")
_Rope = _struct("x cos_sin", "rows heads head_dim turned x_stride threads")
_Write = _struct(
    "k v keys values key_scales value_scales slots_n",
    "rows kv_heads head_dim slots type k_stride v_stride threads",
)
_Attend = _struct(
    "q y keys values key_scales value_scales pages text position",
    "rows heads kv_heads head_dim slots type page_stride q_stride y_stride window threads",
    "scale softcap",
)
_Gate = _struct("gate up y", "rows width gate_stride up_stride y_stride gelu threads")
_Add = _struct("x y", "rows width x_stride y_stride threads")
_Step = _struct("kernel call", "")

PAGE = 16  # slots of a page, as in kernels.cpp
POOL_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
GATES = {"silu": 0, "gelu_tanh": 1}


@functools.cache
def _kernel(name: str) -> Any:
    lib = library()
    assert lib is not None, "there are no kernels here: ask available() first"
    function = getattr(lib, name)
    function.restype = None
    return function


class _Recording(threading.local):
    """The calls of the program that this thread records; other threads go on with their own."""

    calls: list[tuple[Any, ctypes.Structure, tuple[object, ...]]] | None = None


_recording = _Recording()


def _run(name: str, call: ctypes.Structure, *keep: object) -> None:
    function = _kernel(name)
    function(ctypes.byref(call))
    if _recording.calls is not None:
        _recording.calls.append((function, call, keep))


class Program:
    """Kernel calls, recorded once and replayed by one call: a trip through a model without Python.

        program = Program()
        with program.record():
            kernels.rms_norm(x, weight, eps, out=y)
            kernels.linear(matrix, y, out=z)
        program()  # the same on the same memory, whatever stands there now

    Only calls of this module are recorded, on the tensors they were given, which the program keeps;
    what PyTorch does in between is not.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Any, ctypes.Structure, tuple[object, ...]]] = []
        self._steps: Any = None

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Run and remember the calls inside the block."""
        assert _recording.calls is None, "one program is recorded at a time"
        _recording.calls = self._calls
        try:
            yield
        finally:
            _recording.calls = None
        steps = [
            _Step(ctypes.cast(function, ctypes.c_void_p).value, ctypes.addressof(call))
            for function, call, _ in self._calls
        ]
        self._steps = (_Step * len(steps))(*steps)

    def __call__(self) -> None:
        _kernel("run_program")(self._steps, ctypes.c_int64(len(self._steps)))


def _fits(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.stride(-1) == 1 and x.device.type == "cpu"


def _int32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.int32 and x.is_contiguous() else x.int().contiguous()


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def linear(
    matrix: MatrixHandle,
    x_ni: Tensor,
    out: Tensor | None = None,
    bias: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """x W^T (+ bias): (n, in_features) -> (n, out_features); with `add`, out += x W^T.

    Rows of `x_ni` and `out` may be parts of wider ones (a stride between rows).
    """
    n, width = x_ni.shape
    if out is None:
        assert not add
        out = torch.empty(n, matrix.out_features)
    assert width == matrix.in_features and out.shape == (n, matrix.out_features)
    assert _fits(x_ni) and _fits(out) and (bias is None or _fits(bias))
    call = _Linear(
        matrix.address, x_ni.data_ptr(), out.data_ptr(), _pointer(bias), n, x_ni.stride(0),
        out.stride(0), add, torch.get_num_threads(),
    )  # fmt: skip
    _run("linear", call, matrix, x_ni, out, bias)
    return out


def rows(matrix: MatrixHandle, ids_n: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows of the matrix as numbers: (n,) int64 -> (n, in_features). Raises `IndexError`."""
    n = len(ids_n)
    ids_n = ids_n.long().contiguous()
    if out is None:
        out = torch.empty(n, matrix.in_features)
    assert out.shape == (n, matrix.in_features) and _fits(out)
    call = _Rows(
        matrix.address, ids_n.data_ptr(), out.data_ptr(), n, out.stride(0), torch.get_num_threads()
    )
    _run("rows", call, matrix, ids_n, out)
    if call.unknown:
        raise IndexError(f"a row was asked for that the {matrix.out_features} rows do not have")
    return out


def rms_norm(
    x_nm: Tensor, weight: Tensor, eps: float, plus_one: bool = False, out: Tensor | None = None
) -> Tensor:
    """x / rms(x) * weight, or * (1 + weight): (n, m) -> (n, m). `out` may be x."""
    n, width = x_nm.shape
    if out is None:
        out = torch.empty(n, width)
    assert weight.shape == (width,) and out.shape == (n, width)
    assert _fits(x_nm) and _fits(weight) and _fits(out)
    call = _Norm(
        x_nm.data_ptr(), weight.data_ptr(), out.data_ptr(), n, width, x_nm.stride(0),
        out.stride(0), plus_one, torch.get_num_threads(), eps,
    )  # fmt: skip
    _run("rms_norm", call, x_nm, weight, out)
    return out


def angles(
    position_n: Tensor, frequencies: Tensor, loudness: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """Cosines and sines for positions (n,): (n, 2, d), as `angles` in model/positions.py."""
    n, turned = len(position_n), 2 * len(frequencies)
    position_n = _int32(position_n)
    if out is None:
        out = torch.empty(n, 2, turned)
    assert _fits(frequencies) and frequencies.dim() == 1
    assert _fits(out) and out.shape == (n, 2, turned) and out.is_contiguous()
    call = _Angles(
        position_n.data_ptr(), frequencies.data_ptr(), out.data_ptr(), n, turned,
        torch.get_num_threads(), loudness,
    )  # fmt: skip
    _run("angles", call, position_n, frequencies, out)
    return out


def rope(x_nhd: Tensor, cos_sin_n2d: Tensor) -> None:
    """Turn queries or keys in place, as `rotate` in model/positions.py does.

    `cos_sin_n2d` has the cosines and sines of each row's position (`angles` there); features
    beyond its last axis stay. The rows of x may be parts of wider ones.
    """
    n, heads, d = x_nhd.shape
    turned = cos_sin_n2d.shape[-1]
    assert cos_sin_n2d.shape == (n, 2, turned) and turned <= d and cos_sin_n2d.is_contiguous()
    assert _fits(x_nhd) and _fits(cos_sin_n2d) and x_nhd.stride(1) == d
    call = _Rope(
        x_nhd.data_ptr(), cos_sin_n2d.data_ptr(), n, heads, d, turned, x_nhd.stride(0),
        torch.get_num_threads(),
    )  # fmt: skip
    _run("rope", call, x_nhd, cos_sin_n2d)


def _check_pool(pool_ksd: Tensor, scales_ks: Tensor | None, kv_heads: int, d: int) -> None:
    assert pool_ksd.is_contiguous() and pool_ksd.shape[::2] == (kv_heads, d)
    if pool_ksd.dtype == torch.int8:
        assert scales_ks is not None and scales_ks.shape == pool_ksd.shape[:2]
        assert _fits(scales_ks) and scales_ks.is_contiguous()


def kv_write(
    k_nkd: Tensor,
    v_nkd: Tensor,
    keys_ksd: Tensor,
    values_ksd: Tensor,
    slots_n: Tensor,
    key_scales_ks: Tensor | None = None,
    value_scales_ks: Tensor | None = None,
) -> None:
    """Put keys and values of n positions into one layer's pool, at the slots `slots_n` (int32).

    Pools are (k, slots, d) in fp32, bf16 or int8; int8 ones have scales (k, slots) fp32.
    """
    n, kv_heads, d = k_nkd.shape
    slots_n = _int32(slots_n)
    assert v_nkd.shape == k_nkd.shape and slots_n.shape == (n,)
    assert k_nkd.stride(1) == d and v_nkd.stride(1) == d and _fits(k_nkd) and _fits(v_nkd)
    _check_pool(keys_ksd, key_scales_ks, kv_heads, d)
    _check_pool(values_ksd, value_scales_ks, kv_heads, d)
    call = _Write(
        k_nkd.data_ptr(), v_nkd.data_ptr(), keys_ksd.data_ptr(), values_ksd.data_ptr(),
        _pointer(key_scales_ks), _pointer(value_scales_ks), slots_n.data_ptr(), n, kv_heads, d,
        keys_ksd.shape[1], POOL_TYPES[keys_ksd.dtype], k_nkd.stride(0), v_nkd.stride(0),
        torch.get_num_threads(),
    )  # fmt: skip
    _run("kv_write", call, k_nkd, v_nkd, keys_ksd, values_ksd, slots_n,
         key_scales_ks, value_scales_ks)  # fmt: skip


def attend(
    q_nhd: Tensor,
    keys_ksd: Tensor,
    values_ksd: Tensor,
    pages_tp: Tensor,
    text_n: Tensor,
    position_n: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    key_scales_ks: Tensor | None = None,
    value_scales_ks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of n queries over one layer's pool: (n, h, d) -> (n, h, d).

    Query i belongs to text `text_n[i]`, whose pages of 16 slots are listed in `pages_tp` (position
    p lies in page p // 16), and sees the positions up to its own, `position_n[i]`; with a `window`
    the last that many. Queries of one text should stand together, and then share what is read.
    All three index tensors are int32.
    """
    n, heads, d = q_nhd.shape
    kv_heads = keys_ksd.shape[0]
    if out is None:
        out = torch.empty(n, heads, d)
    text_n, position_n, pages_tp = _int32(text_n), _int32(position_n), _int32(pages_tp)
    assert heads % kv_heads == 0 and values_ksd.shape == keys_ksd.shape
    assert text_n.shape == (n,) and position_n.shape == (n,) and out.shape == q_nhd.shape
    assert _fits(q_nhd) and _fits(out) and q_nhd.stride(1) == d and out.stride(1) == d
    _check_pool(keys_ksd, key_scales_ks, kv_heads, d)
    _check_pool(values_ksd, value_scales_ks, kv_heads, d)
    call = _Attend(
        q_nhd.data_ptr(), out.data_ptr(), keys_ksd.data_ptr(), values_ksd.data_ptr(),
        _pointer(key_scales_ks), _pointer(value_scales_ks), pages_tp.data_ptr(), text_n.data_ptr(),
        position_n.data_ptr(), n, heads, kv_heads, d, keys_ksd.shape[1],
        POOL_TYPES[keys_ksd.dtype], pages_tp.shape[1], q_nhd.stride(0), out.stride(0), window,
        torch.get_num_threads(), scale, softcap,
    )  # fmt: skip
    _run("attend", call, q_nhd, out, keys_ksd, values_ksd, key_scales_ks, value_scales_ks,
         pages_tp, text_n, position_n)  # fmt: skip
    return out


def gated(gate_nf: Tensor, up_nf: Tensor, kind: str, out: Tensor | None = None) -> Tensor:
    """activation(gate) * up: (n, f); `kind` is one of `GATES`. `out` may be `gate_nf`."""
    n, width = gate_nf.shape
    if out is None:
        out = torch.empty(n, width)
    assert up_nf.shape == out.shape == (n, width)
    assert _fits(gate_nf) and _fits(up_nf) and _fits(out)
    call = _Gate(
        gate_nf.data_ptr(), up_nf.data_ptr(), out.data_ptr(), n, width, gate_nf.stride(0),
        up_nf.stride(0), out.stride(0), GATES[kind], torch.get_num_threads(),
    )  # fmt: skip
    _run("gated", call, gate_nf, up_nf, out)
    return out


def add(x_nm: Tensor, y_nm: Tensor) -> None:
    """y += x, in place: (n, m) both."""
    n, width = x_nm.shape
    assert y_nm.shape == x_nm.shape and _fits(x_nm) and _fits(y_nm)
    call = _Add(
        x_nm.data_ptr(), y_nm.data_ptr(), n, width, x_nm.stride(0), y_nm.stride(0),
        torch.get_num_threads(),
    )  # fmt: skip
    _run("add", call, x_nm, y_nm)
