"""Completions: the texts that the library writes, their log-probabilities, prompts given back."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
from openai import BadRequestError

from llm_from_scratch.generate.generate import complete, generate
from llm_from_scratch.serve.models import ServedModel
from llm_from_scratch.serve.openai.schemas import Completion

PROMPTS = ["Once upon a time", "むかしむかし、"]


def texts_of(model: ServedModel, prompts: list[Any], **settings: Any) -> list[str]:
    found = complete(model.model, model.tokenizer, prompts, **settings)  # type: ignore[arg-type]
    return [one.text for one in found]


@pytest.mark.parametrize("name", ["tiny", "plain", "pair"])
def test_a_completion_is_the_one_that_the_library_writes(
    name: str, client: Any, models: dict[str, ServedModel]
) -> None:
    same: dict[str, Any] = {
        "temperature": 1.1,
        "seed": 3,
        "stop": ["q", "い"],
        "top_p": 0.9,
        "n": 2,
    }
    ours = texts_of(models[name], PROMPTS, max_new_tokens=14, top_k=50, **same)
    whole = client.completions.create(
        model=name, prompt=PROMPTS, max_tokens=14, extra_body={"top_k": 50}, **same
    )
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in whole.choices] == ours
    assert {choice.finish_reason for choice in whole.choices} <= {"stop", "length"}
    streamed = ["", "", "", ""]
    for chunk in client.completions.create(
        model=name, prompt=PROMPTS, max_tokens=14, extra_body={"top_k": 50}, stream=True,
        stream_options={"include_usage": True}, **same,
    ):  # fmt: skip
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == ours and chunk.usage == whole.usage
    model: Any = models[name].model
    plain = generate(model, models[name].tokenizer, PROMPTS[0], max_new_tokens=5, temperature=0)
    answer = client.completions.create(model=name, prompt=PROMPTS[0], max_tokens=5, temperature=0)
    assert answer.choices[0].text == "".join(plain)


def test_a_prompt_can_be_token_ids(client: Any, models: dict[str, ServedModel]) -> None:
    ids = models["tiny"].tokenizer.encode(PROMPTS[0])
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    as_text = client.completions.create(prompt=PROMPTS[0], **asked).choices[0].text
    assert client.completions.create(prompt=ids, **asked).choices[0].text == as_text
    several = client.completions.create(prompt=[ids, ids[:2]], **asked)
    assert several.choices[0].text == as_text and len(several.choices) == 2
    assert client.completions.create(prompt="", **asked).choices[0].text


def test_logprobs_and_offsets(client: Any, models: dict[str, ServedModel]) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "prompt": PROMPTS[1], "max_tokens": 9, "temperature": 0, "logprobs": 3,
    }  # fmt: skip
    choice = client.completions.create(**asked).choices[0]
    found: Any = choice.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == 9
    for token, logprob, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values()) and len(top) == 3
    # Where a token is a whole piece of text, it stands where its offset says.
    checked = 0
    for token, place in zip(found.tokens, found.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert choice.text[place:].startswith(token)
            checked += 1
    assert checked
    (result,) = complete(
        models["tiny"].model, models["tiny"].tokenizer, [PROMPTS[1]],  # type: ignore[arg-type]
        max_new_tokens=9, temperature=0, logprobs=3,
    )  # fmt: skip
    assert result.logprobs is not None
    assert found.token_logprobs == pytest.approx([one.logprob for one in result.logprobs], abs=1e-4)
    bare: Any = client.completions.create(**{**asked, "logprobs": 0}).choices[0].logprobs
    assert bare.top_logprobs is None and bare.tokens == found.tokens
    joined: dict[str, list[Any]] = {"tokens": [], "text_offset": []}
    for chunk in client.completions.create(**asked, stream=True):
        for name, values in joined.items():
            values += getattr(chunk.choices[0].logprobs, name)
    assert joined == {"tokens": found.tokens, "text_offset": found.text_offset}


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_given_back_with_how_likely_it_was(
    stream: bool, client: Any, http: httpx2.Client, models: dict[str, ServedModel]
) -> None:
    """As evaluations ask for it: how likely is this text?"""
    ids = [models["tiny"].tokenizer.encode(text) for text in PROMPTS]
    asked: dict[str, Any] = {
        "model": "tiny", "prompt": ids, "echo": True, "logprobs": 1, "n": 2, "temperature": 0,
    }  # fmt: skip
    for count in (0, 4):
        found: dict[int, list[Any]] = {}
        answer = client.completions.create(**asked, max_tokens=count, stream=stream)
        for part in answer if stream else [answer]:
            for choice in part.choices:
                found.setdefault(choice.index, []).append(choice)
        assert sorted(found) == [0, 1, 2, 3]
        for index, parts in found.items():
            row, prompt = ids[index // 2], PROMPTS[index // 2]
            text = "".join(part.text for part in parts)
            assert text.startswith(prompt) and (count > 0 or text == prompt)
            assert parts[-1].finish_reason == "length"
            tokens = [token for part in parts for token in part.logprobs.tokens]
            values = [value for part in parts for value in part.logprobs.token_logprobs]
            places = [place for part in parts for place in part.logprobs.text_offset]
            assert len(tokens) == len(values) == len(places) == len(row) + count
            assert values[0] is None and places[0] == 0 and places == sorted(places)
            (result,) = complete(
                models["tiny"].model, models["tiny"].tokenizer, [row],  # type: ignore[arg-type]
                max_new_tokens=1, temperature=0, prompt_logprobs=1,
            )  # fmt: skip
            assert result.prompt_logprobs is not None
            assert values[1 : len(row)] == pytest.approx(
                [one.logprob for one in result.prompt_logprobs], abs=1e-4
            )
        if not stream and not count:
            assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_prompt_that_ends_inside_a_character_is_given_back_whole(
    cut: int, client: Any, models: dict[str, ServedModel]
) -> None:
    tokenizer = models["plain"].tokenizer
    begin = tokenizer.encode("a")
    by_bytes = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    whole = [*begin, *(by_bytes[bytes([byte])] for byte in "🦜".encode())]
    ids = whole[: len(begin) + cut]
    asked: dict[str, Any] = {
        "model": "plain", "prompt": ids, "echo": True, "logprobs": 0, "temperature": 0,
    }  # fmt: skip
    choice = client.completions.create(
        **asked, max_tokens=1, logit_bias={str(whole[len(ids)]): 100}
    ).choices[0]
    assert choice.text == ("a🦜" if cut == 3 else "a\ufffd")  # what is missing never comes
    places = choice.logprobs.text_offset
    assert places[: len(begin) + 1] == [0, 1] and set(places[1:]) == {1}
    assert len(places) == len(ids) + 1
    alone = client.completions.create(**asked, max_tokens=0).choices[0]
    assert alone.text == tokenizer.decode(ids) and len(alone.logprobs.tokens) == len(ids)


def test_ids_on_the_wire(http: httpx2.Client) -> None:
    """What the page reads: the prompt's ids first, and log-probabilities in the form of chats."""
    asked = {
        "prompt": [70, 71, 72], "stream": True, "logprobs": 8, "return_token_ids": True,
        "max_tokens": 12, "seed": 1,
    }  # fmt: skip
    answer = http.post("/v1/completions", json=asked)
    events = answer.content.decode().split("\n\n")[:-2]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    for chunk in chunks:
        Completion.model_validate(chunk, strict=True)
    assert chunks[0]["prompt_token_ids"] == [70, 71, 72]
    assert all("prompt_token_ids" not in chunk for chunk in chunks[1:])
    heard = [e for chunk in chunks for e in chunk["choices"][0]["logprobs"]["content"]]
    assert len(heard) == 12
    assert all(len(e["top_logprobs"]) == 8 and "token_id" in e["top_logprobs"][0] for e in heard)


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"suffix": "x"}, "suffix", "fills no gaps"),
    ({"best_of": 3}, "best_of", "leave best_of out"),
    ({"prompt": []}, "prompt", "must be a text"),
    ({"prompt": [[]]}, "prompt", "at place 0"),
    ({"prompt": ["a", 1]}, "prompt", "at place 1"),
    ({"prompt": ["a", [1]]}, "prompt", "mixes"),
    ({"prompt": {"a": 1}}, "prompt", "must be a text"),
    ({"prompt": [1.5]}, "prompt", "at place 0"),
    ({"prompt": [True]}, "prompt", "at place 0"),
    ({"prompt": [10**6]}, "prompt", "vocabulary ends"),
    ({"prompt": [-1]}, "prompt", "token id"),
    ({"prompt": ["a"] * 2049}, "prompt", "at most 2048"),
    ({"prompt": ["a"] * 41}, "n", "room for 40"),
    ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
    ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"logprobs": True}, "logprobs", "valid integer"),
    ({"echo": True, "model": "pair"}, "echo", "nothing to echo"),
    ({"prompt": ["a", "b"], "return_token_ids": True}, "return_token_ids", "single prompt"),
    ({"messages": []}, "messages", "no field"),
]


@pytest.mark.parametrize(("fields", "param", "words"), WRONG)
def test_what_is_wrong(fields: dict[str, Any], param: str, words: str, client: Any) -> None:
    with pytest.raises(BadRequestError, match=words) as found:
        client.post("/completions", body={"model": "tiny", "prompt": "a", **fields}, cast_to=object)
    assert found.value.param == param


def test_best_of_may_say_what_is_so_anyway(client: Any) -> None:
    assert client.completions.create(model="tiny", prompt="a", max_tokens=1, best_of=1).choices
