"""`scratchlm quantize` and `scratchlm prune`: from a model folder to a smaller one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llm_from_scratch as llm
from llm_from_scratch.cli.main import run
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.presets import ModelSettings, resolve
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer
from llm_from_scratch.train.calibration import calibration_windows
from llm_from_scratch.train.prune import prune
from llm_from_scratch.train.quantize import quantize
from llm_from_scratch.weights.folder import load_folder, save_folder
from llm_from_scratch.weights.packing import packed_layers
from llm_from_scratch.weights.quantized_write import matrices

TEXT = "".join(f"The {n} cats sat on mat {n * n % 97} and purred. " for n in range(600))
TOKENS = torch.arange(30)[None] * 7 % 251


def silent(line: str) -> None:
    """A report that says nothing."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with a tokenizer, and a text to calibrate on beside it."""
    folder = tmp_path_factory.mktemp("source")
    tokenizer = train_tokenizer([TEXT], vocab_size=270)
    given = ModelSettings(family="llama", depth=2, d_model=64, n_heads=4, n_kv_heads=2, d_ff=192)
    model = Decoder(resolve(given, tokenizer.vocab_size, 48)).eval()
    model.initialise(seed=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "blocks" in name:
                parameter.mul_(6)  # so that the blocks decide what comes out
    save_folder(model, tokenizer, folder / "model")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def logits_of(path: Path, **how: Any) -> torch.Tensor:
    with torch.no_grad():
        return llm.load(path, device="cpu", **how)[0](TOKENS % 200)


@pytest.mark.parametrize(
    ("to", "group", "zeros", "bits"),
    [
        ("int8", None, False, 8 + 16 / 64), ("int8", 32, True, 8 + 24 / 32),
        ("int4", None, False, 4.5), ("int4", 128, False, 4 + 16 / 64),
        ("int4", 64, True, 4 + 20 / 64), ("nf4", None, False, 4.5),
    ],
)  # fmt: skip
def test_a_folder_in_few_bits(
    source: Path, tmp_path: Path, to: str, group: int | None, zeros: bool, bits: float
) -> None:
    done = quantize(
        source / "model", to, tmp_path / "out", group_size=group, zero_points=zeros, report=silent
    )
    assert done.matrices == 14 and done.dense == []
    assert done.bits_per_weight == pytest.approx(bits, abs=0.15 if to == "int8" else 1e-9)
    assert done.bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    packed, tokenizer = llm.load(tmp_path / "out", device="cpu")
    kinds = Counter(part.packed.kind for _, part in packed_layers(packed))
    assert kinds == {to: 14, "bf16": 2}  # the embedding, which is the head as well
    assert tokenizer.encode("cats") == Tokenizer.load(source / "model").encode("cats")
    with torch.no_grad():
        mine = packed(TOKENS % 200)
    torch.testing.assert_close(mine, logits_of(tmp_path / "out", dtype="fp32"), atol=2e-2, rtol=0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = theirs(TOKENS % 200).logits
    scale = wanted.std()
    assert (mine - wanted).abs().max() < 0.1 * scale
    lost = (mine - logits_of(source / "model", dtype="fp32")).std() / scale
    assert lost < (0.05 if to == "int8" else 0.5)


def test_gptq_is_closer_to_the_original(source: Path, tmp_path: Path) -> None:
    text = [source / "text.txt"]
    model = source / "model"
    quantize(model, "int4", tmp_path / "rtn", group_size=0, dtype="fp32", report=silent)
    quantize(
        model, "int4", tmp_path / "gptq", method="gptq", calibrate=text, group_size=0, dtype="fp32",
        samples=40, length=40, device="cpu", report=silent,
    )  # fmt: skip
    tokenizer = Tokenizer.load(model)
    tokens = calibration_windows(text, tokenizer, 7, 48)
    with torch.no_grad():
        wanted = load_folder(model)[0](tokens).log_softmax(-1)
        kl = {}
        for method in ("rtn", "gptq"):
            mine = load_folder(tmp_path / method)[0](tokens).log_softmax(-1)
            kl[method] = float((wanted.exp() * (wanted - mine)).sum(-1).mean())
    assert kl["gptq"] < 0.7 * kl["rtn"]


@pytest.mark.parametrize(("method", "pattern"), [
    ("magnitude", "unstructured"), ("magnitude", "2:4"), ("wanda", "unstructured"),
    ("wanda", "2:4"),
])  # fmt: skip
def test_pruned_folders(source: Path, tmp_path: Path, method: str, pattern: str) -> None:
    text = [source / "text.txt"] if method == "wanda" else []
    done = prune(
        source / "model", tmp_path / "out", method=method, pattern=pattern, calibrate=text,
        samples=8, length=40, device="cpu", report=silent,
    )  # fmt: skip
    assert done.sparsity == pytest.approx(0.5, abs=0.01)
    model, _ = load_folder(tmp_path / "out")
    before, _ = load_folder(source / "model")
    for name in matrices(model):
        weight, old = model.get_parameter(name), before.get_parameter(name)
        assert torch.equal(weight[weight != 0], old[weight != 0])
        if pattern == "2:4":
            assert ((weight.unflatten(1, (-1, 4)) == 0).sum(-1) == 2).all()
    assert torch.equal(model.embedding.weight, before.embedding.weight)


def test_windows_are_spread_over_the_text(source: Path) -> None:
    tokenizer = Tokenizer.load(source / "model")
    windows = calibration_windows([source / "text.txt"], tokenizer, 5, 40)
    assert windows.shape == (5, 40)
    first, last = tokenizer.decode(windows[0].tolist()), tokenizer.decode(windows[-1].tolist())
    assert TEXT.startswith(first)
    assert TEXT.index(last) > 0.9 * len(TEXT)
    short = calibration_windows([source / "text.txt"], tokenizer, 1000, 40)
    assert len(short) == 1000
    long = calibration_windows([source / "text.txt"], tokenizer, 1000, 4000)
    assert 1 <= len(long) < 10 and long.shape[1] == 4000


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"to": "int3"}, "int3"),
        ({"to": "int4", "method": "awq"}, "awq"),
        ({"to": "nf4", "method": "gptq", "calibrate": ["text.txt"]}, "GPTQ"),
        ({"to": "int4", "method": "gptq"}, "--calibrate"),
        ({"to": "int4", "calibrate": ["text.txt"]}, "rtn"),
        ({"to": "nf4", "zero_points": True}, "zero points"),
        ({"to": "int4", "group_size": 48}, "48"),
        ({"to": "nf4", "group_size": 32}, "32"),
        ({"to": "int4", "dtype": "fp8"}, "fp8"),
    ],
)
def test_contradictions_are_refused(source: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        quantize(source / "model", out=source / "new", report=silent, **settings)
    assert not (source / "new").exists()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"method": "random"}, "random"),
        ({"pattern": "1:2"}, "1:2"),
        ({"sparsity": 1.0}, "1.0"),
        ({"sparsity": 0.3, "pattern": "2:4"}, "2:4"),
        ({"method": "wanda"}, "--calibrate"),
        ({"calibrate": ["text.txt"]}, "magnitude"),
    ],
)
def test_prunings_that_contradict_themselves(
    source: Path, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        prune(source / "model", source / "new", report=silent, **settings)


def test_the_calibration_text_is_checked(source: Path, tmp_path: Path) -> None:
    def gptq(text: Path) -> None:
        quantize(source / "model", "int4", tmp_path / "out", method="gptq", calibrate=[text],
                 device="cpu", report=silent)  # fmt: skip

    with pytest.raises(UserError, match="--calibrate"):
        gptq(tmp_path / "missing.txt")
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(UserError, match="too short"):
        gptq(tmp_path / "short.txt")
    assert not (tmp_path / "out").exists()


def test_the_model_itself_is_not_written_over(source: Path) -> None:
    with pytest.raises(UserError, match="where the model itself lies"):
        quantize(source / "model", "int8", source / "model", report=silent)


def test_the_commands(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = str(source / "model"), str(source / "text.txt")
    gptq = ["--method", "gptq", "--calibrate", text, "--calibrate-samples", "4"]
    assert run(["quantize", model, "--to", "int4", *gptq, "--out", str(tmp_path / "a")]) == 0
    said = capsys.readouterr()
    assert "14 matrices" in said.out and "4.50 bits" in said.out
    assert "GPTQ, block 2 of 2" in said.err
    assert run(["prune", model, "--out", str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sparsity"] == pytest.approx(0.5, abs=0.01)
    # What was pruned can be quantised, and what is quantised can be used like any other model.
    out = ["--out", str(tmp_path / "c"), "--json"]
    assert run(["quantize", str(tmp_path / "b"), "--to", "nf4", *out]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["to"] == "nf4" and told["bits_per_weight"] == 4.5
    assert run(["info", str(tmp_path / "c"), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)["stored"]
    weights = (tmp_path / "c" / "model.safetensors").stat().st_size
    assert described == {"form": "nf4", "bytes": weights}
    assert run(["convert", str(tmp_path / "c"), "--to", "hf", "--out", str(tmp_path / "d")]) == 0
    capsys.readouterr()
    again = json.loads((tmp_path / "d" / "config.json").read_text())
    assert "quantization_config" not in again


def test_matrices_whose_rows_do_not_divide_stay(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([TEXT], vocab_size=270)
    given = ModelSettings(family="qwen3", depth=2, d_model=32, n_heads=4, d_ff=72)
    model = Decoder(resolve(given, tokenizer.vocab_size, 48)).eval()
    model.initialise(seed=5)
    save_folder(model, tokenizer, tmp_path / "model")
    done = quantize(tmp_path / "model", "int4", tmp_path / "out", report=silent)
    assert done.dense == [f"blocks.{n}.feed_forward.down.weight" for n in (0, 1)]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ours, _ = load_folder(tmp_path / "out", torch.float32)
    with torch.no_grad():
        wanted = theirs(TOKENS % 200).logits
        torch.testing.assert_close(ours(TOKENS % 200), wanted, atol=2e-2, rtol=0)
    with pytest.raises(UserError, match="no matrix that can be quantised"):
        quantize(tmp_path / "model", "nf4", tmp_path / "none", report=silent)


@pytest.mark.parametrize("to", ["int4", "nf4"])
def test_a_broken_matrix_is_not_rounded_away(source: Path, tmp_path: Path, to: str) -> None:
    model, tokenizer = load_folder(source / "model")
    model.get_parameter("blocks.1.attention.k.weight").data[3, 5] = torch.nan
    save_folder(model, tokenizer, tmp_path / "model")
    with pytest.raises(UserError, match=r"'blocks\.1\.attention\.k\.weight' holds values that are"):
        quantize(tmp_path / "model", to, tmp_path / "out", report=silent)
    assert not (tmp_path / "out").exists()
