"""Values that are sound by their type, and absurd all the same: a sentence that names them."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_from_scratch.core.errors import UserError, shown
from llm_from_scratch.model.config import ExpertsConfig, ModelConfig, RopeScaling
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.config_json import LARGEST, MOST_EXPERTS, check_sizes
from llm_from_scratch.weights.families import read_config
from llm_from_scratch.weights.folder import load_folder, save_folder
from llm_from_scratch.weights.gguf import GGUF
from llm_from_scratch.weights.gguf_architectures import GEMMA2
from llm_from_scratch.weights.gguf_load import load_gguf
from llm_from_scratch.weights.gguf_save import save_gguf
from llm_from_scratch.weights.gguf_settings import Keys
from llm_from_scratch.weights.gguf_write import Planned, write_gguf
from llm_from_scratch.weights.sentence_layout import read_layout
from tests.weights.gguf_models import make

Make = Callable[..., Decoder]
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
GEMMA = {**LLAMA, "model_type": "gemma2", "head_dim": 8}
MIXTURE = {
    **LLAMA, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "head_dim": 8,
}  # fmt: skip
MODERN = {
    "model_type": "modernbert", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 2.0}


@pytest.mark.parametrize(
    ("base", "changes", "words"),
    [
        (GEMMA, {"layer_types": [["full_attention"], {}]}, "'layer_types' is"),
        (
            {**LLAMA, "model_type": "qwen2", "layer_types": ["full_attention"] * 2},
            {"layer_types": ["full_attention", "sliding_attention"]},
            "'use_sliding_window' is False; it must be true, because 'layer_types' has windows",
        ),
        (
            {**LLAMA, "model_type": "qwen2", "use_sliding_window": True},
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": None},
            "'sliding_window' is None; it must be a number, because 'layer_types' has windows",
        ),
        (MIXTURE, {"num_experts": 1 << 20}, "'num_experts' is 1048576; .* to 4,096"),
        (LLAMA, {"rope_scaling": {**YARN, "beta_slow": 0}}, "'beta_slow' is 0; it must be above 0"),
        (LLAMA, {"rope_scaling": {**YARN, "beta_slow": 5e-324}}, "'beta_slow' is 5e-324"),
        (LLAMA, {"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta is 1.0; with YaRN"),
        (MODERN, {"global_rope_theta": 0.0}, "'rope_theta' is 0.0; it must be above 0"),
        (MODERN, {"local_rope_theta": 0}, "'rope_theta' is 0; it must be above 0"),
        (LLAMA, {"initializer_range": 0.0}, "init_std 0.0"),
        (
            LLAMA,
            dict.fromkeys(("hidden_size", "num_attention_heads", "head_dim"), LARGEST),
            "'blocks.*.attention.q.weight' a tensor of 281,474,976,710,656 x 16,777,216",
        ),
        (
            MIXTURE,
            {"num_experts": MOST_EXPERTS, "moe_intermediate_size": LARGEST},
            "'blocks.*.feed_forward.gate' a tensor of 4,096 x 16,777,216 x 32",
        ),
    ],
)
def test_a_config_json_is_named(base: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    read_config(base, "config.json")
    pattern = words if "'blocks" not in words else re.escape(words)
    with pytest.raises(UserError, match=pattern) as caught:
        read_config({**base, **changes}, "some/config.json")
    assert str(caught.value).startswith("some/config.json")


def test_a_sentence_stays_one(tmp_path: Path) -> None:
    """However long the value is that is wrong."""
    many = ["full_attention"] * 100_000
    for values in (
        {**LLAMA, "layer_kinds": many},
        {**LLAMA, "x" * 100_000: 1},
        {**LLAMA, "model_type": "x" * 100_000},
        {**LLAMA, "hidden_act": "x" * 100_000},
        {**GEMMA, "layer_types": many},
    ):
        with pytest.raises(UserError) as caught:
            read_config(values, "config.json")
        assert len(str(caught.value)) < 600
    with pytest.raises(UserError) as caught:
        raise Keys({"a": many}, "llama", "file").refuse("a", "less")
    assert len(str(caught.value)) < 300
    assert shown("llama") == "'llama'" and shown([1, None]) == "[1, None]"


def test_layers_without_experts_are_looked_up_at_once() -> None:
    """A hundred thousand times a hundred would take minutes in a list."""
    lookups = []

    class Number(int):
        def __eq__(self, other: object) -> bool:
            lookups.append(other)
            return int(self) == other

        __hash__ = int.__hash__

    dense = [Number(9_999 + i) for i in range(1000)]
    values = {**MIXTURE, "num_hidden_layers": 100, "mlp_only_layers": [3, *dense]}
    config = read_config(values, "config.json")[1]
    assert isinstance(config, ModelConfig) and config.experts is not None
    assert config.experts.layers == (*range(3), *range(4, 100))
    assert len(lookups) < 1000


def test_sizes_of_a_run_and_of_a_config_made_by_hand() -> None:
    base: dict[str, Any] = {
        "vocab_size": 50, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2,
        "head_dim": 8, "d_ff": 48, "max_seq_len": 64,
    }  # fmt: skip
    experts = ExpertsConfig(MOST_EXPERTS + 1, 2, 16, layers=(0,))
    with pytest.raises(UserError, match=r"config\.yaml: 'n_experts' is 4097"):
        check_sizes(ModelConfig(**base, experts=experts), "config.yaml")
    with pytest.raises(UserError, match=r"config\.yaml: its sizes make 'embedding\.weight'"):
        check_sizes(ModelConfig(**{**base, "vocab_size": 1 << 36}), "config.yaml")
    for theta in (0.0, -1.0):
        with pytest.raises(UserError, match="local_rope_theta is"):
            ModelConfig(**base, local_rope_theta=theta)


def test_stored_in_a_format_that_nothing_computes_with(
    make_model: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_folder(make_model(), tokenizer, tmp_path)
    path = tmp_path / "model.safetensors"
    eighths = {k: v.to(torch.float8_e4m3fn) for k, v in load_file(path).items()}
    save_file(eighths, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"holds torch\.float8_e4m3fn numbers, of which"):
        load_folder(tmp_path)


@pytest.mark.parametrize("place", ["..", "", "../elsewhere", "a/b", 3])
def test_the_pooling_lies_in_the_folder(place: object, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    steps = [{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": place}]
    (inner / "modules.json").write_text(json.dumps(steps), "utf-8")
    for folder in (tmp_path, inner):
        (folder / "config.json").write_text('{"pooling_mode_cls_token": true}', "utf-8")
    with pytest.raises(UserError, match="its pooling below"):
        read_layout(inner)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"do_lower_case": True}, "'do_lower_case' is true, which is not supported"),
        ({"max_seq_length": 0}, "'max_seq_length' is 0; it must be"),
        ({"max_seq_length": "long"}, "'max_seq_length' is 'long'"),
    ],
)
def test_what_is_said_of_the_texts_of_an_embedder(
    said: dict[str, Any], words: str, tmp_path: Path
) -> None:
    steps = [{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "1_Pooling"}]
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("{}", "utf-8")
    (tmp_path / "modules.json").write_text(json.dumps(steps), "utf-8")
    place = tmp_path / "sentence_bert_config.json"
    place.write_text('{"max_seq_length": 21, "do_lower_case": false}', "utf-8")
    found = read_layout(tmp_path)
    assert found is not None and found.max_length == 21
    place.write_text(json.dumps(said), "utf-8")
    with pytest.raises(UserError, match=f"sentence_bert_config.json: {words}"):
        read_layout(tmp_path)


# ------------------------------------------------------------------------- GGUF


def changed(
    name: str, path: Path, keys: dict[str, Any], more: dict[str, torch.Tensor] | None = None
) -> Path:
    """The GGUF file of a model, with other metadata and more tensors."""
    save_gguf(make(name), None, path, "F32")
    file = GGUF(path)
    plan = [
        Planned(t, info.shape, info.form, partial(file.read, t)) for t, info in file.tensors.items()
    ]
    form = next(info.form for info in file.tensors.values())
    plan += [
        Planned(t, tuple(v.shape), form, partial(torch.clone, v)) for t, v in (more or {}).items()
    ]
    place = path.with_name("changed.gguf")
    write_gguf(place, {**file.metadata, **keys}, plan)
    return place


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("llama-yarn", {"llama.rope.scaling.yarn_beta_slow": 0.0}, "beta_slow' is 0.0"),
        ("llama-yarn", {"llama.rope.scaling.yarn_beta_slow": 40.0}, "beta_fast' is 32.0; .* above"),
        ("llama-yarn", {"llama.rope.freq_base": 1.0}, "rope_theta is 1.0; with YaRN"),
        ("qwen3moe", {"qwen3moe.expert_count": 1 << 20}, "expert_count' is 1048576"),
        (
            "llama",
            dict.fromkeys(
                [f"llama.attention.{n}" for n in ("head_count", "key_length", "value_length")]
                + ["llama.rope.dimension_count"],
                LARGEST,
            ),
            r"its sizes make 'blocks.\*.attention.q.weight'",
        ),
    ],
)
def test_metadata_of_a_gguf_is_named(
    name: str, keys: dict[str, Any], words: str, tmp_path: Path
) -> None:
    place = changed(name, tmp_path / "m.gguf", keys)
    with pytest.raises(UserError, match=words) as caught:
        load_gguf(place)
    assert str(place) in str(caught.value)


@pytest.mark.parametrize("last", [8.0, math.inf, math.nan])
def test_divisors_that_no_stretching_gives(last: float, tmp_path: Path) -> None:
    """With a base of 1 all frequencies are equal, and no line goes through them."""
    more = {"rope_freqs.weight": torch.tensor([1, 2, 3, 4, 5, 6, 7, 12345.0])}
    place = changed("llama", tmp_path / "m.gguf", {"llama.rope.freq_base": 1.0}, more)
    data = place.read_bytes().replace(struct.pack("<f", 12345.0), struct.pack("<f", last))
    place.write_bytes(data)
    with pytest.raises(UserError, match=r"rope_freqs\.weight' stretches"):
        load_gguf(place)


def test_normalisation_that_is_no_bytes(tmp_path: Path) -> None:
    vocabulary = {
        "model": "t5", "tokens": ["<pad>", "</s>", "<unk>", "a"],
        "scores": [0.0, 0.0, 0.0, -1.0], "token_type": [3, 3, 2, 1],
        "precompiled_charsmap": [1.5, 2.5],
    }  # fmt: skip
    keys = {f"tokenizer.ggml.{name}": value for name, value in vocabulary.items()}
    with pytest.raises(UserError, match="precompiled_charsmap' is not a list of bytes"):
        load_gguf(changed("llama", tmp_path / "m.gguf", keys))


def test_tensors_in_the_same_place(tmp_path: Path) -> None:
    """Else a small file may unpack to any number of weights."""
    save_gguf(make("llama"), None, tmp_path / "m.gguf", "F32")
    data = (tmp_path / "m.gguf").read_bytes()
    name = b"blk.0.ffn_up.weight"
    record = data.index(name) + len(name) + 4 + 2 * 8 + 4  # rank, axes, type
    (tmp_path / "b.gguf").write_bytes(data[:record] + bytes(8) + data[record + 8 :])
    with pytest.raises(UserError, match=r"the tensor '[\w.]+' overlaps another"):
        GGUF(tmp_path / "b.gguf")


def test_the_window_of_gemma_2_where_the_file_is_silent(tmp_path: Path) -> None:
    """llama.cpp takes 4096, with or without the key."""
    values = {
        "block_count": 4, "embedding_length": 32, "feed_forward_length": 48,
        "context_length": 8192, "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.key_length": 8, "attention.value_length": 8,
        "attention.layer_norm_rms_epsilon": 1e-6, ".token_embd": 50,
    }  # fmt: skip
    config = GEMMA2.read(Keys(values, "gemma2", "file"))
    assert (config.window, config.window_layers) == (4096, (0, 2))
    model = make("gemma2", window=None, window_layers=())
    save_gguf(model, None, tmp_path / "m.gguf", "F32")
    assert GGUF(tmp_path / "m.gguf").metadata["gemma2.attention.sliding_window"] == 64
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_gguf(tmp_path / "m.gguf")[0](tokens), model(tokens))


def test_a_sound_stretching_is_still_read() -> None:
    found = read_config({**LLAMA, "rope_scaling": YARN}, "config.json")[1]
    assert isinstance(found, ModelConfig)
    assert found.rope_scaling == RopeScaling("yarn", 2.0, 1.0, 32.0, 64)
