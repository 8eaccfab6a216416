"""`scratchlm doctor`: versions, devices, caches and measured limits of this machine."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="say what this machine is, has and can do",
        description="Versions, devices, caches, and the measured limits of this machine.",
        epilog="examples:\n  scratchlm doctor\n  scratchlm doctor --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def examine() -> dict[str, Any]:
    """Everything that doctor says, as one mapping."""
    import torch

    from llm_from_scratch.core.device import (
        environment,
        gemm_rate,
        memory_bandwidth,
        pick_device,
        pick_precision,
    )
    from llm_from_scratch.core.files import cache_folder
    from llm_from_scratch.quant import kernels

    device = pick_device("auto")
    dtypes = {"fp32": torch.float32}
    if device.type != "mps":
        dtypes["bf16"] = torch.bfloat16
    cache = cache_folder()
    size = sum(f.stat().st_size for f in cache.rglob("*") if f.is_file()) if cache.is_dir() else 0
    free = shutil.disk_usage(Path.cwd()).free
    return {
        **environment(),
        "device": device.type,
        "precision": pick_precision("auto", device),
        "gemm_flops": {name: gemm_rate(device.type, dtype) for name, dtype in dtypes.items()},
        "memory_bytes_per_s": memory_bandwidth(device.type),
        "compiler": shutil.which("c++") or shutil.which("g++") or shutil.which("cl"),
        "kernels": kernels.instructions(),
        "cache": {"folder": str(cache), "bytes": size},
        "disk_free_bytes": free,
    }


def run(args: argparse.Namespace) -> int:
    from llm_from_scratch.core.files import human_bytes

    if not args.json:
        print("Measuring for a few seconds ...", file=sys.stderr)
    found = examine()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    rows = [
        ("Python", found["python"]),
        ("system", found["system"]),
        ("processor", f"{found['processor']}, {found['cores']} cores"),
        *((name, version) for name, version in found["versions"].items()),
        ("device", found.get("cuda_device", found["device"])),
        ("training precision", found["precision"]),
        *((f"GEMM {n}", f"{r / 1e9:,.0f} GFLOP/s") for n, r in found["gemm_flops"].items()),
        ("memory bandwidth", f"{found['memory_bytes_per_s'] / 1e9:,.1f} GB/s"),
        ("C++ compiler", found["compiler"] or "none (train.compile stays off)"),
        ("kernels", found["kernels"]),
        ("cache", f"{found['cache']['folder']} ({human_bytes(found['cache']['bytes'])})"),
        ("free disk here", human_bytes(found["disk_free_bytes"])),
    ]
    for name, value in rows:
        print(f"{name:<20} {value}")
    return 0
