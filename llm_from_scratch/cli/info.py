"""`scratchlm info`: parameters, arithmetic and memory of a model, and what fits this machine."""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES = """\
examples:
  scratchlm info smollm2-135m
  scratchlm info runs/quickstart
  scratchlm info model.gguf --context 4096 --batch 8 --dtype bf16
  scratchlm info --preset llama-3.2-1b --optimizer adamw --json
"""
BAR = 28  # cells of the longest bar
NAMES = {
    "optimizer": "optimiser's state",
    "working": "working space *",
    "logits": "logits and loss *",
}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "info",
        help="say what a model costs, and what fits this machine",
        description="Parameters by part, FLOPs per token, key-value cache, the memory that "
        "inference and training take, and the largest batches that fit here. Reads the model's "
        "description alone (config.json, a GGUF's metadata, a run's config.yaml), no weights. Of "
        "an adapter it tells its kind and size, and the figures of its base.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a model folder, a run folder, a .gguf file, a hub name, or a short name",
    )
    parser.add_argument("--preset", metavar="NAME", help="a size of `scratchlm models` instead")
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens of one text (default: at most 2048)"
    )
    parser.add_argument(
        "--batch", type=int, metavar="B", help="texts at once (default: a run's own, else 1)"
    )
    parser.add_argument(
        "--optimizer", metavar="adamw|muon", help="of training (default: a run's own, else muon)"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        metavar="auto|fp32|bf16|fp16",
        help="of weights and cache in inference, and of what training computes",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from llm_from_scratch.train.account import Question, account

    question = Question(args.context, args.batch, args.optimizer, args.dtype, args.device)
    found = account(args.model, question, preset=args.preset)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        draw(found)
    return 0


def draw(found: dict[str, Any]) -> None:
    """The figures for people, on standard output."""
    from rich.console import Console

    console = Console(highlight=False)
    console.width = max(console.width, 80)  # narrower, the tables could not be read
    with console.capture() as captured:
        _title(console, found)
        _parameters(console, found)
        _flops(console, found)
        _memory(console, found)
        _machine(console, found)
    # Tables fill their cells with spaces, which are of no use at the end of a line.
    print(re.sub(r" +((?:\x1b\[[\d;]*m)*)$", r"\1", captured.get(), flags=re.M), end="")


# --- the parts -----------------------------------------------------------------------------------


def _title(console: Console, found: dict[str, Any]) -> None:
    from llm_from_scratch.core.files import human_bytes

    config = found["config"]
    stacks = {k: config[k] for k in ("encoder", "decoder") if k in config} or {"": config}
    shapes = [
        f"{name} {s['n_layers']} blocks of width {s['d_model']:,}, {_heads(s)}".strip()
        for name, s in stacks.items()
    ]
    vocab_size = list(stacks.values())[-1]["vocab_size"]
    head = f" with a head for {found['head'].replace('_', ' ')}" if found["head"] else ""
    stored = found["stored"]
    form = f"{stored['form']} " if stored["form"] else ""
    size = f", {form}{human_bytes(stored['bytes'])}" if stored["bytes"] else ""
    _say(console, f"{found['model']}: {found['family']}, {found['kind']}{head}", style="bold")
    if (adapter := found["adapter"]) is not None:
        _say(console, _adapter(adapter))
    _say(console, f"{'; '.join(shapes)}; a vocabulary of {vocab_size:,}")
    _say(console, f"read from {found['source']}{size}; no weight was loaded", style="dim")


def _adapter(adapter: dict[str, Any]) -> str:
    from llm_from_scratch.core.files import human_bytes

    more = f", and {adapter['whole']:,} of layers trained whole" if adapter["whole"] else ""
    return (
        f"an adapter ({adapter['kind']}, rank {adapter['rank']}, alpha {adapter['alpha']:g}) of "
        f"{adapter['base']}: {adapter['parameters']:,} parameters around {adapter['layers']} "
        f"layers{more}, {human_bytes(adapter['bytes'])}; all that follows is its base's"
    )


def _heads(stack: dict[str, Any]) -> str:
    heads, shared = stack["n_heads"], stack["n_kv_heads"]
    if shared == heads:
        return f"{heads} heads"
    return f"{heads} query heads, {shared} key-value head{'s' * (shared > 1)}"


def _parameters(console: Console, found: dict[str, Any]) -> None:
    parameters = found["parameters"]
    total, active = parameters["total"], parameters["active"]
    text = f"{total:,} parameters"
    if active != total:
        text += f", of which a token meets {active:,} ({active / total:.0%})"
    rows = [(name, count, f"{count:,}") for name, count in parameters["parts"].items()]
    _chart(console, text, rows, total)
    last = found["config"].get("decoder", found["config"])
    if found["kind"] != "encoder" and found["head"] is None and last["tie_embeddings"]:
        _say(console, "  The matrix that makes the logits is the embedding once more.", style="dim")


def _flops(console: Console, found: dict[str, Any]) -> None:
    from rich.table import Table

    n = found["asked"]["context"]
    table = Table(
        title=_heading(f"FLOPs at {n:,} tokens"), title_justify="left", box=None, padding=(0, 2)
    )
    table.add_column("")
    for name in ("per token", "in all", "matrices", "attention", "logits"):
        table.add_column(name, justify="right", header_style="dim")
    reading = "prefill"
    names = {"prefill": reading, "decode": f"token {n:,}", "training": "training step"}
    if found["kind"] == "encoder" or found["head"]:
        names["prefill"], reading = "reading a text", "text"
    elif found["kind"] == "encoder-decoder":
        names["prefill"], reading = "reading a source", "source"
    for key, name in names.items():
        work = found["flops"][key]
        if work is not None:
            parts = [work[part] / work["total"] for part in ("matrices", "attention", "logits")]
            table.add_row(
                name, human(work["per_token"]), human(work["total"]), *(f"{p:.0%}" for p in parts)
            )
    console.print()
    console.print(table)
    hidden = found["flops"]["prefill"]["hidden"]
    if hidden > 0.005:
        _note(
            console,
            f"  {hidden:.0%} of attention's products in a {reading} lie behind a mask or window; "
            "they are carried out and counted all the same.",
        )


def _memory(console: Console, found: dict[str, Any]) -> None:
    from llm_from_scratch.core.files import human_bytes

    asked, cache = found["asked"], found["kv_cache"]
    texts = f"{asked['batch']:,} x {asked['context']:,} tokens"
    if cache["per_token"]:
        _say(
            console,
            f"\nKV cache: {human_bytes(cache['per_token'])} a token, "
            f"{human_bytes(cache['per_sequence'])} a text, {human_bytes(cache['batch'])} in all",
        )
    inference, training = found["inference"], found["training"]
    rows = [
        (NAMES.get(part, part), size, human_bytes(size))
        for part, size in inference.items()
        if part != "total"
    ]
    total = inference["total"]
    title = f"{human_bytes(total)} for inference in {asked['inference_dtype']}, {texts}"
    _chart(console, title, rows, total)
    rows = []
    for part in ("weights", "gradients", "optimizer", "activations", "logits"):
        rows.append((NAMES.get(part, part), training[part], human_bytes(training[part])))
        if part == "activations":
            details = training["activations_by_part"].items()
            rows += [(f"  {name}", size, human_bytes(size)) for name, size in details]
    total = training["total"]
    title = (
        f"{human_bytes(total)} for training in {asked['training_precision']} with "
        f"{asked['optimizer']}, {texts}"
    )
    _chart(console, title, [row for row in rows if row[1]], total)
    if training["optimizer_work"]:
        size = human_bytes(training["optimizer_work"])
        _say(console, f"  Muon works in {size} * once the activations are gone.", style="dim")


def _machine(console: Console, found: dict[str, Any]) -> None:
    from llm_from_scratch.core.files import human_bytes

    machine, asked = found["machine"], found["asked"]
    if machine["free"] is None:
        _say(console, "\nThis system does not say how much memory it has.")
        return
    free, memory = human_bytes(machine["free"]), human_bytes(machine["memory"])
    _say(console, "\n" + _heading(f"This machine: {free} free of {memory} ({machine['device']})"))
    for name, most in machine["largest"].items():
        total = found[name]["total"]
        verdict = "fits" if total * machine["slack"] <= machine["free"] else "does not fit"
        if most["batch"]:
            texts = "text" if most["batch"] == 1 else "texts"
            fit = "fits" if most["batch"] == 1 else "fit at once"
            batches = f"up to {most['batch']:,} {texts} of {asked['context']:,} tokens {fit} *"
        elif most["context"]:
            batches = f"alone, a text fits up to {most['context']:,} tokens *"
        else:
            batches = "not even one token of it fits *"
        _say(console, f"  {name:<10} {human_bytes(total)} {verdict}; {batches}")
    console.print()
    _note(
        console,
        "* estimated. All other figures are exact, or counted tensor by tensor. To fit, there "
        f"must be {machine['slack'] - 1:.0%} more than that, for what allocators leave unused.",
    )


# --- drawing -------------------------------------------------------------------------------------


def human(count: float) -> str:
    """1234567 -> '1.23 M', for FLOPs."""
    for unit in ("", " k", " M", " G", " T", " P"):
        if abs(count) < 999.5:  # above, three digits would be 1e+03
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} E"


