"""Embeddings through OpenAI's own client: the model's own vectors, in both encodings."""

from __future__ import annotations

import base64
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from openai import BadRequestError

from llm_from_scratch.serve.models import ServedModel
from llm_from_scratch.serve.openai import embeddings
from tests.serve.servers import Running

TEXTS = ["Once upon a time there was a king.", "王様", "The end", "", "a b c d e f g h i j k l m"]


def vectors_of(served: ServedModel, texts: list[str]) -> np.ndarray:
    found = []
    for text in texts:
        ids = torch.tensor(served.tokenizer.encode_inputs([text]).ids)
        with torch.inference_mode():
            found.append(served.model(ids)[0].numpy())  # type: ignore[operator]
    return np.stack(found)


def test_vectors_are_the_models(client: Any, models: dict[str, ServedModel]) -> None:
    served = models["vectors"]
    ours = vectors_of(served, TEXTS)
    assert np.linalg.norm(ours, axis=1) == pytest.approx(1.0)
    for form in ("float", "base64", None):
        more: Any = {} if form is None else {"encoding_format": form}
        answer = client.embeddings.create(model="vectors", input=TEXTS, **more)
        assert [one.index for one in answer.data] == list(range(len(TEXTS)))
        rows: list[Any] = [one.embedding for one in answer.data]
        if form == "base64":
            rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
        np.testing.assert_allclose(np.array(rows), ours, atol=1e-5)
    count = sum(len(ids) for text in TEXTS for ids in served.tokenizer.encode_inputs([text]).ids)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == count
    single = client.embeddings.create(model="vectors", input=TEXTS[0])
    np.testing.assert_allclose(single.data[0].embedding, ours[0], atol=1e-5)


def test_shorter_vectors_have_length_one(client: Any, models: dict[str, ServedModel]) -> None:
    ours = vectors_of(models["vectors"], TEXTS[:2])[:, :7]
    ours /= np.linalg.norm(ours, axis=1, keepdims=True)
    answer = client.embeddings.create(model="vectors", input=TEXTS[:2], dimensions=7)
    np.testing.assert_allclose([one.embedding for one in answer.data], ours, atol=1e-5)


def test_token_ids_are_the_models_own(client: Any, models: dict[str, ServedModel]) -> None:
    served = models["vectors"]
    plain = [served.tokenizer.encode(text) for text in TEXTS if text]
    around = [served.tokenizer.encode_inputs([text]).ids[0] for text in TEXTS if text]
    ours = vectors_of(served, [text for text in TEXTS if text])
    for rows in (plain, around):
        answer = client.embeddings.create(model="vectors", input=rows)
        np.testing.assert_allclose([one.embedding for one in answer.data], ours, atol=1e-5)
    answer = client.embeddings.create(model="vectors", input=plain[0])
    np.testing.assert_allclose(answer.data[0].embedding, ours[0], atol=1e-5)


def test_work_is_cut_into_short_jobs(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other clients' texts go on in between; the order of the answer stays."""
    jobs: list[list[int]] = []
    embed = embeddings.embed

    def listening(served: ServedModel, rows: list[list[int]]) -> np.ndarray:
        jobs.append([len(row) for row in rows])
        return embed(served, rows)

    monkeypatch.setattr(embeddings, "embed", listening)
    texts = ["x" * (7 * i % 70 + 1) for i in range(100)]
    answer = client.embeddings.create(model="vectors", input=texts)
    assert len(jobs) > 3 and sum(map(len, jobs)) == 100
    for lengths in jobs:
        assert len(lengths) <= embeddings.BATCH
        assert len(lengths) * max(lengths) <= embeddings.BATCH_TOKENS
    first = client.embeddings.create(model="vectors", input=texts[57])
    np.testing.assert_allclose(answer.data[57].embedding, first.data[0].embedding, atol=1e-5)


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"input": []}, "input", "must be a text"),
    ({"input": ["a", None]}, "input", "at place 1"),
    ({"input": ["a", "b" * 100]}, "input", "text 2 of the input has 102"),
    ({"input": [[5000]]}, "input", "not in the vocabulary"),
    ({"dimensions": 10**6}, "dimensions", "ask for fewer"),
    ({"dimensions": 0}, "dimensions", "greater than or equal to 1"),
    ({"encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
    ({"model": "tiny"}, "model", "embeds no texts"),
    ({"inputs": "a"}, "inputs", "Did you mean 'input'"),
]


@pytest.mark.parametrize(("fields", "param", "words"), WRONG)
def test_what_is_wrong(fields: dict[str, Any], param: str, words: str, client: Any) -> None:
    with pytest.raises(BadRequestError, match=words) as found:
        client.post(
            "/embeddings", body={"model": "vectors", "input": "a", **fields}, cast_to=object
        )
    assert found.value.param == param
    if "has 102" in words:
        assert found.value.code == "context_length_exceeded"


def test_the_time_limit(http: httpx2.Client, api: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.service, "limits", SimpleNamespace(max_seconds=0.0, max_body=1 << 20))
    answer = http.post("/v1/embeddings", json={"input": "a"})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "timeout"


def test_without_a_name_the_embedder_is_meant(http: httpx2.Client) -> None:
    assert http.post("/v1/embeddings", json={"input": "a"}).json()["model"] == "vectors"
