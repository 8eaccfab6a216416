"""POST /v1/embeddings: texts as vectors."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from anyio.to_thread import run_sync
from fastapi import APIRouter
from starlette.responses import Response

from llm_from_scratch.model.heads import Embedder
from llm_from_scratch.serve.errors import ApiError
from llm_from_scratch.serve.models import ServedModel
from llm_from_scratch.serve.openai.events import answer
from llm_from_scratch.serve.openai.inputs import rows_of
from llm_from_scratch.serve.openai.schemas import EmbeddingRequest, Embeddings
from llm_from_scratch.serve.openai.settings import naming
from llm_from_scratch.serve.service import Service
from llm_from_scratch.text.inputs import with_special
from llm_from_scratch.text.tokenizer import Tokenizer

BATCH = 32  # texts that go through the model at once
BATCH_TOKENS = 512  # and tokens: a job must not hold up those who are being written to


def encode_rows(served: ServedModel, rows: Sequence[str | list[int]]) -> list[list[int]]:
    """The ids of each text, with the special tokens that belong around it.

    Rows of ids are of the model's own vocabulary. Raises `ApiError` for one that does not fit.
    """
    tokenizer, context = served.tokenizer, served.context
    texts = [row for row in rows if isinstance(row, str)]
    found = iter(tokenizer.encode_batch(texts))
    encoded = []
    for place, row in enumerate(rows):
        ids = _around(tokenizer, next(found) if isinstance(row, str) else row)
        if len(ids) > context:
            raise ApiError(
                400,
                f"This model's maximum context length is {context} tokens, but text {place + 1} of "
                f"the input has {len(ids)}. Cut it into shorter ones.",
                code="context_length_exceeded",
                param="input",
            )
        if max(ids, default=0) >= tokenizer.vocab_size or min(ids, default=0) < 0:
            raise ApiError(
                400,
                f"Text {place + 1} of the input has token ids that are not in the vocabulary of "
                f"{tokenizer.vocab_size}; send texts, or ids of this model's own tokens.",
                param="input",
            )
        encoded.append(ids)
    return encoded


def _around(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    whole = with_special(tokenizer, ids)
    done = ids[:1] == whole[:1] and ids[-1:] == whole[-1:] and len(ids) > 1
    return list(ids) if done and len(whole) > len(ids) else whole


def batches(rows: Sequence[list[int]]) -> Iterator[list[int]]:
    """Places of rows that go through the model together: of like length, and not too many."""
    batch: list[int] = []
    for place in sorted(range(len(rows)), key=lambda place: len(rows[place])):
        tokens = len(rows[place]) * (len(batch) + 1)  # it is the longest so far
        if batch and (len(batch) == BATCH or tokens > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


@torch.inference_mode()
def embed(served: ServedModel, rows: Sequence[list[int]]) -> np.ndarray:
    """The vectors (rows, d_model) of rows of ids, as 32-bit floats."""
    model = served.model
    assert isinstance(model, Embedder)
    length = max(1, *map(len, rows))
    pad = served.tokenizer.pad_id or 0
    device = next(model.parameters()).device
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    return model(ids, attention_mask=mask).float().cpu().numpy()


def cut(vectors: np.ndarray, size: int | None) -> np.ndarray:
    """The first `size` numbers of each vector, as long as a vector of length 1 again."""
    if size is None or size == vectors.shape[1]:
        return vectors
    if size > vectors.shape[1]:
        raise ApiError(
            400,
            f"dimensions is {size}, but the model's vectors have {vectors.shape[1]} numbers; ask "
            "for fewer.",
            param="dimensions",
        )
    short = vectors[:, :size]
    return short / np.maximum(np.linalg.norm(short, axis=1, keepdims=True), 1e-12)


def router(service: Service) -> APIRouter:
    api = APIRouter(tags=["openai"])

    @api.post("/v1/embeddings", response_model=Embeddings)
    async def embeddings(body: EmbeddingRequest) -> Response:
        """Vectors of texts: those of like meaning are close."""
        served = service.model(body.model, "embedder")
        inputs = rows_of(body.input, "input")
        with naming("input"):
            rows = await run_sync(encode_rows, served, inputs)
        assert isinstance(served.model, Embedder)
        size = served.model.stack.d_model
        cut(np.zeros((1, size)), body.dimensions)  # refused before anything is computed
        vectors = np.zeros((len(rows), size), dtype="<f4")
        try:
            async with asyncio.timeout(service.limits.max_seconds):
                for places in batches(rows):
                    job = partial(embed, served, [rows[place] for place in places])
                    vectors[places] = await service.worker.do(job)
        except TimeoutError as error:
            raise ApiError(
                503,
                f"The texts took longer than {service.limits.max_seconds} seconds, the limit of "
                "this server; send fewer at a time.",
                code="timeout",
            ) from error
        vectors = cut(vectors, body.dimensions)
        return answer(
            {
                "object": "list",
                "data": [
                    {
                        "object": "embedding",
                        "index": place,
                        "embedding": _written(vector, body.encoding_format),
                    }
                    for place, vector in enumerate(vectors)
                ],
                "model": served.name,
                "usage": {
                    "prompt_tokens": sum(map(len, rows)),
                    "total_tokens": sum(map(len, rows)),
                },
            }
        )

    return api


def _written(vector: np.ndarray, form: str | None) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(number) for number in vector]