def _heading(text: str) -> str:
    return f"[bold]{text}[/bold]"


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, soft_wrap=True, markup="[bold]" in text)


def _note(console: Console, text: str) -> None:
    width = min(console.width, 100)
    _say(console, textwrap.fill(text, width, subsequent_indent="  "), "dim")


def _chart(
    console: Console, title: str, rows: Sequence[tuple[str, float, str]], total: float
) -> None:
    """A bar for each part, as long as its share of the total."""
    from rich.table import Table

    table = Table(title=_heading(title), title_justify="left", box=None, show_header=False)
    table.add_column(width=23)
    table.add_column(justify="right", width=14)
    table.add_column(justify="right", width=5)
    table.add_column(style="cyan")
    longest = max((size for _, size, _ in rows), default=0.0)
    full, half = _marks(console)
    for name, size, text in rows:
        halves = round(2 * BAR * size / longest) if longest else 0
        table.add_row(
            f"  {name}", text, f"{size / total:.0%}", full * (halves // 2) + half * (halves % 2),
            style="dim" if name.startswith(" ") else None,
        )  # fmt: skip
    console.print()
    console.print(table)


def _marks(console: Console) -> tuple[str, str]:
    """A whole and a half cell of a bar, in what the terminal can write."""
    try:
        "█▌".encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return "#", ""
    return "█", "▌"
