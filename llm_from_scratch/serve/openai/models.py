"""GET /v1/models: what this server has."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from llm_from_scratch.serve.models import ServedModel
from llm_from_scratch.serve.openai.events import answer
from llm_from_scratch.serve.openai.schemas import ModelEntry, ModelList
from llm_from_scratch.serve.service import Service


def _entry(served: ServedModel) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "scratchlm",
        "kind": served.kind,
        "max_model_len": served.context,
    }


def router(service: Service) -> APIRouter:
    api = APIRouter(tags=["openai"])

    @api.get("/v1/models", response_model=ModelList)
    async def models() -> Response:
        """The models that can be asked for."""
        found = [_entry(served) for served in service.models.values()]
        return answer({"object": "list", "data": found})

    @api.get("/v1/models/{model:path}", response_model=ModelEntry)
    async def model(model: str) -> Response:
        """One of them."""
        return answer(_entry(service.model(model)))

    return api
