"""What the page shows of the inside of a model: /api/inside/*, and /api/page, what there is at all.

The arithmetic is `model/inside.py`. Everything that touches a model is done by the worker between
two steps of its engines, a block (or some rows of a table) at a time: whoever looks inside waits
for the texts that are being written, not they for him.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, TypeVar

import torch
from anyio.to_thread import run_sync
from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from llm_from_scratch import __version__
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.generate import encode_prompt, encode_source
from llm_from_scratch.model.adapters import with_adapter
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.heads import Head
from llm_from_scratch.model.inside import Reading, cosines, lens_rows, nearest_of, reader_of
from llm_from_scratch.model.inventory import parameter_count
from llm_from_scratch.serve.models import ServedModel
from llm_from_scratch.serve.service import Service
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.tools import encode_tool_prompt

T = TypeVar("T")
Do = Callable[[Callable[[], T]], Awaitable[T]]

ATTENTION_TOKENS, LENS_TOKENS = 256, 96  # of the longest texts that are looked at
TEXT_LENGTH, TEXT_TOKENS = 100_000, 32_768  # of a text that is shown in tokens
SHARES = 65_535  # a weight of 1, as 16 bits hold it
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Count = Annotated[int, Field(ge=1, le=100)]


class Asked(BaseModel):
    """What every question has: the model, by its name; without one it is the server's first."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None


class TokensAsked(Asked):
    """Exactly one of a text, a chat's messages, and ids."""

    text: Annotated[str, Field(max_length=TEXT_LENGTH)] | None = None
    messages: list[dict[str, Any]] | None = None
    ids: Annotated[list[TokenId], Field(max_length=TEXT_TOKENS)] | None = None

    @model_validator(mode="after")
    def one_of_them(self) -> TokensAsked:
        if [self.text, self.messages, self.ids].count(None) != 2:
            raise ValueError("Give one of text, messages and ids.")
        return self


class AttentionAsked(Asked):
    """The text as ids, and which layer (from 0) is looked into."""

    ids: Annotated[list[TokenId], Field(min_length=1, max_length=ATTENTION_TOKENS)]
    layer: Annotated[int, Field(ge=0, lt=1 << 31)]


class LensAsked(Asked):
    """The text as ids, and how many guesses are wanted of each layer at each position."""

    ids: Annotated[list[TokenId], Field(min_length=1, max_length=LENS_TOKENS)]
    top: Annotated[int, Field(ge=1, le=20)] = 3


class NeighboursAsked(Asked):
    """A token, by its id or by its text."""

    id: TokenId | None = None
    text: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    top: Count = 12

    @model_validator(mode="after")
    def one_of_them(self) -> NeighboursAsked:
        if (self.id is None) == (self.text is None):
            raise ValueError("Give one of id and text.")
        return self


# --- tokens --------------------------------------------------------------------------------------


