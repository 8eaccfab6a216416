"""`scratchlm convert`: what goes in comes out again, pickles included, and nothing else is lost."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file

from llm_from_scratch.cli.main import run as run_command
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import ASIDE
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights import sources
from llm_from_scratch.weights.convert import convert
from llm_from_scratch.weights.folder import save_folder
from llm_from_scratch.weights.sources import load

TOKENS = torch.tensor([[3, 17, 250, 8, 9, 9, 1]])


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCRATCHLM_QUIET", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(make_model: Callable[..., Any], tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A model folder with files that the model itself does not need."""
    path = tmp_path / "model"
    save_folder(make_model(), tokenizer, path, {"temperature": 0.6})
    (path / "README.md").write_text("A model card.\n", "utf-8")
    (path / "LICENSE").write_text("Free.\n", "utf-8")
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text("{}", "utf-8")
    (path / "optimizer.safetensors.tmp").write_text("no part of a model", "utf-8")
    return path


@pytest.fixture
def pickled(folder: Path, tmp_path: Path) -> Path:
    """The same model as its weights were kept in former times."""
    path = tmp_path / "pickled"
    shutil.copytree(folder, path)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    return path


def logits(model: str | Path) -> torch.Tensor:
    with torch.inference_mode():
        return load(model, device="cpu", dtype="fp32")[0](TOKENS)


def left_behind(place: Path) -> list[Path]:
    return list(place.rglob(ASIDE + "*"))


