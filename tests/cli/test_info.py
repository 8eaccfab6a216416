"""`scratchlm info`: the same figures for people and for programs, from descriptions alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llm_from_scratch.cli.info import human
from llm_from_scratch.cli.main import run
from llm_from_scratch.core import device as device_module
from llm_from_scratch.core.config import to_yaml
from llm_from_scratch.core.device import free_memory_bytes, memory_bytes
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.config import EncoderDecoderConfig
from llm_from_scratch.model.memory import Pass
from llm_from_scratch.model.presets import PRESETS
from llm_from_scratch.train.account import Question, account
from llm_from_scratch.train.memory import training_memory
from llm_from_scratch.weights.describe import describe_preset
from llm_from_scratch.weights.folder import save_folder
from llm_from_scratch.weights.gguf_save import save_gguf
from llm_from_scratch.weights.heads import add_head
from tests.model.architectures import ARCHITECTURES, make
from tests.train.helpers import config, text

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--device", "cpu", "--dtype", "fp32"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SCRATCHLM_CACHE", str(tmp_path / "cache"))


def asked(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert run(["info", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def folder_of(name: str, where: str) -> Path:
    """A model folder of one of the families, without its weights."""
    config = ARCHITECTURES[name]
    if name == "t5":  # whose class has no limit
        assert isinstance(config, EncoderDecoderConfig)
        stacks = (replace(x, max_seq_len=16384) for x in (config.encoder, config.decoder))
        config = replace(config, **dict(zip(("encoder", "decoder"), stacks, strict=True)))
    save_folder(make(config).eval(), None, where)  # type: ignore[arg-type]
    (Path(where) / "model.safetensors").unlink()
    return Path(where)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_accounted_for(preset: str) -> None:
    found = account(None, Question(device="cpu", dtype="bf16"), preset=preset)
    assert found["parameters"]["total"] == sum(found["parameters"]["parts"].values())
    for memory in (found["inference"], found["training"]):
        assert memory["total"] >= memory["weights"] > 0
    flops = found["flops"]
    for work in flops.values():
        assert work["total"] == work["matrices"] + work["attention"] + work["logits"]
    assert flops["training"]["total"] > 3 * flops["prefill"]["total"]
    assert found["asked"]["context"] == min(2048, found["asked"]["longest_context"])


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "bert", "modernbert", "t5", "bart"])
def test_a_description_is_enough(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(name, "model")
    found = asked(["model", *SMALL], capsys)
    assert found["family"] == name
    assert found["stored"] == {"form": "fp32", "bytes": None}
    assert found == {**asked([str(folder / "config.json"), *SMALL], capsys), "model": "model",
                     "machine": found["machine"]}  # fmt: skip
    assert run(["info", "model", *SMALL]) == 0
    said = capsys.readouterr().out
    parts = found["parameters"]["parts"]
    assert all(part in said and f"{count:,}" in said for part, count in parts.items())
    assert f"{found['parameters']['total']:,} parameters" in said
    step = f"  token {found['asked']['context']:,} "
    assert (step in said) == (found["kind"] != "encoder")
    assert ("KV cache:" in said) == (found["kind"] != "encoder")
    assert all(len(line) <= 150 for line in said.split("\n"))


def test_a_run_is_asked_about_with_its_own_settings(capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_text(text(), "utf-8")
    settings = config(Path(), out="run", data={"paths": ["text.txt"]})
    Path("run").mkdir()
    Path("run/config.yaml").write_text(to_yaml(settings), "utf-8")
    found = asked(["run", *SMALL], capsys)
    assert found["source"] == str(Path("run/config.yaml"))
    assert found["asked"]["context"] == settings.data.seq_len
    assert found["asked"]["batch"] == settings.train.batch_size
    assert found["asked"]["optimizer"] == settings.train.optimizer
    assert found["config"]["vocab_size"] == settings.tokenizer.vocab_size
    assert asked(["run/config.yaml", *SMALL], capsys)["training"] == found["training"]
    flags = ["--batch", "2", "--context", "8", "--optimizer", "adamw"]
    other = asked(["run", *SMALL, *flags], capsys)["asked"]
    assert (other["batch"], other["context"], other["optimizer"]) == (2, 8, "adamw")
    # A model that the run has saved is described by its own config.json.
    folder_of("llama", "run/model")
    assert asked(["run", *SMALL], capsys)["source"] == str(Path("run/model/config.json"))
    Path("run/model/config.json").unlink()
    broken = {**yaml.safe_load(Path("run/config.yaml").read_text("utf-8")), "model": {"depht": 2}}
    Path("run/config.yaml").write_text(yaml.safe_dump(broken), "utf-8")
    with pytest.raises(UserError, match="depht"):
        run(["info", "run"])


def test_of_a_hub_name_only_the_description_is_fetched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of("llama", "snapshot")
    wanted = []

    def fetch(name: str, allow_patterns: list[str], **more: Any) -> str:
        wanted.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert asked(["org/name", *SMALL], capsys)["family"] == "llama"
    assert wanted == [
        ("org/name", ["config.json", "adapter_config.json", "adapter_model.safetensors"])
    ]


def test_weights_that_are_still_on_their_way(capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of("bert", "model")
    whole = asked(["model", *SMALL], capsys)["parameters"]
    (folder / "model.safetensors").write_bytes(b"half of a hea")
    assert asked(["model", *SMALL], capsys)["parameters"] == whole


def test_a_gguf_file_tells_as_much(capsys: pytest.CaptureFixture[str]) -> None:
    model = make(ARCHITECTURES["llama-d192"]).eval()
    save_gguf(model, None, "model.gguf", kind="Q8_0")  # type: ignore[arg-type]
    found = asked(["model.gguf", *SMALL], capsys)
    assert found["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert found["stored"]["form"] == "Q8_0"
    assert 0 < found["stored"]["bytes"] <= Path("model.gguf").stat().st_size
    # On a CPU the weights stay as they are stored, unless a precision is asked for.
    kept = asked(["model.gguf", "--device", "cpu"], capsys)["inference"]["weights"]
    assert kept == found["stored"]["bytes"]
    grown = asked(["model.gguf", "--device", "cpu", "--dtype", "fp32"], capsys)
    assert grown["inference"]["weights"] == 4 * found["parameters"]["total"]
    assert found["head"] is None and found["flops"]["decode"] is not None
    save_gguf(add_head(model, "embedding"), None, "vectors.gguf", kind="Q8_0")  # type: ignore[arg-type]
    found = asked(["vectors.gguf", *SMALL], capsys)
    assert found["head"] == "embedding" and found["flops"]["decode"] is None


def test_the_largest_batch_is_the_last_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_from_scratch.train.account.free_memory_bytes", lambda device: 10**9)
    question = Question(context=256, dtype="fp32", device="cpu", optimizer="adamw")
    found = account(None, question, preset="stories15m")
    machine = found["machine"]
    most = machine["largest"]["training"]["batch"]
    config = describe_preset("stories15m").config
    fits = [
        training_memory(config, Pass(b, 256, masked=True), "adamw").total * machine["slack"] <= 1e9
        for b in (most, most + 1)
    ]
    assert fits == [True, False]
    # A model that does not fit at this context is told the longest that does.
    larger = account(None, Question(dtype="fp32", device="cpu"), preset="smollm2-135m")
    assert larger["machine"]["largest"]["training"]["batch"] == 0
    assert larger["machine"]["largest"]["inference"]["batch"] >= 1


def test_memory_that_nobody_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llm_from_scratch.train.account.free_memory_bytes", lambda device: None)
    assert run(["info", "--preset", "nano-char", *SMALL]) == 0
    assert "does not say how much memory" in capsys.readouterr().out


def test_a_container_limits_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    total, free = memory_bytes(cpu), free_memory_bytes(cpu)
    assert total and free and 0 < free <= total
    for name, content in (
        ("memory.max", f"{10**9}\n"),
        ("memory.current", f"{6 * 10**8}\n"),
        ("memory.stat", f"anon 3\ninactive_file {10**8}\n"),
    ):
        (tmp_path / name).write_text(content, "utf-8")
    monkeypatch.setattr(device_module, "CONTAINER", tmp_path)
    assert memory_bytes(cpu) == 10**9
    if Path("/proc/meminfo").exists():
        assert free_memory_bytes(cpu) == 5 * 10**8
    (tmp_path / "memory.max").write_text("max\n", "utf-8")  # no limit
    assert memory_bytes(cpu) == total


def test_no_character_that_the_terminal_lacks() -> None:
    command = [sys.executable, "-m", "llm_from_scratch", "info", "--preset", "nano-char", *SMALL]
    done = subprocess.run(
        command, capture_output=True, timeout=120, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0
    assert b"####" in done.stdout


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from llm_from_scratch.cli.main import run\n"
        "try: run(['info', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == 0


def test_numbers_for_people() -> None:
    assert [human(x) for x in (999.7, 999.7e6, 999.4e6)] == ["1 k", "1 G", "999 M"]
    assert [human(x) for x in (0, 999, 1234, 2.5e9, 7e18)] == ["0", "999", "1.23 k", "2.5 G", "7 E"]


def test_one_key_value_head_and_no_spaces_to_spare(capsys: pytest.CaptureFixture[str]) -> None:
    folder_of("llama", "model")
    (Path("model") / "model.safetensors").write_bytes(b"")
    assert run(["info", "model", *SMALL]) == 0
    said = capsys.readouterr().out
    heads = ARCHITECTURES["llama"]
    assert f"{heads.n_heads} query heads, {heads.n_kv_heads} key-value head" in said
    lines = said.split("\n")
    assert all(line == line.rstrip() and len(line) <= 100 for line in lines)
    assert not re.search(r"\S  \S", lines[2]), lines[2]


@pytest.mark.parametrize("language", ["en", "ja"])
def test_the_page_shows_what_is_printed(language: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / language / "info.md").read_text("utf-8")
    command = "scratchlm info --preset gpt2 --context 1024 --batch 8"
    assert f"\n{command} " in page
    (shown,) = re.findall(r"```text\n(gpt2: .*?)```", page, re.DOTALL)
    assert run([*command.split()[1:], "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith(shown)
