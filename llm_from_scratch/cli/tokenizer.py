"""`scratchlm tokenizer`: learn a vocabulary from text, or see how one cuts a text."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_from_scratch.cli.generate import read_stdin
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.json_files import read_json

if TYPE_CHECKING:
    from llm_from_scratch.text.tokenizer import Tokenizer

DEFAULT_SIZE = 8192
KINDS = ("bpe", "unigram", "wordpiece", "char")
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"}
FILES = "tokenizer.json, *.model, *.spm, vocab.txt"
# What a kind alone can do: its flag, and the kinds.
FLAGS = {
    "keep_case": ("wordpiece",),
    "no_byte_fallback": ("unigram",),
    "no_unknown": ("char",),
    "character_coverage": ("unigram", "wordpiece"),
}

TRAIN_EXAMPLES = """examples:
  scratchlm tokenizer train --data books/ --vocab_size 8192 --out tokenizers/books
  scratchlm tokenizer train --data aozora.zip --language ja --vocab_size 16384 --out tokenizers/ja
  scratchlm tokenizer train --data aozora.zip --language ja --kind unigram --out tokenizers/uni
  scratchlm tokenizer train --data books/ --kind wordpiece --out tokenizers/bert
  scratchlm tokenizer train --data input.txt --kind char --special --out tokenizers/char
  scratchlm tokenizer train --data chats.jsonl --data.text_field content --vocab_size 4096 \\
      --out tokenizers/chat --special '<|endoftext|>' '<|im_start|>' '<|im_end|>'
"""
SHOW_EXAMPLES = """examples:
  scratchlm tokenizer show tokenizers/books "It is a truth universally acknowledged"
  scratchlm tokenizer show smollm2-135m "吾輩は猫である。"
  scratchlm tokenizer show runs/quickstart - < README.md
  scratchlm tokenizer show tokenizers/ja "名前はまだ無い。" --json
  scratchlm tokenizer show smollm2-135m --chat conversation.json
"""
COMPARE_EXAMPLES = """examples:
  scratchlm tokenizer compare tokenizers/books tokenizers/ja --text wagahai.txt
  scratchlm tokenizer compare smollm2-135m tokenizers/ja tokenizer.model --text wagahai.txt
  scratchlm tokenizer compare tokenizers/ja runs/ja --text books.zip --html compared.html
  scratchlm tokenizer compare tokenizers/ja --text - --json < wagahai.txt
