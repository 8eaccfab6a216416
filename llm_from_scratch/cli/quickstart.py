"""`scratchlm quickstart`: the whole way, once, in at most four minutes on two cores."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from llm_from_scratch.cli.pretrain import given_values
from llm_from_scratch.core.config import from_dict, merge
from llm_from_scratch.core.errors import UserError

EXAMPLES = """examples:
  scratchlm quickstart
  scratchlm quickstart --data my_texts/ --out runs/mine
  scratchlm quickstart --language ja --data aozora/ --out runs/ja
  scratchlm quickstart --minutes 10

Without --data it trains on the text that every Python carries: the standard library and
its help topics. For Japanese, Aozora Bunko (https://www.aozora.gr.jp/) offers works out of
copyright as zip files; give the folder with them as --data: encodings, ruby and notes are
understood. Settings of a run (--model.depth 6, --train.seed 2) are taken as by `pretrain`.
"""

JA_HINT = (
    "For Japanese give your own text with --data. Works out of copyright can be had from Aozora "
    "Bunko (https://www.aozora.gr.jp/): put its zip files into a folder and name that folder."
)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "quickstart",
        help="train a model on this machine in minutes and talk to it",
        description="Train a tokenizer and a language model, and compare it with gzip, bz2, xz.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", nargs="+", metavar="PATH", help="your own files or folders")
    parser.add_argument("--language", choices=("en", "ja"), default="en", help="default en")
    parser.add_argument("--out", metavar="DIR", default=None, help="default runs/quickstart")
    parser.add_argument(
        "--minutes", type=float, default=3.6, help="time for everything, default 3.6"
    )
    parser.add_argument("--config", metavar="FILE", help="settings as YAML; flags win over it")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def free_folder(base: str) -> str:
    """`runs/quickstart`, or `runs/quickstart-2`, ... when that is taken."""
    path, number = Path(base), 1
    while path.exists() and any(path.iterdir()):
        number += 1
        path = Path(f"{base}-{number}")
    return str(path)


def run(args: argparse.Namespace) -> int:
    if not 0 < args.minutes < 10_000:
        raise UserError(f"--minutes is {args.minutes:g}; it must be above 0 and below 10000.")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("quickstart runs in one process; under torchrun use scratchlm pretrain.")
    if args.language == "ja" and not args.data:
        raise UserError(JA_HINT)
    from llm_from_scratch.train.quickstart import defaults, quickstart
    from llm_from_scratch.train.settings import PretrainConfig

    args.out = args.out or free_folder("runs/quickstart")
    given = given_values(args)
    base = defaults(args.language, tuple(args.data or ()))
    config = from_dict(PretrainConfig, merge(base, given))
    if config.data.val_fraction == 0:
        raise UserError("data.val_fraction is 0, but quickstart measures on text it held out.")
    result, figures = quickstart(config, seconds=60 * args.minutes, given=given)
    if result.interrupted:
        return result.exit_code
    if args.json:
        print(json.dumps(result.summary))
    elif figures:
        prompt = "def read_" if not args.data else {"ja": "春の", "en": "It was "}[args.language]
        print_report(result.folder, result.summary, figures, prompt)
    return 0


def print_report(
    folder: Path, summary: dict[str, Any], figures: dict[str, float], prompt: str
) -> None:
    """The comparison, some text, and what to type next."""
    samples = (folder / "samples.md").read_text(encoding="utf-8").rpartition("\n## ")[2]
    print("\nText that the model wrote:\n")
    print("## " + samples.strip() + "\n")
    names = {
        "ours": "this model",
        "gzip": "gzip -9",
        "bz2": "bz2 -9",
        "xz": "xz -9e",
        "xz_primed": "xz -9e, primed with the training text",
    }
    print("Held-out text, bits per byte (less is better):\n")
    longest = max(figures.values())
    for name, value in figures.items():
        bar = "█" * round(30 * value / longest)
        print(f"  {value:6.3f}  {bar:<30}  {names[name]}")
    best = min(figures["gzip"], figures["bz2"], figures["xz"])
    share = 1 - figures["ours"] / best
    verdict = f"{share:.1%} fewer bits than" if share > 0 else f"{-share:.1%} more bits than"
    print(f"\nThat is {verdict} the best of gzip, bz2 and xz.")
    print(
        f"{summary['parameters']:,} parameters, {summary['steps']:,} steps, {summary['tokens']:,} "
        f"tokens in {summary['seconds']:.0f} s ({summary['tokens_per_second']:,.0f} tokens/s, MFU "
        f"{summary['mfu']:.0%})."
    )
    print(f"The run is in {folder}/ (loss.png, samples.md, model/, config.yaml).\n")
    print("Next:")
    print(f"  scratchlm generate {folder} '{prompt}'")
    print(f"  scratchlm chat {folder}")
    print("  scratchlm chat smollm2-135m        # a real pretrained model, 98 MB, Apache-2.0")
    print("  scratchlm pretrain --data YOUR_TEXT --out runs/mine")
