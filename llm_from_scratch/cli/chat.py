"""`scratchlm chat`: talk with a model in the terminal, be it here or at the address of a server."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llm_from_scratch.cli.generate import (
    NOT_UTF8,
    add_model_arguments,
    add_sampling_arguments,
    explain_template,
    load_model,
    settings_of,
    stdin_lines,
)
from llm_from_scratch.core.errors import RunError, UserError, nearest

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

COMMANDS = {
    "/help": "this list",
    "/reset": "begin a new conversation",
    "/system": "/system TEXT: what the model is told first (no TEXT: nothing); begins anew",
    "/quit": "leave (or Ctrl-D); Ctrl-C stops an answer",
}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk with a model in the terminal",
        description="Talk with a model in the terminal. One line is one message; lines can also "
        "be piped in.\nCtrl-C stops an answer, Ctrl-D leaves, /help lists the commands.",
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
    parser.set_defaults(max_new_tokens=512)


def note(text: str) -> None:
    """Something that is no part of the conversation."""
    print(text, file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    from llm_from_scratch.generate.chat import is_address
    from llm_from_scratch.generate.conversation import Conversation

    settings = settings_of(args)
    if is_address(args.model):
        if args.seed is None:  # not every server takes one
            settings = dataclasses.replace(settings, seed=None)
        chat = chat_at_address(args, settings)
    else:
        chat = chat_here(args)
    with chat:
        conversation = Conversation(chat, settings, system=args.system)
        talk(conversation, reply_json if args.json else reply)
    return 0


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
    from llm_from_scratch.generate.protocol import request_body
    from llm_from_scratch.generate.remote import RemoteChat

    for flag in ("device", "dtype"):
        if getattr(args, flag) != "auto":
            raise UserError(f"--{flag} is for a model on this machine; a server has its own.")
    request_body("", [{"role": "user", "content": ""}], settings, stream=True)
    chat = RemoteChat(args.model, args.served, report=note)
    note(f"{chat.name} at {chat.address}. /help lists the commands.")
    return chat


def talk(conversation: Conversation, reply: Callable[[Conversation, str], None]) -> None:
    """Read messages and commands until the input ends; `reply` answers a message."""
    interactive = sys.stdin is not None and sys.stdin.isatty()
    piped = stdin_lines()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for `input`)
    while True:
        try:
            line = input("\n> ").strip() if interactive else next(piped).strip()
        except UnicodeDecodeError as error:
            raise UserError(NOT_UTF8) from error
        except StopIteration:
            return
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            note("\n(Ctrl-D or /quit leaves.)")
            continue
        if not line:
            continue
        if line.startswith("/") and not line.startswith("//"):
            if not obey(conversation, line):
                return
            continue
        try:
            reply(conversation, line.removeprefix("/") if line.startswith("//") else line)
        except RunError as error:  # a server that is gone may come back
            if not interactive:
                raise
            note(f"({error})")


def reply(conversation: Conversation, message: str) -> None:
    """Print the answer as it comes; Ctrl-C stops it and keeps what was said."""
    try:
        with contextlib.closing(conversation.ask(message)) as pieces:
            first = True
            for piece in pieces:
                if first and conversation.forgotten:
                    note(
                        f"(The context is full: the {conversation.forgotten} oldest messages were "
                        "dropped.)"
                    )
                first = False
                print(piece, end="", flush=True)
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


def reply_json(conversation: Conversation, message: str) -> None:
    """Print the message and the whole answer as one line of JSON."""
    row: dict[str, Any] = {"message": message}
    try:
        row["answer"] = "".join(conversation.ask(message))
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


def obey(conversation: Conversation, line: str) -> bool:
    """Carry out a /command; False to leave."""
    command, _, rest = line.partition(" ")
    if command in ("/quit", "/exit"):
        return False
    if command == "/help":
        note("\n".join(f"{name:<9}{text}" for name, text in COMMANDS.items()))
    elif command == "/reset":
        conversation.reset()
        note("(new conversation)")
    elif command == "/system":
        conversation.system = rest.strip() or None
        conversation.reset()
        note("(new conversation with this system message)" if rest else "(no system message)")
    else:
        note(f"(There is no command {command}; /help lists them.{nearest(command, COMMANDS)})")
    return True
