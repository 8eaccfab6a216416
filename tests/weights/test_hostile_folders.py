"""Model folders and run folders with wrong values in their small files: always a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.config_json import check_sizes
from llm_from_scratch.weights.folder import save_folder
from llm_from_scratch.weights.sources import load, locate

Make = Callable[..., Decoder]
WRONG = (None, [], {}, "x", -1, 4_000_000_000, 2.5, True, [{}], {"x": {}}, "\ud800")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_any_wrong_value_in_config_json(
    family: str, make_model: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_folder(make_model(family), tokenizer, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    values = json.loads(path.read_text("utf-8"))
    names = {*values, "rope_scaling", "quantization_config", "layer_types", "sliding_window"}
    for name in sorted(names - {"tie_word_embeddings"}):
        for wrong in WRONG:
            path.write_text(json.dumps({**values, name: wrong}), encoding="utf-8")
            try:
                load(tmp_path / "m", device="cpu")
            except UserError as error:
                assert str(tmp_path / "m") in str(error)
            except Exception as error:
                raise AssertionError(f"{name} = {wrong!r}") from error


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("generation_config.json", [], "must hold a JSON object"),
        ("generation_config.json", {"eos_token_id": {}}, "'eos_token_id' is {}"),
        ("config.json", [], "must hold a JSON object"),
        ("model.safetensors.index.json", {"weight_map": []}, "has no 'weight_map'"),
        ("model.safetensors.index.json", {"weight_map": {"a": "../x.safetensors"}}, "not a shard"),
        ("model.safetensors.index.json", {"weight_map": {"a": "\ud800.safetensors"}}, "is missing"),
        ("model.safetensors.index.json", {"weight_map": {"a": "\0.safetensors"}}, "model"),
    ],
)
def test_files_of_a_folder(
    name: str, values: Any, words: str, make_model: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_folder(make_model(), tokenizer, tmp_path / "m")
    if "index" in name:
        (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / name).write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        load(tmp_path / "m", device="cpu")


def test_a_context_without_end_costs_nothing_and_is_refused_by_its_name(
    make_model: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Rotary angles are computed for the positions at hand: a long context needs no table."""
    model = make_model()
    save_folder(model, tokenizer, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    values = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**values, "max_position_embeddings": 1 << 24}), "utf-8")
    loaded, _ = load(tmp_path / "m", device="cpu")
    assert sum(buffer.nbytes for buffer in loaded.buffers()) < 1000
    path.write_text(json.dumps({**values, "max_position_embeddings": (1 << 24) + 1}), "utf-8")
    with pytest.raises(UserError, match=r"'max_position_embeddings' is 16777217; .* to 16,777,216"):
        load(tmp_path / "m", device="cpu")
    check_sizes(model.config, "config.yaml")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            "model: {max_seq_len: 99999999999}\ndata: {seq_len: 32}\n",
            "'max_seq_len' is 9+;",
        ),
        (
            "model: {n_layers: 9999999, d_model: 24, n_heads: 4}\ndata: {seq_len: 32}\n",
            "'n_layers'",
        ),
        ("model: {}\ndata: [1]\n", "no whole number as data.seq_len"),
        ("model: {}\ndata: {seq_len: 99999999999}\n", "'max_seq_len' is 9"),
        ("model: [1]\ndata: {seq_len: 32}\n", "model must be a table"),
    ],
)
def test_settings_of_a_run(settings: str, words: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step-1"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}", encoding="utf-8")
    tokenizer.save(tmp_path / "run" / "tokenizer")
    (tmp_path / "run" / "config.yaml").write_text(settings, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        load(tmp_path / "run", device="cpu")


def test_folders_that_only_look_like_checkpoints(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("step-foo", "step-", "step-9-old", "step-3", "step-20", "step-٣٣"):
        (run / "checkpoints" / name).mkdir(parents=True)
        (run / "checkpoints" / name / "state.json").write_text("{}", encoding="utf-8")
    assert locate(run) == run / "checkpoints" / "step-20"
    for name in ("step-20", "step-3"):
        (run / "checkpoints" / name / "state.json").unlink()
    with pytest.raises(UserError, match="is not a model folder"):
        locate(run)
