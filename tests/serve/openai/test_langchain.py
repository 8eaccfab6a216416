"""langchain-openai as a client: chats, streams, tools, structured output, embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
from pydantic import BaseModel, Field

from llm_from_scratch.generate.chat import LocalChat
from llm_from_scratch.serve.models import ServedModel
from tests.serve.servers import Running

langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
pytest.importorskip("tiktoken")


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Nara", "京都"]
    days: int = Field(ge=1, le=9)


@pytest.fixture
def chat(api: Running) -> Callable[..., Any]:
    def make(model: str, **settings: Any) -> Any:
        return langchain.ChatOpenAI(
            model=model, base_url=f"{api.address}/v1", api_key="none", max_retries=0, **settings
        )

    return make


def test_invoke_and_stream(chat: Callable[..., Any], models: dict[str, ServedModel]) -> None:
    model: Any = models["tiny"].model
    messages = [("system", "Be kind."), ("human", "王様?")]
    ours = LocalChat(model, models["tiny"].tokenizer).reply(
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "王様?"}],
        temperature=0.8, seed=4, max_new_tokens=12, stop="q",
    )  # fmt: skip
    asked = chat("tiny", temperature=0.8, seed=4, max_tokens=12, stop_sequences=["q"])
    answer = asked.invoke(messages)
    assert answer.content == ours.text
    assert ours.usage is not None
    assert answer.usage_metadata["input_tokens"] == ours.usage.prompt_tokens
    assert answer.usage_metadata["output_tokens"] == ours.usage.completion_tokens
    assert answer.response_metadata["finish_reason"] == ours.finish_reason
    pieces = list(asked.stream(messages, stream_usage=True))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    assert whole.content == ours.text and whole.usage_metadata == answer.usage_metadata
    assert [one.content for one in asked.batch([messages, messages])] == [ours.text] * 2
    heard = asked.bind(logprobs=True, top_logprobs=2).invoke(messages)
    assert len(heard.response_metadata["logprobs"]["content"]) == 12


def test_tools(chat: Callable[..., Any], tell: Callable[[str], str]) -> None:
    said = 'Well.\n<tool_call>{"name": "Weather", "arguments": {"city": "Nara", "days": 2}}'
    answer = chat(tell(said)).bind_tools([Weather]).invoke("Rain?")
    assert answer.content == "Well."
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("Weather", {"city": "Nara", "days": 2})
    pieces = list(chat(tell(said)).bind_tools([Weather]).stream("Rain?"))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    assert whole.tool_calls[0]["args"] == call["args"]
    forced = chat("tiny", seed=3).bind_tools([Weather], tool_choice="any").invoke("Rain?")
    (call,) = forced.tool_calls
    Weather.model_validate(call["args"])
    result = {"role": "tool", "tool_call_id": call["id"], "content": "rain"}
    assert chat("tiny", max_tokens=3).invoke([("human", "Rain?"), forced, result]).content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(method: str, chat: Callable[..., Any]) -> None:
    asked = chat("tiny", seed=5).with_structured_output(Weather, method=method)
    assert isinstance(asked.invoke("Rain?"), Weather)


@pytest.mark.parametrize("check", [False, True])
def test_embeddings(
    check: bool, api: Running, models: dict[str, ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sends texts, or else token ids, which have to be of the model's own vocabulary."""
    import tiktoken

    tokenizer = models["vectors"].tokenizer
    special = set(tokenizer.special_tokens.values())
    ranks = {tokenizer.token_bytes(i): i for i in range(len(tokenizer)) if i not in special}
    own = tiktoken.Encoding("own", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda name: own)
    embedder = langchain.OpenAIEmbeddings(
        model="vectors", base_url=f"{api.address}/v1", api_key="none", max_retries=0,
        check_embedding_ctx_length=check,
    )  # fmt: skip
    texts = ["abc de", "xyz", "a b c"]
    rows = [own.encode(text) if check else tokenizer.encode(text) for text in texts]
    asked = [tokenizer.decode(row) for row in rows]
    assert asked == texts
    found = np.array(embedder.embed_documents(texts))
    assert found.shape == (3, len(embedder.embed_query("abc")))
    import httpx2

    body = {"input": rows, "model": "vectors"}
    direct = httpx2.post(f"{api.address}/v1/embeddings", json=body).json()["data"]
    np.testing.assert_allclose(found, [one["embedding"] for one in direct], atol=1e-5)
