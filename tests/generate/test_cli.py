"""`scratchlm generate` and `scratchlm chat` on a tiny model folder."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.cli import convert, generate
from llm_from_scratch.cli.main import run
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate import conversation as conversation_module
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.text.chat_template import CHATML
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer
from llm_from_scratch.train.quantize import quantize
from llm_from_scratch.weights.folder import save_folder


@pytest.fixture(scope="module")
def chat_folder(make: Callable[..., Decoder], tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("models") / "chat"
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer = train_tokenizer(
        ["user assistant system hello " * 9], vocab_size=280, special=special
    )
    tokenizer.chat_template = CHATML
    save_folder(make(vocab_size=tokenizer.vocab_size, max_seq_len=120), tokenizer, path)
    return str(path)


def test_text_goes_to_stdout(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", folder, "Once upon", "--max-new-tokens", "8", "--seed", "1"]
    assert run(arguments) == 0
    first = capsys.readouterr()
    assert first.out.endswith("\n")
    assert len(first.out) > 1
    assert run(arguments) == 0
    assert capsys.readouterr().out == first.out
    assert run([*arguments[:-1], "2"]) == 0
    assert capsys.readouterr().out != first.out


def test_json_says_everything(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", folder, "Once", "--max_new_tokens", "5", "--stop", "\\n", "q", "--json"]
    assert run(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["finish_reason"] in ("length", "stop", "stop_string")
    assert found["new_tokens"] == len(found["tokens"]) <= 5
    assert found["prompt"] == "Once"
    assert {"text", "prompt_tokens", "seconds", "tokens_per_second", "model"} <= found.keys()
    assert found["settings"]["stop"] == ["\n", "q"]
    assert found["settings"]["temperature"] == 0.8
    # The seed that was drawn is told, so that the run can be repeated.
    assert run([*command, "--seed", str(found["settings"]["seed"])]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == found["text"]


def test_a_prompt_from_stdin(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("むかしむかし\n"))
    assert run(["generate", folder, "-", "--max_new_tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "むかしむかし"


def stdin_of(data: bytes) -> io.TextIOWrapper:
    """Standard input under a locale that lets every byte pass."""
    return io.TextIOWrapper(io.BytesIO(data), encoding="ascii", errors="surrogateescape")


def test_standard_input_is_utf8_whatever_the_locale(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["--max_new_tokens", "3", "--json"]
    monkeypatch.setattr("sys.stdin", stdin_of("むかし\r\nむかし\r\n".encode()))
    assert run(["generate", folder, "-", *few]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "むかし\nむかし"
    monkeypatch.setattr("sys.stdin", stdin_of("名前\r\n".encode()))
    assert run(["chat", folder, *few]) == 0
    assert json.loads(capsys.readouterr().out)["message"] == "名前"
    for verb in (["generate", folder, "-"], ["chat", folder]):
        monkeypatch.setattr("sys.stdin", stdin_of("日本".encode("cp932")))
        with pytest.raises(UserError, match="Standard input is not UTF-8 text; convert it first"):
            run([*verb, *few])


def test_chat_uses_the_template(chat_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", chat_folder, "hello", "--chat", "--max_new_tokens", "5", "--json"]
    assert run(command) == 0
    captured = capsys.readouterr()
    short = json.loads(captured.out)["prompt_tokens"]
    assert captured.err == ""
    assert json.loads(captured.out)["settings"]["temperature"] == 0
    assert run([*command, "--system", "hello"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] > short + 3


def test_a_base_model_says_that_it_is_one(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", folder, "Hello", "--chat", "--max_new_tokens", "5"]) == 0
    assert "no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--temperature", "-1"], "temperature is -1"),
        (["--temperature", "warm"], "temperature is 'warm'; it must be a number"),
        (["--top_p", "0"], "top_p is 0"),
        (["--top_k", "-5"], "top_k is -5"),
        (["--min_p", "3"], "min_p is 3"),
        (["--repetition_penalty", "0"], "repetition_penalty is 0"),
        (["--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--stop", ""], "stop string is empty"),
        (["--dtype", "int3"], "dtype"),
        (["--device", "tpu"], "no device 'tpu'"),
        (["--system", "x"], "add --chat"),
        (["--draft", "a", "--lookup", "3"], "give one of them"),
        (["--lookup", "0"], "--lookup is 0"),
        (["--cache_dtype", "int4"], "--cache_dtype is 'int4'"),
        (["--num_beams", "0"], "num_beams is 0"),
        (["--num_beams", "2", "--temperature", "1"], "set temperature to 0"),
        (["--num_beams", "2", "--n", "3"], "n is 3, but num_beams is 2"),
        (["--draft", "nowhere"], "nowhere"),
        (["--draft", ""], "--draft is empty"),
        (["--regex", ""], "--regex is empty"),
        (["--chat", "--n", "2"], "--n is for texts without --chat"),
        (["--logprobs", "2"], "add --json"),
        (["--length_penalty", "2"], "add --num_beams"),
        (["--temprature", "1"], "temprature"),
    ],
)
def test_wrong_flags_are_sentences(folder: str, arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        run(["generate", folder, "Once", *arguments])


def test_an_address_is_for_chat() -> None:
    with pytest.raises(UserError, match="`scratchlm chat` talks with its server"):
        run(["generate", "http://127.0.0.1:9/v1", "Once"])


def greedy(capsys: pytest.CaptureFixture[str], model: str, *flags: str) -> str:
    command = ["generate", model, "Once upon", "--max_new_tokens", "9", "--temperature", "0"]
    assert run([*command, *flags]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("chat", [(), ("--chat",)], ids=["plain", "chat"])
def test_guessing_ahead_changes_nothing(
    folder: str, chat: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = greedy(capsys, folder, *chat)
    assert greedy(capsys, folder, *chat, "--draft", folder) == plain
    assert greedy(capsys, folder, *chat, "--lookup", "4") == plain
    assert greedy(capsys, folder, *chat, "--cache_dtype", "fp32") == plain
    assert greedy(capsys, folder, *chat, "--cache_dtype", "int8")


def test_a_draft_of_another_vocabulary(folder: str, chat_folder: str) -> None:
    with pytest.raises(UserError, match="vocabulary is not that of"):
        run(["generate", folder, "Once", "--draft", chat_folder])


def test_several_texts_and_beams(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", folder, "Once upon", "--max_new_tokens", "6", "--num_beams", "3"]
    assert run([*command, "--n", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "1:\n2:\n"
    assert run([*command, "--n", "2", "--json", "--logprobs", "1", "--prompt_logprobs", "0"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["settings"]["temperature"] == 0 and "text" not in told
    results = told["results"]
    assert captured.out == "".join(result["text"] + "\n" for result in results)
    assert [result["choice"] for result in results] == [0, 1]
    sums = [sum(one["logprob"] for one in result["logprobs"]) for result in results]
    assert sums[0] >= sums[1]
    assert len(results[0]["prompt_logprobs"]) == results[0]["prompt_tokens"] - 1
    assert run([*command, "--json", "--length_penalty", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["length_penalty"] == 0


def test_what_takes_long_is_said_in_a_terminal(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    @contextmanager
    def progress() -> Iterator[Callable[[str], None]]:
        yield said.append

    monkeypatch.setattr(convert, "progress", progress)
    plain = greedy(capsys, folder)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert greedy(capsys, folder) == plain
    assert said == []
    greedy(capsys, folder, "--json")
    monkeypatch.setattr(generate, "LONG", 3)
    assert greedy(capsys, folder) == plain
    assert said == ["Writing ...", "Reading the prompt ..."]


def test_logprobs_are_told(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(greedy(capsys, folder, "--json", "--logprobs", "2"))
    assert [one["token"] for one in told["logprobs"]] == told["tokens"]
    assert all(len(one["top"]) == 2 for one in told["logprobs"])
    assert json.loads(greedy(capsys, folder, "--json"))["logprobs"] is None


def test_a_prompt_longer_than_the_context(folder: str) -> None:
    with pytest.raises(UserError, match=r"has \d+ tokens, but the model's context is 120"):
        run(["generate", folder, "漢" * 200])


# ------------------------------------------------------------------------- chat


def chat(monkeypatch: pytest.MonkeyPatch, model: str, lines: str, *flags: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return run(["chat", model, "--max_new_tokens", "6", "--seed", "1", *flags])


def test_piped_lines_are_answered(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []

    class Echo(conversation_module.Conversation):
        def ask(self, text: str) -> Any:
            heard.append(text)
            return super().ask(text)

    monkeypatch.setattr(conversation_module, "Conversation", Echo)
    assert chat(monkeypatch, folder, "Hello\n\nOnce upon\n//path\n") == 0
    captured = capsys.readouterr()
    assert heard == ["Hello", "Once upon", "/path"]
    assert captured.out.count("\n") >= 3
    assert "no chat template" in captured.err
    assert "context 120 tokens" in captured.err


def test_the_first_line_counts_packed_weights(
    make: Callable[..., Decoder],
    tokenizer: Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def said(model: Path) -> str:
        assert chat(monkeypatch, str(model), "") == 0
        return capsys.readouterr().err.rpartition(f"\n{model}")[2]

    sizes = {"d_model": 64, "n_heads": 4, "head_dim": 16, "d_ff": 128}
    model = make(vocab_size=tokenizer.vocab_size, **sizes)
    save_folder(model, tokenizer, tmp_path / "model")
    quantize(tmp_path / "model", "int8", tmp_path / "small")
    plain, packed = said(tmp_path / "model"), said(tmp_path / "small")
    assert plain.split(",")[0] == packed.split(",")[0] != ": 0.0 M parameters"
    assert "float32 on cpu" in plain
    assert "in few bits on cpu" in packed


def test_commands(
    chat_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "/help\n/system Be kind.\n/system\n/reset\n/rest\n/quit\nnever read\n"
    assert chat(monkeypatch, chat_folder, lines) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    for said in ("/reset  ", "with this system", "(no system", "(new conv", "Did you mean"):
        assert said in captured.err


def test_what_does_not_fit_is_said_and_the_talk_goes_on(
    chat_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chat(monkeypatch, chat_folder, "x" * 500 + "\nhello\n" * 9) == 0
    captured = capsys.readouterr()
    assert "The message has" in captured.err
    assert "oldest messages are left out" in captured.err
    assert captured.out


def test_ctrl_c_stops_the_answer_and_not_the_program(
    chat_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Interrupted(conversation_module.Conversation):
        def ask(self, text: str) -> Any:
            asked.append(text)

            def pieces() -> Generator[str, None, None]:
                yield "some"
                raise KeyboardInterrupt

            return pieces()

    monkeypatch.setattr(conversation_module, "Conversation", Interrupted)
    assert chat(monkeypatch, chat_folder, "one\ntwo\n") == 0
    assert asked == ["one", "two"]
    captured = capsys.readouterr()
    assert captured.out == "some\nsome\n"
    assert captured.err.count("(stopped)") == 2


def test_json_answers_one_line_each(
    chat_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chat(monkeypatch, chat_folder, "hello\nonce\n" + "x" * 500 + "\n", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["message"] for row in rows[:2]] == ["hello", "once"]
    assert all(row["finish_reason"] in ("stop", "length") for row in rows[:2])
    assert "answer" in rows[0]
    assert "context" in rows[2]["error"]


def test_help_has_examples_and_loads_nothing() -> None:
    code = (
        "import sys\nfrom llm_from_scratch.cli.main import run\n"
        "for verb in ('generate', 'chat'):\n"
        "    try:\n        run([verb, '--help'])\n    except SystemExit as stop:\n"
        "        assert stop.code == 0\n"
        "assert 'torch' not in sys.modules, 'help must not wait for torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("examples:") == 2
