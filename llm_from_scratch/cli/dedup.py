"""`scratchlm dedup FILE...`: texts that are the same as others, or mostly contained in them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import refuse_existing

EXAMPLES = """examples:
  scratchlm dedup books/ --out books.jsonl
  scratchlm dedup train.csv --field text --against test.csv --out new.jsonl
  scratchlm dedup sms.tsv --columns label text --field text --json
  scratchlm dedup chats.jsonl --field instruction output --similarity 0.6 --exact

Without --field a file is read as pretrain reads it: a plain text is one document. With --field each
row of a table is one text, and --out gets the rows that stay, whole.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "dedup",
        help="find texts that are the same or nearly the same",
        description="Find duplicates: texts that are the same but for case, width and blanks, and "
        "texts whose word sequences are mostly contained in another. Candidates come from MinHash "
        "sketches and are compared exactly, so nothing is left out by an estimate.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", nargs="+", metavar="FILE", help="files or folders with texts")
    parser.add_argument(
        "--against", nargs="+", metavar="FILE", default=[],
        help="texts that must not occur again, such as a test set; they stay as they are",
    )  # fmt: skip
    parser.add_argument("--field", nargs="+", metavar="NAME", help="the rows' fields with text")
    parser.add_argument(
        "--columns", nargs="+", metavar="NAME", default=[],
        help="the columns' names, for a table without a header",
    )  # fmt: skip
    parser.add_argument(
        "--similarity", type=float, default=0.8, metavar="X",
        help="the share of a text's runs of 5 words (or characters, where words are not spaced) "
        "in another that makes it a near-duplicate (default 0.8)",
    )  # fmt: skip
    parser.add_argument(
        "--exact", action="store_true",
        help="compare on all runs of words, without sketches: misses nothing, takes longer",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE", help="write what stays, as JSON lines")
    parser.add_argument(
        "--show", type=int, default=10, metavar="N", help="show N pairs (default 10)"
    )
    parser.add_argument("--json", action="store_true", help="print everything found, as JSON")


def run(args: argparse.Namespace) -> int:
    if not 0 < args.similarity <= 1:
        raise UserError(f"--similarity is {args.similarity}; it must be above 0 and at most 1.")
    if args.show < 0:
        raise UserError(f"--show is {args.show}; it must not be negative.")
    if args.columns and not args.field:
        raise UserError("--columns names the columns of rows; say which hold text with --field.")
    for path in (*args.data, *args.against):
        if not Path(path).exists():
            raise UserError(f"{path} does not exist; check the path.")
    if args.out is not None:
        refuse_existing(args.out)

    from llm_from_scratch.core.runlog import LiveLine
    from llm_from_scratch.data.dedup import Texts, deduplicate, read_texts

    line = LiveLine()
    bad: list[str] = []
    texts, against = (
        read_texts(paths, args.field, args.columns, bad, line) if paths else Texts()
        for paths in (args.data, args.against)
    )
    line.show(f"Comparing {len(texts.texts) + len(against.texts):,} texts")
    found = deduplicate(texts, against, args.similarity, exact=args.exact)
    line.end()
    for sentence in bad[:8]:
        line.say(f"Left out: {sentence}")
    if len(bad) > 8:
        line.say(f"Left out: {len(bad) - 8:,} more.")
    if args.out is not None:
        found.write(Path(args.out))
    summary = {**found.counts, "unreadable": len(bad)}
    if args.json:
        print(json.dumps({**summary, "pairs": found.pairs}, ensure_ascii=False))
        return 0
    for name, count in summary.items():
        print(f"{name.replace('_', ' '):<24} {count:,}")
    if found.pairs and args.show:
        print()
    for pair in found.pairs[: args.show]:
        kind = "the same" if pair["exact"] else f"{pair['similarity']:.0%}"
        print(f"{kind:>8}  {pair['text']}  is like  {pair['like']}\n          {pair['begins']}")
    if len(found.pairs) > args.show > 0:
        print(f"\n{len(found.pairs) - args.show:,} more; --json or --show prints them.")
    if args.out is not None:
        print(f"\n{args.out} holds the {found.counts['kept']:,} that stay.")
    return 0
