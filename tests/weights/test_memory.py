"""Loading holds the weights once: what is read is mapped, and one tensor at a time is converted.

A tokenizer takes little beside them: its vocabulary stays packed until a text is encoded.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import pytest
import torch

from llm_from_scratch.model.config import ExpertsConfig, ModelConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.text.formats import bpe_spec
from llm_from_scratch.text.pretokenize import byte_letters
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.training import train_tokenizer
from llm_from_scratch.weights.assemble import empty_model
from llm_from_scratch.weights.folder import save_folder
from llm_from_scratch.weights.gguf_save import save_gguf
from tests.weights.memory import load_and_look, needs_proc
from tests.weights.real_files import real

WORDS = 160_000


def zeros(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    """A model whose weights take no time to make."""
    model = empty_model(config)
    assert isinstance(model, Decoder)
    model.to_empty(device="cpu").to(dtype)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    return model


def write_folder(path: Path, family: str, d_model: int, dtype: torch.dtype) -> None:
    """A model of this width, in shards, none of whose tensors is more than a tenth of it."""
    fields = {
        "vocab_size": 4 * d_model, "d_model": d_model, "n_layers": 6, "n_heads": 8,
        "n_kv_heads": 8, "head_dim": d_model // 8, "d_ff": 3 * d_model, "max_seq_len": 64,
        "family": family,
    }  # fmt: skip
    more = {
        "llama": {},
        "gpt2": {
            "norm": "layer", "gated": False, "attention_bias": True, "output_bias": True,
            "feed_forward_bias": True, "position": "learned",
        },
        "qwen3_moe": {
            "qk_norm": "head",
            "experts": ExpertsConfig(4, 2, d_model // 2, layers=tuple(range(6))),
        },
    }[family]  # fmt: skip
    model = zeros(ModelConfig(**fields, **more), dtype)  # type: ignore[arg-type]
    save_folder(model, None, path, shard_bytes=20_000_000)


@needs_proc
@pytest.mark.parametrize(
    ("family", "stored", "wanted"),
    [
        ("llama", "bfloat16", "fp32"),
        ("llama", "float32", "bf16"),
        ("gpt2", "float32", "fp32"),
        ("qwen3_moe", "bfloat16", "bf16"),
    ],
)
def test_loading_takes_little_more_than_the_weights(
    family: str, stored: str, wanted: str, tmp_path: Path
) -> None:
    write_folder(tmp_path / "large", family, 640, getattr(torch, stored))
    write_folder(tmp_path / "small", family, 64, getattr(torch, stored))
    loaded = load_and_look(tmp_path / "large", tmp_path / "small", wanted)
    assert loaded.weights > 40_000_000
    loaded.assert_little_more_than_the_weights()


@cache
def many_words() -> Tokenizer:
    """A BPE vocabulary as large as those of today's models, each entry with its merge."""
    letters = byte_letters()
    pairs = list(itertools.product(letters, letters))
    triples = (("".join(pair), letter) for pair in pairs for letter in letters)
    merges = [*pairs, *itertools.islice(triples, WORDS - len(pairs) - len(letters))]
    return Tokenizer.from_spec(bpe_spec([*letters, *map("".join, merges)], merges))


@needs_proc
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_large_vocabulary_is_no_large_part_of_it(kind: str, tmp_path: Path) -> None:
    few = train_tokenizer(["a cat sat on a mat " * 9], vocab_size=262)
    paths = {}
    for name, tokenizer, width in (("large", many_words(), 320), ("small", few, 64)):
        config = ModelConfig(
            vocab_size=tokenizer.vocab_size, d_model=width, n_layers=2, n_heads=4, n_kv_heads=4,
            head_dim=width // 4, d_ff=2 * width, max_seq_len=64, tie_embeddings=True,
        )  # fmt: skip
        model = zeros(config, torch.bfloat16)
        paths[name] = tmp_path / (name + (".gguf" if kind == "gguf" else ""))
        if kind == "gguf":
            save_gguf(model, tokenizer, paths[name], "BF16")
        else:
            save_folder(model, tokenizer, paths[name])
    loaded = load_and_look(paths["large"], paths["small"], "bf16")
    assert loaded.words == WORDS
    assert loaded.weights < 120_000_000
    loaded.assert_little_more_than_the_weights()


@pytest.mark.weights
@needs_proc
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b", "gemma-3-270m"])
def test_published_models_with_their_tokenizers(name: str, dtype: str, tmp_path: Path) -> None:
    if name == "smollm2-135m":
        from tests.weights.test_real_weights import fetched

        path = fetched(name)
    else:
        (path,) = real(name).glob("*.gguf")
    few = train_tokenizer(["a cat sat on a mat " * 9], vocab_size=262)
    config = ModelConfig(
        vocab_size=262, d_model=64, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=16, d_ff=128,
        max_seq_len=64,
    )  # fmt: skip
    save_gguf(zeros(config, torch.bfloat16), few, tmp_path / "small.gguf", "Q8_0")
    loaded = load_and_look(path, tmp_path / "small.gguf", dtype)
    assert loaded.words > 40_000
    loaded.assert_little_more_than_the_weights()
