"""`scratchlm pretrain`: a run from text to model."""

from __future__ import annotations

import argparse
import json
from typing import Any

from llm_from_scratch.core.config import (
    from_dict,
    from_flags,
    merge,
    read_yaml,
    settings_epilog,
    to_yaml,
)
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.train.settings import PretrainConfig

EXAMPLES = """examples:
  scratchlm pretrain --data books/ --out runs/books
  scratchlm pretrain --data aozora.zip --data.language ja --tokenizer.vocab_size 8192 --out runs/ja
  scratchlm pretrain --data input.txt --tokenizer.kind char --model.depth 6 --out runs/char
  scratchlm pretrain --data python --model.family qwen3_moe --model.n_experts 8 \\
      --model.n_active 2 --out runs/experts
  scratchlm pretrain --config run.yaml --train.max_steps 500 --out runs/again
  scratchlm pretrain --out runs/books --resume

"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "pretrain",
        help="train a language model from your own text",
        description="Train a language model from text: files and folders, also compressed.",
        epilog=EXAMPLES + settings_epilog(PretrainConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", nargs="+", metavar="PATH", help="files, folders, or: python")
    parser.add_argument("--out", metavar="DIR", help="the run folder")
    parser.add_argument("--config", metavar="FILE", help="settings as YAML; flags win over it")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--print_config", action="store_true", help="print all settings and stop")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def given_values(args: argparse.Namespace) -> dict[str, Any]:
    """What --config and the flags say (flags win), nested by part."""
    values: dict[str, Any] = read_yaml(args.config) if args.config else {}
    values = merge(values, from_flags(args.settings, PretrainConfig))
    if args.data:
        values = merge(values, {"data": {"paths": args.data}})
    if args.out:
        values = merge(values, {"out": args.out})
    return values


def run(args: argparse.Namespace) -> int:
    given = given_values(args)
    config = from_dict(PretrainConfig, given)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    if not config.out:
        raise UserError("No run folder was given; name one with --out.")
    from llm_from_scratch.train.pretrain import pretrain

    result = pretrain(config, resume=args.resume, given=given)
    if result.interrupted:
        return result.exit_code
    if args.json:
        print(json.dumps(result.summary))
    elif result.summary:
        print_summary(result.folder, result.summary)
    return 0


def print_summary(folder: Any, summary: dict[str, Any]) -> None:
    """The figures of a finished run, one a line."""
    for name, value in summary.items():
        print(f"{name:<18} {value:,.4f}" if isinstance(value, float) else f"{name:<18} {value:,}")
    print(f"\nThe run is in {folder}. Try: scratchlm generate {folder} 'Once upon a time'")
