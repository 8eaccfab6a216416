"""What lies beside an adapter (its tokenizer, its template), and what the verbs make of one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_from_scratch.cli.main import run as run_command
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.chat import open_chat
from llm_from_scratch.model.adapters import adapted_layers, merged
from llm_from_scratch.model.lora import LoraSettings, add_lora
from llm_from_scratch.text.chat_template import TEMPLATES
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.train.quantize import quantize
from llm_from_scratch.weights.adapter_config import CONFIG, TENSORS
from llm_from_scratch.weights.adapters_write import save_adapter
from llm_from_scratch.weights.convert import convert
from llm_from_scratch.weights.folder import load_folder, save_folder
from llm_from_scratch.weights.sources import load

TOKENS = torch.tensor([[3, 17, 250, 8, 9, 9, 1]])
WORDS = "A king, once upon a time."


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCRATCHLM_QUIET", "1")
    monkeypatch.setenv("SCRATCHLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def scramble(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            adapter = layer.named("default")
            assert adapter is not None
            for part in (adapter.a, adapter.b):
                part.copy_(torch.empty(part.shape).normal_(generator=generator) * 0.3)


@pytest.fixture
def base(make_model: Callable[..., Any], tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A base without a chat template, stored in bf16, with what a folder may have besides."""
    folder = tmp_path / "base"
    save_folder(make_model().bfloat16(), tokenizer, folder, {"temperature": 0.6})
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (folder / "README.md").write_text("The base's card.\n", "utf-8")
    (folder / "LICENSE").write_text("Free.\n", "utf-8")
    return folder


def taught(base: Path) -> tuple[Any, Tokenizer]:
    """The base with an adapter, and the tokenizer with the template that it was trained in."""
    model, tokenizer = load_folder(base, torch.float32)
    assert tokenizer is not None and tokenizer.chat_template is None
    add_lora(model, LoraSettings(rank=2, alpha=7), 0)
    scramble(model)
    tokenizer.chat_template = TEMPLATES["alpaca"]
    tokenizer.extra_stop_ids.add(7)
    return model.eval(), tokenizer


@pytest.fixture
def adapter(base: Path) -> Path:
    model, tokenizer = taught(base)
    save_adapter(model, base.parent / "poet", str(base), tokenizer=tokenizer)
    return base.parent / "poet"


# --- the tokenizer beside it ----------------------------------------------------------------------


def test_an_adapter_brings_its_template(base: Path, adapter: Path) -> None:
    for model, more in ((adapter, None), (base, adapter)):
        _, tokenizer = load(model, adapter=more, device="cpu")
        assert tokenizer.chat_template == TEMPLATES["alpaca"] and 7 in tokenizer.stop_ids
    assert load(base, device="cpu")[1].chat_template is None
    with open_chat(str(adapter), device="cpu") as chat, open_chat(str(base), device="cpu") as bare:
        said = [{"role": "user", "content": WORDS}]
        assert chat.count(said) != bare.count(said)


def test_an_adapter_is_written_over_with_its_tokenizer(base: Path, adapter: Path) -> None:
    model, tokenizer = taught(base)
    tokenizer.chat_template = TEMPLATES["chatml"]
    save_adapter(model, adapter, str(base), tokenizer=tokenizer)
    assert load(adapter, device="cpu")[1].chat_template == TEMPLATES["chatml"]
    save_adapter(model, adapter, str(base))
    assert load(adapter, device="cpu")[1].chat_template is None


