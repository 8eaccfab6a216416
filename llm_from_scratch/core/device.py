"""Where and how precisely to compute: device, dtype, seeds, threads, and the machine's limits."""

from __future__ import annotations

import functools
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from llm_from_scratch.core.errors import UserError, nearest

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is cuda, then mps, then cpu; anything else must exist on this machine."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind = name.partition(":")[0]
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if kind not in available:
        raise UserError(
            f"There is no device '{name}'; use auto, cpu, cuda or mps.{nearest(kind, available)}"
        )
    if not available[kind]:
        raise UserError(f"Device '{name}' is not available here; use auto or cpu.")
    return torch.device(name)


def memory_bytes(device: torch.device) -> int | None:
    """The memory that the device works in, or None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows
        return None
    limit = _container_limit()
    return machine if limit is None else min(machine, limit)


def free_memory_bytes(device: torch.device) -> int | None:
    """What of that memory is free now, or None where the system does not say.

    On a CPU that counts what the system would give back from its caches; on Apple's GPUs it is what
    their driver recommends.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    available = _number_in(Path("/proc/meminfo"), "MemAvailable:")
    if available is None:
        return memory_bytes(device)  # macOS: there is no such figure, take the whole
    limit, used = _container_limit(), _number_in(CONTAINER / "memory.current")
    if limit is None or used is None:
        return available * 1024
    given_back = _number_in(CONTAINER / "memory.stat", "inactive_file") or 0
    return max(0, min(available * 1024, limit - used + given_back))


CONTAINER = Path("/sys/fs/cgroup")


def _container_limit() -> int | None:
    """The memory that a container grants its programs (control groups, version 2)."""
    return _number_in(CONTAINER / "memory.max")


def _number_in(path: Path, name: str = "") -> int | None:
    """The number behind `name` in one of the kernel's files; None where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    for line in text.split("\n"):
        word, _, rest = line.partition(" ") if name else ("", "", line)
        if word == name and rest.split()[:1] and rest.split()[0].isdigit():
            return int(rest.split()[0])
    return None


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock read afterwards is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@functools.cache
def gemm_rate(device_name: str, dtype: torch.dtype, size: int = 1024) -> float:
    """Measured matrix-multiplication rate in FLOP/s (2 n^3 per product), best of several tries."""
    device = torch.device(device_name)
    size = size if device.type == "cpu" else 4096
    # Not torch.randn: measuring must not draw from the generator that training draws from.
    a = torch.full((size, size), 0.5, device=device, dtype=dtype)
    b = torch.full((size, size), 0.25, device=device, dtype=dtype)
    best = float("inf")
    torch.mm(a, b)
    for _ in range(5):
        synchronise(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@functools.cache
def memory_bandwidth(device_name: str) -> float:
    """Measured read bandwidth in bytes/s: summing a buffer far larger than the caches."""
    device = torch.device(device_name)
    count = (256 if device.type == "cpu" else 2048) * 1024 * 1024 // 4
    buffer = torch.ones(count, device=device)
    best = float("inf")
    buffer.sum()
    for _ in range(3):
        synchronise(device)
        start = time.perf_counter()
        buffer.sum()
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 4 * count / best


def pick_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where this machine multiplies bf16 clearly faster than fp32, else fp32."""
    if name != "auto":
        if name not in ("fp32", "bf16"):
            raise UserError(f"train.precision is '{name}'; it must be auto, fp32 or bf16.")
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if device.type != "cpu":
        return "fp32"
    fp32, bf16 = (gemm_rate("cpu", d, 512) for d in (torch.float32, torch.bfloat16))
    return "bf16" if bf16 > 1.3 * fp32 else "fp32"


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the generators that training draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def processor_name() -> str:
    """The processor as its maker names it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Versions and hardware, for environment.json and the benchmarks."""
    from importlib import metadata

    versions = {}
    for name in ("scratchlm", "torch", "numpy", "tokenizers", "safetensors"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "unknown"
    result: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }
    if torch.cuda.is_available():
        result["cuda_device"] = torch.cuda.get_device_name()
    return result
