"""POST /v1/completions: texts continued, whole or in events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from anyio.to_thread import run_sync
from fastapi import APIRouter
from starlette.responses import Response

from llm_from_scratch.core.errors import shown
from llm_from_scratch.generate.chat import protocol_reason
from llm_from_scratch.generate.generate import encode_for
from llm_from_scratch.generate.sampling import TokenLogprobs
from llm_from_scratch.generate.settings import SamplingSettings
from llm_from_scratch.generate.texts import Piece
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.serve.errors import ApiError
from llm_from_scratch.serve.models import ServedModel
from llm_from_scratch.serve.openai.chat import FINGERPRINT
from llm_from_scratch.serve.openai.events import EventStream, answer, or_events
from llm_from_scratch.serve.openai.fields import usage_of
from llm_from_scratch.serve.openai.inputs import rows_of
from llm_from_scratch.serve.openai.logprobs import Offsets, completion_logprobs
from llm_from_scratch.serve.openai.schemas import Completion, CompletionRequest
from llm_from_scratch.serve.openai.settings import naming, settings_of
from llm_from_scratch.serve.service import Service
from llm_from_scratch.text.stream import StreamDecoder
from llm_from_scratch.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Plan:
    """What is written for a request.

    Attributes:
        texts: the prompts as text, for those who want them back.
        silent: whether only the prompt is wanted, and what is written is not.
        written: the tokenizer of the new text.
    """

    served: ServedModel
    prompts: list[list[int]]
    texts: list[str]
    settings: SamplingSettings
    echo: bool
    silent: bool
    with_ids: bool
    written: Tokenizer


def plan_of(served: ServedModel, body: CompletionRequest, most: int) -> Plan:
    """The plan for a request. Raises `ApiError` for what is wrong with it, naming the field."""
    model, tokenizer = served.model, served.tokenizer
    rows = rows_of("" if body.prompt is None else body.prompt, "prompt")
    echo, pair = bool(body.echo), isinstance(model, EncoderDecoder)
    if echo and pair:
        raise ApiError(
            400,
            f"The model {shown(served.name)} writes a text of its own and continues none, so there "
            "is nothing to echo; leave echo out.",
            param="echo",
        )
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(
            400,
            f"best_of is {body.best_of} and n {body.n or 1}; every text that is written here is "
            "given back, so leave best_of out.",
            param="best_of",
        )
    silent = body.max_tokens == 0
    if body.return_token_ids and len(rows) > 1:
        raise ApiError(
            400, "return_token_ids is for a single prompt; send them one at a time.",
            param="return_token_ids",
        )  # fmt: skip
    with naming("prompt"):
        prompts = [encode_for(model, tokenizer, row) for row in rows]  # type: ignore[arg-type]
    settings = settings_of(
        body,
        1 if silent else most,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if echo else None,
    )
    texts = []
    if echo:
        texts = [row if isinstance(row, str) else _shown(tokenizer, row, silent) for row in rows]
    return Plan(
        served=served,
        prompts=prompts,
        texts=texts,
        settings=settings,
        echo=echo,
        silent=silent,
        with_ids=bool(body.return_token_ids),
        written=tokenizer.target if pair else tokenizer,
    )


def _shown(tokenizer: Tokenizer, ids: list[int], whole: bool) -> str:
    """The text of a prompt of ids. A character that it only begins comes with the new text; where
    none follows (`whole`), it is U+FFFD."""
    decoder = StreamDecoder(tokenizer)
    text = "".join(map(decoder.push, ids))
    return text if tokenizer.bytes_rule.exact and not whole else tokenizer.decode(ids)


class _Text:
    """One text as it is written.

    Attributes:
        text: what came with the last piece; with echo, the prompt ahead of the first.
        logprobs: of its tokens, in the protocol's form.
        reason: why it ended; None until it has.
        written: how many tokens it has.
    """

    def __init__(self, plan: Plan, row: int) -> None:
        self.plan = plan
        self.row = row
        self.text = ""
        self.logprobs: dict[str, Any] | None = None
        self.reason: str | None = None
        self.written = 0
        self._told = 0
        self._begun = False
        self._offsets = Offsets(plan.written)

    def take(self, piece: Piece, heard: Sequence[TokenLogprobs] | None) -> None:
        """Take in a piece; `heard` is what is known of the prompt's tokens."""
        plan, result = self.plan, piece.result
        new = piece.logprobs if result is None else (result.logprobs or [])[self._told :]
        self._told += len(new)
        self.written = self.written + len(piece.tokens) if result is None else len(result.tokens)
        if result is not None:
            self.reason = protocol_reason(result.finish_reason)
        self.text = piece.text
        found: list[TokenLogprobs | int] = list(new)
        if plan.silent:
            self.text, found, self.written = "", [], 0
            self.reason = self.reason and "length"
        if plan.echo and not self._begun:
            text = plan.texts[self.row]
            self.text = text + self.text
            prompt = plan.prompts[self.row]
            # A text's bos token stands in front of what was given.
            self._offsets.begin(prompt, len(text))
            found = [*prompt[:1], *(heard or ()), *found]
        self._begun = True
        self.logprobs = None
        if plan.settings.logprobs is not None:
            self.logprobs = completion_logprobs(
                plan.written, found, self._offsets, plan.settings.logprobs, plan.with_ids
            )