def test_peft_and_transformers_read_the_same_folder(base: Path, adapter: Path) -> None:
    wanted = load(adapter, dtype="fp32", device="cpu")[0](TOKENS)
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    ).eval()
    torch.testing.assert_close(theirs(TOKENS).logits, wanted, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(adapter).chat_template == TEMPLATES["alpaca"]
    # And what they write beside an adapter, we read.
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (adapter / name).unlink()
    own = AutoTokenizer.from_pretrained(base)
    own.chat_template = TEMPLATES["phi3"]
    own.save_pretrained(adapter)
    found = load(adapter, device="cpu")[1]
    assert found.chat_template == TEMPLATES["phi3"]
    assert found.encode(WORDS) == load(base, device="cpu")[1].encode(WORDS)


def test_a_template_alone_and_a_larger_vocabulary(base: Path, adapter: Path) -> None:
    plain = load(base, device="cpu")[1]
    grown = load(adapter, device="cpu")[1]
    # More than the embedding has rows.
    grown.add_tokens([f"[PAD{number}]" for number in range(99)], special=True)
    grown.save(adapter)
    found = load(adapter, device="cpu")[1]
    assert found.vocab_size == plain.vocab_size
    assert found.chat_template == TEMPLATES["alpaca"]
    assert found.stop_ids == plain.stop_ids | {7} and plain.stop_ids == {plain.eos_id}
    for file in adapter.iterdir():
        if file.name not in (CONFIG, TENSORS):
            file.unlink()
    (adapter / "chat_template.jinja").write_text(TEMPLATES["llama3"], "utf-8")
    assert load(adapter, device="cpu")[1].chat_template == TEMPLATES["llama3"]
    assert plain.chat_template is None


def test_a_broken_tokenizer_beside_an_adapter(adapter: Path) -> None:
    (adapter / "tokenizer.json").write_text("{", "utf-8")
    with pytest.raises(UserError, match=r"poet/tokenizer\.json"):
        load(adapter, device="cpu")


def test_no_adapter_around_an_adapter(base: Path, adapter: Path) -> None:
    with pytest.raises(UserError, match=rf"is an adapter itself.* name its base .*{base}"):
        load(adapter, adapter=adapter, device="cpu")


# --- convert and quantize -------------------------------------------------------------------------


def test_convert_merges_in_full_precision(base: Path, adapter: Path) -> None:
    model = merged(load(adapter, dtype="stored", device="cpu")[0])
    wanted = model(TOKENS)
    done = convert(adapter, "hf", "whole")
    assert done.kind == "float32" and done.parameters == sum(p.numel() for p in model.parameters())
    found, tokenizer = load("whole", device="cpu")
    torch.testing.assert_close(found(TOKENS), wanted, rtol=0, atol=1e-6)
    assert tokenizer.chat_template == TEMPLATES["alpaca"] and 7 in tokenizer.stop_ids
    told = json.loads(Path("whole/generation_config.json").read_text())
    assert told["temperature"] == 0.6 and 7 in told["eos_token_id"]
    # What the base has beside its weights; its card speaks of another model.
    assert Path("whole/LICENSE").is_file() and not Path("whole/README.md").exists()
    assert convert(adapter, "hf", "half", dtype="bf16").kind == "bfloat16"
    stored = load_file("half/model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {torch.bfloat16}


def test_convert_into_a_gguf(adapter: Path) -> None:
    wanted = merged(load(adapter, dtype="stored", device="cpu")[0])(TOKENS)
    assert convert(adapter, "gguf", "whole.gguf").kind == "F32"
    found, tokenizer = load("whole.gguf", device="cpu", dtype="fp32")
    torch.testing.assert_close(found(TOKENS), wanted, rtol=1e-4, atol=1e-4)
    assert tokenizer.chat_template == TEMPLATES["alpaca"]


def test_the_base_is_never_written_over(base: Path, adapter: Path) -> None:
    before = (base / "model.safetensors").read_bytes()
    for write in (
        lambda: convert(adapter, "hf", base),
        lambda: quantize(adapter, "int8", base),
    ):
        with pytest.raises(UserError, match="is where the model itself lies"):
            write()
    assert (base / "model.safetensors").read_bytes() == before


def test_quantize_takes_the_merged_matrices(adapter: Path) -> None:
    done = quantize(adapter, "int8", "small", dtype="fp32")
    whole = quantize(convert(adapter, "hf", "whole").path, "int8", "same", dtype="fp32")
    assert (done.matrices, done.dense) == (whole.matrices, whole.dense)
    small, same = (load(name, dtype="fp32", device="cpu")[0] for name in ("small", "same"))
    torch.testing.assert_close(small(TOKENS), same(TOKENS), rtol=0, atol=0)


# --- info -----------------------------------------------------------------------------------------


def test_info_of_an_adapter(base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def info(*words: str) -> str:
        capsys.readouterr()
        assert run_command(["info", *words, "--device", "cpu"]) == 0
        return capsys.readouterr().out

    found = json.loads(info(str(adapter), "--json"))
    tensors = load_file(adapter / TENSORS)
    assert found["adapter"] == {
        "kind": "lora", "rank": 2, "alpha": 7.0, "base": str(base), "layers": len(tensors) // 2,
        "parameters": sum(tensor.numel() for tensor in tensors.values()), "whole": 0,
        "bytes": (adapter / TENSORS).stat().st_size,
    }  # fmt: skip
    of_base = json.loads(info(str(base), "--json"))
    assert of_base["adapter"] is None and of_base["parameters"] == found["parameters"]
    assert f"an adapter (lora, rank 2, alpha 7) of {base}" in info(str(adapter))
    (adapter / TENSORS).write_bytes(b"\x10\x00")
    with pytest.raises(UserError, match=f"{adapter / TENSORS} cannot be read"):
        info(str(adapter))
    shutil.rmtree(base)
    with pytest.raises(UserError, match=f"is an adapter of {base}, which is not to be had"):
        info(str(adapter))
