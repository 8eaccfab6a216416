"""The flags that `generate`, `chat` and others share: MODEL, how to load it, how to sample."""

from __future__ import annotations

import argparse
import dataclasses
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llm_from_scratch.core.errors import UserError, shown

if TYPE_CHECKING:
    from llm_from_scratch.generate.requests import Writer
    from llm_from_scratch.generate.settings import SamplingSettings
    from llm_from_scratch.text.tokenizer import Tokenizer

MAX_SCHEMA_BYTES = 4 << 20
DTYPES = ("auto", "fp32", "bf16", "fp16")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and how to load it."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a model folder, a run folder, a .gguf file, a hub name, or a short name",
    )
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="the folder of an adapter (PEFT) to put around the model",
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
    group.add_argument(
        "--presence_penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="off the logit of every token written so far (0: off; up to 2 is usual)",
    )
    group.add_argument(
        "--frequency_penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="the same for each time that it was written",
    )
    group.add_argument(
        "--no_repeat_ngram",
        type=int,
        default=0,
        metavar="N",
        help="no N tokens in a row come twice (0: off)",
    )
    group.add_argument(
        "--logit_bias",
        nargs="+",
        default=[],
        metavar="ID=X",
        help="added to the logit of a token id: -100 in effect forbids it, 100 demands it",
    )
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    group.add_argument(
        "--stop",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="end before any of these texts (\\n means a line end)",
    )
    add_form_arguments(parser)


def add_form_arguments(parser: argparse.ArgumentParser) -> None:
    """What form the text must have."""
    group = parser.add_argument_group("structured output (one of them)")
    group.add_argument(
        "--json_schema", metavar="FILE|JSON", help="write JSON that this schema describes"
    )
    group.add_argument("--regex", metavar="PATTERN", help="write a text that the pattern matches")
    group.add_argument(
        "--choice", nargs="+", default=[], metavar="TEXT", help="write one of these texts"
    )


def settings_of(args: argparse.Namespace) -> SamplingSettings:
    """The sampling settings of a command line; without --seed a fresh one, so it can be told."""
    from llm_from_scratch.generate.settings import SamplingSettings

    names = [field.name for field in dataclasses.fields(SamplingSettings)]
    values = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if values["temperature"] is None:
        # A small model that draws its words at random soon talks nonsense. That is welcome in a
        # story, but who asks a question wants the answer that the model finds likeliest.
        likeliest = getattr(args, "chat", True) or values.get("num_beams", 1) > 1
        values["temperature"] = 0.0 if likeliest else 0.8
    values["stop"] = tuple(
        text.replace("\\n", "\n").replace("\\t", "\t") for text in values["stop"]
    )
    values["logit_bias"] = dict(read_bias(text) for text in values["logit_bias"])
    values["json_schema"] = read_schema(values["json_schema"])
    if values["seed"] is None:
        values["seed"] = secrets.randbelow(2**31)
    settings = SamplingSettings(**values)
    check_form(settings)
    return settings


def check_form(settings: SamplingSettings) -> None:
    """Refuse a form that no grammar can be made of; who wants none waits for no PyTorch."""
    if settings.json_schema is not None or settings.regex is not None or settings.choice:
        from llm_from_scratch.generate.constraint import check_form

        check_form(settings)


def read_bias(text: str) -> tuple[str, str]:
    """A token id and a number out of ID=X; what they are worth the settings find out."""
    token, sign, value = text.partition("=")
    if not sign:
        raise UserError(f"--logit_bias is '{text}'; it must be a token id and a number, ID=X.")
    return token, value


def read_schema(text: str | None) -> str | None:
    """A JSON schema: the text itself where it is an object, else the file of that name."""
    if text is None or text.lstrip().startswith("{"):
        return text
    path = Path(text)
    try:
        if path.stat().st_size > MAX_SCHEMA_BYTES:
            raise UserError(f"{path} is larger than {MAX_SCHEMA_BYTES >> 20} MiB; is it a schema?")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text, so it is no JSON schema.") from error
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"--json_schema is {shown(Path(text).as_posix())}, which is neither a JSON object nor "
            "a file that can be read."
        ) from error


def load_model(args: argparse.Namespace) -> tuple[Writer, Tokenizer]:
    """The MODEL of a command line, which must be one that writes."""
    from llm_from_scratch.core.device import PRECISIONS
    from llm_from_scratch.generate.requests import as_writer
    from llm_from_scratch.weights.sources import load

    if args.dtype not in DTYPES:
        raise UserError(f"--dtype is '{args.dtype}'; it must be one of {', '.join(DTYPES)}.")
    model, tokenizer = load(
        args.model, dtype=PRECISIONS.get(args.dtype), device=args.device, adapter=args.adapter
    )
    return as_writer(model), tokenizer


def explain_template(tokenizer: Tokenizer) -> None:
    """Say so where a model was not made for conversations."""
    if tokenizer.chat_template is None:
        print(
            "This model has no chat template: it is a base model, which continues text. It is "
            "given the conversation as lines that begin with 'User:' and 'Assistant:'.",
            file=sys.stderr,
        )