class Shown:
    """Tokens as the page gets them: {"id", "text", "special"}."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special = frozenset(tokenizer.special_tokens.values())

    def text(self, token: int) -> str:
        """A token's text with its spaces; bytes that are no whole character as `\\xe3`."""
        return self.tokenizer.token_bytes(token).decode("utf-8", "backslashreplace")

    def tokens(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        return [{"id": i, "text": self.text(i), "special": i in self.special} for i in ids]

    def rated(self, ids: Tensor, values: Tensor, name: str) -> list[dict[str, Any]]:
        """Tokens with a number each; a broken model's numbers that are none are 0."""
        numbers = torch.nan_to_num(values).tolist()
        return [
            {"id": i, "text": self.text(i), name: round(x, 6)}
            for i, x in zip(ids.tolist(), numbers, strict=True)
        ]


def ids_of(served: ServedModel, asked: TokensAsked) -> list[int]:
    """The ids that the model reads, with the special tokens that belong around a text."""
    tokenizer = served.tokenizer
    if asked.ids is not None:
        return asked.ids
    if asked.messages is not None:
        return encode_tool_prompt(tokenizer, asked.messages, template=served.template)
    assert asked.text is not None
    encode = encode_prompt if isinstance(served.model, Decoder) else encode_source
    return encode(tokenizer, asked.text)


def token_of(tokenizer: Tokenizer, text: str) -> tuple[int, list[int]]:
    """The token that a text is, and all of its tokens where it is several.

    A word is the token with a space before it, where there is one: `king` without is rather the
    end of `making`. Of several tokens it is the first that is more than a space. Raises `UserError`
    for a text without tokens.
    """
    ids = tokenizer.encode(text)
    if text[0].isascii() and text[0].isalpha():
        with contextlib.suppress(UserError):  # a vocabulary of characters need not have the space
            behind_space = tokenizer.encode(f" {text}")
            ids = behind_space if len(behind_space) == 1 else ids
    if not ids:
        raise UserError("There is no token in this text: give another.")
    return next((i for i in ids if tokenizer.token_bytes(i).strip()), ids[0]), ids


# --- looking -------------------------------------------------------------------------------------


def through(do: Do[Any], served: ServedModel) -> Do[Any]:
    """`do`, with each job done while the model's adapter acts: others share its base."""
    name = served.adapter
    if name is None:
        return do

    def adapted(job: Callable[[], Any]) -> Any:
        with with_adapter(served.model, name or None):
            return job()

    return lambda job: do(partial(adapted, job))


async def attention(do: Do[Any], served: ServedModel, ids: list[int], layer: int) -> dict[str, Any]:
    """The weights of one layer, packed: heads x T x T shares of 65,535."""
    do = through(do, served)
    stack = reader_of(served.model)
    if layer >= len(stack.blocks):
        raise UserError(f"There is no layer {layer}: the model's are 0 to {len(stack.blocks) - 1}.")
    reading: Reading = await do(lambda: Reading(served.model, ids))
    for _ in range(layer):
        await do(reading.step)
    weights_hts: Tensor = await do(reading.watched_step)
    shares = (torch.nan_to_num(weights_hts) * SHARES).round().cpu().numpy().astype("<u2")
    return {
        "layer": layer,
        "heads": len(shares),
        "tokens": Shown(served.tokenizer).tokens(ids),
        "weights": base64.b64encode(shares.tobytes()).decode(),
    }


async def lens(do: Do[Any], served: ServedModel, ids: list[int], top: int) -> dict[str, Any]:
    """The likeliest next tokens at the embedding and behind each block."""
    do = through(do, served)
    reading: Reading = await do(lambda: Reading(served.model, ids))
    shown, cells = Shown(served.tokenizer), []
    while True:
        rows, cells_t = lens_rows(reading, top), []
        while (part := await do(partial(next, rows, None))) is not None:
            pairs = zip(*(x.cpu() for x in part), strict=True)
            cells_t += [shown.rated(ids_k, p_k, "p") for ids_k, p_k in pairs]
        cells.append(cells_t)
        if reading.ended:
            break
        await do(reading.step)
    names = ["embedding", *(str(number) for number in range(1, len(cells)))]
    return {"layers": names, "tokens": shown.tokens(ids), "cells": cells}


async def neighbours(do: Do[Any], served: ServedModel, asked: NeighboursAsked) -> dict[str, Any]:
    """The tokens whose embeddings point most nearly the same way."""
    do = through(do, served)
    tokenizer = served.tokenizer
    token, ids = (asked.id, []) if asked.text is None else token_of(tokenizer, asked.text)
    assert token is not None
    some = cosines(served.model, token, tokenizer.vocab_size)
    parts: list[Tensor] = []
    while (part := await do(partial(next, some, None))) is not None:
        parts.append(part)
    found, shown = nearest_of(torch.cat(parts), token, asked.top), Shown(tokenizer)
    return {
        "token": {"id": token, "text": shown.text(token)},
        "pieces": shown.tokens(ids),
        "neighbours": shown.rated(*found, "cosine"),
    }


# --- what there is -------------------------------------------------------------------------------


def stored_as(model: nn.Module) -> str:
    """The form of most of a model's numbers: "bf16", or "4 bits" where they are packed."""
    counts: dict[str, int] = {}
    for part in {id(x): x for m in model.modules() if (x := getattr(m, "packed", None))}.values():
        bits = part.layout.bits
        name = f"{bits} bits" if bits <= 8 else part.kind
        counts[name] = counts.get(name, 0) + part.out_features * part.in_features
    for parameter in model.parameters():
        name = DTYPES.get(parameter.dtype, str(parameter.dtype).removeprefix("torch."))
        counts[name] = counts.get(name, 0) + parameter.numel()
    return max(counts, key=counts.__getitem__)


def described(served: ServedModel) -> dict[str, Any]:
    """A model as the page lists it."""
    model, tokenizer = served.model, served.tokenizer
    config = reader_of(model).config
    head = model.head_config if isinstance(model, Head) else None
    return {
        "name": served.name,
        "kind": served.kind,
        "family": config.family,
        "parameters": parameter_count(model.config, head),
        "context": served.context,
        "layers": config.n_layers,
        "heads": config.n_heads,
        "vocab_size": model.config.vocab_size,
        "weights": stored_as(model),
        "chat": served.kind == "writer" and bool(served.template or tokenizer.chat_template),
    }


def router(service: Service) -> APIRouter:
    """The routes."""
    routes, do = APIRouter(tags=["page"]), service.worker.do

    @routes.get("/api/page")
    async def page() -> Response:
        """What the page can show: models, limits, and whether there are run folders."""
        limits = asdict(service.limits)
        own = {"attention_tokens": ATTENTION_TOKENS, "lens_tokens": LENS_TOKENS}
        models = [described(served) for served in service.models.values()]
        return JSONResponse(
            {
                "version": __version__,
                "models": models,
                "runs": service.runs is not None,
                "limits": limits | own,
            }
        )

    @routes.post("/api/inside/tokens")
    async def tokens(asked: TokensAsked) -> Response:
        """A text, a chat or ids as the tokens that the model reads."""
        served = service.model(asked.model)
        ids = await run_sync(ids_of, served, asked)
        if len(ids) > TEXT_TOKENS:
            raise UserError(f"The text has {len(ids):,} tokens; {TEXT_TOKENS:,} can be shown.")
        return JSONResponse({"tokens": await run_sync(Shown(served.tokenizer).tokens, ids)})

    @routes.post("/api/inside/attention")
    async def look_at_attention(asked: AttentionAsked) -> Response:
        """Where each head of a layer looks: base64 of little-endian uint16, heads x T x T."""
        served = service.model(asked.model)
        return JSONResponse(await attention(do, served, asked.ids, asked.layer))

    @routes.post("/api/inside/lens")
    async def look_through_lens(asked: LensAsked) -> Response:
        """The prediction layer by layer (logit lens); for decoders."""
        return JSONResponse(await lens(do, service.model(asked.model), asked.ids, asked.top))

    @routes.post("/api/inside/neighbours")
    async def look_for_neighbours(asked: NeighboursAsked) -> Response:
        """The tokens whose embeddings are most like that of one."""
        return JSONResponse(await neighbours(do, service.model(asked.model), asked))

    return routes
