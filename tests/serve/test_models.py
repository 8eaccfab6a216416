"""The models that a server opens: their names, their kinds, their room, and wrong flags."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_from_scratch.cli import main, serve
from llm_from_scratch.core.config import Parser
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.speculative import Draft, Lookup
from llm_from_scratch.model.config import ModelConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder import Encoder
from llm_from_scratch.model.heads import HeadConfig, MaskedLM, make_head
from llm_from_scratch.serve.limits import Limits
from llm_from_scratch.serve.models import (
    CACHE_BYTES,
    Opening,
    ServedModel,
    cache_room,
    name_models,
    open_models,
    serve_model,
    split_name,
)
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer
from llm_from_scratch.weights.families import read_config
from llm_from_scratch.weights.folder import save_folder
from tests.generate.conftest import TEXT, make_model

BERT = {
    "model_type": "bert", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 40, "max_position_embeddings": 40,
}  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "name", "model"),
    [
        ("smollm2-135m", "smollm2-135m", "smollm2-135m"),
        ("small=smollm2-135m", "small", "smollm2-135m"),
        ("runs/quickstart", "quickstart", "runs/quickstart"),
        ("runs/quickstart/", "quickstart", "runs/quickstart/"),
        ("runs/quickstart/model", "quickstart", "runs/quickstart/model"),
        ("model", "model", "model"),
        ("org/name", "name", "org/name"),
        ("a/b/weights-q4.gguf", "weights-q4", "a/b/weights-q4.gguf"),
        ("big=a/b.gguf", "big", "a/b.gguf"),
        ("a/x=y/z", "z", "a/x=y/z"),
        ("gpt-4o=runs/x=y", "gpt-4o", "runs/x=y"),
    ],
)
def test_names(argument: str, name: str, model: str) -> None:
    assert split_name(argument) == (name, model)


def test_a_folder_whose_name_has_the_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lr=0.1").mkdir()
    monkeypatch.chdir(tmp_path)
    assert split_name("lr=0.1") == ("lr=0.1", "lr=0.1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a/x", "b/x"], "Two models would be called 'x': a/x and b/x. .*NAME=b/x"),
        (["x="], "x= names no model"),
        (["=x"], "'' cannot be what clients call a model"),
        (["two words=x"], "'two words' cannot be"),
        (["n" * 300 + "=x"], "cannot be what clients call"),
        ([], "no model to serve"),
    ],
)
def test_names_that_cannot_be(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        name_models(arguments)


def test_models_are_opened_in_their_order(model_folder: str) -> None:
    opened = open_models(["b=" + model_folder, "a=" + model_folder], Limits(cache_tokens=100))
    assert list(opened) == ["b", "a"]
    for name, served in opened.items():
        assert (served.name, served.kind, served.source) == (name, "writer", model_folder)
        assert served.created > 0 and served.engine is not None
        assert served.engine.engine.room == served.context == 112  # whole pages
    assert opened["a"].engine is not opened["b"].engine


def test_the_missing_model_is_named_before_one_is_loaded(
    model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_from_scratch.serve.models.load", None)
    with pytest.raises(UserError, match=r"no model 'smollm2-135'.*Did you mean 'smollm2-135m'"):
        open_models([model_folder, "smollm2-135"])


def make_encoder(tokenizer: Tokenizer) -> Encoder:
    config = read_config({**BERT, "vocab_size": tokenizer.vocab_size}, "config.json")[1]
    assert isinstance(config, ModelConfig)
    model = Encoder(config)
    model.initialise(seed=1)
    return model.eval()


def test_encoders_embed(tokenizer: Tokenizer) -> None:
    said: list[str] = []
    encoder = make_encoder(tokenizer)
    embedder = make_head(encoder, HeadConfig("embedding"))
    served = serve_model(embedder, tokenizer, "e", report=said.append)
    assert served.kind == "embedder" and served.model is embedder and not said
    assert served.context == encoder.config.max_seq_len
    for plain in (make_encoder(tokenizer), masked(tokenizer)):
        served = serve_model(plain, tokenizer, "e", report=said.append)
        assert served.kind == "embedder"
        assert served.model(torch.tensor([[3, 4, 5]])).shape == (1, encoder.config.d_model)
    assert len(said) == 2 and "nobody taught to embed" in said[0]
    labels = make_head(encoder, HeadConfig("classification", labels=("a", "b")))
    with pytest.raises(UserError, match="labels texts"):
        serve_model(labels, tokenizer, "e")


def masked(tokenizer: Tokenizer) -> MaskedLM:
    head = make_head(make_encoder(tokenizer), HeadConfig("masked_lm"))
    assert isinstance(head, MaskedLM)
    return head


def test_the_room_of_the_cache() -> None:
    model = make_model(max_seq_len=48)
    each = 2 * 3 * 2 * 10 * 4  # keys and values, layers, heads, features, bytes
    assert cache_room(model) == 64 * 48
    long = make_model(max_seq_len=10**9)
    room = cache_room(long)
    assert room % 16 == 0 and room * each <= CACHE_BYTES + 16 * each
    assert cache_room(long, share=2) <= room // 2 + 16
    assert cache_room(long, torch.int8) > 2 * room
    assert cache_room(make_model(max_seq_len=20_000), share=10**9) == 4096


def test_the_cache_is_written_to_when_it_is_made(writer: Callable[..., ServedModel]) -> None:
    """So that memory is taken at the start; what is there must be zeros, as before."""
    pool = writer().engine.engine.pool
    assert not pool.keys.any() and not pool.values.any()


def test_guessing_ahead(model_folder: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    limits = Limits(cache_tokens=512)
    served = open_models([model_folder], limits, Opening(lookup=3))["tiny"]
    assert isinstance(served.engine.engine.proposer, Lookup)
    pair = open_models([model_folder, f"b={model_folder}"], limits, Opening(draft=model_folder))
    guessers = [one.engine.engine.proposer for one in pair.values()]
    assert all(isinstance(one, Draft) for one in guessers) and guessers[0] is not guessers[1]
    assert isinstance(served.make_engine, Callable)  # type: ignore[arg-type]

    other = train_tokenizer([TEXT], vocab_size=300)
    save_folder(make_model(vocab_size=other.vocab_size), other, tmp_path / "draft")
    with pytest.raises(UserError, match=r"--draft is .* must have the same tokenizer"):
        open_models([model_folder], limits, Opening(draft=str(tmp_path / "draft")))


# ------------------------------------------------------------------- the command line


def arguments(*words: str) -> Any:
    parser = Parser(prog="scratchlm")
    serve.add_parser(parser.add_subparsers(parser_class=Parser))
    return parser.parse_args(["serve", *words])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["m", "--port", "70000"], "--port is 70000; it must be from 1 to 65535"),
        (["m", "--port", "x"], "--port is 'x'; it must be a whole number"),
        (["m", "--grace", "-1"], "--grace is -1.0; it must be 0 or more"),
        (["m", "--grace", "nan"], "--grace is nan"),
        (["m", "--max_queue", "-1"], "--max_queue is -1; it must be at least 0"),
        (["m", "--max_new_tokens", "0"], "--max_new_tokens is 0; it must be at least 1"),
        (["m", "--cache_tokens", "0"], "--cache_tokens is 0; it must be at least 1"),
        (["m", "--dtype", "fp8"], "--dtype is 'fp8'; it must be one of"),
        (["m", "--cache_dtype", "int4"], "--cache_dtype is 'int4'; it must be one of"),
        (["m", "--device", "gpu"], "no device 'gpu'"),
        (["m", "--lookup", "0"], "--lookup is 0; it must be at least 1"),
        (["m", "--lookup", "3", "--draft", "m"], "both guess ahead"),
        (["m", "--template", "chatlm"], "--template is 'chatlm'.*Did you mean 'chatml'"),
        (["m", "--runs", "nowhere"], "--runs is nowhere, and there is no such folder"),
        (["m", "--api_keys", "nowhere"], "--api_keys is nowhere, and there is no such file"),
        (["m", "--host", "no.such.host.invalid"], "--host is 'no.such.host.invalid'"),
        (["a/m", "b/m"], "Two models would be called 'm'"),
        (["m", "--prot", "1"], "no flag --prot. Did you mean '--port'"),
        ([], "Missing: MODEL"),
    ],
)
def test_wrong_flags_are_refused_before_a_model_is_looked_for(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llm_from_scratch.serve.models.open_models", None)
    with pytest.raises(UserError, match=said):
        main.run(["serve", *words])


def test_a_busy_port_is_said_before_a_model_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_from_scratch.serve.models.open_models", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(UserError, match=f"Port {port} is in use already"):
            main.run(["serve", "m", "--port", port])


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'scratchlm\[serve\]'"):
        main.run(["serve", "m"])


def test_keys_come_from_a_file_and_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("\ufeffone\n  two  \n# not this\n\n", encoding="utf-8")
    monkeypatch.setenv(serve.KEYS, "three, four\n")
    assert serve.keys_of(arguments("m", "--api_keys", str(file))) == ("three", "four", "one", "two")
    for lost in ("", " ,"):  # a server without keys because a secret was lost would be open
        monkeypatch.setenv(serve.KEYS, lost)
        with pytest.raises(UserError, match="is set and has no key"):
            serve.keys_of(arguments("m"))
    monkeypatch.delenv(serve.KEYS)
    assert serve.keys_of(arguments("m")) == ()
    for text, said in (("# none\n", "has no key"), ("kéy\n", "API key 1"), ("a b\n", "API key 1")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=said):
            serve.keys_of(arguments("m", "--api_keys", str(file)))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        serve.keys_of(arguments("m", "--api_keys", str(file)))
    with pytest.raises(UserError, match="cannot be read"):
        serve.keys_of(arguments("m", "--api_keys", str(tmp_path)))


@pytest.mark.parametrize(
    ("host", "more", "hosts"),
    [
        ("127.0.0.1", [], ("localhost", "127.0.0.1", "::1", "127.0.0.1")),
        ("::1", [], ("localhost", "127.0.0.1", "::1", "::1")),
        ("127.0.0.1", ["Box.lan:80"], ("localhost", "127.0.0.1", "::1", "127.0.0.1", "box.lan")),
        ("0.0.0.0", [], None),
        ("0.0.0.0", ["box.lan"], ("localhost", "127.0.0.1", "::1", "0.0.0.0", "box.lan")),
    ],
)
def test_names_of_the_server(host: str, more: list[str], hosts: tuple[str, ...] | None) -> None:
    words = ["m", *(["--allowed_hosts", *more] if more else [])]
    assert serve.hosts_of(arguments(*words), host) == hosts


def test_a_template_is_a_name_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages[0]['content'] }}")
    assert serve.template_of("chatml") == "chatml"
    assert serve.template_of(str(file)) == "{{ messages[0]['content'] }}"
    file.write_text("{% for %}")
    with pytest.raises(UserError, match="not valid Jinja"):
        serve.template_of(str(file))


def test_the_runs_are_those_of_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert serve.runs_of(arguments("m")) is None
    (tmp_path / "runs").mkdir()
    assert serve.runs_of(arguments("m")) == Path("runs")


def test_a_model_is_described(writer: Callable[..., ServedModel]) -> None:
    line = serve.described(writer())
    assert line.startswith("tiny: 0.0 M parameters, float32 on cpu, context 512 tokens; its cache")
    assert isinstance(writer().model, Decoder)
