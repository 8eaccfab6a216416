"""`scratchlm quantize`: a model in few bits."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

EXAMPLES = """\
examples:
  scratchlm quantize runs/quickstart --to int8 --out small/
  scratchlm quantize smollm2-135m --to int4 --group_size 64 --out small/
  scratchlm quantize smollm2-135m --to int4 --method gptq --calibrate texts/ --out small/
  scratchlm quantize org/name --to nf4 --out small/ --json
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "quantize",
        help="write a model in few bits",
        description="Write a model as a folder whose matrices are in 4 or 8 bits: compressed-"
        "tensors (int8, int4) or bitsandbytes (nf4). `transformers` loads both, and every command "
        "here computes with them as they are. Embeddings and norms stay as they were.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a model folder, a run folder, a .gguf file, a hub name, or a short name",
    )
    parser.add_argument("--to", required=True, metavar="int8|int4|nf4", help="the format")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--method",
        default="rtn",
        metavar="rtn|gptq",
        help="round to the nearest, or fit the rounding to a text (default: rtn)",
    )
    add_calibration(parser, "gptq")
    parser.add_argument(
        "--group_size",
        type=int,
        metavar="N",
        help="inputs that share a scale: 32, 64, 128, or 0 for the whole row (default: 32 for "
        "int4, the whole row for int8); where it does not divide a row, the next smaller does",
    )
    parser.add_argument(
        "--zero_points", action="store_true", help="of integers: each group has one"
    )
    parser.add_argument(
        "--dtype",
        metavar="bf16|fp16|fp32",
        help="of embeddings, norms and scales (default: as stored, but bf16 for fp32)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_calibration(parser: argparse.ArgumentParser, method: str) -> None:
    """The flags of methods that look at a text."""
    parser.add_argument(
        "--calibrate",
        nargs="+",
        default=[],
        metavar="PATH",
        help=f"text for {method}, as --data takes it: like what the model is for, and never what "
        "it is measured on",
    )
    parser.add_argument(
        "--calibrate_samples", type=int, default=128, metavar="N", help="windows (default: 128)"
    )
    parser.add_argument(
        "--calibrate_length", type=int, default=512, metavar="N", help="their tokens (default: 512)"
    )
    parser.add_argument(
        "--device", default="auto", help="for calibration: auto, cpu, cuda or mps (default: auto)"
    )


def run(args: argparse.Namespace) -> int:
    from llm_from_scratch.cli.convert import progress
    from llm_from_scratch.core.files import human_bytes
    from llm_from_scratch.train.quantize import quantize

    with progress() as report:
        done = quantize(
            args.model,
            args.to,
            args.out,
            method=args.method,
            calibrate=args.calibrate,
            group_size=args.group_size,
            zero_points=args.zero_points,
            dtype=args.dtype,
            samples=args.calibrate_samples,
            length=args.calibrate_length,
            device=args.device,
            report=report,
        )
    if args.json:
        print(json.dumps({"model": args.model, **dataclasses.asdict(done)}, indent=2))
        return 0
    share = f"{done.quantized / done.parameters:.0%} of {done.parameters / 1e6:.1f} M parameters"
    print(
        f"Written: {done.path} ({human_bytes(done.bytes)}; {done.matrices} matrices, {share}, in "
        f"{done.bits_per_weight:.2f} bits each)"
    )
    if done.dense:
        print(f"Left as they were, their rows do not divide: {len(done.dense)} matrices")
    return 0
