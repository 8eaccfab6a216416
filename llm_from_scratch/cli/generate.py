"""`scratchlm generate`: continue a prompt, or answer it with --chat."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llm_from_scratch.cli.best_of import (
    TEMPERATURE,
    add_best_of_arguments,
    check_best_of,
    print_best,
)
from llm_from_scratch.cli.sampling_flags import (
    DTYPES,
    add_model_arguments,
    add_sampling_arguments,
    explain_template,
    load_model,
    settings_of,
)
from llm_from_scratch.core.errors import UserError

if TYPE_CHECKING:
    from llm_from_scratch.generate.generate import Result
    from llm_from_scratch.generate.requests import Writer
    from llm_from_scratch.generate.settings import SamplingSettings
    from llm_from_scratch.text.tokenizer import Tokenizer

EXAMPLES = """\
examples:
  scratchlm generate runs/quickstart "def read_"
  scratchlm generate smollm2-135m "What is the capital of France?" --chat
  scratchlm generate t5-small/ "translate English to German: The house is wonderful."
  scratchlm generate gpt2/ "Once upon a time" --temperature 0.8 --top_p 0.95 --seed 1
  scratchlm generate model.gguf "1, 2, 3," --temperature 0 --stop "\\n" --json
  scratchlm generate smollm2-135m "A poem, please." --chat --adapter runs/poet/adapter
  scratchlm generate smollm2-135m "Is the sky green?" --chat --choice yes no
  scratchlm generate smollm2-135m "Invent a person." --chat --json_schema person.schema.json
  scratchlm generate smollm2-135m "What is 17 + 25?" --chat --best_of 9 --best_by votes
  echo "Dear diary" | scratchlm generate runs/mine -
