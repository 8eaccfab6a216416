"""Models, tokens, and the tutorial's way to ask."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from openai import NotFoundError

from llm_from_scratch.generate.generate import complete, encode_prompt
from llm_from_scratch.serve.models import ServedModel


def test_models(client: Any, models: dict[str, ServedModel]) -> None:
    found = client.models.list().data
    assert [one.id for one in found] == list(models)
    one: Any = client.models.retrieve("vectors")
    assert (one.object, one.owned_by, one.kind, one.max_model_len) == (
        "model", "scratchlm", "embedder", 80,
    )  # fmt: skip
    assert client.models.retrieve("tiny").created == models["tiny"].created
    with pytest.raises(NotFoundError, match="Did you mean 'tiny'"):
        client.models.retrieve("tinny")
    with pytest.raises(NotFoundError, match="There is no model 'a/b'"):
        client.models.retrieve("a/b")


def test_tokens_there_and_back(http: httpx2.Client, models: dict[str, ServedModel]) -> None:
    text = "Once 王様 <|im_end|>🙂"
    tokenizer = models["tiny"].tokenizer
    found = http.post("/v1/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == encode_prompt(tokenizer, text)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 2048
    assert tokenizer.special_tokens["<|im_end|>"] not in found["tokens"]  # a user's text
    back = http.post("/v1/detokenize", json={"tokens": found["tokens"]}).json()
    assert back == {"prompt": text}
    asked = {"model": "vectors", "prompt": "The end"}
    whole = http.post("/v1/tokenize", json=asked).json()["tokens"]
    bare = http.post("/v1/tokenize", json={**asked, "add_special_tokens": False}).json()["tokens"]
    assert (
        whole[1:-1] == bare
        and whole == models["vectors"].tokenizer.encode_inputs(["The end"]).ids[0]
    )


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/tokenize", {}, "prompt"),
        ("/v1/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt"),
        ("/v1/tokenize", {"messages": [{"role": "user"}]}, "messages"),
        ("/v1/tokenize", {"prompt": 5}, "prompt"),
        ("/v1/detokenize", {"tokens": [9999]}, "tokens"),
        ("/v1/detokenize", {"tokens": [-1]}, "tokens"),
        ("/v1/detokenize", {}, "tokens"),
        ("/generate", {"text": 5}, "text"),
        ("/generate", {}, "text"),
        ("/generate", {"text": "a", "temperature": -1}, "temperature"),
        ("/generate", {"prompt": "a"}, "prompt"),
    ],
)
def test_what_is_wrong(path: str, body: dict[str, Any], param: str, http: httpx2.Client) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_the_tutorials_way(http: httpx2.Client, models: dict[str, ServedModel]) -> None:
    answer = http.post("/generate", json={"text": "Once upon a time", "seed": 1})
    tiny = models["tiny"]
    (ours,) = complete(
        tiny.model, tiny.tokenizer, ["Once upon a time"], seed=1, max_new_tokens=50  # type: ignore[arg-type]
    )  # fmt: skip
    assert answer.json() == {"generated_text": "Once upon a time" + ours.text}
    assert len(http.post("/generate", json={"text": "a", "max_new_tokens": 1}).json()) == 1
