"""`scratchlm finetune METHOD MODEL`: a run from rows of data and a model to a better model."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from llm_from_scratch.core.config import (
    Parser,
    from_dict,
    from_flags,
    merge,
    read_yaml,
    settings_epilog,
    to_yaml,
)
from llm_from_scratch.core.errors import UserError

EXAMPLES = """examples:
  scratchlm finetune sft smollm2-135m --data chats.jsonl --out runs/chat
  scratchlm finetune sft smollm2-135m --data chats.jsonl --lora.rank 16 --out runs/adapter
  scratchlm finetune sft --out runs/chat --resume
  scratchlm finetune sft smollm2-135m --data all.csv --test test.csv --out runs/new

Rows come from .jsonl, .json, .csv, .tsv and .parquet files, also .gz, or folders of them.
Without --val and --test a share of the rows is held back, drawn by the seed.
scratchlm finetune METHOD --help lists the settings of a method.
"""


def add_parser(subparsers: Any) -> None:
    from llm_from_scratch.train.methods.names import METHODS

    parser = subparsers.add_parser(
        "finetune",
        help="teach a model from rows of data",
        description="Teach a model: the loop, adapters, splits and reports are the same for all "
        "methods.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    methods = parser.add_subparsers(
        parser_class=Parser, dest="method", metavar="METHOD", required=True
    )
    for name, method in METHODS.items():
        one = methods.add_parser(
            name,
            help=method.purpose,
            description=f"{method.purpose[0].upper()}{method.purpose[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            late_epilog=lambda name=name: help_of(name),
        )
        one.add_argument("model", nargs="?", metavar="MODEL", help="what to start from")
        one.add_argument("--data", nargs="+", metavar="FILE", help="the rows to learn from")
        one.add_argument("--val", nargs="+", metavar="FILE", help="the best model is chosen here")
        one.add_argument("--test", nargs="+", metavar="FILE", help="the result is measured here")
        one.add_argument("--out", metavar="DIR", help="the run folder")
        one.add_argument("--config", metavar="FILE", help="settings as YAML; flags win over it")
        one.add_argument("--resume", action="store_true", help="go on with the run in --out")
        one.add_argument("--print_config", action="store_true", help="print all settings and stop")
        one.add_argument("--json", action="store_true", help="print the summary as JSON")
        if name == "sft":
            one.add_argument(
                "--show_masks", type=int, metavar="N",
                help="print N rows as the model reads them, what it learns marked, and stop",
            )  # fmt: skip


def help_of(name: str) -> str:
    """The examples and settings of a method, for its --help."""
    from llm_from_scratch.train.methods import method_named
    from llm_from_scratch.train.methods.names import METHODS

    examples = "\n".join(f"  {line}" for line in METHODS[name].examples)
    return f"examples:\n{examples}\n\n{settings_epilog(method_named(name).Config)}"


def given_values(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """What --config and the flags say (flags win), nested by part."""
    from llm_from_scratch.train.finetune import steps_meant

    values: dict[str, Any] = read_yaml(args.config) if args.config else {}
    flags = from_flags(args.settings, cls)
    if "max_steps" in flags.get("train", {}) and not args.resume:
        # Steps that are asked for win over the passes that a method takes by default.
        flags["train"].setdefault("epochs", None)
    values = merge(values, flags)
    for flag, part in (("data", "paths"), ("val", "val"), ("test", "test")):
        if getattr(args, flag):
            values = merge(values, {"data": {part: getattr(args, flag)}})
    for name in ("model", "out"):
        if getattr(args, name):
            values = merge(values, {name: getattr(args, name)})
    return values if args.resume else steps_meant(values)


def run(args: argparse.Namespace) -> int:
    from llm_from_scratch.train.methods import method_named

    cls = method_named(args.method).Config
    given = given_values(args, cls)
    if given.get("method", args.method) != args.method:
        raise UserError(
            f"{args.config} is for {given['method']}, not for {args.method}: run "
            f"scratchlm finetune {given['method']} --config {args.config}."
        )
    given["method"] = args.method
    config = from_dict(cls, given)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    if getattr(args, "show_masks", None) is not None:
        return show_masks(config, args.show_masks)
    from llm_from_scratch.train.finetune import finetune

    result = finetune(args.method, config, resume=args.resume, given=given)
    if result.interrupted:
        return result.exit_code
    if args.json:
        print(json.dumps(result.summary))
    elif result.summary:
        from llm_from_scratch.evaluate.report import number_text

        for name, value in result.summary.items():
            print(f"{name:<24} {number_text(value)}")
        print(f"\nThe run is in {result.folder}: see report.html there.")
    return 0


def show_masks(config: Any, count: int) -> int:
    """Print the first rows with what is learnt marked: green, or in [[ ]]."""
    from llm_from_scratch.cli.tokenizer import load_tokenizer
    from llm_from_scratch.train.methods.sft import mask_texts

    if count < 1:
        raise UserError(f"--show_masks is {count}; it must be at least 1.")
    if not config.model or not config.data.paths:
        raise UserError("--show_masks needs a MODEL and --data FILE.")
    tokenizer = load_tokenizer(config.model)
    for text in mask_texts(config, tokenizer, count, color=sys.stdout.isatty()):
        print(f"{text}\n")
    return 0
