"""The commands one after the other, as a person would type them, on one tiny run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llm_from_scratch import __version__
from llm_from_scratch.cli import main as main_module
from llm_from_scratch.cli.main import main, run, split_settings
from llm_from_scratch.core.errors import RunError
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.gguf_architectures import ARCHITECTURES
from tests.train.helpers import text

SETTINGS = (
    "--data.seq_len 16 --tokenizer.vocab_size 300 --model.d_model 16 --model.n_layers 1 "
    "--model.n_heads 2 --train.max_steps 3 --train.batch_size 4 --train.warmup_steps 1 "
    "--train.precision fp32 --train.device cpu"
).split()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus.txt and, in runs/first, what the first command made of it."""
    folder: Path = tmp_path_factory.mktemp("cli")
    (folder / "corpus.txt").write_text(text(), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ["pretrain", "--data", "corpus.txt", "--out", "runs/first", *SETTINGS]
        assert run(words) == 0
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SCRATCHLM_CACHE", str(place / "cache"))


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that succeeds writes to standard output."""
    capsys.readouterr()
    assert run(words) == 0
    return capsys.readouterr().out


def exit_code(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["scratchlm", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert isinstance(end.value.code, int)
    return end.value.code


def test_the_run_folder_is_complete() -> None:
    names = {path.name for path in Path("runs/first").iterdir() if not path.name.startswith("ev")}
    assert names == {
        "checkpoints", "config.yaml", "environment.json", "loss.png", "metrics.jsonl", "model",
        "samples.md", "summary.json", "tokenizer", "tokens",
    }  # fmt: skip
    assert list(Path("runs/first").glob("events.*"))
    summary = json.loads(Path("runs/first/summary.json").read_text())
    assert summary.keys() >= {
        "steps", "tokens", "parameters", "seconds", "tokens_per_second", "mfu", "val_loss",
        "best_val_loss", "bits_per_byte",
    }  # fmt: skip
    assert (summary["steps"], summary["tokens"]) == (3, 3 * 4 * 16)


def test_a_run_is_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["the cat", "--max_new_tokens", "4", "--seed", "1", "--json"]
    texts = set()
    for model in ("runs/first", "runs/first/", "runs/first/model"):
        found = json.loads(printed(["generate", model, *words], capsys))
        assert found["new_tokens"] <= 4
        assert found["settings"]["seed"] == 1
        texts.add(found["text"])
    assert len(texts) == 1


def test_a_run_is_a_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    shown = json.loads(printed(["tokenizer", "show", "runs/first", "the cat", "--json"], capsys))
    assert (shown["characters"], shown["bytes"]) == (7, 7)
    tokenizer = Tokenizer.load(Path("runs/first/model"))
    assert [token["id"] for token in shown["tokens"]] == tokenizer.encode("the cat")


def test_models_lists_what_can_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(["models", "--json"], capsys))
    assert found.keys() == {"models", "families", "gguf", "presets"}
    assert [entry["name"] for entry in found["gguf"]] == list(ARCHITECTURES)
    assert "smollm2-135m" in {model["name"] for model in found["models"]}
    assert {family["name"] for family in found["families"]} >= {"llama", "qwen3", "gpt2"}
    plain = printed(["models"], capsys)
    for part in found.values():
        assert all(entry["name"] in plain for entry in part)


def test_doctor_examines_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(["doctor", "--json"], capsys))
    assert found["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["gemm_flops"]["fp32"] > 1e6
    assert found["memory_bytes_per_s"] > 1e6
    assert found["device"] in ("cpu", "cuda", "mps")
    assert {"python", "system", "processor", "cores", "cache", "precision"} <= found.keys()
    assert found["kernels"] in ("avx512", "avx2", "neon", "plain", "off")


def test_printed_settings_can_be_fed_back(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pretrain", "--data", "corpus.txt", "--out", "runs/second", *SETTINGS]
    shown = printed([*words, "--print_config"], capsys)
    assert not Path("runs/second").exists()
    Path("again.yaml").write_text(shown, encoding="utf-8")
    assert printed(["pretrain", "--config", "again.yaml", "--print-config"], capsys) == shown
    # A flag wins over the file.
    flags = ["--train.max_steps", "2", "--print_config"]
    other = yaml.safe_load(printed(["pretrain", "--config", "again.yaml", *flags], capsys))
    assert other["train"]["max_steps"] == 2
    assert other == {
        **yaml.safe_load(shown),
        "train": {**yaml.safe_load(shown)["train"], "max_steps": 2},
    }


def test_config_yaml_repeats_the_run() -> None:
    words = ["pretrain", "--config", "runs/first/config.yaml", "--out", "runs/again"]
    assert run(words) == 0
    one, two = (
        load_file(Path(folder) / "model" / "model.safetensors")
        for folder in ("runs/first", "runs/again")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_dash_and_underscore_are_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--train.max_steps=7", "--data.seq_len", "32", "--print_config"]
    dashed = [word.replace("_", "-") if word.startswith("--") else word for word in settings]
    assert dashed != settings
    assert printed(["pretrain", *settings], capsys) == printed(["pretrain", *dashed], capsys)
    for flag in ("--max_new_tokens", "--max-new-tokens"):
        out = printed(["generate", "runs/first", "a", flag, "2", "--seed", "1", "--json"], capsys)
        assert json.loads(out)["settings"]["max_new_tokens"] == 2


def test_a_prompt_that_looks_like_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "runs/first", "--max_new_tokens", "2", "--json", "--", "--no-flag"]
    assert json.loads(printed(words, capsys))["prompt"] == "--no-flag"


def test_settings_are_told_from_flags() -> None:
    words = ["--data", "a", "--train.seed", "1", "--data.paths", "b", "c", "--json"]
    assert split_settings(words) == (
        ["--data", "a", "--json"],
        ["--train.seed", "1", "--data.paths", "b", "c"],
    )


def test_json_of_a_run_is_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pretrain", "--data", "corpus.txt", "--out", "runs/json", *SETTINGS, "--json"]
    found = json.loads(printed(words, capsys))
    assert found == json.loads(Path("runs/json/summary.json").read_text())


def test_a_run_stopped_on_purpose_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pretrain", "--data", "corpus.txt", "--out", "runs/half", *SETTINGS]
    assert run([*words, "--train.stop_after", "1"]) == 0
    told = re.search(r"To go on: scratchlm (.+)\n", capsys.readouterr().err)
    assert told
    assert json.loads(printed([*told[1].split(), "--json"], capsys))["steps"] == 3


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RunError("The disk is full."), 1, "scratchlm: The disk is full."),
        (KeyboardInterrupt(), 130, "scratchlm: stopped."),
        (MemoryError(), 1, "scratchlm: The memory is not enough."),
        (RuntimeError("CUDA out of memory. Tried"), 1, "scratchlm: The memory is not enough."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "The memory is not enough"),
    ],
)
def test_exit_codes_of_failures(
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(words: list[str]) -> int:
        raise error

    monkeypatch.setattr(main_module, "run", fail)
    assert exit_code(["pretrain"], monkeypatch) == code
    assert said in capsys.readouterr().err


def test_a_fault_of_the_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(words: list[str]) -> int:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(main_module, "run", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        main()


def test_exit_codes_of_success(monkeypatch: pytest.MonkeyPatch) -> None:
    for words in ([], ["--help"], ["--version"], ["models"], ["pretrain", "--print_config"]):
        assert exit_code(words, monkeypatch) == 0


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llm_from_scratch", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, f"scratchlm {__version__}\n")


@pytest.mark.skipif(os.name == "nt", reason="pipes close differently on Windows")
def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "llm_from_scratch", "pretrain", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0