"""


def add_parser(subparsers: Any) -> None:
    """Declare the verb with its parts, `train`, `show` and `compare`."""
    parser = subparsers.add_parser(
        "tokenizer",
        help="train a tokenizer, or see how one cuts a text",
        description="Train a tokenizer, or see how one cuts a text.",
        epilog=TRAIN_EXAMPLES
        + SHOW_EXAMPLES.removeprefix("examples:\n")
        + COMPARE_EXAMPLES.removeprefix("examples:\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = parser.add_subparsers(dest="part", required=True, metavar="train|show|compare")
    _add_train(parts)
    _add_show(parts)
    _add_compare(parts)


def _add_train(parts: Any) -> None:
    train = parts.add_parser(
        "train",
        help="learn a vocabulary from text",
        description="Learn a vocabulary from text; the folder suits every model and transformers.",
        epilog=TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument(
        "--data", nargs="+", required=True, metavar="PATH", help="files, folders, or: python"
    )
    train.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    train.add_argument(
        "--vocab_size",
        type=int,
        metavar="N",
        help=f"entries, special tokens included (default: {DEFAULT_SIZE}; char: all that occur)",
    )
    # Those of text/training.py, whose import would make --help slow.
    train.add_argument(
        "--kind",
        choices=KINDS,
        default="bpe",
        help="bpe: pairs joined, down to bytes (GPT-2, Llama); unigram: pieces with probabilities "
        "(T5, many Japanese models); wordpiece: BERT's, for encoders; char: a token for each "
        "character (default: bpe)",
    )
    train.add_argument(
        "--special",
        nargs="*",
        metavar="TOKEN",
        help="tokens that text never becomes (default: <|endoftext|>; wordpiece: BERT's five)",
    )
    train.add_argument("--language", choices=("en", "ja"), default="en", help="default: en")
    train.add_argument(
        "--min_count",
        type=int,
        default=2,
        metavar="N",
        help="no entry for a pair or substring that occurs less often (default: 2)",
    )
    train.add_argument(
        "--character_coverage",
        type=float,
        metavar="SHARE",
        help="unigram, wordpiece: of the text, in characters with an entry of their own",
    )
    train.add_argument(
        "--no_byte_fallback",
        action="store_true",
        help="unigram: no entries for bytes; other characters are unknown, and lost",
    )
    train.add_argument(
        "--keep_case",
        action="store_true",
        help="wordpiece: upper case and accents stay (with --language ja they always do)",
    )
    train.add_argument(
        "--no_unknown",
        action="store_true",
        help="char: no <|unk|> token; characters never seen are an error",
    )
    # Spelled like the same settings of a run.
    train.add_argument(
        "--data.on_bad",
        choices=("skip", "stop"),
        default="skip",
        dest="on_bad",
        help="what to do with a broken file or row: skip (and name it) or stop (default: skip)",
    )
    train.add_argument(
        "--data.text_field",
        default="text",
        metavar="NAME",
        dest="text_field",
        help="the field of .jsonl, .json, .csv, .tsv and .parquet that is text (default: text)",
    )
    train.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _add_show(parts: Any) -> None:
    show = parts.add_parser(
        "show",
        help="how a tokenizer cuts a text",
        description="The tokens of a text in colours, each with its id.",
        epilog=SHOW_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    show.add_argument(
        "model", metavar="MODEL", help=f"a tokenizer's folder or file ({FILES}), or any MODEL"
    )
    show.add_argument(
        "text", metavar="TEXT", nargs="?", default="", help="the text; - reads standard input"
    )
    show.add_argument(
        "--chat", metavar="FILE", help="a conversation instead: JSON, a list of messages"
    )
    show.add_argument(
        "--with_special", action="store_true", help="text such as <|endoftext|> is a special token"
    )
    show.add_argument("--json", action="store_true", help="print one JSON object")


def _add_compare(parts: Any) -> None:
    compare = parts.add_parser(
        "compare",
        help="several tokenizers beside each other on one text",
        description="The tokens of a text's beginning in colours, and a table for all of it.",
        epilog=COMPARE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help=f"tokenizers' folders or files ({FILES}), or any MODEL",
    )
    compare.add_argument(
        "--text", metavar="FILE", required=True, help="the text: any file that train reads, or -"
    )
    compare.add_argument(
        "--characters",
        type=int,
        default=300,
        metavar="N",
        help="of the text to show as tokens (default: 300); all of it is counted",
    )
    compare.add_argument("--html", metavar="OUT", help="also write it all as an HTML page")
    compare.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Carry out the verb; returns the exit code."""
    return {"train": train, "show": show, "compare": compare}[args.part](args)


