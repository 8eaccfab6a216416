"""The engine: many requests at once, each answered as if it were alone.

A step is one pass of the model. Every text that is being written brings its newest token, texts
that have just arrived bring a piece of their prompt (so that a long one holds nobody up), and all
go through the model together; requests join and leave between steps (continuous batching, as in
Orca, OSDI 2022, and vLLM, arXiv:2309.06180). Keys and values live in pages that are dealt out as
texts grow. When there are none left the text that came last gives its pages back and waits; it
goes on later from where it was. Nothing fails for want of room.

    engine = Engine(model)
    number = engine.submit(Request([1, 2, 3], SamplingSettings(max_new_tokens=5)))
    while engine.busy:
        for new in engine.step():
            print(new.request, new.token, new.finish_reason)

What a step costs is in `runner.py`, how a token is chosen in `sampling.py` and `runs.py`, who holds
which page in `pages.py`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Many
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm_from_scratch.core.device import free_memory_bytes
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.beam import Beams
from llm_from_scratch.generate.fast import make_runner
from llm_from_scratch.generate.pages import ROOT, Pages
from llm_from_scratch.generate.requests import (
    BASE,
    Feed,
    NewToken,
    Request,
    Sequence,
    Writer,
    as_writer,
    check_numbers,
    check_prompt,
    writing_stack,
)
from llm_from_scratch.generate.runs import Run, Sampling
from llm_from_scratch.generate.sampling import SamplingSettings, check_bias
from llm_from_scratch.generate.speculative import Proposer
from llm_from_scratch.model.adapters import adapter_names
from llm_from_scratch.model.cache import PagePool
from llm_from_scratch.model.config import ModelConfig
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.model.lora import switch_of
from llm_from_scratch.quant import kernels

if TYPE_CHECKING:
    from llm_from_scratch.generate.constraint import Constraint

PAGE = 16  # positions; small pages waste little at the end of a text, large ones are found faster
CHUNK = 512  # tokens of prompts in one step
LISTENING_CHUNK = 64  # the same where every one of their logits is wanted
MOST = 64  # texts at once


class Engine:
    """Writes texts for many requests with one model.

    Args:
        model: a decoder or an encoder-decoder.
        cache_tokens: how many tokens of text there is room for, in all; by default as much as
            `max_running` full contexts, but at most a quarter of the free memory.
        max_running: how many texts are written at once; the others wait. The beams of a request
            that is under way may go beyond it.
        chunk: how many tokens of prompts a step reads at most.
        cache_dtype: that of keys and values; by default that of the activations. int8 takes a
            quarter of fp32's memory.
        reuse_prefixes: whether a text may look at what was computed for the beginning of another.
        proposer: guesses the next tokens, which the model then checks all at once.

    Not for use from several threads at once.
    """

    def __init__(
        self,
        model: Writer,
        *,
        cache_tokens: int | None = None,
        max_running: int = MOST,
        chunk: int = CHUNK,
        cache_dtype: torch.dtype | None = None,
        reuse_prefixes: bool = True,
        proposer: Proposer | None = None,
    ) -> None:
        self.model = as_writer(model)
        self.pair = model.config if isinstance(model, EncoderDecoder) else None
        for name, value in (("max_running", max_running), ("chunk", chunk)):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")
        self.max_running = max_running
        self.chunk = chunk
        self.proposer = proposer
        if proposer is not None:
            proposer.check(model)
        # What a decoder with a source makes of its text depends on that source.
        self.reuse_prefixes = reuse_prefixes and self.pair is None
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # those that were asked for first come first
        self.runs: dict[int, Run] = {}
        self._numbers = itertools.count()
        self.stack = writing_stack(model)
        dtype = cache_dtype or self.stack.activation_dtype
        if not dtype.is_floating_point and dtype != torch.int8:
            raise UserError(f"cache_dtype is {dtype}; it must be a type of floats, or torch.int8.")
        device = self.stack.device
        if cache_tokens is None:
            cache_tokens = default_room(self.stack.config, max_running, dtype, device)
        pages = 1 + -(-cache_tokens // PAGE)
        self.pool = PagePool(self.stack.config, pages, PAGE, dtype, device)
        self.pages = Pages(pages, PAGE)
        self.runner = make_runner(model, self.pool)
        self.switch = switch_of(model)
        self._roots = {BASE: ROOT}  # of the texts that each adapter has read

    # ------------------------------------------------------------------ asking

    @property
    def busy(self) -> bool:
        """Whether anything is still to be written."""
        return bool(self.runs)

    @property
    def room(self) -> int:
        """How many tokens one text may have: the context, or the whole cache if that is less."""
        return min(self.stack.config.max_seq_len, (self.pages.count - 1) * PAGE)

    def submit(self, request: Request) -> int:
        """Put a request into the queue; its number. Raises `UserError` for an impossible one."""
        request = replace(request, adapter=self._adapter_of(request))
        check_prompt(self.model, request.prompt)
        check_bias(request.settings, self.model.config.vocab_size)
        if self.pair is not None and request.settings.prompt_logprobs is not None:
            raise UserError(
                "prompt_logprobs was asked of an encoder-decoder, but its encoder reads the source "
                "whole and finds none of its tokens likely or not. Leave it out."
            )
        beginning = list(request.prompt) if self.pair is None else [self.pair.start_id]
        if len(beginning) > self.room:
            raise UserError(
                f"The prompt has {len(beginning)} tokens, but the cache has room for {self.room}. "
                "Give a shorter prompt or more room (cache_tokens)."
            )
        if self.pair is not None and self.pair.end_id is not None:
            request = replace(request, end_ids=request.end_ids | {self.pair.end_id})
        number = next(self._numbers)
        kind = Beams if request.settings.num_beams > 1 else Sampling
        run = self.runs[number] = kind(self, number, request, beginning)
        self.waiting.extend(run.sequences)
        return number

    def _adapter_of(self, request: Request) -> str:
        """The name of the adapter that a request is written with, or `BASE`."""
        if self.switch is None and (switch := switch_of(self.model)) is not None:
            # The model got its first adapter since: what was read so far was read without one.
            self.switch, self.runner = switch, make_runner(self.model, self.pool)
        name = request.adapter
        if name is None:
            return BASE if self.switch is None or self.switch.active is None else self.switch.active
        known = [] if name == BASE else adapter_names(self.model)
        if name != BASE and name not in known:
            raise UserError(
                f"The model has no adapter '{name}'; it has {', '.join(known) or 'none at all'}."
            )
        return name

    def _root_of(self, sequence: Sequence) -> int:
        """Where its text begins: what one adapter has read, another must not look at."""
        name = sequence.request.adapter or BASE
        return self._roots.setdefault(name, ROOT - len(self._roots))

    def forget(self) -> None:
        """To be called when weights have changed: no text goes on from what the old ones read."""
        self.pages.forget()

    def cancel(self, number: int, choice: int | None = None) -> None:
        """Stop writing a request, or one of its texts; its memory is free at once.

        Beams are one text until the search has ended.
        """
        run = self.runs.get(number)
        if run is None:
            return
        for sequence in list(run.sequences):
            if choice is None or sequence.choice == choice or isinstance(run, Beams):
                self.finish(sequence)

    # ------------------------------------------------------------------ a step

    @torch.inference_mode()
    def step(self) -> list[NewToken]:
        """One pass of the model; the tokens that it brought, none where only prompts were read."""
        self._admit()
        if self.proposer is not None:
            self.proposer.propose([one for one in self.running if one.pending == 1])
        feeds = self._plan()
        if not feeds:
            return []
        logits = self.runner.run(feeds)
        listening = any(feed.sequence.wants_prompt_logprobs for feed in feeds)  # to many logits
        with contextlib.nullcontext() if listening else kernels.pytorch_alone():
            new = self._take(feeds, logits)
        for feed in feeds:
            self._make_known(feed.sequence)
        return new

    def _take(self, feeds: list[Feed], logits: Tensor) -> list[NewToken]:
        """Let each run choose from what the model said of its texts."""
        check_numbers(logits)
        best = likeliest(logits)
        found: dict[Run, list[tuple[Sequence, Tensor, list[int]]]] = {}
        at = 0
        for feed in feeds:
            sequence = feed.sequence
            sequence.cached += len(feed.tokens)
            end = at + feed.want
            if feed.want:
                run = self.runs[sequence.number]
                found.setdefault(run, []).append((sequence, logits[at:end], best[at:end]))
            at = end
        return [token for run, rows in found.items() for token in run.take(rows)]

    def _admit(self) -> None:
        """Let those who wait begin, in their order, as far as there is room."""
        while self.waiting:
            run = self.runs[self.waiting[0].number]
            group = run.company(self.waiting[0])
            crowded = len(self.running) + len(group) > self.max_running
            if (self.running and crowded) or not run.may_begin(group[0]):
                return
            for one in group:
                self._find_beginning(one)
            needed = sum(self._needs(one) for one in [*self.running, *group])
            if self.running and needed > self.pages.available:
                for one in group:
                    self._give_back(one)
                return
            for one in group:
                self.waiting.remove(one)
                self.running.append(one)

    def _find_beginning(self, sequence: Sequence) -> None:
        """What was computed for other texts, up to where this one differs."""
        if self.reuse_prefixes and not sequence.wants_prompt_logprobs:
            root = self._root_of(sequence)
            sequence.table, sequence.serial = self.pages.find(sequence.tokens, root)
            sequence.known = len(sequence.table)
            sequence.cached = sequence.known * PAGE

    def _needs(self, sequence: Sequence) -> int:
        """Pages that it will soon take: for what stands there, and what comes next."""
        length = len(sequence.tokens)
        soon = min(length + PAGE, max(length, sequence.end - 1))
        return -(-soon // PAGE) - len(sequence.table)

    def _plan(self) -> list[Feed]:
        """What goes through the model: the newest tokens first, then pieces of prompts."""
        feeds: dict[Sequence, Feed] = {}
        left = self.chunk
        for sequence in sorted(self.running, key=lambda one: one.pending > 1):
            if sequence not in self.running or not self.runs[sequence.number].ready(sequence):
                continue
            pending = sequence.pending
            if pending > 1:
                size = min(pending, left)
                if sequence.wants_prompt_logprobs:
                    size = min(size, LISTENING_CHUNK)
                left -= size
            else:
                size = 1
            if size == 0 or not self._make_room(sequence, size + len(sequence.guess), feeds):
                continue
            start = sequence.cached
            tokens = sequence.tokens[start : start + size]
            want = 1 if size == pending else 0
            if want:
                tokens = tokens + sequence.guess
                want += len(sequence.guess)
            if sequence.wants_prompt_logprobs:
                want = len(tokens)
            feeds[sequence] = Feed(sequence, tokens, want)
        return list(feeds.values())

    def _make_room(self, sequence: Sequence, more: int, feeds: dict[Sequence, Feed]) -> bool:
        """Pages for `more` tokens; the text that came last gives way. False if that is itself."""
        while len(sequence.table) * PAGE < sequence.cached + more:
            page = self.pages.take(sequence.table[-1] if sequence.table else None)
            if page is not None:
                sequence.table.append(page)
                continue
            last = self.running[-1]
            group = self.runs[last.number].company(last)
            for one in reversed(group):
                self._send_back(one)
                feeds.pop(one, None)
            if sequence in group:
                return False
        return True

    def _send_back(self, sequence: Sequence) -> None:
        """Back to the head of the queue, without pages but with all that was written."""
        self.running.remove(sequence)
        self._leave(sequence)
        self.waiting.appendleft(sequence)

    # ------------------------------------------------------------------ pages

    def _leave(self, sequence: Sequence) -> None:
        """Forget what was computed of it, but for what others may find."""
        self._make_known(sequence)
        self._give_back(sequence)
        sequence.guess, sequence.guess_odds = [], None
        self.runner.leave(sequence)
        if self.proposer is not None:
            self.proposer.leave(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        for page in reversed(sequence.table):  # the end of a text is forgotten before its beginning
            self.pages.release(page)
        sequence.table, sequence.cached, sequence.known, sequence.serial = [], 0, 0, ROOT

    def _make_known(self, sequence: Sequence) -> None:
        """Let other texts find the pages that have become full."""
        if not self.reuse_prefixes:
            return
        while sequence.known < min(sequence.cached // PAGE, len(sequence.table)):
            start = sequence.known * PAGE
            tokens, page = sequence.tokens[start : start + PAGE], sequence.table[sequence.known]
            parent = sequence.serial if sequence.known else self._root_of(sequence)
            sequence.serial = self.pages.remember(parent, tokens, page)
            sequence.known += 1

    def fork(self, sequence: Sequence, twin: Sequence) -> None:
        """Let `twin` go on from where `sequence` is: full pages are shared, the last one copied.

        Where there is no page for the copy, the twin reads everything anew.
        """
        self.runs[sequence.number].sequences.append(twin)
        self.running.insert(self.running.index(sequence) + 1, twin)
        twin.source = sequence.source
        full = sequence.cached // PAGE
        table = sequence.table[:full]
        if sequence.cached % PAGE:
            page = self.pages.take()
            if page is None:
                return
            self.pool.copy_page(sequence.table[full], page)
            table = [*table, page]
        for shared in table[:full]:
            self.pages.hold(shared)
        twin.table, twin.cached = table, sequence.cached
        twin.known, twin.serial = sequence.known, sequence.serial

    def finish(self, sequence: Sequence) -> None:
        """A text has ended, or nobody waits for it any more."""
        run = self.runs[sequence.number]
        if sequence in self.running:
            self.running.remove(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        self._leave(sequence)
        run.sequences.remove(sequence)
        if not run.sequences:
            del self.runs[sequence.number]


def likeliest(logits: Tensor) -> list[int]:
    """The argmax of each row. On a CPU NumPy finds it ten times as fast as PyTorch."""
    found = logits.numpy().argmax(-1) if logits.device.type == "cpu" else logits.argmax(-1)
    return [int(token) for token in found.tolist()]


def default_room(
    config: ModelConfig, max_running: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Tokens of room for an engine that was not told how many."""
    one = config.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)
    each = 2 * config.n_layers * config.n_kv_heads * one
    wanted = max_running * config.max_seq_len
    free = free_memory_bytes(device)
    affordable = wanted if free is None else free // 4 // each
    return max(min(wanted, affordable), min(config.max_seq_len, 4096))


