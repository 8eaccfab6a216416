"""`scratchlm models`: the models with short names, the families, and the sizes to train."""

from __future__ import annotations

import argparse
import json
from textwrap import fill
from typing import Any

KINDS = ("decoder", "encoder", "encoder-decoder")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "models",
        help="list the models and families that are known",
        description="Models that can be pulled by name, families whose Hugging Face folders can "
        "be read and written, and the presets of sizes to train from scratch.",
        epilog="examples:\n  scratchlm models\n  scratchlm models --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def listing() -> dict[str, Any]:
    """Everything that the command prints, as one mapping."""
    from llm_from_scratch.model.presets import PRESETS
    from llm_from_scratch.weights.catalogue import CATALOGUE, local_path
    from llm_from_scratch.weights.families import FAMILIES
    from llm_from_scratch.weights.gguf_architectures import ARCHITECTURES

    models = []
    for name, package in CATALOGUE.items():
        path = local_path(name)
        models.append(
            {
                "name": name,
                "title": package.title,
                "kind": package.kind,
                "parameters": package.parameters,
                "bytes": package.size,
                "licence": package.licence,
                "origin": package.origin,
                "pulled": path is not None,
                "path": None if path is None else str(path),
            }
        )
    families = [
        {"name": f.name, "kind": f.kind, "title": f.title, "classes": f.classes}
        for f in FAMILIES.values()
    ]
    presets = [{"name": name, "family": family} for name, (family, _) in PRESETS.items()]
    gguf = [{"name": a.name, "family": a.family} for a in ARCHITECTURES.values()]
    return {"models": models, "families": families, "gguf": gguf, "presets": presets}


def run(args: argparse.Namespace) -> int:
    found = listing()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    print("Models to pull by name:")
    for model in found["models"]:
        state = "here" if model["pulled"] else f"not yet: scratchlm pull {model['name']}"
        print(
            f"  {model['name']:<16} {model['kind']}: {model['title']}, "
            f"{model['bytes'] / 1e6:.0f} MB, {model['licence']} ({state})"
        )
    print("\nFamilies whose Hugging Face folders can be read and written:")
    for family in sorted(found["families"], key=lambda family: KINDS.index(family["kind"])):
        print(f"  {family['name']:<16} {family['kind']}: {family['title']}")
    print("\nGGUF architectures that can be read and written:")
    print("  " + fill(", ".join(entry["name"] for entry in found["gguf"]), 98))
    print("\nSizes to train from scratch (--model.preset):")
    for preset in found["presets"]:
        print(f"  {preset['name']:<16} {preset['family']}")
    return 0
