"""schemathesis reads the server's own OpenAPI and asks in every way that it allows, and in others:
no answer is a server error, and every answer is what the description says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_from_scratch.serve.limits import Limits
from llm_from_scratch.serve.service import make_service
from llm_from_scratch.text.tokenizer import Tokenizer
from tests.serve.conftest import make_writer
from tests.serve.openai.conftest import make_embedder
from tests.serve.servers import Running, running

pytest.importorskip("schemathesis", reason="schemathesis is not installed")

LIMITS = Limits(cache_tokens=1024, max_new_tokens=2, max_running=4, max_queue=8)
# What is valid by its types alone can still be refused, for a sentence says why.
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_headers_conformance", "response_schema_conformance", "negative_data_rejection",
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[Running]:
    """Answers are short here: there will be thousands."""
    models = {"tiny": make_writer(tokenizer, LIMITS, max_seq_len=96, n_layers=1)}
    models["vectors"] = make_embedder()
    with running(make_service(models, LIMITS)) as started:
        yield started


def run(server: Running, folder: Path, phases: str, *options: str) -> None:
    command = [
        sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run",
        f"{server.address}/openapi.json", "--checks", ",".join(CHECKS), "--no-color",
        "--phases", phases, "--suppress-health-check", "all", *options,
    ]  # fmt: skip
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    assert "generated" in found.stdout and "Tested: 0" not in found.stdout


def test_every_answer_is_as_described(server: Running, tmp_path: Path) -> None:
    """The examples, and of every field of every route the limits of what is allowed, each kind of
    what is not, and its absence: some 1,700 requests."""
    run(server, tmp_path, "examples,coverage", "--workers", "2", "--seed", "1")


@pytest.mark.full
def test_many_more_answers_are(server: Running, tmp_path: Path) -> None:
    options = ("--max-examples", "100", "--seed", "2")
    run(server, tmp_path, "examples,coverage,fuzzing", *options)
