"""Many clients at once: what they ask, what they must be told, and a count of what became of it."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
import torch

from llm_from_scratch.generate.sampling import SamplingSettings
from llm_from_scratch.generate.texts import TextEngine
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.text.chat import encode_chat_prompt
from llm_from_scratch.text.tokenizer import Tokenizer

WORDS = "once upon a time there was the king むかし 王様 が いました end 🙂 , . the The".split()
DECISIVE = 1e-2  # between the two likeliest logits, at every place of an answer
ROUNDS = 400  # tries of one request before it counts as lost


@dataclass(frozen=True)
class Question:
    """A request and, where it is greedy, the answer that it has when nobody else asks."""

    path: str
    body: dict[str, Any]
    tokens: tuple[int, ...] | None
    text: str | None


@dataclass
class Tally:
    asked: int = 0
    answered: int = 0
    left: int = 0  # clients that hung up in the middle, on purpose
    refused: int = 0  # 429: the queue was full, and the client came again
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------- what is asked


def make_questions(
    name: str, model: Decoder, tokenizer: Tokenizer, count: int, seed: int
) -> list[Question]:
    """`count` requests of all kinds and lengths to the model that is served as `name`.

    Greedy ones whose two likeliest tokens are ever nearly equal are not asked: there the rounding
    of a larger batch may decide (see tests/generate/test_company.py), so nothing could be said.
    """
    draw = random.Random(seed)
    found: list[Question] = []
    while len(found) < count:
        words = draw.choices(WORDS, k=draw.choice([1, 3, 8, 20]))
        limit = draw.choice([1, 4, 12, 32])
        kind = len(found) % 4
        body: dict[str, Any] = {"model": name, "max_tokens": limit, "temperature": 0}
        if kind == 3:  # drawn by chance: only that it is answered can be said
            body |= {"prompt": " ".join(words), "temperature": 0.9, "top_p": 0.9, "n": 2}
            found.append(Question("/v1/completions", body, None, None))
            continue
        if kind == 0:
            messages = [{"role": "user", "content": " ".join(words)}]
            path, prompt = "/v1/chat/completions", encode_chat_prompt(tokenizer, messages)
            body |= {"messages": messages, "logprobs": True, "return_token_ids": True}
        else:
            path, prompt = "/v1/completions", tokenizer.encode(" ".join(words))
            body |= {"prompt": prompt}
            if kind == 2:
                body |= {"logprobs": 2, "return_token_ids": True}
        answer = decided(model, tokenizer, prompt, limit)
        if answer is not None:
            tokens = None if kind == 1 else tuple(answer.tokens)
            found.append(Question(path, body, tokens, answer.text))
    return found


def decided(model: Decoder, tokenizer: Tokenizer, prompt: Sequence[int], limit: int) -> Any:
    """The model's answer with an engine to itself, or None where two tokens are all but equal."""
    engine = TextEngine(model, tokenizer, cache_tokens=len(prompt) + limit, max_running=1)
    settings = SamplingSettings(max_new_tokens=limit, temperature=0.0)
    (result,) = [piece.result for piece in engine.stream([prompt], settings) if piece.result]
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *result.tokens]]))[0, len(prompt) - 1 :]
    best = logits.topk(2).values
    return result if bool((best[:, 0] - best[:, 1] > DECISIVE).all()) else None


# ------------------------------------------------------------------------- how it is asked


async def chunks_of(answer: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream, which must end with [DONE]."""
    done = False
    async for line in answer.aiter_lines():
        if line.startswith("data: "):
            assert not done, "something came behind [DONE]"
            done = line == "data: [DONE]"
            if not done:
                yield json.loads(line[6:])
    assert done, "the stream broke off"


def read(choice: dict[str, Any]) -> tuple[str, list[int]]:
    """Text and token ids of a choice, whole or a piece of it."""
    part = choice.get("message") or choice.get("delta") or {}
    text = choice["text"] if "text" in choice else part.get("content")
    content = (choice.get("logprobs") or {}).get("content") or []
    return text or "", [entry["token_id"] for entry in content]


class Clients:
    """Clients that each ask, wait for the answer and ask again, one HTTP connection each."""

    def __init__(self, base: str, questions: Sequence[Question], count: int, seed: int) -> None:
        self.base, self.questions, self.count, self.seed = base, questions, count, seed
        self.tally = Tally()
        self.stop = False

    async def run(self, each: int | None = None) -> Tally:
        """Until everyone has had `each` turns, or until `stop` is set."""
        limits = httpx2.Limits(max_connections=self.count, max_keepalive_connections=self.count)
        async with (
            httpx2.AsyncClient(
                base_url=self.base, limits=limits, timeout=120, verify=False, trust_env=False
            ) as client,
            asyncio.TaskGroup() as group,
        ):
            for number in range(self.count):
                group.create_task(self._client(client, number, each))
        return self.tally

    async def _client(self, client: httpx2.AsyncClient, number: int, each: int | None) -> None:
        draw = random.Random(self.seed * 1000 + number)
        turn = 0
        while not self.stop and (each is None or turn < each):
            turn += 1
            question = draw.choice(self.questions)
            way = draw.choice(["whole", "stream", "stream", "leave"])
            self.tally.asked += 1
            for tried in range(ROUNDS):
                if await self._ask(client, question, way, draw):
                    break
                self.tally.refused += 1
                await asyncio.sleep(min(0.02 * 1.3**tried, 0.3) * draw.uniform(0.5, 1.5))
            else:
                self.tally.wrong.append(f"never let in: {question.body}")

    async def _ask(
        self, client: httpx2.AsyncClient, question: Question, way: str, draw: random.Random
    ) -> bool:
        """One request; False where the queue was full."""
        body = {**question.body, "stream": way != "whole"}
        stop_after = draw.randint(0, 3) if way == "leave" else None
        parts: dict[int, tuple[str, list[int]]] = {}
        async with client.stream("POST", question.path, json=body) as answer:
            self.tally.statuses[answer.status_code] += 1
            if answer.status_code == 429:
                await answer.aread()
                self._check_refusal(answer)
                return False
            if answer.status_code != 200:
                self.tally.wrong.append(f"{answer.status_code}: {await answer.aread()!r:.300}")
                return True
            if way == "whole":
                await answer.aread()
                parts = {choice["index"]: read(choice) for choice in answer.json()["choices"]}
            else:
                seen = 0
                async for chunk in chunks_of(answer):
                    if seen == stop_after:
                        self.tally.left += 1
                        return True
                    seen += 1
                    for choice in chunk["choices"]:
                        text, ids = parts.get(choice["index"], ("", []))
                        more, new = read(choice)
                        parts[choice["index"]] = (text + more, [*ids, *new])
        self.tally.answered += 1
        self._check(question, parts)
        return True

    def _check_refusal(self, answer: httpx2.Response) -> None:
        if float(answer.headers.get("retry-after", 0)) <= 0:
            self.tally.wrong.append("429 without Retry-After")
        if "message" not in answer.json().get("error", {}):
            self.tally.wrong.append(f"429 says {answer.text:.200}")

    def _check(self, question: Question, parts: dict[int, tuple[str, list[int]]]) -> None:
        if sorted(parts) != list(range(question.body.get("n", 1))):
            self.tally.wrong.append(f"choices {sorted(parts)} for {question.body}")
            return
        text, ids = parts[0]
        if question.tokens is not None and tuple(ids) != question.tokens:
            self.tally.wrong.append(f"{ids} and not {question.tokens} for {question.body}")
        elif question.text is not None and text.lstrip() != question.text.lstrip():
            self.tally.wrong.append(f"{text!r} and not {question.text!r} for {question.body}")
