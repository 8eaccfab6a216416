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
from llm_from_scratch.weights.convert import _unpickled, convert
from llm_from_scratch.weights.folder import save_folder
from llm_from_scratch.weights.heads import add_head
from llm_from_scratch.weights.sources import load
from tests.model.references_seq2seq import make_seq2seq

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
    assert type(back) is type(load("embedder")[0]) is type(model)
    assert back.head_config.style.pooling == model.head_config.style.pooling
    with torch.inference_mode():  # llama.cpp scales embeddings to length 1, always
        wanted = torch.nn.functional.normalize(model(TOKENS), dim=-1)
        torch.testing.assert_close(back(TOKENS), wanted)


def test_a_gguf_of_half_precision_stays_one(folder: Path) -> None:
    Path("again").mkdir()
    for kind, dtype in (("F16", "float16"), ("BF16", "bfloat16")):
        convert(folder, "gguf", "half.gguf", kind=kind)
        assert convert("half.gguf", "hf", "half").kind == dtype
        assert load_file("half/model.safetensors")["model.norm.weight"].dtype == getattr(
            torch, dtype
        )
        assert convert("half.gguf", "gguf", "again/half.gguf").kind == kind
        assert Path("again/half.gguf").read_bytes() == Path("half.gguf").read_bytes()
        assert convert("half.gguf", "hf", "full", dtype="fp32").kind == "float32"
        assert convert("half.gguf", "gguf", "full.gguf", kind="F32").kind == "F32"


@pytest.mark.parametrize("pickled_too", [False, True])
def test_a_pooling_in_another_place_is_written_where_all_look(
    pickled_too: bool, folder: Path
) -> None:
    model, tokenizer = load(folder, head="embedding")
    source = Path("embedder")
    save_folder(model, tokenizer, source)
    (source / "1_Pooling").rename(source / "Pooling")
    steps = json.loads((source / "modules.json").read_text())
    steps[1]["path"] = "Pooling"
    (source / "modules.json").write_text(json.dumps(steps))
    if pickled_too:
        torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    convert(source, "hf", "out")
    assert Path("out/1_Pooling/config.json").is_file() and not Path("out/Pooling").exists()
    back = load("out")[0]
    assert (
        back.head_config == model.head_config or back.head_config.style == model.head_config.style
    )
    with torch.inference_mode():
        assert torch.equal(back(TOKENS), model(TOKENS))


def test_both_vocabularies_of_a_pickled_translator_are_at_hand(pickled: Path) -> None:
    (pickled / "target_vocab.json").write_text("{}", "utf-8")
    with _unpickled(pickled, [pickled / "pytorch_model.bin"], Path("out")) as place:
        assert (place / "target_vocab.json").is_file()


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


def test_a_field_that_is_not_known_is_named_before_a_pickle_is_read(pickled: Path) -> None:
    (pickled / "pytorch_model.bin").write_bytes(b"nothing that can be read")
    config = pickled / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "state_size": 16}), "utf-8")
    with pytest.raises(UserError, match=r"pickled/config\.json: the field 'state_size'"):
        convert(pickled, "hf", "out")


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


def test_pickles_are_fetched_from_the_hub_where_there_is_nothing_else(
    pickled: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    fetched: list[list[str]] = []

    def download(name: str, **options: Any) -> str:
        """What the patterns allow of the repository."""
        there = [path.name for path in pickled.iterdir() if path.is_file()]
        patterns = {key: options[key] for key in ("allow_patterns", "ignore_patterns")}
        fetched.append(list(huggingface_hub.utils.filter_repo_objects(there, **patterns)))
        for path in fetched[-1]:
            Path("cache").mkdir(exist_ok=True)
            shutil.copy(pickled / path, Path("cache") / path)
        return "cache"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    convert("some-org/old", "hf", "out")
    assert torch.equal(logits("out"), logits(folder))
    assert [("pytorch_model.bin" in names) for names in fetched] == [False, True]
    fetched.clear()
    (pickled / "pytorch_model.bin").rename(pickled / "pytorch_model.tmp")
    shutil.copy(folder / "model.safetensors", pickled)
    convert("some-org/old", "hf", "out")
    assert len(fetched) == 1  # with safetensors no pickle is asked for


@pytest.mark.parametrize("what", ["t5", "head", "family"])
def test_what_a_gguf_cannot_hold_is_refused_before_a_weight_is_read(
    what: str, tmp_path: Path, make_model: Callable[..., Any], tokenizer: Tokenizer
) -> None:
    path = tmp_path / "unfit"
    if what == "t5":
        make_seq2seq("t5").save_pretrained(path)
    else:
        model = make_model(family="mistral" if what == "head" else "gpt2")
        head = add_head(model, "classification", 3) if what == "head" else model
        save_folder(head, tokenizer, path)
    if what == "family":
        values = json.loads((path / "config.json").read_text("utf-8"))
        values["activation_function"] = "relu"
        (path / "config.json").write_text(json.dumps(values), "utf-8")
    said: list[str] = []
    with pytest.raises(UserError, match="GGUF"):
        convert(path, "gguf", "new.gguf", report=said.append)
    assert said == []
