"""`scratchlm serve`: models over HTTP in OpenAI's protocol, and a web page to talk with them."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_from_scratch.cli.generate import CACHE_DTYPES, add_engine_arguments
from llm_from_scratch.cli.sampling_flags import DTYPES
from llm_from_scratch.core.errors import UserError, shown

if TYPE_CHECKING:
    from llm_from_scratch.serve.limits import Limits
    from llm_from_scratch.serve.models import Opening, ServedModel

EXAMPLES = """\
examples:
  scratchlm serve smollm2-135m
  scratchlm serve runs/quickstart --port 8080
  scratchlm serve small=smollm2-135m big=model/ all-minilm-l6-v2
  scratchlm serve smollm2-135m runs/poet/adapter runs/clerk/adapter
  scratchlm serve model.gguf --cache_tokens 8192 --cache_dtype int8
  scratchlm serve model/ --host 0.0.0.0 --api_keys keys.txt
Then open http://127.0.0.1:8000 in a browser, or point a client of OpenAI's protocol to
http://127.0.0.1:8000/v1. MODEL stands before flags that take several values: --allowed_hosts and
--allow_origin. Keys can also stand in the environment variable SCRATCHLM_API_KEYS, separated by
spaces or commas.
"""

KEYS = "SCRATCHLM_API_KEYS"
RUNS = Path("runs")
ORIGIN = re.compile(r"https?://(\[[0-9a-fA-F:]+\]|[\w.-]+)(:\d+)?")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve models over HTTP (OpenAI's protocol), with a web page",
        description="Serve models over HTTP in OpenAI's protocol, with a web page to talk with "
        "them and to look inside.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a model folder, a run folder, a .gguf file, a hub name, or a short name; NAME=MODEL "
        "says what clients call it",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="the address to listen at (default: 127.0.0.1, this machine alone; 0.0.0.0: all)",
    )
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="default: 8000; 0: any that is free"
    )
    parser.add_argument(
        "--runs", metavar="DIR", help="show the run folders in DIR (default: runs, if there is one)"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds for unfinished answers when the server is stopped (default: 30)",
    )
    add_model_flags(parser)
    add_engine_arguments(parser)
    add_access_flags(parser)
    add_limit_flags(parser)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """How the models are opened."""
    group = parser.add_argument_group("models")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    group.add_argument(
        "--dtype", default="auto", metavar="|".join(DTYPES), help="precision of the weights"
    )
    group.add_argument(
        "--template",
        metavar="NAME|FILE",
        help="a chat template in the place of the models' own: a Jinja file, or one that is built "
        "in",
    )


def add_access_flags(parser: argparse.ArgumentParser) -> None:
    """Who may ask."""
    group = parser.add_argument_group("access")
    group.add_argument(
        "--api_keys", metavar="FILE", help="a file of keys, one a line: clients must bring one"
    )
    group.add_argument(
        "--allowed_hosts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="further names by which the server may be called (the header Host)",
    )
    group.add_argument(
        "--allow_origin",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="web pages whose scripts may ask, such as https://example.org (CORS)",
    )


def add_limit_flags(parser: argparse.ArgumentParser) -> None:
    """What clients may use up."""
    group = parser.add_argument_group("limits")
    for name, default, help in (
        ("max_new_tokens", 4096, "tokens of one text"),
        ("max_running", 64, "texts that each model writes at once"),
        ("max_queue", 256, "texts that wait beside them; further ones are refused (429)"),
        ("max_seconds", 600, "seconds for a request; its text then ends with what it has"),
        ("max_body", 4 << 20, "bytes of a request"),
    ):
        group.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{help} (default: {default})"
        )
    group.add_argument(
        "--cache_tokens",
        type=int,
        metavar="N",
        help="tokens that each model has room for (default: what fits into 1 GiB, divided by the "
        "models; on a GPU into a quarter of the free memory)",
    )


def run(args: argparse.Namespace) -> int:
    require_extra()
    from llm_from_scratch.serve.models import name_models, open_models
    from llm_from_scratch.serve.run import address_of, bind, serve, set_up_logs
    from llm_from_scratch.serve.service import make_service

    limits, opening = limits_of(args), opening_of(args)
    keys, runs = keys_of(args), runs_of(args)
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port is {args.port}; it must be from 1 to 65535, or 0 for any.")
    for origin in args.allow_origin:
        if not ORIGIN.fullmatch(origin):
            raise UserError(
                f"--allow_origin is {shown(origin)}; an origin is a scheme and a host, with a port "
                "where it is unusual, such as https://example.org or http://localhost:5173."
            )
    if not 0 <= args.grace < float("inf"):
        raise UserError(f"--grace is {args.grace}; it must be 0 or more seconds.")
    name_models(args.models)
    with bind(args.host, args.port) as bound:
        hosts = hosts_of(args, bound.getsockname()[0])
        models = open_models(args.models, limits, opening)
        service = make_service(
            models, limits, keys=keys, runs=runs, hosts=hosts, origins=args.allow_origin
        )
        set_up_logs()

        def started() -> None:
            for served in models.values():
                note(described(served))
            if not keys and not is_loopback(bound.getsockname()[0]):
                note(
                    "WARNING: whoever reaches this machine can use the models: no key is asked "
                    "for. Give keys with --api_keys FILE, or leave --host out."
                )
            address = address_of(bound)
            print(f"Page: {address}/")
            print(f"API:  {address}/v1 ({'with a key' if keys else 'no key needed'})", flush=True)
            note("Ctrl-C ends the server; it finishes what it is writing.")

        serve(service, bound, args.grace, started)
    note("The server has ended.")
    return 0


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def require_extra() -> None:
    """Say in a sentence what is missing, before anything else is done."""
    import importlib.util

    for name in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"The server needs {name}, which is not installed: pip install 'scratchlm[serve]'"
            )


def limits_of(args: argparse.Namespace) -> Limits:
    from dataclasses import fields

    from llm_from_scratch.serve.limits import Limits

    try:
        return Limits(**{field.name: getattr(args, field.name) for field in fields(Limits)})
    except UserError as error:
        raise UserError(f"--{error}") from error


def opening_of(args: argparse.Namespace) -> Opening:
    """How the models are to be opened; wrong flags are refused while there is none yet."""
    import torch

    from llm_from_scratch.core.device import PRECISIONS, pick_device
    from llm_from_scratch.serve.models import Opening

    for flag, known in (("dtype", DTYPES), ("cache_dtype", CACHE_DTYPES)):
        if (value := getattr(args, flag)) not in known:
            raise UserError(f"--{flag} is '{value}'; it must be one of {', '.join(known)}.")
    if args.draft is not None and args.lookup is not None:
        raise UserError("--draft and --lookup both guess ahead; give one of them.")
    if args.lookup is not None and args.lookup < 1:
        raise UserError(f"--lookup is {args.lookup}; it must be at least 1 token.")
    pick_device(args.device)
    return Opening(
        dtype=PRECISIONS.get(args.dtype),
        device=args.device,
        cache_dtype={**PRECISIONS, "int8": torch.int8}.get(args.cache_dtype),
        template=template_of(args.template),
        draft=args.draft,
        lookup=args.lookup,
    )


def template_of(name: str | None) -> str | None:
    """A chat template: one that is built in, or the content of a file."""
    from llm_from_scratch.core.errors import nearest
    from llm_from_scratch.text.chat_template import TEMPLATES, compiled

    if name is None or name in TEMPLATES:
        return name
    try:
        template = read_small(Path(name).expanduser(), "--template")
        compiled(template)
        return template
    except FileNotFoundError as error:
        raise UserError(
            f"--template is '{name}', which is neither a file nor one of {', '.join(TEMPLATES)}."
            + nearest(name, TEMPLATES)
        ) from error


def read_small(path: Path, flag: str) -> str:
    """A text file of at most 1 MiB."""
    try:
        if path.is_file() and path.stat().st_size > 1 << 20:
            raise UserError(f"{flag} is {path}, which is larger than 1 MiB; is it the right file?")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} is {path}, which is not UTF-8 text.") from error
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{flag} is {shown(str(path))}, which cannot be read.") from error


def keys_of(args: argparse.Namespace) -> tuple[str, ...]:
    """The keys of the file and of the environment; none where there are neither."""
    keys = os.environ.get(KEYS, "").replace(",", " ").split()
    if not keys and KEYS in os.environ and args.api_keys is None:  # a secret that was lost
        raise UserError(f"{KEYS} is set and has no key; write one there, or unset it.")
    if args.api_keys is not None:
        path = Path(args.api_keys).expanduser()
        try:
            lines = [line.strip() for line in read_small(path, "--api_keys").splitlines()]
        except FileNotFoundError as error:
            raise UserError(f"--api_keys is {path}, and there is no such file.") from error
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise UserError(f"{path} has no key; write one a line.")
        keys += found
    for number, key in enumerate(keys, 1):
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(
                f"API key {number} has spaces or characters that no HTTP header can carry; take "
                "letters, digits and signs."
            )
    return tuple(keys)


def runs_of(args: argparse.Namespace) -> Path | None:
    if args.runs is None:
        return RUNS if RUNS.is_dir() else None
    folder = Path(args.runs).expanduser()
    if not folder.is_dir():
        raise UserError(f"--runs is {folder}, and there is no such folder.")
    return folder


def hosts_of(args: argparse.Namespace, host: str) -> tuple[str, ...] | None:
    """The names by which the server may be called; None for any.

    Bound to this machine alone, it answers to its own names: another one comes from a web page
    whose name was made to point here (DNS rebinding).
    """
    from llm_from_scratch.serve.guard import LOOPBACK, host_of

    if not is_loopback(host) and not args.allowed_hosts:
        return None
    return (*LOOPBACK, host, *(host_of(name) for name in args.allowed_hosts))


def is_loopback(host: str) -> bool:
    import ipaddress

    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def described(served: ServedModel) -> str:
    """A line about a model that is open."""
    from llm_from_scratch.quant.linear import QuantLinear

    model = served.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weight = next(model.parameters())
    packed = any(isinstance(part, QuantLinear) for part in model.modules())
    held = "in few bits" if packed else f"{parameters / 1e6:,.1f} M parameters, {weight.dtype}"
    line = f"{served.name}: {held.replace('torch.', '')} on {weight.device.type}"
    line += f", context {served.context:,} tokens"
    if served.host is not None:
        base = served.host.source
        return f"{served.name}: an adapter of {base}, context {served.context:,} tokens."
    if served.engine is None:
        return f"{line}, for embeddings."
    engine = served.engine.engine
    room = (engine.pages.count - 1) * engine.pages.page_size
    return f"{line}; its cache holds {room:,} tokens in {engine.pool.nbytes / 2**20:,.0f} MiB."
