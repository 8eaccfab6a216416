"""Models of every architecture into GGUF files and back, and into llama.cpp."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader, quants

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.config import ExpertsConfig, ModelConfig, RopeScaling
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder import Encoder
from llm_from_scratch.model.heads import Embedder, HeadConfig, HeadStyle, MaskedLM
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.gguf import GGUF
from llm_from_scratch.weights.gguf_architectures import ARCHITECTURES, architecture_of
from llm_from_scratch.weights.gguf_load import load_gguf
from llm_from_scratch.weights.gguf_save import save_gguf
from llm_from_scratch.weights.gguf_write import Planned, write_gguf
from tests.weights.conftest import llama_cpp_order
from tests.weights.gguf_models import BASE, BENT, MODELS, architecture_of_case, make, tokens
from tests.weights.memory import load_and_look, needs_proc

# What a GGUF does not hold, because it does not change an answer.
LEFT_OUT = {"family": "", "init_std": 1.0, "pooler": False, "position_offset": 0}
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")


def run(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids)[0]


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_what_is_written_is_read_back(
    name: str, kind: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = make(name)
    save_gguf(model, tokenizer, tmp_path / "m.gguf", kind)
    back, own = load_gguf(tmp_path / "m.gguf")
    assert type(back) is type(model)
    assert isinstance(back, Decoder | Encoder)
    same = {**LEFT_OUT, "tie_embeddings": model.config.tie_embeddings}
    assert dataclasses.replace(back.config, **same) == dataclasses.replace(model.config, **same)
    assert back.config.family == ARCHITECTURES[architecture_of_case(name)].family
    got, wanted = run(back, tokens()), run(model, tokens())
    assert wanted.std() > 0.5
    if kind == "F32":
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    assert torch.nn.functional.cosine_similarity(got, wanted).median() > 0.99
    assert own is not None
    text = "the end\n<|im_end|> 日本"
    assert own.encode(text, special=True) == tokenizer.encode(text, special=True)


def test_names_are_those_of_the_reference(name: str, tmp_path: Path) -> None:
    """Keys and tensors that the `gguf` package knows for the architecture, none of our own."""
    save_gguf(make(name), None, tmp_path / "m.gguf", "F32")
    reader = GGUFReader(tmp_path / "m.gguf")
    architecture = architecture_of_case(name)
    assert reader.fields["general.architecture"].contents() == architecture
    number = {text: arch for arch, text in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[number]}
    for tensor in reader.tensors:
        parts = [("{bid}" if part.isdecimal() else part) for part in tensor.name.split(".")]
        assert ".".join(parts[:-1]) in names, tensor.name
    groups = [vars(group) for key, group in vars(gguf.Keys).items() if isinstance(group, type)]
    keys = {str(text).replace("{arch}", architecture) for g in groups for text in g.values()}
    ours = {key for key in reader.fields if not key.startswith("GGUF.")}
    assert ours <= keys


def test_formats_of_the_tensors(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for kind in KINDS:
        save_gguf(make("gpt2", d_ff=100), tokenizer, tmp_path / "m.gguf", kind)
        found = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "m.gguf").tensors}
        assert found["blk.0.attn_qkv.weight"] == kind
        assert found["token_embd.weight"] == ("Q8_0" if kind == "Q4_0" else kind)
        assert found["blk.0.ffn_down.weight"] == ("F16" if kind.startswith("Q") else kind)
        for name in ("position_embd.weight", "output_norm.bias", "blk.3.attn_qkv.bias"):
            assert found[name] == "F32"


def test_conventions_of_llama_cpp(tmp_path: Path) -> None:
    """Written so that llama.cpp's own arithmetic finds what ours has."""

    def written(name: str) -> tuple[Any, dict[str, np.ndarray]]:
        model = make(name)
        save_gguf(model, None, tmp_path / "m.gguf", "F32")
        tensors = GGUFReader(tmp_path / "m.gguf").tensors
        found = {t.name: quants.dequantize(t.data, t.tensor_type).copy() for t in tensors}
        return model, found

    model, found = written("llama-biases")
    for letter, heads in (("q", 6), ("k", 2)):
        linear = getattr(model.blocks[1].attention, letter)
        for part in ("weight", "bias"):
            ours = getattr(linear, part).detach().numpy()
            stored = found[f"blk.1.attn_{letter}.{part}"]
            np.testing.assert_array_equal(stored, llama_cpp_order(ours, heads))
    model, found = written("gemma3")
    ours = model.blocks[2].attention.q_norm.weight.detach().numpy()
    np.testing.assert_array_equal(found["blk.2.attn_q_norm.weight"], ours + 1)
    model, found = written("gptneox")
    attention = model.blocks[0].attention
    parts = [x.weight.detach() for x in (attention.q, attention.k, attention.v)]
    np.testing.assert_array_equal(found["blk.0.attn_qkv.weight"], torch.cat(parts).numpy())
    model, found = written("olmo2-tied")
    np.testing.assert_array_equal(found["output.weight"], found["token_embd.weight"])
    model, found = written("bert-offset")
    ours = model.positions.weight.detach().numpy()
    np.testing.assert_array_equal(found["position_embd.weight"], ours[2:])
    model, found = written("qwen3moe")
    assert found["blk.0.ffn_down_exps.weight"].shape == (5, 96, 64)


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
        RopeScaling("llama3", 4.0, 1.0, 8.0, 3000),
    ],
)
def test_llama3_settings_follow_from_their_divisors(scaling: RopeScaling, tmp_path: Path) -> None:
    model = make("llama", head_dim=64, rope_theta=500_000.0, rope_scaling=scaling)
    save_gguf(model, None, tmp_path / "m.gguf", "F32")
    assert load_gguf(tmp_path / "m.gguf")[0].config.rope_scaling == scaling  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama", {"activation": "relu"}, "activation is 'relu', but 'llama' can have 'silu'"),
        ("mistral", {"window": 8, "window_layers": (0, 1)}, "window is 8, but 'llama'"),
        ("llama", {"norm": "layer_no_bias"}, "norm is 'layer_no_bias'"),
        ("olmo2", {"head_dim": 32}, r"attention\.key_length' is 32"),
        ("qwen3", {"output_bias": True}, "output_bias is True"),
        ("qwen3", {"rope_scaling": RopeScaling("llama3")}, "rope_scaling is RopeScaling"),
        ("llama", {"rope_scaling": RopeScaling("yarn", 4.0, 2.0, 8.0)}, "rope_scaling is"),
        ("gemma2", {"tie_embeddings": False}, "tie_embeddings is False"),
        ("gemma2", {"attention_softcap": None}, "attention_softcap is None"),
        ("gemma3", {"attention_width": 64}, "attention_width is 64.0"),
        ("qwen3moe", {"experts": ExpertsConfig(5, 2, 64, layers=(1, 2))}, "experts is"),
        (
            "qwen3moe",
            {"experts": ExpertsConfig(5, 2, 64, normalise=False, layers=tuple(range(7)))},
            "experts is",
        ),
        ("bert", {"relative_buckets": 8, "relative_distance": 32}, "relative_buckets is 8"),
        ("bert", {"activation": "relu"}, "activation is 'relu'"),
    ],
)
def test_what_llama_cpp_cannot_express_is_named(
    name: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        save_gguf(make(name, **changes), None, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_are_known_by_their_layers(name: str, layers: int) -> None:
    """llama.cpp divides their scores by the root of d_model / heads, all others' by the width's."""
    fields = {**BASE, **MODELS[name], "n_layers": layers}
    for width, fits in ((fields["d_model"] // fields["n_heads"], True), (32, False)):
        config = ModelConfig(**{**fields, "attention_width": width})
        if fits:
            assert architecture_of(config)[0].name == name
        else:
            with pytest.raises(UserError, match=r"attention_width is 32\.0, but .* have 16\.0"):
                architecture_of(config)


def test_a_setting_may_belong_to_another_architecture(tmp_path: Path) -> None:
    """Qwen2 has no heads of a width of their own, but Llama has, and may have biases."""
    model = make("qwen2", head_dim=32)
    save_gguf(model, None, tmp_path / "m.gguf", "F32")
    back, _ = load_gguf(tmp_path / "m.gguf")
    assert back.config.family == "llama"
    torch.testing.assert_close(run(back, tokens()), run(model, tokens()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_models_for_embeddings(pooling: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    style = HeadStyle(pooling=pooling)
    model = Embedder(make("bert"), HeadConfig("embedding", style, normalise=True))
    save_gguf(model, tokenizer, tmp_path / "m.gguf", "F32")
    back, _ = load_gguf(tmp_path / "m.gguf")
    assert isinstance(back, Embedder)
    assert back.head_config == model.head_config
    torch.testing.assert_close(run(back, tokens()), run(model, tokens()), atol=1e-5, rtol=0)
    for head in ("none", "classification"):
        assert isinstance(load_gguf(tmp_path / "m.gguf", head=head)[0], Encoder)
    masked = MaskedLM(make("bert"), HeadConfig("masked_lm"))
    with pytest.raises(UserError, match="but not a head like this one"):
        save_gguf(masked, tokenizer, tmp_path / "m.gguf")


def test_windows_as_wide_as_the_context_are_none(tmp_path: Path) -> None:
    model = make("mistral", window=64, window_layers=tuple(range(7)))
    save_gguf(model, None, tmp_path / "m.gguf", "F32")
    back, _ = load_gguf(tmp_path / "m.gguf")
    torch.testing.assert_close(run(back, tokens(64)), run(model, tokens(64)), atol=1e-5, rtol=0)


def test_unknown_kind_and_foreign_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no kind 'q8_0'; use one of F32, .*Did you mean 'Q8_0'"):
        save_gguf(make("llama"), tokenizer, tmp_path / "m.gguf", "q8_0")
    with pytest.raises(UserError, match="265 entries, but the model only 100"):
        save_gguf(make("llama", vocab_size=100), tokenizer, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("llama", "attention.head_count", [6, 6], r"attention\.head_count' is \[6, 6\]"),
        ("llama", "attention.causal", False, r"attention\.causal' is False; it must be True"),
        ("llama", "rope.dimension_count", 8, r"rope\.dimension_count' is 8"),
        ("llama", "rope.freq_base", -1.0, r"rope\.freq_base' is -1\.0"),
        ("llama", "rope.scaling.type", "longrope", r"rope\.scaling\.type' is 'longrope'"),
        ("llama-linear", "rope.scaling.factor", 0.5, r"rope\.scaling\.factor' is 0\.5"),
        ("llama-yarn", "rope.scaling.original_context_length", 0, "original_context_length' is 0"),
        ("llama", "attention.sliding_window", 8, r"sliding_window' is 8; it must be left out"),
        ("qwen2", "attention.key_length", 32, "key_length' is 32"),
        ("qwen3", "attention.value_length", 16, "value_length' is 16"),
        ("qwen3", "brand_new.setting", 3, r"brand_new\.setting' is 3; it must be left out"),
        ("qwen3moe", "expert_used_count", 9, "expert_used_count' is 9; it must be at most"),
        ("qwen3moe", "expert_count", 6, "has the shape"),
        ("gemma3", "attention.sliding_window", "x", "sliding_window' is 'x'"),
        ("gemma3", "attention.sliding_window_pattern", [True], "one value for each of 7 layers"),
        ("gemma3", "attention.sliding_window_pattern", -2, "sliding_window_pattern' is -2"),
        ("gptneox", "use_parallel_residual", 7, "use_parallel_residual' is 7"),
        ("gptneox", "rope.dimension_count", 3, "rope.dimension_count' is 3"),
        ("bert", "attention.causal", True, "attention.causal' is True"),
        ("gpt2", "block_count", 1 << 20, "block_count' is 1048576"),
        ("gpt2", "block_count", 8, "lacks 12 tensor"),
    ],
)
def test_metadata_that_does_not_fit_is_named(
    name: str, key: str, value: Any, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    save_gguf(make(name), None, path, "F32")
    file = GGUF(path)
    full = f"{architecture_of_case(name)}.{key}"
    plan = [
        Planned(t, info.shape, info.form, lambda t=t: file.read(t))
        for t, info in file.tensors.items()
    ]
    write_gguf(tmp_path / "changed.gguf", {**file.metadata, full: value}, plan)
    with pytest.raises(UserError, match=words) as caught:
        load_gguf(tmp_path / "changed.gguf")
    assert "changed.gguf" in str(caught.value)


# ------------------------------------------------------------------------- llama.cpp itself


def llama_cpp_states(path: Path, ids: list[int], width: int, causal: bool) -> torch.Tensor:
    """Logits (or, of an encoder, states) of every position, computed by llama.cpp."""
    llama_cpp = pytest.importorskip("llama_cpp")
    count = len(ids)
    more = {} if causal else {"embedding": True, "pooling_type": 0}
    model = llama_cpp.Llama(
        str(path), n_ctx=64, n_batch=64, n_ubatch=64, n_threads=1, logits_all=causal, type_k=0,
        type_v=0, verbose=False, **more,
    )  # fmt: skip
    if causal:
        model.eval(ids)
        return torch.from_numpy(model.scores[:count].copy())
    model._batch.set_batch(ids, n_past=0, logits_all=True)
    model._ctx.decode(model._batch)
    rows = [llama_cpp.llama_get_embeddings_ith(model.ctx, i) for i in range(count)]
    states = [np.ctypeslib.as_array(row, shape=(width,)).copy() for row in rows]
    return torch.from_numpy(np.stack(states))


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_same(
    name: str, kind: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = make(name)
    save_gguf(model, tokenizer, tmp_path / "m.gguf", kind)
    config = model.config
    got = llama_cpp_states(tmp_path / "m.gguf", tokens()[0].tolist(), config.d_model, config.causal)
    wanted = run(load_gguf(tmp_path / "m.gguf")[0], tokens())
    if kind != "F32":  # it also rounds what goes into a matrix to the matrix's own precision
        assert torch.nn.functional.cosine_similarity(got, wanted).median() > 0.99
        return
    atol = 1e-2 if name.startswith(BENT) else 1e-4
    torch.testing.assert_close(got, wanted, atol=atol, rtol=0)


@needs_proc
@pytest.mark.parametrize(
    ("name", "kind", "dtype"), [("llama", "Q8_0", "bf16"), ("gpt2", "F16", "fp32")]
)
def test_loading_takes_little_more_than_the_weights(
    name: str, kind: str, dtype: str, tmp_path: Path
) -> None:
    large = {"vocab_size": 2560, "d_model": 640, "n_heads": 10, "n_kv_heads": 10, "head_dim": 64}
    save_gguf(make(name, d_ff=1920, **large), None, tmp_path / "large.gguf", kind)
    save_gguf(make(name), None, tmp_path / "small.gguf", kind)
    loaded = load_and_look(tmp_path / "large.gguf", tmp_path / "small.gguf", dtype)
    assert loaded.weights > 60_000_000
    loaded.assert_little_more_than_the_weights()