def room_for(model: Writer, prompts: Many[Many[int]], settings: SamplingSettings) -> int:
    """Tokens of room with which as many texts as run at once never wait for memory."""
    context = writing_stack(model).config.max_seq_len
    pair = isinstance(model, EncoderDecoder)
    lengths = [min((1 if pair else len(p)) + settings.max_new_tokens, context) for p in prompts]
    pages = sorted((-(-length // PAGE) for length in lengths), reverse=True)[:MOST]
    if settings.num_beams > 1:
        return PAGE * settings.num_beams * sum(pages)
    return PAGE * sum([count for count in pages for _ in range(settings.n)][:MOST])


def requests_of(
    prompts: Many[Many[int]],
    settings: SamplingSettings,
    end_ids: frozenset[int] = frozenset(),
    constraint: Constraint | None = None,
) -> list[Request]:
    """One request for each prompt. With a seed every text has its own: the seed plus its place."""
    requests = []
    for place, prompt in enumerate(prompts):
        own = settings
        if settings.seed is not None:
            own = replace(settings, seed=(settings.seed + place * settings.n) % 2**63)
        requests.append(Request(prompt, own, end_ids, constraint))
    return requests


def generate_tokens(
    model: Writer,
    prompts: Many[Many[int]],
    settings: SamplingSettings,
    end_ids: Collection[int] = (),
) -> Iterator[list[NewToken]]:
    """Continue token ids together: each step yields the new token of every text.

    Prompts are checked before the first step is asked for. Prompt number i (from 0) is request
    number i.
    """
    if not prompts:
        raise UserError("There is no prompt to continue; give at least one.")
    engine = Engine(model, cache_tokens=room_for(model, prompts, settings))
    for number, request in enumerate(requests_of(prompts, settings, frozenset(end_ids))):
        assert engine.submit(request) == number

    def steps() -> Iterator[list[NewToken]]:
        while engine.busy:
            yield engine.step()

    return steps()
