"""`scratchlm generate`: continue a prompt, or answer it with --chat."""

from __future__ import annotations

import argparse
import dataclasses
import json
import secrets
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llm_from_scratch.core.errors import UserError

if TYPE_CHECKING:
    from llm_from_scratch.generate.generate import Result
    from llm_from_scratch.generate.sampling import SamplingSettings
    from llm_from_scratch.generate.tokens import Writer
    from llm_from_scratch.text.tokenizer import Tokenizer

EXAMPLES = """\
examples:
  scratchlm generate runs/quickstart "def read_"
  scratchlm generate smollm2-135m "What is the capital of France?" --chat
  scratchlm generate t5-small/ "translate English to German: The house is wonderful."
  scratchlm generate gpt2/ "Once upon a time" --temperature 0.8 --top_p 0.95 --seed 1
  scratchlm generate model.gguf "1, 2, 3," --temperature 0 --stop "\\n" --json
  echo "Dear diary" | scratchlm generate runs/mine -
"""

DTYPES = ("auto", "fp32", "bf16", "fp16")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and how to load it."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a model folder, a run folder, a .gguf file, a hub name, or a short name",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument(
        "--dtype", default="auto", metavar="|".join(DTYPES), help="precision of the weights"
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of `SamplingSettings`."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max_new_tokens", type=int, default=128, metavar="N")
    group.add_argument(
        "--temperature",
        type=float,
        metavar="X",
        help="0: always the likeliest token (default: 0.8; answers and translations: 0)",
    )
    group.add_argument(
        "--top_k", type=int, default=0, metavar="K", help="only the K likeliest tokens (0: off)"
    )
    group.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        metavar="P",
        help="only the likeliest tokens that hold P of the probability (1: off)",
    )
    group.add_argument(
        "--min_p",
        type=float,
        default=0.0,
        metavar="P",
        help="only tokens at least P times as likely as the likeliest (0: off)",
    )
    group.add_argument(
        "--repetition_penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: tokens that occurred become less likely",
    )
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    group.add_argument(
        "--stop",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="end before any of these texts (\\n means a line end)",
    )


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt, or answer one with --chat",
        description="Continue a prompt. The text streams to standard output, notes to standard "
        "error.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads stdin")
    parser.add_argument(
        "--chat", action="store_true", help="the prompt is a message: answer it (chat template)"
    )
    parser.add_argument(
        "--system", metavar="TEXT", help="with --chat: what the model is told first"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    add_sampling_arguments(parser)


def settings_of(args: argparse.Namespace) -> SamplingSettings:
    """The sampling settings of a command line; without --seed a fresh one, so it can be told."""
    from llm_from_scratch.generate.sampling import SamplingSettings

    names = [field.name for field in dataclasses.fields(SamplingSettings)]
    values = {name: getattr(args, name) for name in names}
    if values["temperature"] is None:
        # A small model that draws its words at random soon talks nonsense. That is welcome in a
        # story, but who asks a question wants the answer that the model finds likeliest.
        values["temperature"] = 0.0 if getattr(args, "chat", True) else 0.8
    values["stop"] = tuple(
        text.replace("\\n", "\n").replace("\\t", "\t") for text in values["stop"]
    )
    if values["seed"] is None:
        values["seed"] = secrets.randbelow(2**31)
    return SamplingSettings(**values)


def load_model(args: argparse.Namespace) -> tuple[Writer, Tokenizer]:
    """The MODEL of a command line, which must be one that writes."""
    from llm_from_scratch.core.device import PRECISIONS
    from llm_from_scratch.generate.tokens import as_writer
    from llm_from_scratch.weights.sources import load

    if args.dtype not in DTYPES:
        raise UserError(f"--dtype is '{args.dtype}'; it must be one of {', '.join(DTYPES)}.")
    model, tokenizer = load(args.model, dtype=PRECISIONS.get(args.dtype), device=args.device)
    return as_writer(model), tokenizer


def explain_template(tokenizer: Tokenizer) -> None:
    """Say so where a model was not made for conversations."""
    if tokenizer.chat_template is None:
        print(
            "This model has no chat template: it is a base model, which continues text. It is "
            "given the conversation as lines that begin with 'User:' and 'Assistant:'.",
            file=sys.stderr,
        )


NOT_UTF8 = "Standard input is not UTF-8 text; convert it first."


def read_stdin() -> str:
    """All of standard input, which must be UTF-8 whatever the terminal's encoding is."""
    return "".join(stdin_lines())


def stdin_lines() -> Iterator[str]:
    """Standard input line by line, as the lines come; their ends are those of this program."""
    if sys.stdin is None:  # closed by whoever started this program
        return
    try:
        # The text layer would decode as the locale says, and under some locales lets anything pass.
        for line in getattr(sys.stdin, "buffer", sys.stdin):
            text = line.decode("utf-8") if isinstance(line, bytes) else line
            yield text[:-2] + "\n" if text.endswith("\r\n") else text
    except UnicodeDecodeError as error:
        raise UserError(NOT_UTF8) from error


def read_prompt(prompt: str) -> str:
    """The prompt itself, or standard input for '-' without its last line end."""
    from llm_from_scratch.text.tokenizer import without_surrogates

    return without_surrogates(read_stdin().removesuffix("\n") if prompt == "-" else prompt)


def run(args: argparse.Namespace) -> int:
    from llm_from_scratch.model.encoder_decoder import EncoderDecoder

    settings = settings_of(args)
    if args.system is not None and not args.chat:
        raise UserError("--system is part of a conversation; add --chat.")
    prompt = read_prompt(args.prompt)
    model, tokenizer = load_model(args)
    if args.temperature is None and isinstance(model, EncoderDecoder):
        # What is made of a source is no invention: of a translation the likeliest is wanted.
        settings = dataclasses.replace(settings, temperature=0.0)
    texts, result = (answer if args.chat else continuation)(
        model, tokenizer, prompt, settings, args
    )
    if args.json:
        text = "".join(texts)
        print(json.dumps(report(args, prompt, text, settings, result()), ensure_ascii=False))
        return 0
    for text in texts:
        print(text, end="", flush=True)
    print()
    return 0


def continuation(
    model: Writer,
    tokenizer: Tokenizer,
    prompt: str,
    settings: SamplingSettings,
    args: argparse.Namespace,
) -> tuple[Iterator[str], Any]:
    """The pieces of the text, and a function that gives the `Result` once they are through."""
    from llm_from_scratch.generate.generate import encode_for, stream

    results: list[Result] = []
    pieces = stream(model, tokenizer, [encode_for(model, tokenizer, prompt)], settings)

    def texts() -> Iterator[str]:
        for piece in pieces:
            if piece.result is not None:
                results.append(piece.result)
            yield piece.text

    return texts(), lambda: results[0]


def answer(
    model: Writer,
    tokenizer: Tokenizer,
    prompt: str,
    settings: SamplingSettings,
    args: argparse.Namespace,
) -> tuple[Iterator[str], Any]:
    """As `continuation`, for a message and its answer."""
    from llm_from_scratch.generate.conversation import Conversation

    conversation = Conversation(model, tokenizer, settings, system=args.system)
    explain_template(tokenizer)
    return conversation.ask(prompt), lambda: conversation.result


def report(
    args: argparse.Namespace,
    prompt: str,
    text: str,
    settings: SamplingSettings,
    result: Result,
) -> dict[str, Any]:
    """What --json prints."""
    return {
        "model": args.model,
        "prompt": prompt,
        **dataclasses.asdict(result),
        "text": text,
        "new_tokens": len(result.tokens),
        "settings": dataclasses.asdict(settings),
    }
