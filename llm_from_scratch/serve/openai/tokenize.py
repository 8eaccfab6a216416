"""POST /v1/tokenize and /v1/detokenize: a text as a model reads it, and back."""

from __future__ import annotations

from typing import Any

from anyio.to_thread import run_sync
from fastapi import APIRouter
from starlette.responses import Response

from llm_from_scratch.generate.chat import token_text
from llm_from_scratch.generate.generate import encode_for
from llm_from_scratch.serve.errors import ApiError
from llm_from_scratch.serve.models import ServedModel
from llm_from_scratch.serve.openai.chat_schema import plain
from llm_from_scratch.serve.openai.events import answer
from llm_from_scratch.serve.openai.schemas import DetokenizeRequest, Text, TokenizeRequest, Tokens
from llm_from_scratch.serve.openai.settings import naming
from llm_from_scratch.serve.service import Service
from llm_from_scratch.text.tools import encode_tool_prompt


def _ids(served: ServedModel, body: TokenizeRequest) -> list[int]:
    tokenizer = served.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "Give either prompt or messages.", param="prompt")
    if body.messages is not None:
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        with naming("messages"):
            said = plain(body.messages)
            return encode_tool_prompt(tokenizer, said, tools, template=served.template)
    assert body.prompt is not None
    with naming("prompt"):
        if body.add_special_tokens is False:
            return tokenizer.encode(body.prompt)
        if served.kind == "embedder":
            return tokenizer.encode_inputs([body.prompt]).ids[0]
        return encode_for(served.model, tokenizer, body.prompt)  # type: ignore[arg-type]


def _tokens(served: ServedModel, body: TokenizeRequest) -> Response:
    ids = _ids(served, body)
    found: dict[str, Any] = {"count": len(ids), "max_model_len": served.context, "tokens": ids}
    if body.return_token_strs:
        found["token_strs"] = [token_text(served.tokenizer, token) for token in ids]
    return answer(found)


def router(service: Service) -> APIRouter:
    api = APIRouter(tags=["tokens"])

    @api.post("/v1/tokenize", response_model=Tokens, response_model_exclude_none=True)
    async def tokenize(body: TokenizeRequest) -> Response:
        """The tokens of a text, or of a conversation up to where the answer begins."""
        served = service.model(body.model)
        return await run_sync(_tokens, served, body)  # there may be millions

    @api.post("/v1/detokenize", response_model=Text)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of tokens."""
        served = service.model(body.model)
        size = served.tokenizer.vocab_size
        wrong = next((token for token in body.tokens if not 0 <= token < size), None)
        if wrong is not None:
            raise ApiError(
                400,
                f"tokens has the id {wrong}, but the model's vocabulary ends at {size - 1}.",
                param="tokens",
            )
        text = await run_sync(served.tokenizer.target.decode, body.tokens)
        return answer({"prompt": text})

    return api
