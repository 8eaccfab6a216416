"""The application: every route behind the same guards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles

from llm_from_scratch import __version__
from llm_from_scratch.serve import docs_pages, errors, inside, runs
from llm_from_scratch.serve.guard import Connection, Gate, Watchman
from llm_from_scratch.serve.openai import (
    chat,
    completions,
    embeddings,
    models,
    tokenize,
    tutorial,
)
from llm_from_scratch.serve.openai.fields import ERRORS
from llm_from_scratch.serve.service import Service

PAGE = Path(__file__).parent / "page"
LAST_STEP = 2.0  # seconds for what the worker is in the middle of when everything ends
ROUTES = (
    chat, completions, embeddings, models, tokenize, tutorial, inside, runs, docs_pages,
)  # fmt: skip


def make_app(service: Service) -> FastAPI:
    """The ASGI application of a service; the worker works while it runs."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop, LAST_STEP)

    app = FastAPI(
        title="scratchlm",
        version=__version__,
        description="Language models over HTTP, in OpenAI's protocol.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        responses=ERRORS,
    )
    app.state.service = service
    errors.install(app)
    for part in ROUTES:
        app.include_router(part.router(service))
    _add_own_routes(app, service)
    # The last one added is the outermost.
    app.add_middleware(Connection, service=service)
    app.add_middleware(Gate, service=service)
    if service.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client in a browser sends many of its own
        )
    app.add_middleware(Watchman, service=service)
    return app


def _add_own_routes(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", tags=["server"])
    async def healthz() -> Response:
        """Whether the server takes requests: 200, or 503 while it shuts down."""
        if service.draining:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", tags=["server"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4")

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE, check_dir=False), name="page")