PROMPT stands before flags that take several values: --stop, --choice, --logit_bias.
"""

LONG = 4000  # characters of a prompt that may take more than a moment to read

CACHE_DTYPES = (*DTYPES, "int8")


def add_number_arguments(parser: argparse.ArgumentParser) -> None:
    """How many texts, and what is told about them."""
    group = parser.add_argument_group("numbers")
    group.add_argument(
        "--n", type=int, default=1, metavar="N", help="write N texts for the prompt (default: 1)"
    )
    group.add_argument(
        "--logprobs",
        type=int,
        metavar="K",
        help="with --json: the log-probability of each new token, and of the K likeliest",
    )
    group.add_argument(
        "--prompt_logprobs", type=int, metavar="K", help="with --json: the same for the prompt"
    )
    group.add_argument(
        "--num_beams",
        type=int,
        default=1,
        metavar="N",
        help="look for the likeliest text with N texts side by side, at temperature 0 (1: off)",
    )
    group.add_argument(
        "--length_penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="with --num_beams: above 0 favours longer texts (default: 1)",
    )


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """What makes it faster or smaller and does not change the text."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--draft", metavar="MODEL", help="a small model of the same vocabulary guesses ahead"
    )
    group.add_argument(
        "--lookup",
        type=int,
        metavar="N",
        help="guess up to N tokens ahead: what followed the last words before (5 is usual)",
    )
    group.add_argument(
        "--cache_dtype",
        default="auto",
        metavar="|".join(CACHE_DTYPES),
        help="precision of keys and values; int8 takes a quarter of fp32's memory",
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
    add_number_arguments(parser)
    add_best_of_arguments(parser)
    add_engine_arguments(parser)


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
    from llm_from_scratch.cli.convert import waiting
    from llm_from_scratch.model.encoder_decoder import EncoderDecoder

    if args.best_of is not None and args.temperature is None:
        args.temperature = TEMPERATURE  # several texts are to differ
    check_best_of(args)
    settings = settings_of(args)
    if args.system is not None and not args.chat:
        raise UserError("--system is part of a conversation; add --chat.")
    check_flags(args)
    prompt = read_prompt(args.prompt)
    model, tokenizer = load_model(args)
    if args.best_of is not None:
        options = engine_options(args, tokenizer)
        return print_best(args, model, tokenizer, prompt, settings, options)
    if args.temperature is None and isinstance(model, EncoderDecoder):
        # What is made of a source is no invention: of a translation the likeliest is wanted.
        settings = dataclasses.replace(settings, temperature=0.0)
    texts, results = (answer if args.chat else continuation)(
        model, tokenizer, prompt, settings, args
    )
    whole = args.json or settings.num_beams > 1 or settings.n > 1
    line = "Writing ..." if whole else "Reading the prompt ..."
    with waiting(line, when=whole or len(prompt) > LONG):
        text = "".join(texts) if whole else next(texts, "")
    if args.json:
        print(json.dumps(report(args, prompt, text, settings, results()), ensure_ascii=False))
        return 0
    if settings.n > 1:
        for number, result in enumerate(results(), 1):
            print(f"{number}:", file=sys.stderr, flush=True)
            print(result.text, flush=True)
        return 0
    for piece in itertools.chain([text], texts):
        print(piece, end="", flush=True)
    print()
    return 0


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what cannot be done, or would have no effect, while there is no model yet."""
    if args.model.startswith(("http://", "https://")):
        raise UserError(f"{args.model} is an address; `scratchlm chat` talks with its server.")
    if args.chat and args.n > 1:
        raise UserError(
            "--n is for texts without --chat; for another answer give another --seed and a "
            "--temperature above 0."
        )
    if not args.json and (args.logprobs is not None or args.prompt_logprobs is not None):
        raise UserError("--logprobs and --prompt_logprobs are told in JSON alone; add --json.")
    if args.length_penalty != 1 and args.num_beams == 1:
        raise UserError("--length_penalty compares beams; add --num_beams.")
    if args.draft is not None and args.lookup is not None:
        raise UserError("--draft and --lookup both guess ahead; give one of them.")
    if args.lookup is not None and args.lookup < 1:
        raise UserError(f"--lookup is {args.lookup}; it must be at least 1 token.")
    if args.cache_dtype not in CACHE_DTYPES:
        known = ", ".join(CACHE_DTYPES)
        raise UserError(f"--cache_dtype is '{args.cache_dtype}'; it must be one of {known}.")


def engine_options(args: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the flags mean for `Engine`; the draft is loaded as the model was."""
    import torch

    from llm_from_scratch.core.device import PRECISIONS
    from llm_from_scratch.generate.speculative import Draft, Lookup

    dtypes = {**PRECISIONS, "int8": torch.int8}
    options: dict[str, Any] = {"cache_dtype": dtypes.get(args.cache_dtype)}
    if args.lookup is not None:
        options["proposer"] = Lookup(args.lookup)
    if args.draft is not None:
        draft, own = load_model(
            argparse.Namespace(**{**vars(args), "model": args.draft, "adapter": None})
        )
        if own.tokens != tokenizer.tokens:
            raise UserError(
                f"--draft is {args.draft}, whose vocabulary is not that of {args.model}; a draft "
                "must have the same tokenizer."
            )
        options["proposer"] = Draft(draft)  # type: ignore[arg-type]  # the engine checks it
    return options


def continuation(
    model: Writer,
    tokenizer: Tokenizer,
    prompt: str,
    settings: SamplingSettings,
    args: argparse.Namespace,
) -> tuple[Iterator[str], Any]:
    """The pieces of the text, and a function that gives the results once they are through."""
    from llm_from_scratch.generate.generate import encode_for, stream

    results: list[Result] = []
    ids = encode_for(model, tokenizer, prompt)
    pieces = stream(model, tokenizer, [ids], settings, **engine_options(args, tokenizer))

    def texts() -> Iterator[str]:
        for piece in pieces:
            if piece.result is not None:
                results.append(piece.result)
            yield piece.text

    return texts(), lambda: sorted(results, key=lambda one: one.choice)


def answer(
    model: Writer,
    tokenizer: Tokenizer,
    prompt: str,
    settings: SamplingSettings,
    args: argparse.Namespace,
) -> tuple[Iterator[str], Any]:
    """As `continuation`, for a message and its answer."""
    from llm_from_scratch.generate.chat import LocalChat
    from llm_from_scratch.generate.conversation import Conversation

    chat = LocalChat(model, tokenizer, options=engine_options(args, tokenizer))
    conversation = Conversation(chat, settings, system=args.system)
    explain_template(tokenizer)
    return conversation.ask(prompt), lambda: [conversation.reply and conversation.reply.result]


def report(
    args: argparse.Namespace,
    prompt: str,
    text: str,
    settings: SamplingSettings,
    results: list[Result],
) -> dict[str, Any]:
    """What --json prints: the text and what belongs to it, or with --n a list of these."""
    told = [{**dataclasses.asdict(one), "new_tokens": len(one.tokens)} for one in results if one]
    several: dict[str, Any] = {"results": told}
    return {
        "model": args.model,
        "prompt": prompt,
        **(several if settings.n > 1 else {**told[0], "text": text}),
        "settings": dataclasses.asdict(settings),
    }
