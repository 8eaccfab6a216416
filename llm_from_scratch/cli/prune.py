"""`scratchlm prune`: a model without its least important weights."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from llm_from_scratch.cli.quantize import add_calibration

EXAMPLES = """\
examples:
  scratchlm prune runs/quickstart --sparsity 0.3 --out pruned/
  scratchlm prune smollm2-135m --method wanda --calibrate texts/ --out pruned/
  scratchlm prune smollm2-135m --pattern 2:4 --method wanda --calibrate texts/ --out pruned/
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "prune",
        help="set the least important weights of a model to zero",
        description="Set a share of every matrix in the blocks to zero. The folder holds numbers "
        "and is no smaller for it, even larger than a model in few bits: zeros are worth something "
        "to what compresses them or skips them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a model folder, a run folder, a .gguf file, a hub name, or a short name",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--sparsity", type=float, default=0.5, metavar="X", help="the share of zeros (default: 0.5)"
    )
    parser.add_argument(
        "--pattern",
        default="unstructured",
        metavar="unstructured|2:4",
        help="anywhere, or two in every four inputs (default: unstructured)",
    )
    parser.add_argument(
        "--method",
        default="magnitude",
        metavar="magnitude|wanda",
        help="the smallest, or by what they meet on a text (default: magnitude)",
    )
    add_calibration(parser, "wanda")
    parser.add_argument(
        "--dtype", help="fp32, bf16 or fp16 (default: as stored, but fp32 for a GGUF in few bits)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from llm_from_scratch.cli.convert import progress
    from llm_from_scratch.core.files import human_bytes
    from llm_from_scratch.train.prune import prune

    with progress() as report:
        done = prune(
            args.model,
            args.out,
            sparsity=args.sparsity,
            method=args.method,
            pattern=args.pattern,
            calibrate=args.calibrate,
            dtype=args.dtype,
            samples=args.calibrate_samples,
            length=args.calibrate_length,
            device=args.device,
            report=report,
        )
    if args.json:
        print(json.dumps({"model": args.model, **dataclasses.asdict(done)}, indent=2))
        return 0
    print(
        f"Written: {done.path} ({human_bytes(done.bytes)}; {done.sparsity:.1%} of the weights in "
        f"{done.matrices} matrices are zero)"
    )
    return 0
