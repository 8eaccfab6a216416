"""The models that a server has open: what clients call them, and what writes their texts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llm_from_scratch.core.device import free_memory_bytes
from llm_from_scratch.core.errors import UserError, shown
from llm_from_scratch.generate.engine import PAGE
from llm_from_scratch.generate.requests import BASE, Writer, writing_stack
from llm_from_scratch.generate.speculative import Draft, Lookup
from llm_from_scratch.generate.texts import TextEngine
from llm_from_scratch.model.adapters import use_adapter
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder import Encoder
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.model.heads import Embedder, MaskedLM
from llm_from_scratch.serve.limits import Limits
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.adapter_config import is_adapter_folder
from llm_from_scratch.weights.adapter_folder import about_adapter, tokenizer_with
from llm_from_scratch.weights.adapters import attach
from llm_from_scratch.weights.assemble import Model
from llm_from_scratch.weights.heads import add_head
from llm_from_scratch.weights.sources import base_of, load, locate

CACHE_BYTES = 1 << 30  # of keys and values, on a machine whose memory others use too
LONGEST_NAME = 200


@dataclass
class ServedModel:
    """One model that is open.

    Attributes:
        name: what clients call it.
        kind: "writer" (a decoder or an encoder-decoder) or "embedder".
        created: when it was opened, in Unix seconds.
        source: the MODEL that was asked for.
        template: the chat template that takes the place of its own; None for its own.
        engine: what writes its texts; only the worker's thread may touch it. None for an embedder.
        make_engine: makes that engine anew, should a step have failed.
        adapter: what its texts are written with: the name of an adapter, `BASE` for none.
        host: the model that it is an adapter of, which has the engine; None for a model by itself.
    """

    name: str
    kind: str
    model: Model
    tokenizer: Tokenizer
    created: int
    source: str
    template: str | None = None
    engine: TextEngine | None = field(default=None, repr=False)
    make_engine: Callable[[], TextEngine] | None = field(default=None, repr=False)
    adapter: str | None = None
    host: ServedModel | None = field(default=None, repr=False)

    @property
    def context(self) -> int:
        """The longest prompt, in tokens, that the model can read."""
        if self.kind == "embedder":
            assert isinstance(self.model, Embedder)
            longest = self.model.head_config.max_length or self.model.stack.max_seq_len
            return min(longest, self.model.stack.max_seq_len)
        assert isinstance(self.model, Decoder | EncoderDecoder)
        reader = self.model.encoder if isinstance(self.model, EncoderDecoder) else self.model
        room = reader.config.max_seq_len
        engine = self.engine if self.host is None else self.host.engine
        if engine is not None and isinstance(self.model, Decoder):
            room = min(room, engine.engine.room)
        return room


@dataclass(frozen=True)
class Opening:
    """How models are opened: the flags of `scratchlm serve` that concern them."""

    dtype: torch.dtype | str | None = None
    device: str = "auto"
    cache_dtype: torch.dtype | None = None
    template: str | None = None
    draft: str | None = None
    lookup: int | None = None


def split_name(argument: str) -> tuple[str, str]:
    """(what clients call it, MODEL) of an argument `MODEL` or `NAME=MODEL`."""
    name, sign, model = argument.partition("=")
    if sign and "/" not in name and not _exists(argument):
        if not model:
            raise UserError(f"{argument} names no model; write NAME=MODEL.")
        return _checked(name), model
    parts = [part for part in Path(argument).parts if part not in ("/", "..", "~")]
    if len(parts) > 1 and parts[-1] in ("model", "adapter"):  # of a run, whose name says more
        parts.pop()
    last = parts[-1] if parts else argument
    return _checked(last.removesuffix(".gguf")), argument


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except OSError:  # too long for a name
        return False


def _checked(name: str) -> str:
    if not name or len(name) > LONGEST_NAME or not name.isprintable() or " " in name:
        raise UserError(
            f"{shown(name)} cannot be what clients call a model: it must be a word of at most "
            f"{LONGEST_NAME} characters. Write NAME=MODEL."
        )
    return name


def name_models(arguments: Sequence[str]) -> dict[str, str]:
    """What clients call each model -> MODEL; a `UserError` where a name comes twice."""
    found: dict[str, str] = {}
    for argument in arguments:
        name, model = split_name(argument)
        if name in found:
            raise UserError(
                f"Two models would be called '{name}': {found[name]} and {model}. Give one of them "
                f"another name: NAME={model}"
            )
        found[name] = model
    if not found:
        raise UserError("There is no model to serve; name at least one.")
    return found


def open_models(
    arguments: Sequence[str],
    limits: Limits | None = None,
    opening: Opening | None = None,
    report: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> dict[str, ServedModel]:
    """Every model that the arguments (`MODEL` or `NAME=MODEL`) name, loaded, in their order.

    All are looked for before the first is loaded. Raises `UserError` for one that does not exist,
    cannot be loaded, or neither writes nor embeds.
    """
    limits, opening = limits or Limits(), opening or Opening()
    named = name_models(arguments)
    places = {source: locate(source).resolve() for source in named.values()}
    if opening.draft is not None:
        locate(opening.draft)
    opened: dict[str, ServedModel] = {}
    hosts: dict[Path, ServedModel] = {}
    adapters = [name for name, source in named.items() if is_adapter_folder(places[source])]
    for name in adapters:
        base_of(about_adapter(places[named[name]]))
    for name, source in named.items():
        if name not in adapters:
            model, tokenizer = load(source, dtype=opening.dtype, device=opening.device)
            opened[name] = serve_model(model, tokenizer, name, source, report=report)
            hosts.setdefault(places[source], opened[name])
    for name in adapters:
        opened[name] = open_adapter(name, named[name], hosts, opening, report)
    hosting = [*{id(one): one for one in (*opened.values(), *hosts.values())}.values()]
    writers = [one for one in hosting if one.kind == "writer" and one.host is None]
    guess = _guesser(opening, writers)
    for served in writers:
        give_engine(served, limits, opening.cache_dtype, guess, share=len(writers))
    for served in opened.values():
        served.template = opening.template if served.kind == "writer" else None
    return {name: opened[name] for name in named}


def open_adapter(
    name: str,
    source: str,
    hosts: dict[Path, ServedModel],
    opening: Opening,
    report: Callable[[str], None],
) -> ServedModel:
    """A model that is an adapter: its base is loaded once, for all of its adapters and for itself.

    `hosts` has the models by their place; a base that is not among them yet joins them.
    """
    folder = locate(source)
    about = about_adapter(folder)
    base = base_of(about)
    place = locate(base).resolve()
    host = hosts.get(place)
    if host is None:
        model, tokenizer = load(base, dtype=opening.dtype, device=opening.device)
        # No client can ask for it, but it is counted: by a name that no model has.
        own = f"{name}/{split_name(base)[0]}"
        host = hosts[place] = serve_model(model, tokenizer, own, base, report=report)
    if about.head is not None or host.kind != "writer":
        raise UserError(
            f"{source} is an adapter that labels or embeds; the server has adapters of models "
            "that write alone. Merge it: scratchlm convert ADAPTER --to hf --out NEW"
        )
    assert isinstance(host.model, Decoder | EncoderDecoder)
    attach(host.model, folder, name, alone=False)
    host.model.eval()
    use_adapter(host.model, None)
    host.adapter = BASE
    tokenizer = tokenizer_with(folder, host.tokenizer, host.model)
    tokenizer.encode("")
    made = replace(
        host, name=name, source=source, tokenizer=tokenizer, adapter=name, host=host,
        created=int(time.time()),
    )  # fmt: skip
    report(f"{name} is an adapter of {base}, with which it shares its memory.")
    return made


def serve_model(
    model: Model,
    tokenizer: Tokenizer,
    name: str,
    source: str | None = None,
    *,
    template: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> ServedModel:
    """A model that is loaded already, without an engine (`give_engine`)."""
    source = source or name
    if isinstance(model, Encoder | MaskedLM):
        backbone = model.backbone if isinstance(model, MaskedLM) else model
        model = add_head(backbone, "embedding")
        report(
            f"{source} is an encoder that nobody taught to embed: it is served with the mean of "
            "its last states as embedding."
        )
    kind = "embedder" if isinstance(model, Embedder) else "writer"
    if kind == "writer" and not isinstance(model, Decoder | EncoderDecoder):
        raise UserError(
            f"{source} labels texts; the server has models that write or embed. To embed with it, "
            "save it with head='embedding'."
        )
    model.eval()
    tokenizer.encode("")  # what it builds on first use takes a moment
    return ServedModel(name, kind, model, tokenizer, int(time.time()), source, template)


def give_engine(
    served: ServedModel,
    limits: Limits,
    cache_dtype: torch.dtype | None = None,
    guess: Callable[[], Any] = lambda: None,
    share: int = 1,
) -> None:
    """Give a model that writes its engine; `share` models divide the machine's memory."""
    model = served.model
    assert isinstance(model, Decoder | EncoderDecoder)
    room = limits.cache_tokens or cache_room(model, cache_dtype, share)

    def make() -> TextEngine:
        engine = TextEngine(
            model,
            served.tokenizer,
            cache_tokens=room,
            max_running=limits.max_running,
            cache_dtype=cache_dtype,
            proposer=guess(),
        )
        # The system hands memory out when it is first written to. Written now, it is there when
        # it is needed, and the process does not seem to grow for as long as the pool is new.
        pool = engine.engine.pool
        for part in (pool.keys, pool.values, *([] if pool.scales is None else [pool.scales])):
            part.fill_(1).zero_()
        return engine

    served.make_engine = make
    served.engine = make()


