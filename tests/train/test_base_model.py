"""A run goes on with the model that it began with, and with no other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llm_from_scratch.core.config import from_dict
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.runlog import read_json, write_json
from llm_from_scratch.model.lora import LoraSettings, add_lora
from llm_from_scratch.train.base_model import model_hash
from llm_from_scratch.weights.adapters_write import save_adapter
from llm_from_scratch.weights.convert import convert
from llm_from_scratch.weights.sources import load
from tests.train.test_finetune import ToyConfig, numbers, rows, run
from tests.train.tiny_folders import decoder_folder


def test_the_hash_is_of_what_is_computed_with(tmp_path: Path) -> None:
    base = decoder_folder(tmp_path / "a")
    known = model_hash(base)
    shutil.copytree(base, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("A card may change.")
    (tmp_path / "copy" / "results.json").write_text("{}")
    assert model_hash(str(tmp_path / "copy")) == known
    assert model_hash(decoder_folder(tmp_path / "b", seed=1)) != known
    for name in ("config.json", "tokenizer.json"):
        folder = shutil.copytree(base, tmp_path / name)
        (folder / name).write_text((folder / name).read_text() + "\n")
        assert model_hash(str(folder)) != known
    convert(base, "gguf", str(tmp_path / "a.gguf"))
    shutil.copyfile(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert model_hash(str(tmp_path / "a.gguf")) == model_hash(str(tmp_path / "b.gguf")) != known
    with pytest.raises(UserError, match="no-such-model"):
        model_hash("no-such-model")


def test_an_adapter_has_its_base_in_the_hash(tmp_path: Path) -> None:
    base = decoder_folder(tmp_path / "base")
    model, _ = load(base, dtype="fp32", device="cpu")
    add_lora(model, LoraSettings(rank=2), 0)
    save_adapter(model, tmp_path / "adapter", base)
    known = model_hash(str(tmp_path / "adapter"))
    shutil.rmtree(base)
    decoder_folder(Path(base), seed=1)
    assert model_hash(str(tmp_path / "adapter")) != known


def test_a_run_does_not_go_on_with_another_model(tmp_path: Path) -> None:
    base = decoder_folder(tmp_path / "base")
    settings = from_dict(ToyConfig, {
        "model": base, "out": str(tmp_path / "run"), "train": {"stop_after": 2},
        "data": {"paths": [rows(tmp_path / "d.jsonl", numbers(30))]},
    })  # fmt: skip
    assert run(settings).interrupted
    about = tmp_path / "run" / "environment.json"
    assert read_json(about)["model_sha256"] == model_hash(base)
    shutil.move(base, tmp_path / "kept")
    decoder_folder(Path(base), seed=1)
    again = ToyConfig(out=settings.out)
    with pytest.raises(UserError, match=r"The model .*base has changed since the run in .*run beg"):
        run(again, resume=True)
    shutil.rmtree(base)
    shutil.move(tmp_path / "kept", base)
    assert run(again, resume=True).summary["steps"] == 6
    # A run from before there was a hash is not refused.
    write_json(about, {n: value for n, value in read_json(about).items() if n != "model_sha256"})
    decoder_folder(Path(base), seed=1)
    assert run(again, resume=True).summary["steps"] == 6