class _Texts:
    """The texts of one request."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        n = plan.settings.n
        self.texts = [_Text(plan, row) for row in range(len(plan.prompts)) for _ in range(n)]
        self.frame: dict[str, Any] = {
            "id": f"cmpl-{uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": plan.served.name,
            "system_fingerprint": FINGERPRINT,
        }
        self._heard: dict[int, Sequence[TokenLogprobs]] = {}
        self._early: dict[int, list[Piece]] = {}  # they wait for what is known of their prompt

    def take(self, piece: Piece) -> list[dict[str, Any]]:
        """Take in a piece; the choices of an answer that it brings."""
        row = piece.row
        if row not in self._heard:
            if self.plan.settings.prompt_logprobs is not None and piece.choice:
                self._early.setdefault(row, []).append(piece)
                return []
            self._heard[row] = piece.prompt_logprobs or ()
        return [self._choice(one) for one in (piece, *self._early.pop(row, ()))]

    def _choice(self, piece: Piece) -> dict[str, Any]:
        index = piece.row * self.plan.settings.n + piece.choice
        text = self.texts[index]
        text.take(piece, self._heard[piece.row])
        return {
            "index": index,
            "text": text.text,
            "logprobs": text.logprobs,
            "finish_reason": text.reason,
        }

    @property
    def usage(self) -> dict[str, int]:
        read = sum(map(len, self.plan.prompts))
        return usage_of(read, sum(text.written for text in self.texts))


def _join(whole: dict[str, Any], more: dict[str, Any]) -> None:
    """Add the next part of a choice to what there is of it."""
    whole["text"] += more["text"]
    whole["finish_reason"] = more["finish_reason"]
    for name, values in (more["logprobs"] or {}).items():
        if values is not None:
            whole["logprobs"][name] += values


async def _whole(plan: Plan, pieces: AsyncGenerator[Piece, None]) -> dict[str, Any]:
    texts = _Texts(plan)
    choices: dict[int, dict[str, Any]] = {}
    async with aclosing(pieces):
        async for piece in pieces:
            for choice in texts.take(piece):
                if choice["index"] in choices:
                    _join(choices[choice["index"]], choice)
                else:
                    choices[choice["index"]] = choice
    found = [choices[index] for index in sorted(choices)]
    whole = {**texts.frame, "choices": found, "usage": texts.usage}
    return {**whole, "prompt_token_ids": plan.prompts[0]} if plan.with_ids else whole


async def _chunks(
    plan: Plan, pieces: AsyncGenerator[Piece, None], with_usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    texts = _Texts(plan)
    frame = {**texts.frame, **({"usage": None} if with_usage else {})}
    first = {"prompt_token_ids": plan.prompts[0]} if plan.with_ids else {}
    async with aclosing(pieces):
        async for piece in pieces:
            for choice in texts.take(piece):
                yield {**frame, "choices": [choice], **first}
                first = {}
    if with_usage:
        yield {**texts.frame, "choices": [], "usage": texts.usage}


def router(service: Service) -> APIRouter:
    api = APIRouter(tags=["openai"])

    @api.post("/v1/completions", response_model=Completion, responses=or_events(Completion))
    async def completions(body: CompletionRequest) -> Response:
        """Continue texts."""
        served = service.model(body.model, "writer")
        plan = await run_sync(plan_of, served, body, service.limits.max_new_tokens)
        with naming("prompt"):
            pieces = service.worker.write(served.name, plan.prompts, plan.settings)
            await pieces.accepted()
        if body.stream:
            return EventStream(_chunks(plan, pieces, body.wants_usage))
        return answer(await _whole(plan, pieces))

    return api