def cache_room(model: Writer, dtype: torch.dtype | None = None, share: int = 1) -> int:
    """Tokens of room for a server that was not told how many.

    On a CPU 1 GiB of keys and values, on a GPU a quarter of what is free, divided by the models
    that share it; never more than 64 whole contexts, nor less than one (of at most 4,096 tokens).
    """
    stack = writing_stack(model)
    config, dtype = stack.config, dtype or stack.activation_dtype
    one = config.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)
    each = 2 * config.n_layers * config.n_kv_heads * one
    free = free_memory_bytes(stack.device)
    affordable = CACHE_BYTES if free is None else free // 4
    if stack.device.type == "cpu":
        affordable = min(affordable, CACHE_BYTES)
    wanted = min(affordable // share // each, 64 * config.max_seq_len)
    return -(-max(wanted, min(config.max_seq_len, 4096)) // PAGE) * PAGE


def _guesser(opening: Opening, writers: Sequence[ServedModel]) -> Callable[[], Any]:
    """What makes each engine's guesser, where there is to be one."""
    if opening.lookup is not None:
        most = opening.lookup
        return lambda: Lookup(most)
    if opening.draft is None:
        return lambda: None
    model, tokenizer = load(opening.draft, dtype=opening.dtype, device=opening.device)
    for served in writers:
        if served.tokenizer.tokens != tokenizer.tokens:
            raise UserError(
                f"--draft is {opening.draft}, whose vocabulary is not that of {served.source}; a "
                "draft must have the same tokenizer."
            )
    return lambda: Draft(model)  # type: ignore[arg-type]  # it refuses what is no decoder
