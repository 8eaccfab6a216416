"""`scratchlm convert`: a model in another format."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EXAMPLES = """\
examples:
  scratchlm convert runs/quickstart --to gguf --kind Q8_0 --out quickstart.gguf
  scratchlm convert model.gguf --to hf --dtype bf16 --out model/
  scratchlm convert smollm2-135m --to hf --out smollm2/ --json
  scratchlm convert old/pytorch_model.bin --to hf --out new/
  scratchlm convert runs/poet/adapter --to hf --out merged/
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="write a model in another format",
        description="Write a model as a Hugging Face folder (hf) or as a GGUF file (gguf). This is "
        "also the one door for old pickles (pytorch_model.bin with its config.json beside it): "
        "only tensors are taken out of them, and no code is run. An adapter is merged into its "
        "base, in fp32 unless --dtype or --kind says otherwise.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a model folder, a run folder, a .gguf file, a hub name, a short name, or a pickle",
    )
    parser.add_argument("--to", required=True, choices=("hf", "gguf"), help="the format")
    parser.add_argument("--out", required=True, metavar="PATH", help="the folder or .gguf file")
    parser.add_argument(
        "--kind", help="of a GGUF: F32, F16, BF16, Q8_0 or Q4_0 (default: as stored)"
    )
    parser.add_argument("--dtype", help="of a folder: fp32, bf16 or fp16 (default: as stored)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that says what is being done: in a terminal with a clock, else line by line."""
    if os.environ.get("SCRATCHLM_QUIET"):
        yield lambda line: None
    elif not sys.stderr.isatty():
        yield lambda line: print(line, file=sys.stderr, flush=True)
    else:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
        task = bar.add_task("", total=None)

        def show(line: str) -> None:
            bar.start()  # with the first line: a download before that has a bar of its own
            bar.update(task, description=line.replace("[", r"\["))

        try:
            yield show
        finally:
            bar.stop()


@contextmanager
def waiting(line: str, when: bool = True) -> Iterator[None]:
    """In a terminal a clock beside `line`, for work that shows nothing until it is done."""
    if not when or not sys.stderr.isatty():
        yield
        return
    with progress() as report:
        report(line)
        yield


def run(args: argparse.Namespace) -> int:
    from llm_from_scratch.core.files import human_bytes
    from llm_from_scratch.weights.convert import convert

    with progress() as report:
        done = convert(
            args.model, args.to, args.out, kind=args.kind, dtype=args.dtype, report=report
        )
    if args.json:
        print(json.dumps({"model": args.model, **dataclasses.asdict(done)}, indent=2))
        return 0
    what = f"{done.parameters / 1e6:.1f} M parameters, {done.kind}, {human_bytes(done.bytes)}"
    print(f"Written: {done.path} ({what})")
    return 0