def test_a_folder_in_another_precision(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(folder), "--to", "hf", "--dtype", "bf16", "--out", "half"]
    assert run_command([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    size = sum(path.stat().st_size for path in Path("half").rglob("*") if path.is_file())
    parameters = sum(p.numel() for p in load(folder, device="cpu")[0].parameters())
    assert said == {
        "model": str(folder), "path": "half", "to": "hf", "kind": "bfloat16",
        "parameters": parameters, "bytes": size,
    }  # fmt: skip
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(load_file("half/model.safetensors")[name], tensor.bfloat16())
    kept = {path.name for path in Path("half").iterdir()}
    assert kept == {path.name for path in folder.iterdir()} - {"optimizer.safetensors.tmp"}
    assert Path("half/1_Pooling/config.json").is_file()
    assert json.loads(Path("half/generation_config.json").read_text())["temperature"] == 0.6
    assert run_command(words) == 0  # an earlier result is replaced
    assert "bfloat16" in capsys.readouterr().out
    assert not left_behind(tmp_path)


def test_half_precision_is_kept(
    make_model: Callable[..., Any], tokenizer: Tokenizer, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also where computing with it is slow, and `load` would rather have fp32."""
    monkeypatch.setattr(sources, "computes_bf16", lambda device: False)
    for stored in (torch.bfloat16, torch.float16):
        save_folder(make_model().to(stored), tokenizer, "model")
        assert convert("model", "hf", "out").kind == str(stored).removeprefix("torch.")
        assert load_file("out/model.safetensors")["model.norm.weight"].dtype == stored


def test_a_gguf_becomes_a_folder(gguf_case: type, tmp_path: Path) -> None:
    gguf_case(GGMLQuantizationType.Q8_0).write(tmp_path / "model.gguf")
    done = convert("model.gguf", "hf", "deep/below/out")
    assert done.kind == "float32"
    assert torch.equal(logits("deep/below/out"), logits("model.gguf"))
    assert load("deep/below/out")[1].spec == load("model.gguf")[1].spec


@pytest.mark.parametrize(("kind", "most"), [("F32", 0.0), ("F16", 2e-2), (None, 0.0)])
def test_a_folder_becomes_a_gguf(kind: str | None, most: float, folder: Path) -> None:
    done = convert(folder, "gguf", "model.gguf", kind=kind)
    assert (done.kind, done.bytes) == (kind or "F32", Path("model.gguf").stat().st_size)
    assert (logits("model.gguf") - logits(folder)).abs().max() <= most * logits(folder).abs().max()
    tokenizer = load(folder)[1]
    assert load("model.gguf")[1].encode("the cat") == tokenizer.encode("the cat")


def test_a_sentence_embedder_keeps_its_pooling(folder: Path) -> None:
    """A folder says it in files of its own, a GGUF has to be told."""
    model, tokenizer = load(folder, head="embedding")
    save_folder(model, tokenizer, "embedder")
    convert("embedder", "gguf", "model.gguf", kind="F32")
    back, _ = load("model.gguf")
    assert back.head_config.style.pooling == model.head_config.style.pooling
    with torch.inference_mode():  # llama.cpp scales embeddings to length 1, always
        wanted = torch.nn.functional.normalize(model(TOKENS), dim=-1)
        torch.testing.assert_close(back(TOKENS), wanted)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("given", ["folder", "file", "shards"])
def test_pickles(given: str, new: bool, pickled: Path, folder: Path, tmp_path: Path) -> None:
    model = pickled / "pytorch_model.bin"
    state = torch.load(model, weights_only=True)
    if given == "shards":
        names = list(state)
        model.unlink()
        for number, part in enumerate((names[:3], names[3:])):
            shard = pickled / f"pytorch_model-{number}.bin"
            some = {name: state[name] for name in part}
            torch.save(some, shard, _use_new_zipfile_serialization=new)
        table = {name: f"pytorch_model-{int(n >= 3)}.bin" for n, name in enumerate(names)}
        index = json.dumps({"weight_map": table})
        (pickled / "pytorch_model.bin.index.json").write_text(index, "utf-8")
    else:
        torch.save(state, model, _use_new_zipfile_serialization=new)
    convert(model if given == "file" else pickled, "hf", "out")
    assert torch.equal(logits("out"), logits(folder))
    assert {p.name for p in Path("out").iterdir()} == {
        p.name for p in folder.iterdir() if p.suffix != ".tmp"
    }
    convert(pickled if given == "shards" else model, "gguf", "out.gguf")
    assert torch.equal(logits("out.gguf"), logits(folder))
    assert not left_behind(tmp_path)


class Trap:
    """Makes a folder when it is unpickled by a reader that runs what it is told."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("sprung",)


def test_a_hostile_pickle_is_refused(pickled: Path, tmp_path: Path) -> None:
    path = pickled / "pytorch_model.bin"
    torch.save({"model.norm.weight": torch.zeros(2), "x": Trap()}, path)
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle that names .*mkdir"):
        convert(pickled, "hf", "out")
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="was not written by PyTorch"):
        convert(path, "hf", "out")
    assert not Path("sprung").exists() and not Path("out").exists() and not left_behind(tmp_path)
    pickle.loads(pickle.dumps(Trap()))  # the trap is a trap
    assert Path("sprung").is_dir()


def test_a_pickle_is_checked_like_any_other_folder(pickled: Path, tmp_path: Path) -> None:
    state = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    del state["model.norm.weight"]
    torch.save(state, pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"^\S*pickled lacks 1 tensor"):  # not the place in between
        convert(pickled, "hf", "out")
    (pickled / "config.json").unlink()
    with pytest.raises(UserError, match=r"pytorch_model\.bin is weights alone"):
        convert(pickled / "pytorch_model.bin", "hf", "out")
    assert not Path("out").exists() and not left_behind(tmp_path)


def test_what_does_not_fit_together(folder: Path, pickled: Path, tmp_path: Path) -> None:
    Path("notes").mkdir()
    Path("notes/notes.txt").touch()
    Path("text.gguf").write_text("not a GGUF", "utf-8")
    for words, match in (
        ((folder, "onnx", "out"), "no format 'onnx'"),
        ((folder, "gguf", "out.gguf", "Q4_1"), "Did you mean 'Q4_0'"),
        ((folder, "gguf", "out.gguf", "q8_0"), "Did you mean 'Q8_0'"),
        ((folder, "hf", "out", "F16"), "not a kind; say it with --dtype"),
        ((folder, "gguf", "out.gguf", None, "fp16"), "not a dtype; say it with --kind"),
        ((folder, "hf", "out", None, "fp61"), "Did you mean 'fp16'"),
        ((folder, "hf", folder), "is where the model itself lies"),
        ((pickled / "pytorch_model.bin", "hf", pickled), "is where the model itself lies"),
        ((folder, "hf", "notes"), "holds 'notes.txt', which is no part of a model"),
        ((folder, "hf", "text.gguf"), "is a file; a model is saved as a folder"),
        ((folder, "gguf", "notes"), "such as notes/model.gguf"),
        ((folder, "gguf", "out.bin"), "such as out.bin/model.gguf"),
        ((folder, "gguf", "text.gguf"), "exists and is no GGUF file"),
        (("nowhere", "hf", "out"), "no model 'nowhere'"),
    ):
        model, to, out, kind, dtype = (*words, None, None)[:5]
        with pytest.raises(UserError, match=match):
            convert(model, to, out, kind=kind, dtype=dtype)
    assert Path("notes/notes.txt").is_file() and Path("text.gguf").read_text() == "not a GGUF"
    assert logits(folder).isfinite().all() and not left_behind(tmp_path)
