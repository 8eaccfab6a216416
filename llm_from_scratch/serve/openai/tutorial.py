"""POST /generate: the plainest way to ask for a text, as tutorials have it."""

from __future__ import annotations

from typing import Any

from anyio.to_thread import run_sync
from fastapi import APIRouter
from starlette.responses import Response

from llm_from_scratch.generate.generate import encode_for
from llm_from_scratch.generate.settings import SamplingSettings
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.serve.openai.events import answer
from llm_from_scratch.serve.openai.schemas import TutorialReply, TutorialRequest
from llm_from_scratch.serve.openai.settings import naming
from llm_from_scratch.serve.service import Service

NEW_TOKENS = 50


def router(service: Service) -> APIRouter:
    api = APIRouter(tags=["tutorial"])

    @api.post("/generate", response_model=TutorialReply)
    async def generate(body: TutorialRequest) -> Response:
        """Continue a text: {"text": "Once upon a time"} -> {"generated_text": "Once upon a ..."}.

        A translator gives its translation instead.
        """
        served = service.model(None, "writer")
        given: dict[str, Any] = {"seed": body.seed}
        if body.temperature is not None:
            given["temperature"] = body.temperature
        with naming("text"):
            settings = SamplingSettings(
                max_new_tokens=min(body.max_new_tokens or NEW_TOKENS, 2**31), **given
            )
            ids = await run_sync(encode_for, served.model, served.tokenizer, body.text)  # type: ignore[arg-type]
            pieces = service.worker.write(served.name, [ids], settings)
            new = "".join([piece.text async for piece in pieces])
        before = "" if isinstance(served.model, EncoderDecoder) else body.text
        return answer({"generated_text": before + new})

    return api
