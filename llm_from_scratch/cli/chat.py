"""`scratchlm chat`: talk with a model in the terminal, be it here or at the address of a server."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

from llm_from_scratch.cli.commands import Commands, note, printable
from llm_from_scratch.cli.generate import stdin_lines
from llm_from_scratch.cli.sampling_flags import (
    add_model_arguments,
    add_sampling_arguments,
    explain_template,
    load_model,
    settings_of,
)
from llm_from_scratch.core.errors import RunError, UserError

if TYPE_CHECKING:
    from llm_from_scratch.generate.chat import Chat
    from llm_from_scratch.generate.conversation import Conversation
    from llm_from_scratch.generate.settings import SamplingSettings

EXAMPLES = """\
examples:
  scratchlm chat smollm2-135m
  scratchlm chat runs/quickstart --temperature 0.5
  scratchlm chat model/ --system "Answer in one sentence." --max_new_tokens 400
  printf 'Hello!\\nWhat can you do?\\n' | scratchlm chat smollm2-135m --json
  scratchlm chat http://127.0.0.1:8000/v1 --model NAME
MODEL may be the address of an OpenAI-compatible server. A key for it is read from the environment
variable SCRATCHLM_API_KEY.
"""

Ask = Callable[[], Generator[str, None, None]]


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk with a model in the terminal",
        description="Talk with a model in the terminal. Enter sends a message, Alt+Enter begins a "
        "new line in it; piped in, one line is one message. Ctrl-C stops an answer, Ctrl-D leaves, "
        "/help lists the commands.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--model",
        dest="served",
        metavar="NAME",
        help="at an address: the server's name of the model (needed where it has several)",
    )
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    add_sampling_arguments(parser)
    parser.add_argument(
        "--json", action="store_true", help="print each answer as one JSON object, a line each"
    )
    parser.add_argument(
        "--no_history",
        action="store_true",
        help="keep nothing of what is typed for the next session (it is kept in the cache folder)",
    )
    parser.set_defaults(max_new_tokens=512)


def run(args: argparse.Namespace) -> int:
    from llm_from_scratch.generate.chat import is_address
    from llm_from_scratch.generate.conversation import Conversation

    settings = settings_of(args)
    if is_address(args.model):
        if args.adapter is not None:
            raise UserError(
                "--adapter is put around a model on this machine; a server has its adapters by "
                "their own names: --model NAME."
            )
        if args.seed is None:  # not every server takes one
            settings = dataclasses.replace(settings, seed=None)
        chat = chat_at_address(args, settings)
    else:
        chat = chat_here(args)
    interactive = sys.stdin is not None and sys.stdin.isatty()
    with chat:
        conversation = Conversation(chat, settings, system=args.system)

        def answer(message: str, ask: Ask) -> None:
            if args.json:
                reply_json(conversation, message, ask)
            else:
                reply(conversation, ask)

        check = check_askable if is_address(args.model) else (lambda settings: None)
        commands = Commands(conversation, answer, interactive=interactive, check=check)
        talk(conversation, commands, interactive, keep=not args.no_history)
    return 0


def check_askable(settings: SamplingSettings) -> None:
    """Refuse settings that no server can be asked for."""
    from llm_from_scratch.generate.protocol import request_body

    request_body("", [{"role": "user", "content": ""}], settings, stream=True)


def chat_here(args: argparse.Namespace) -> Chat:
    """A model on this machine."""
    from llm_from_scratch.generate.chat import LocalChat
    from llm_from_scratch.model.flops import parameter_count
    from llm_from_scratch.quant.linear import QuantLinear

    if args.served is not None:
        raise UserError(
            "--model names a model of a server, whose address stands in the place of MODEL; "
            "an address begins with http:// or https://."
        )
    model, tokenizer = load_model(args)
    chat = LocalChat(model, tokenizer, name=args.model)
    explain_template(tokenizer)
    weight = next(model.parameters())
    packed = any(isinstance(part, QuantLinear) for part in model.modules())
    held = "in few bits" if packed else str(weight.dtype)[6:]
    note(
        f"{args.model}: {parameter_count(model.config) / 1e6:,.1f} M parameters, {held} on "
        f"{weight.device.type}, context {model.config.max_seq_len:,} tokens. /help lists the "
        "commands."
    )
    return chat


def chat_at_address(args: argparse.Namespace, settings: SamplingSettings) -> Chat:
    """A model that a server answers for; what it cannot be asked is refused before anything is."""
    from llm_from_scratch.generate.remote import RemoteChat

    for flag in ("device", "dtype"):
        if getattr(args, flag) != "auto":
            raise UserError(f"--{flag} is for a model on this machine; a server has its own.")
    check_askable(settings)
    chat = RemoteChat(args.model, args.served, report=note)
    note(f"{chat.name} at {chat.address}. /help lists the commands.")
    return chat


def talk(conversation: Conversation, commands: Commands, interactive: bool, keep: bool) -> None:
    """Read messages and commands until the input ends."""
    read = typed(commands, keep) if interactive else piped()
    while True:
        try:
            line = read()
            if not line.strip():
                continue
            if line.startswith("/") and not line.startswith("//"):
                try:
                    if not commands.obey(line):
                        return
                except UserError as error:
                    note(f"({error})")
                continue
            message = line.removeprefix("/") if line.startswith("//") else line
            commands.answer(message, functools.partial(conversation.ask, message))
        except EOFError:
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            note("\n(Ctrl-D or /quit leaves.)")
        except RunError as error:  # a server that is gone may come back
            if not interactive:
                raise
            note(f"({error})")


def piped() -> Callable[[], str]:
    """Standard input, line by line; `EOFError` behind the last."""
    lines = stdin_lines()

    def read() -> str:
        try:
            return next(lines).strip()
        except StopIteration:
            raise EOFError from None

    return read


def typed(commands: Commands, keep: bool) -> Callable[[], str]:
    """What a person types, several lines included."""
    from llm_from_scratch.cli.terminal import Terminal
    from llm_from_scratch.text.tokenizer import without_surrogates

    terminal = Terminal(keep=keep)

    def read() -> str:
        draft, commands.draft = commands.draft, ""
        return without_surrogates(terminal.read(draft).rstrip().lstrip("\n"))

    return read


def reply(conversation: Conversation, ask: Ask) -> None:
    """Print the answer as it comes; Ctrl-C stops it and keeps what was said."""
    shown = printable if sys.stdout.isatty() else str
    before = conversation.forgotten
    try:
        with interrupts() as seen, contextlib.closing(ask()) as pieces:
            for piece in pieces:
                if conversation.forgotten > before:
                    before = conversation.forgotten
                    note(f"(The context is full: the {before} oldest messages are left out.)")
                print(shown(piece), end="", flush=True)
                if seen:
                    raise KeyboardInterrupt
        print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        note("(stopped)")
        return
    except UserError as error:
        note(f"({error})")
        return
    if conversation.reply and conversation.reply.finish_reason == "length":
        note("(The answer was cut off: --max_new_tokens or the context was used up.)")


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """Within the block a Ctrl-C is noted as well as raised: where a library swallows it, the list
    still has it."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def interrupt(number: int, frame: object) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield seen
    finally:
        # None: it was set outside of Python, and cannot be set again from here.
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)


def reply_json(conversation: Conversation, message: str, ask: Ask) -> None:
    """Print the message and the whole answer as one line of JSON."""
    row: dict[str, Any] = {"message": message}
    try:
        row["answer"] = "".join(ask())
        if (said := conversation.reply) is not None:
            row["finish_reason"] = said.finish_reason
            if said.usage is not None:
                row["prompt_tokens"] = said.usage.prompt_tokens
                row["new_tokens"] = said.usage.completion_tokens
            if said.result is not None:
                row["tokens_per_second"] = said.result.tokens_per_second
    except UserError as error:
        row["error"] = str(error)
    print(json.dumps(row, ensure_ascii=False), flush=True)
