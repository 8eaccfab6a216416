"""Quantised folders: what `transformers` makes of ours, what we make of others, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.quant.linear import QuantLinear
from llm_from_scratch.quant.nf4 import quantize_nf4
from llm_from_scratch.quant.rtn import quantize_rtn
from llm_from_scratch.weights.folder import load_folder, save_folder
from llm_from_scratch.weights.quantized_write import Codes, matrices, refuse_conv1d
from tests.model.references import make_reference

TOKENS = torch.arange(24)[None] * 5 % 61
# Rows of 64, 128 and 160 inputs.
SIZES = {
    "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
NEOX = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}
GPT2 = {"n_embd": 64, "n_inner": 192, "n_head": 4}


def int_codes(bits: int, group: int | None, zeros: bool = False) -> Callable[[torch.Tensor], Codes]:
    return lambda weight: quantize_rtn(weight, bits, group, symmetric=not zeros)


KINDS: dict[str, Callable[[torch.Tensor], Codes]] = {
    "int4": int_codes(4, 32),
    "int4 zeros": int_codes(4, 32, zeros=True),
    "int8": int_codes(8, None),
    "int8 groups and zeros": int_codes(8, 32, zeros=True),
    "nf4": quantize_nf4,
}


def quantized(
    family: str, kind: str, folder: Path, shard_bytes: int = 1 << 30, **sizes: Any
) -> Decoder:
    """A random model of the reference library as a quantised folder of ours; the model before."""
    make_reference(family, **sizes).save_pretrained(folder / "theirs")
    model, _ = load_folder(folder / "theirs")
    assert isinstance(model, Decoder)
    codes = {
        name: KINDS[kind](model.get_parameter(name))
        for name in matrices(model)
        if kind != "nf4" or model.get_parameter(name).shape[1] % 64 == 0
    }
    assert codes
    save_folder(model, None, folder / "ours", codes=codes, shard_bytes=shard_bytes)
    for name, part in codes.items():
        model.get_parameter(name).data.copy_(part.dequantize())
    return model


@pytest.fixture(autouse=True)
def exact_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fp32 path also on processors where it would take one in bf16."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


def their_logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(TOKENS).logits


LINEAR = [("llama", SIZES), ("gpt_neox", NEOX)]
CASES = [(*model, kind) for model in LINEAR for kind in KINDS] + [("gpt2", GPT2, "nf4")]


@pytest.mark.parametrize(
    ("family", "sizes", "kind"), CASES, ids=[f"{case[0]}-{case[2]}" for case in CASES]
)
def test_transformers_and_we_compute_the_same(
    family: str, sizes: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    model = quantized(family, kind, tmp_path, **sizes)
    packed, _ = load_folder(tmp_path / "ours", packed=True)
    dense, _ = load_folder(tmp_path / "ours")
    assert any(isinstance(part, QuantLinear) for part in packed.modules())
    assert not any(isinstance(part, QuantLinear) for part in dense.modules())
    with torch.no_grad():
        wanted = model(TOKENS)
        torch.testing.assert_close(dense(TOKENS), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(packed(TOKENS), wanted, atol=2e-3, rtol=0)
    torch.testing.assert_close(their_logits(tmp_path / "ours"), wanted, atol=2e-4, rtol=0)


def test_matrices_with_groups_of_several_sizes(tmp_path: Path) -> None:
    """Rows that 64 does not divide have groups of 32: the two kinds are told apart by name."""
    make_reference("llama", **SIZES).save_pretrained(tmp_path / "theirs")
    model, _ = load_folder(tmp_path / "theirs")
    codes: dict[str, Codes] = {}
    for name in matrices(model):
        weight = model.get_parameter(name)
        codes[name] = quantize_rtn(weight, 4, 64 if weight.shape[1] % 64 == 0 else 32)
        if name.startswith("blocks.1."):
            del codes[name]  # and one block stays as it is
            continue
        weight.data.copy_(codes[name].dequantize())
    save_folder(model, None, tmp_path / "ours", codes=codes)
    with torch.no_grad():
        wanted = model(TOKENS)
        torch.testing.assert_close(
            load_folder(tmp_path / "ours")[0](TOKENS), wanted, atol=1e-5, rtol=0
        )
    torch.testing.assert_close(their_logits(tmp_path / "ours"), wanted, atol=2e-4, rtol=0)


def test_shards_hold_quantised_tensors(tmp_path: Path) -> None:
    model = quantized("llama", "int4", tmp_path, shard_bytes=30_000, **SIZES)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    back, _ = load_folder(tmp_path / "ours")
    for (name, mine), theirs in zip(model.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_a_packed_model_is_saved_as_numbers(tmp_path: Path) -> None:
    model = quantized("llama", "int4 zeros", tmp_path, tie_word_embeddings=True, **SIZES)
    packed, _ = load_folder(tmp_path / "ours", packed=True)
    save_folder(packed, None, tmp_path / "again")
    back, _ = load_folder(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())
    for (name, mine), theirs in zip(model.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert back.head.weight is back.embedding.weight  # type: ignore[union-attr]


@pytest.mark.parametrize("double", [False, True])
def test_what_bitsandbytes_has_quantised_is_read(double: bool, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    make_reference("llama", **SIZES | {"intermediate_size": 192}).save_pretrained(tmp_path / "a")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "a",
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_use_double_quant=double,
            # Rows of 96 inputs are cut by bitsandbytes across their ends.
            llm_int8_skip_modules=["o_proj", "lm_head"],
        ),
    )
    theirs.save_pretrained(tmp_path / "b")
    ours, _ = load_folder(tmp_path / "b")
    packed, _ = load_folder(tmp_path / "b", packed=True)
    with torch.no_grad():
        wanted = theirs(TOKENS).logits
        torch.testing.assert_close(ours(TOKENS), wanted, atol=2e-4, rtol=0)
        torch.testing.assert_close(packed(TOKENS), wanted, atol=2e-3, rtol=0)


def test_nf4_is_bitwise_that_of_bitsandbytes() -> None:
    import bitsandbytes.functional as bnb

    torch.manual_seed(3)
    weight = torch.randn(48, 192) * torch.rand(48, 1)
    weight[3, :64] = 0.0
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = quantize_nf4(weight)
    assert torch.equal((ours.codes_oi[:, ::2] << 4) | ours.codes_oi[:, 1::2], packed.view(48, -1))
    assert torch.equal(ours.absmax_og.view(-1), state.absmax)
    assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(packed, state))


def test_conv1d_is_refused(tmp_path: Path) -> None:
    make_reference("gpt2", **GPT2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="Conv1D"):
        refuse_conv1d(load_folder(tmp_path)[0])


# --- what is not what it says ------------------------------------------------------------------


def change_config(folder: Path, path: str, value: Any) -> None:
    """Set one field; `path` leads to it with slashes."""
    values = json.loads((folder / "config.json").read_text())
    *above, last = path.split("/")
    place = values["quantization_config"]
    for name in above:
        place = place[name]
    place[last] = value
    (folder / "config.json").write_text(json.dumps(values))


WEIGHTS = "config_groups/group_0/weights"


@pytest.mark.parametrize(
    ("kind", "path", "value", "named"),
    [
        ("int4", "quant_method", "gptq", "gptq"),
        ("int4", "quant_method", None, "quant_method"),
        ("int4", "format", "int-quantized", "format"),
        ("int4", "new_thing", 3, "new_thing"),
        ("int4", "kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme"),
        ("int4", "config_groups", {}, "config_groups"),
        ("int4", "config_groups/group_0/input_activations", {"num_bits": 8}, "input_activations"),
        ("int4", f"{WEIGHTS}/num_bits", 3, "num_bits"),
        ("int4", f"{WEIGHTS}/num_bits", True, "num_bits"),
        ("int4", f"{WEIGHTS}/num_bits", 4.0, "num_bits"),
        ("int4", f"{WEIGHTS}/type", "float", "type"),
        ("int4", f"{WEIGHTS}/actorder", "group", "actorder"),
        ("int4", f"{WEIGHTS}/group_size", "many", "group_size"),
        ("int4", f"{WEIGHTS}/strategy", "tensor", "strategy"),
        ("int4", f"{WEIGHTS}/rotation", "hadamard", "rotation"),
        ("nf4", "bnb_4bit_quant_type", "fp4", "bnb_4bit_quant_type"),
        ("nf4", "load_in_8bit", True, "load_in_8bit"),
        ("nf4", "rotation", "hadamard", "rotation"),
    ],
)
def test_an_unknown_description_is_refused_before_the_weights(
    kind: str, path: str, value: Any, named: str, tmp_path: Path
) -> None:
    quantized("llama", kind, tmp_path, **SIZES)
    folder = tmp_path / "ours"
    change_config(folder, path, value)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=named):
        load_folder(folder)


Change = Callable[[dict[str, torch.Tensor]], object]
Q = "model.layers.0.self_attn.q_proj.weight"
STATE = Q.removesuffix(".weight") + ".weight.quant_state.bitsandbytes__nf4"


def as_bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def nested(size: int, offset: float) -> Change:
    """Magnitudes that are quantised once more, in blocks of `size`."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        state = json.loads(bytes(tensors[STATE].tolist()))
        state |= {"nested_blocksize": size, "nested_offset": offset}
        blocks = len(tensors[f"{Q}.absmax"])
        tensors[STATE] = as_bytes(json.dumps(state))
        tensors[f"{Q}.absmax"] = torch.arange(blocks, dtype=torch.uint8)
        tensors[f"{Q}.nested_absmax"] = torch.ones(-(-blocks // size))
        tensors[f"{Q}.nested_quant_map"] = torch.arange(256.0)

    return change


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("int4", lambda t: t.pop(f"{Q}_scale")),
        ("int4", lambda t: t.pop(f"{Q}_shape")),
        ("int4", lambda t: t.pop(f"{Q}_packed")),
        ("int4 zeros", lambda t: t.pop(f"{Q}_zero_point")),
        ("int4", lambda t: t.update({f"{Q}_shape": torch.tensor([96, -64])})),
        ("int4", lambda t: t.update({f"{Q}_shape": torch.tensor([1 << 40, 1 << 40])})),
        ("int4", lambda t: t.update({f"{Q}_shape": torch.tensor([96, 64, 1])})),
        ("int4", lambda t: t.update({f"{Q}_shape": torch.tensor([96, 128])})),
        ("int4", lambda t: t.update({f"{Q}_scale": t[f"{Q}_scale"][:, :1].clone()})),
        ("int4", lambda t: t.update({f"{Q}_scale": t[f"{Q}_scale"].int()})),
        ("int4", lambda t: t[f"{Q}_scale"].fill_(torch.inf)),
        ("int4", lambda t: t.update({f"{Q}_packed": t[f"{Q}_packed"][:-1].clone()})),
        ("int4", lambda t: t.update({f"{Q}_packed": t[f"{Q}_packed"].float()})),
        ("int4", lambda t: t.update({Q: torch.zeros(96, 64)})),
        ("int4", lambda t: t.update({f"{Q}_g_idx": torch.zeros(64)})),
        ("nf4", lambda t: t.pop(f"{Q}.absmax")),
        ("nf4", lambda t: t.pop(f"{Q}.quant_map")),
        ("nf4", lambda t: t.pop(Q)),
        ("nf4", lambda t: t.pop(STATE)),
        ("nf4", lambda t: t[f"{Q}.quant_map"].mul_(2)),
        ("nf4", lambda t: t[f"{Q}.absmax"].fill_(torch.nan)),
        ("nf4", lambda t: t.update({STATE: as_bytes("[" * 60_000)})),
        ("nf4", lambda t: t.update({STATE: as_bytes('{"shape": [1e9, 64]}')})),
        ("nf4", lambda t: t.update({STATE: as_bytes('{"shape": [96, 64]}')})),
        ("nf4", lambda t: t.update({f"{Q}.absmax": t[f"{Q}.absmax"].half()})),
        ("nf4", nested(32, 10**400)),
        ("nf4", nested(32, 1e300)),
    ],
)
def test_broken_tensors_are_refused(kind: str, change: Change, tmp_path: Path) -> None:
    quantized("llama", kind, tmp_path, **SIZES)
    file = tmp_path / "ours" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.safetensors|ours"):
        load_folder(tmp_path / "ours")


