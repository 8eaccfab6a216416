"""/api/page and /api/inside/*: what they say is what model/inside.py computes; who asks wrongly is
told so in OpenAI's shape; texts that are being written are not held up."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from torch import nn

from llm_from_scratch.generate.engine import Engine
from llm_from_scratch.generate.sampling import SamplingSettings
from llm_from_scratch.model import inside
from llm_from_scratch.model.heads import HeadConfig, make_head
from llm_from_scratch.serve import inside as served_inside
from llm_from_scratch.serve.limits import Limits
from llm_from_scratch.serve.models import ServedModel, give_engine, serve_model
from llm_from_scratch.serve.service import make_service
from llm_from_scratch.text.tokenizer import Tokenizer
from tests.model.architectures import ARCHITECTURES, make
from tests.model.test_inside import packed_model
from tests.serve.conftest import make_writer
from tests.serve.servers import Running, running

LIMITS = Limits(cache_tokens=4096)
TEXT = "Once upon a time. むかし🙂"


@pytest.fixture(scope="module")
def models(tokenizer: Tokenizer) -> dict[str, ServedModel]:
    """A writer, one whose matrices are packed, an encoder-decoder and an embedder."""
    size = tokenizer.vocab_size
    found = {"tiny": make_writer(tokenizer, LIMITS)}
    packed = packed_model(vocab_size=size, max_seq_len=300)
    found["packed"] = serve_model(packed, tokenizer, "packed")
    give_engine(found["packed"], LIMITS)
    found["pair"] = serve_model(make(ARCHITECTURES["t5"]), tokenizer, "pair")  # type: ignore[arg-type]
    encoder: Any = make(ARCHITECTURES["bert"])
    head = make_head(encoder, HeadConfig("embedding"))
    found["vectors"] = serve_model(head, tokenizer, "vectors")
    return found


@pytest.fixture(scope="module")
def running_server(models: dict[str, ServedModel]) -> Iterator[Running]:
    with running(make_service(models, LIMITS)) as server:
        yield server


@pytest.fixture(scope="module")
def client(running_server: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=running_server.address, timeout=60) as client:
        yield client


def ask(client: httpx2.Client, what: str, **body: Any) -> dict[str, Any]:
    answer = client.post(f"/api/inside/{what}", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def unpacked_weights(answer: dict[str, Any]) -> torch.Tensor:
    shares = np.frombuffer(base64.b64decode(answer["weights"]), "<u2").astype(np.float32)
    t = len(answer["tokens"])
    return torch.from_numpy(shares).view(answer["heads"], t, t) / 65535


# --- what there is -------------------------------------------------------------------------------


def test_the_page_is_told_what_there_is(
    client: httpx2.Client, models: dict[str, ServedModel]
) -> None:
    said = client.get("/api/page").json()
    assert set(said) == {"version", "models", "runs", "limits"}
    assert said["runs"] is False
    assert said["limits"]["max_new_tokens"] == LIMITS.max_new_tokens
    rows = {row["name"]: row for row in said["models"]}
    assert list(rows) == list(models)
    tiny = models["tiny"].model
    assert rows["tiny"] == {
        "name": "tiny", "kind": "writer", "family": "llama", "context": 512, "layers": 3,
        "heads": 6, "vocab_size": tiny.config.vocab_size, "weights": "fp32", "chat": True,
        "parameters": sum(p.numel() for p in tiny.parameters()),
    }  # fmt: skip
    assert rows["packed"]["weights"] == "4 bits"
    assert rows["vectors"]["kind"] == "embedder" and not rows["vectors"]["chat"]
    embedder = models["vectors"].model
    assert rows["vectors"]["parameters"] == sum(p.numel() for p in embedder.parameters())


def test_the_form_of_most_numbers() -> None:
    def holding(dtype: torch.dtype) -> nn.Module:
        return nn.ModuleList([nn.Linear(8, 8).to(dtype), nn.LayerNorm(8)])

    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.half, "fp16")):
        assert served_inside.stored_as(holding(dtype)) == name


# --- the views -----------------------------------------------------------------------------------


def test_tokens(client: httpx2.Client, tokenizer: Tokenizer) -> None:
    rows = ask(client, "tokens", text=TEXT)["tokens"]
    assert [row["id"] for row in rows] == tokenizer.encode(TEXT)
    assert "".join(row["text"] for row in rows if "\\x" not in row["text"]) in TEXT
    assert not any(row["special"] for row in rows)
    messages = [{"role": "user", "content": "<|im_end|> a king"}]
    rows = ask(client, "tokens", model="tiny", messages=messages)["tokens"]
    # A person's text cannot end the turn: it is letters, and the template's own mark is special.
    assert [row["text"] for row in rows if row["special"]] == [
        "<|im_start|>", "<|im_end|>", "<|im_start|>",
    ]  # fmt: skip
    same = ask(client, "tokens", ids=[row["id"] for row in rows])["tokens"]
    assert same == rows
    assert ask(client, "tokens", ids=[])["tokens"] == []
    (beyond,) = ask(client, "tokens", ids=[10**6])["tokens"]
    assert beyond == {"id": 10**6, "text": "", "special": False}


@pytest.mark.parametrize("name", ["tiny", "packed", "pair", "vectors"])
def test_attention(name: str, client: httpx2.Client, models: dict[str, ServedModel]) -> None:
    ids = [7, 8, 9, 10, 7, 3]
    model: Any = models[name].model
    layer = inside.reader_of(model).config.n_layers - 1
    answer = ask(client, "attention", model=name, ids=ids, layer=layer)
    assert answer["layer"] == layer
    assert [token["id"] for token in answer["tokens"]] == ids
    wanted = inside.attention_weights(model, ids, layer)
    torch.testing.assert_close(unpacked_weights(answer), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["tiny", "packed"])
def test_lens(
    name: str,
    client: httpx2.Client,
    models: dict[str, ServedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = models[name].model
    monkeypatch.setattr(inside, "LOGITS_AT_ONCE", 2 * model.config.vocab_size)
    ids = [7, 8, 9, 10, 7]
    answer = ask(client, "lens", model=name, ids=ids, top=2)
    assert answer["layers"] == ["embedding", *map(str, range(1, model.config.n_layers + 1))]
    wanted = inside.logit_lens(model, ids, top=2)
    cells = answer["cells"]
    got = torch.tensor([[[guess["p"] for guess in cell] for cell in row] for row in cells])
    torch.testing.assert_close(got, wanted.probabilities_ltk, atol=2e-6, rtol=0)
    assert [[[g["id"] for g in c] for c in row] for row in cells] == wanted.ids_ltk.tolist()
    texts = models[name].tokenizer
    assert cells[0][0][0]["text"] == texts.token_bytes(cells[0][0][0]["id"]).decode(
        "utf-8", "backslashreplace"
    )


@pytest.mark.parametrize("name", ["tiny", "packed", "pair", "vectors"])
def test_neighbours(name: str, client: httpx2.Client, models: dict[str, ServedModel]) -> None:
    answer = ask(client, "neighbours", model=name, id=12, top=5)
    assert answer["token"]["id"] == 12
    wanted = inside.neighbours(models[name].model, 12, 5)  # type: ignore[arg-type]
    assert [row["id"] for row in answer["neighbours"]] == wanted.ids_k.tolist()
    got = torch.tensor([row["cosine"] for row in answer["neighbours"]])
    torch.testing.assert_close(got, wanted.cosines_k, atol=1e-6, rtol=0)


def test_neighbours_of_a_word(client: httpx2.Client, tokenizer: Tokenizer) -> None:
    there = tokenizer.encode(" there")
    assert len(there) == 1 != len(tokenizer.encode("there"))  # a token only behind a space
    answer = ask(client, "neighbours", text="there")
    assert answer["token"] == {"id": there[0], "text": " there"}
    assert len(answer["neighbours"]) == 12
    assert len(tokenizer.encode("king")) == len(tokenizer.encode(" king")) == 1
    assert ask(client, "neighbours", text="king")["token"]["text"] == " king"
    assert ask(client, "neighbours", text="王様")["token"]["text"] == "王様"
    several = ask(client, "neighbours", text=" Once king")
    assert [piece["text"] for piece in several["pieces"]] == [" ", "Once", " king"]
    assert several["token"]["text"] == "Once"


# --- asked wrongly -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "body", "status", "said"),
    [
        ("tokens", {}, 400, "Give one of text, messages and ids"),
        ("tokens", {"text": "a", "ids": [1]}, 400, "Give one of"),
        ("tokens", {"text": "a" * 100_001}, 400, "text"),
        ("tokens", {"ids": [1] * 40_000}, 400, "ids"),
        ("tokens", {"messages": []}, 400, "no messages"),
        ("tokens", {"messages": [{"role": "king", "content": "a"}]}, 400, "role"),
        ("tokens", {"text": "a", "model": "nobody"}, 404, "no model 'nobody'"),
        ("attention", {"ids": [1, 2], "layer": 3}, 400, "There is no layer 3"),
        ("attention", {"ids": [1, 2], "layer": -1}, 400, "layer"),
        ("attention", {"ids": [1, 10**6], "layer": 0}, 400, "There is no token 1000000"),
        ("attention", {"ids": [1, -1], "layer": 0}, 400, "ids.1"),
        ("attention", {"ids": [1, 10**400], "layer": 0}, 400, "ids.1"),
        ("attention", {"ids": [1] * 257, "layer": 0}, 400, "at most 256"),
        ("attention", {"ids": [], "layer": 0}, 400, "ids"),
        ("attention", {"ids": [True, 1.5, "2", None], "layer": 0}, 400, "ids.0"),
        ("attention", {"ids": [[1]], "layer": 0}, 400, "ids.0"),
        ("attention", {"ids": [1] * 51, "layer": 0, "model": "vectors"}, 200, ""),
        ("attention", {"ids": [1], "layer": 0, "heads": 2}, 400, "heads"),
        ("attention", {"layer": 0}, 400, "ids"),
        ("lens", {"ids": [1] * 97}, 400, "at most 96"),
        ("lens", {"ids": [1], "top": 0}, 400, "top"),
        ("lens", {"ids": [1], "model": "pair"}, 400, "predicts no next token"),
        ("lens", {"ids": [1], "model": "vectors"}, 400, "predicts no next token"),
        ("neighbours", {}, 400, "Give one of id and text"),
        ("neighbours", {"id": 1, "text": "a"}, 400, "Give one of"),
        ("neighbours", {"id": 999_999}, 400, "There is no token 999999"),
        ("neighbours", {"id": 1, "top": 10**9}, 400, "top"),
        ("neighbours", {"text": ""}, 400, "text"),
        ("neighbours", {"text": "a" * 201}, 400, "text"),
        ("neighbours", {"text": "a", "model": "../../etc/passwd"}, 404, "no model"),
    ],
)
def test_a_wrong_question_is_answered_in_openais_shape(
    what: str, body: dict[str, Any], status: int, said: str, client: httpx2.Client
) -> None:
    answer = client.post(f"/api/inside/{what}", json=body)
    assert answer.status_code == status, answer.text
    if status != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert said in error["message"]
        assert len(error["message"]) < 500


def test_odd_bodies(client: httpx2.Client) -> None:
    for body in (b"", b"[]", b"null", b"{", b'{"ids": ' + b"[" * 50_000, b"\xff", b'"\\ud800"'):
        answer = client.post(
            "/api/inside/tokens", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400, (body[:20], answer.text)
        assert answer.json()["error"]["message"]
    lone = client.post(
        "/api/inside/tokens",
        content=b'{"text": "\\ud800a"}',
        headers={"Content-Type": "application/json"},
    )
    assert lone.status_code in (200, 400)
    assert client.get("/api/inside/tokens").status_code == 405


def test_a_model_of_no_numbers_is_shown_all_the_same(tokenizer: Tokenizer) -> None:
    broken = make_writer(tokenizer, LIMITS)
    with torch.no_grad():
        for parameter in broken.model.parameters():
            parameter.fill_(float("nan"))
    service = make_service({"broken": broken}, LIMITS)
    with running(service) as server, httpx2.Client(base_url=server.address) as client:
        answer = ask(client, "lens", ids=[1, 2])
        assert {guess["p"] for row in answer["cells"] for cell in row for guess in cell} == {0.0}
        assert unpacked_weights(ask(client, "attention", ids=[1, 2], layer=1)).sum() == 0
        assert ask(client, "neighbours", id=3)["neighbours"][0]["cosine"] == 0.0


# --- beside texts that are being written ---------------------------------------------------------


def test_texts_are_written_while_somebody_looks(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two parts of a look, the engine that is busy has its step."""
    served = make_writer(tokenizer, LIMITS)
    monkeypatch.setattr(inside, "LOGITS_AT_ONCE", 8 * served.model.config.vocab_size)
    happened: list[str] = []

    def noted(kind: type, name: str, what: str) -> None:
        inner = getattr(kind, name)

        def outer(*args: Any, **options: Any) -> Any:
            happened.append(what)
            return inner(*args, **options)

        monkeypatch.setattr(kind, name, outer)

    noted(Engine, "step", "step")
    noted(inside.Reading, "predictions", "look")
    noted(inside.Reading, "step", "look")
    settings = SamplingSettings(
        max_new_tokens=300,
        temperature=0.0,
        logit_bias=dict.fromkeys(served.tokenizer.stop_ids, -100.0),
    )
    worker = make_service({"tiny": served}, LIMITS).worker

    async def write(begun: asyncio.Event) -> None:
        async for _ in worker.write("tiny", [[5, 6, 7]], settings):
            begun.set()

    async def both() -> None:
        begun = asyncio.Event()
        writing = asyncio.create_task(write(begun))
        await begun.wait()
        await served_inside.lens(worker.do, served, [9] * 64, 3)
        await writing

    worker.start()
    try:
        asyncio.run(both())
    finally:
        worker.stop()
    # 64 positions, eight at a time, at four places; and three blocks between these.
    assert happened.count("look") == 4 * 8 + 3
    begun, ended = happened.index("step"), len(happened) - happened[::-1].index("step")
    middle = happened[begun:ended]
    assert middle.count("look") > 20
    assert ("look", "look") not in itertools.pairwise(middle)


def test_answers_are_valid_json(client: httpx2.Client) -> None:
    text = client.post("/api/inside/lens", json={"ids": [1, 2, 3]}).text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