def train(args: argparse.Namespace) -> int:
    """Read the text, learn, save, say what came out."""
    from llm_from_scratch.core.files import writable_folder
    from llm_from_scratch.core.runlog import LiveLine
    from llm_from_scratch.text.files import has_tokenizer
    from llm_from_scratch.text.training import COUNTED, train_tokenizer

    line = LiveLine(quiet=args.json)
    size = args.vocab_size
    refuse_idle_flags(args)
    if size is None and args.kind != "char":
        size = DEFAULT_SIZE
    out = writable_folder(args.out)  # before the work, not after it
    refuse_foreign_files(out)
    replaces = has_tokenizer(out)
    texts = gather(args, line.say)
    characters = sum(map(len, texts))

    def progress(what: str, done: int, total: int) -> None:
        total = total or characters
        text = f"{what}: {done:,} of {total:,} {COUNTED.get(what, '')}".rstrip()
        line.show(text, force=done >= total)

    start = time.perf_counter()
    tokenizer = train_tokenizer(
        texts,
        kind=args.kind,
        vocab_size=size,
        special=args.special,
        language=args.language,
        min_count=args.min_count,
        unknown=not args.no_unknown,
        character_coverage=args.character_coverage,
        byte_fallback=not args.no_byte_fallback,
        lowercase=False if args.keep_case else None,
        progress=progress,
    )
    seconds = time.perf_counter() - start
    tokenizer.save(out)
    sample = [text[:100_000] for text in texts[:: max(1, len(texts) // 100)]]
    tokens = sum(map(len, tokenizer.encode_batch(sample)))
    result = {
        "out": str(args.out),
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "seconds": round(seconds, 3),
        "characters": characters,
        "bytes_per_token": round(sum(len(text.encode()) for text in sample) / max(tokens, 1), 3),
        "replaced": replaces,
    }
    if args.kind == "char":
        result["characters_without_entry"] = len(set().union(*texts) - {*tokenizer.tokens})
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
        return 0
    report(result, size, line.say)
    return 0


def report(result: dict[str, Any], size: int | None, say: Any) -> None:
    """What a person wants to know of a vocabulary that was learnt."""
    entries, out = result["vocab_size"], result["out"]
    say(
        f"{entries:,} entries from {result['characters']:,} characters in "
        f"{result['seconds']:.1f} s; {result['bytes_per_token']:.2f} bytes per token on the same "
        "text."
    )
    if size and entries < size:
        say(f"Fewer than the {size:,} asked for: the text has no more to give.")
    if lost := result.get("characters_without_entry"):
        say(
            f"{lost:,} different characters of the text have no entry and become <|unk|>: a "
            "larger --vocab_size has room for them."
        )
    saved = "The tokenizer there was replaced:" if result["replaced"] else "Saved in"
    say(f"{saved} {out}. Look at it: scratchlm tokenizer show {out} TEXT")


def refuse_idle_flags(args: argparse.Namespace) -> None:
    """A flag that the kind has no use for would be a wish that is not heard."""
    for name, kinds in FLAGS.items():
        if getattr(args, name) not in (None, False) and args.kind not in kinds:
            raise UserError(
                f"--{name} is for --kind {' or '.join(kinds)}, not {args.kind}; leave it out."
            )


def refuse_foreign_files(out: Path) -> None:
    """A tokenizer may replace a tokenizer, but must not slip into a model or a run."""
    names = [entry.name for entry in out.iterdir()] if out.is_dir() else []
    if foreign := sorted(set(names) - TOKENIZER_FILES):
        raise UserError(
            f"The folder {out} holds '{foreign[0]}', which is no part of a tokenizer. Choose "
            "another --out."
        )


def gather(args: argparse.Namespace, say: Any) -> list[str]:
    """The texts that --data names."""
    from llm_from_scratch.data.read import PYTHON, ReadReport, read_documents

    if args.data == [PYTHON]:
        from llm_from_scratch.data.python_corpus import python_corpus

        return [document.text for document in python_corpus()[0]]
    report = ReadReport()
    found = read_documents(args.data, on_bad=args.on_bad, report=report, text_field=args.text_field)
    texts = [document.text for document in found]
    say(report.summary())
    return texts


def load_tokenizer(model: str) -> Tokenizer:
    """The tokenizer of a folder that has one, or of anything else that names a model."""
    from llm_from_scratch.text.files import has_tokenizer
    from llm_from_scratch.text.tokenizer import Tokenizer

    path = Path(model).expanduser()
    for folder in (path, path / "model", path / "tokenizer"):
        if has_tokenizer(folder):
            return Tokenizer.load(folder)
    pieces = path.suffix in (".model", ".spm") or ".model." in path.name
    if path.is_file() and (pieces or path.suffix in (".json", ".txt")):
        return Tokenizer.load(path)
    # Only here: this imports PyTorch, which takes longer than everything else together.
    from llm_from_scratch.weights.gguf import GGUF
    from llm_from_scratch.weights.gguf_tokenizer import read_tokenizer
    from llm_from_scratch.weights.sources import locate

    found = locate(model)
    if not found.is_file():
        return Tokenizer.load(found)
    inside = read_tokenizer(GGUF(found))
    if inside is None:
        raise UserError(f"{found} holds a model without a tokenizer: give one that has its own.")
    return inside


def show(args: argparse.Namespace) -> int:
    """Print the tokens of a text."""
    from llm_from_scratch.text.tokenizer import without_surrogates

    tokenizer = load_tokenizer(args.model)
    if args.chat is not None:
        return show_conversation(tokenizer, args.chat, as_json=args.json)
    # Of standard input every character counts, a last line end too.
    text = read_stdin() if args.text == "-" else without_surrogates(args.text)
    if not text:
        raise UserError("There is no text to show: give some after MODEL.")
    ids = tokenizer.encode(text, special=args.with_special)
    size = len(text.encode("utf-8", "replace"))
    if args.json:
        tokens = [{"id": i, "text": tokenizer.token_text(i)} for i in ids]
        print(json.dumps({"tokens": tokens, "characters": len(text), "bytes": size}))
        return 0

    from rich.console import Console

    from llm_from_scratch.text.show import painted

    console = Console(highlight=False, soft_wrap=True)
    console.print(painted([(tokenizer.token_text(i), i) for i in ids], console.color_system))
    console.print(
        f"{len(ids):,} tokens, {len(text):,} characters, {size:,} bytes: "
        f"{size / max(len(ids), 1):.2f} bytes per token."
    )
    return 0


def show_conversation(tokenizer: Tokenizer, file: str, *, as_json: bool) -> int:
    """Print a conversation through the chat template, and on which tokens training has a loss."""
    from llm_from_scratch.text.chat import encode_chat, mask_pieces, show_mask

    messages = read_json(file, "give --chat a JSON file")
    if isinstance(messages, dict):  # a line of a `messages` data set
        messages = messages.get("messages")
    if not isinstance(messages, list):
        raise UserError(f'{file} must hold a list such as [{{"role": "user", "content": "Hi"}}].')
    tokens = encode_chat(tokenizer, messages)
    if as_json:
        print(json.dumps({"tokens": mask_pieces(tokenizer, tokens)}, ensure_ascii=False))
        return 0
    print(show_mask(tokenizer, tokens, color=sys.stdout.isatty()))
    learned = sum(tokens.mask)
    print(f"{len(tokens.ids):,} tokens, {learned:,} of them learned (green, or in [[ ]]).")
    return 0


def compare(args: argparse.Namespace) -> int:
    """Print what several tokenizers make of a text."""
    from llm_from_scratch.core.files import write_aside
    from llm_from_scratch.core.runlog import LiveLine
    from llm_from_scratch.text.compare import as_json, page, pieces
    from llm_from_scratch.text.compare import compare as count
    from llm_from_scratch.text.show import print_compared

    line = LiveLine(quiet=args.json)
    if args.html and Path(args.html).is_dir():
        raise UserError(f"{args.html} is a folder; --html names the page to write.")
    if args.characters < 0:
        raise UserError(f"--characters is {args.characters}; it must be at least 0.")
    text = _text_to_compare(args.text)
    excerpt = text[: args.characters]
    start = time.perf_counter()
    found, shown = [], []
    for name in args.models:
        tokenizer = load_tokenizer(name)

        def progress(done: int, total: int, name: str = name) -> None:
            if time.perf_counter() - start > 2:
                line.show(f"{name}: {done:,} of {total:,} characters", force=done >= total)

        found.append(count(name, tokenizer, text, progress=progress))
        shown.append(pieces(tokenizer, excerpt))
    line.end()
    if args.html:
        with write_aside(args.html) as file:
            file.write(page(f"Tokenizers on {Path(args.text).name}", found, shown))
    if args.json:
        rows = [as_json(one, tokens) for one, tokens in zip(found, shown, strict=True)]
        size = {"characters": len(text), "bytes": len(text.encode())}
        print(json.dumps({"text": args.text, **size, "tokenizers": rows}, ensure_ascii=False))
        return 0
    print_compared(found, shown)
    if args.html:
        line.say(f"Written to {args.html}.")
    return 0


def _text_to_compare(file: str) -> str:
    """All text of a file, whatever kind it is of."""
    from llm_from_scratch.data.read import read_documents

    if file == "-":
        text = read_stdin()
    elif not Path(file).exists():
        raise UserError(f"{file} does not exist; check the path given as --text.")
    else:
        text = "\n".join(document.text for document in read_documents([file], on_bad="stop"))
    if not text:
        raise UserError(f"There is no text in {file} to compare tokenizers on: give another file.")
    return text