@pytest.mark.parametrize("size", [128, 10**13, 10**30])
def test_a_block_larger_than_the_matrix_takes_no_memory(size: int, tmp_path: Path) -> None:
    quantized("llama", "nf4", tmp_path, **SIZES)
    file = tmp_path / "ours" / "model.safetensors"
    tensors = load_file(file)
    nested(size, 0.5)(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    model, _ = load_folder(tmp_path / "ours")
    weight = model.get_parameter("blocks.0.attention.q.weight")
    wanted = torch.arange(len(tensors[f"{Q}.absmax"])) + 0.5
    assert (weight.abs().amax(1) <= wanted).all()
    assert (weight.abs().amax(1) > 0.2 * wanted).all()


def test_what_is_stored_in_double_precision_is_packed_as_fp32(tmp_path: Path) -> None:
    quantized("llama", "int4", tmp_path, **SIZES)
    file = tmp_path / "ours" / "model.safetensors"
    tensors = load_file(file)
    name = "model.embed_tokens.weight"
    save_file({**tensors, name: tensors[name].double()}, file, metadata={"format": "pt"})
    model, _ = load_folder(tmp_path / "ours", packed=True)
    assert isinstance(model, Decoder) and model.embedding.packed.kind == "fp32"  # type: ignore
    dense, _ = load_folder(tmp_path / "ours", dtype=torch.float32)
    torch.testing.assert_close(model(TOKENS), dense(TOKENS), rtol=1e-3, atol=1e-3)


def test_a_description_without_such_tensors_is_refused(tmp_path: Path) -> None:
    quantized("llama", "int4", tmp_path, **SIZES)
    values = json.loads((tmp_path / "ours/config.json").read_text())
    plain = json.loads((tmp_path / "theirs/config.json").read_text())
    plain["quantization_config"] = values["quantization_config"]
    (tmp_path / "theirs/config.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match="quantization_config"):
        load_folder(tmp_path / "theirs")
