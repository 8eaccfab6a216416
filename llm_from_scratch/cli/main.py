"""`scratchlm`: finds the verb, imports only its file, and turns errors into sentences."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys

from llm_from_scratch import __version__
from llm_from_scratch.core.config import Parser, normalise_flags
from llm_from_scratch.core.errors import RunError, UserError, nearest

# verb -> (what it does, whether it takes the settings of a run such as --train.max_steps)
VERBS: dict[str, tuple[str, bool]] = {
    "quickstart": ("train a model on this machine in minutes and talk to it", True),
    "tokenizer": ("train a tokenizer, or see how one cuts a text", False),
    "pretrain": ("train a language model from your own text", True),
    "finetune": ("teach a model: instructions, labels, names, preferences, rewards", True),
    "dedup": ("find texts that are the same or nearly the same", False),
    "predict": ("ask a model for the labels, numbers or names of texts", False),
    "generate": ("continue a prompt, or answer one with --chat", False),
    "chat": ("talk with a model in the terminal", False),
    "serve": ("serve models over HTTP (OpenAI's protocol), with a web page", False),
    "models": ("list the models and families that are known", False),
    "pull": ("fetch pretrained weights and check them", False),
    "info": ("say what a model costs, and what fits this machine", False),
    "convert": ("write a model in another format", False),
    "quantize": ("write a model in few bits", False),
    "prune": ("set the least important weights of a model to zero", False),
    "doctor": ("say what this machine is, has and can do", False),
}

# How PyTorch's allocators put it: CUDA and MPS, Linux and macOS, Windows.
OUT_OF_MEMORY = "out of memory|can't allocate memory|not enough memory"

USAGE = """usage: scratchlm VERB ...

From raw text to a language model that you trained, understand and take with you.

{verbs}

Every verb explains itself: scratchlm VERB --help
Start with:                 scratchlm quickstart

MODEL is anything that names a model: a model folder, a run folder, a .gguf file,
a hub name (org/name), or a short name from `scratchlm models`.
"""


def usage() -> str:
    width = max(map(len, VERBS))
    return USAGE.format(verbs="\n".join(f"  {v:<{width}}  {t}" for v, (t, _) in VERBS.items()))


def split_settings(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(plain arguments, settings): a setting is `--part.name` with the values that follow it."""
    plain: list[str] = []
    settings: list[str] = []
    place = plain
    for argument in arguments:
        if argument.startswith("--"):
            place = settings if "." in argument.partition("=")[0] else plain
        place.append(argument)
    return plain, settings


def refuse_empty(args: argparse.Namespace) -> None:
    """Refuse an empty name, such as one from an unset variable: it would be the current folder."""
    names = ("model", "models", "data", "text", "out", "html", "config", "calibrate", "runs")
    for name in (*names, "draft", "json_schema", "regex", "against", "val", "test"):
        value = getattr(args, name, None)
        if value == "" or (isinstance(value, list) and "" in value):
            if name == "text" and args.part == "show":
                continue  # a text and no name
            flag = "MODEL" if name.startswith("model") else f"--{name}"
            raise UserError(f"{flag} is empty; give a name, or leave it out for the default.")


def run(arguments: list[str]) -> int:
    """Run one command line (without the program's name); returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"scratchlm {__version__}")
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        near = nearest(verb, [*VERBS, "--help", "--version"])
        raise UserError(f"There is no verb '{verb}'.{near} See scratchlm --help.")
    settings: list[str] = []
    rest = normalise_flags(rest)
    if VERBS[verb][1]:
        rest, settings = split_settings(rest)
    module = importlib.import_module(f"llm_from_scratch.cli.{verb}")
    parser = Parser(prog="scratchlm")
    module.add_parser(parser.add_subparsers(parser_class=Parser))
    args: argparse.Namespace = parser.parse_args([verb, *rest])
    args.settings = settings
    refuse_empty(args)
    return int(module.run(args))


def main() -> None:
    """The entry point: exit code 0 done, 1 failed while running, 2 asked wrongly, 130 stopped."""
    # Read when PyTorch starts its threads: waiting threads sleep instead of spinning. With the
    # machine to itself that costs little; beside other programs spinning costs several times more.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        code = 2
        print(f"scratchlm: {error}", file=sys.stderr)
    except RunError as error:
        code = 1
        print(f"scratchlm: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
        print("\nscratchlm: stopped.", file=sys.stderr)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(OUT_OF_MEMORY, str(error)):
            raise
        code = 1
        print(
            "scratchlm: The memory is not enough. Take a smaller model or a smaller batch "
            "(--train.micro_batch_size changes nothing else); what was saved is still there.",
            file=sys.stderr,
        )
    except BrokenPipeError:
        # The reader (head, less) has gone; nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


if __name__ == "__main__":
    main()
