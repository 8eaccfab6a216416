"""The `llama` architecture in a GGUF file: its metadata and tensors as our `Decoder`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.config import ModelConfig, RopeScaling
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.positions import rope_frequencies
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.assemble import complete, empty_model, put, undisturbed
from llm_from_scratch.weights.config_json import MOST_LAYERS, Fields
from llm_from_scratch.weights.folder import check_vocabulary
from llm_from_scratch.weights.gguf import GGUF
from llm_from_scratch.weights.gguf_tokenizer import read_tokenizer

WHOLE = (("token_embd", "embedding"), ("output_norm", "final_norm"), ("output", "head"))
BLOCK = (
    ("attn_norm", "attention_norm"),
    ("attn_q", "attention.q"),
    ("attn_k", "attention.k"),
    ("attn_v", "attention.v"),
    ("attn_output", "attention.o"),
    ("ffn_norm", "feed_forward_norm"),
    ("ffn_gate", "feed_forward.gate"),
    ("ffn_up", "feed_forward.up"),
    ("ffn_down", "feed_forward.down"),
)
ROPE_FACTORS = "rope_freqs.weight"

# Settings that would change what the model computes, and the values that mean "not in use".
REQUIRED: dict[str, tuple[Any, ...]] = {
    "llama.expert_count": (0,),
    "llama.rope.scaling.type": ("none",),
    "llama.rope.scale_linear": (0.0, 1.0),
    "llama.attention.causal": (True,),
    "llama.attention.sliding_window": (0,),
    "llama.attention.clamp_kqv": (0.0,),
    "llama.attention.max_alibi_bias": (0.0,),
    "llama.attention.scale": (0.0,),
    "llama.logit_scale": (0.0, 1.0),
    "llama.embedding_scale": (0.0, 1.0),
    "llama.residual_scale": (0.0, 1.0),
    "llama.final_logit_softcapping": (0.0,),
}


def read_config(file: GGUF) -> ModelConfig:
    """The architecture that the metadata describes; `UserError` names the key that does not fit."""
    where = str(file.path)
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(
            f"{where}: 'general.architecture' is {architecture!r}; GGUF files of the architecture "
            "'llama' can be read. Take the model as a Hugging Face folder instead."
        )
    fields = Fields(file.metadata, {"llama.rope.freq_base": 10_000.0}, where)
    for name, allowed in REQUIRED.items():
        if file.metadata.get(name, allowed[0]) not in allowed:
            raise fields.refuse(name, f"{allowed[0]!r}; other values are not supported")
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{where} lacks the tensor 'token_embd.weight'; download it anew.")
    heads = fields.integer("llama.attention.head_count")
    fields.values.setdefault("llama.attention.head_count_kv", heads)
    width = fields.integer("llama.embedding_length")
    if "llama.attention.key_length" not in file.metadata:
        per_head = fields.share("llama.embedding_length", "llama.attention.head_count")
        fields.values["llama.attention.key_length"] = per_head
    head_dim = fields.integer("llama.attention.key_length")
    for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if fields.values.setdefault(name, head_dim) != head_dim:
            raise fields.refuse(name, f"the width of a head, {head_dim}")
    fields.share("llama.attention.head_count", "llama.attention.head_count_kv")
    config = ModelConfig(
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        d_model=width,
        n_layers=fields.integer("llama.block_count", MOST_LAYERS),
        n_heads=heads,
        n_kv_heads=fields.integer("llama.attention.head_count_kv"),
        head_dim=head_dim,
        d_ff=fields.integer("llama.feed_forward_length"),
        max_seq_len=fields.integer("llama.context_length"),
        norm_eps=_short(fields.number("llama.attention.layer_norm_rms_epsilon")),
        rope_theta=_short(fields.number("llama.rope.freq_base")),
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        feed_forward_bias="blk.0.ffn_up.bias" in file.tensors,
        tie_embeddings="output.weight" not in file.tensors,
    )
    return _with_rope_factors(file, config)


def _short(value: float) -> float:
    """1e-5 stored as fp32 reads 9.99999974e-06; the shortest number that means the same fp32."""
    return float(f"{value:.7g}")


def _with_rope_factors(file: GGUF, config: ModelConfig) -> ModelConfig:
    """Llama 3's stretched frequencies are stored as a tensor of divisors, one per pair.

    The settings behind them are not stored. Both published ones (Llama 3.1 and 3.2) differ in the
    largest divisor alone; what they do not reproduce is refused.
    """
    if ROPE_FACTORS not in file.tensors:
        return config
    factors = file.read(ROPE_FACTORS)
    if factors.shape == (config.head_dim // 2,) and torch.equal(factors, torch.ones_like(factors)):
        return config
    scaling = RopeScaling(factor=float(f"{float(factors.max()):.5g}"))
    plain = rope_frequencies(config.head_dim, config.rope_theta, None)
    stretched = rope_frequencies(config.head_dim, config.rope_theta, scaling)
    if factors.shape != plain.shape or not torch.allclose(plain / factors, stretched, rtol=1e-4):
        raise UserError(
            f"{file.path}: the tensor '{ROPE_FACTORS}' stretches the rotary frequencies in a way "
            "other than Llama 3's, which is not supported. Take the model as a folder instead."
        )
    return replace(config, rope_scaling=scaling)


def _names(config: ModelConfig, parameters: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    """(their tensor, our parameter), for every parameter that is stored."""
    pairs = list(WHOLE[: 2 if config.tie_embeddings else 3])
    for index in range(config.n_layers):
        pairs += [(f"blk.{index}.{theirs}", f"blocks.{index}.{ours}") for theirs, ours in BLOCK]
    for theirs, ours in pairs:
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in parameters:
                yield f"{theirs}.{kind}", f"{ours}.{kind}"


def _to_halves(tensor: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of the rows of Q and K.

    It turns neighbouring features (2 j, 2 j + 1) of a head, we turn (j, j + d/2), as the Hugging
    Face folders do; its converter interleaved the rows, and this sorts them back.
    """
    rows, rest = tensor.shape[0], tensor.shape[1:]
    return tensor.view(heads, rows // heads // 2, 2, *rest).transpose(1, 2).reshape(rows, *rest)


def _check(file: GGUF, model: Decoder, names: dict[str, str]) -> None:
    missing = sorted(names.keys() - file.tensors.keys())
    if missing:
        raise UserError(
            f"{file.path} lacks {len(missing)} tensor(s) that its metadata asks for, such as "
            f"'{missing[0]}'; download it anew."
        )
    surplus = sorted(file.tensors.keys() - names.keys() - {ROPE_FACTORS})
    if surplus:
        raise UserError(
            f"{file.path} holds {len(surplus)} tensor(s) that a model of the architecture 'llama' "
            f"does not have, such as '{surplus[0]}'; it cannot be read."
        )
    for theirs, ours in names.items():
        shape = tuple(model.get_parameter(ours).shape)
        if file.tensors[theirs].shape != shape:
            raise UserError(
                f"{file.path}: the tensor '{theirs}' has the shape {file.tensors[theirs].shape}, "
                f"but the metadata means {shape}."
            )


@undisturbed()
@torch.no_grad()
def load_gguf(
    path: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Decoder, Tokenizer]:
    """The model (in inference mode, weights decoded to `dtype`) and tokenizer of a GGUF file.

    Raises `UserError` naming the key or tensor for anything that cannot be read.
    """
    file = GGUF(path)
    config = read_config(file)
    tokenizer = read_tokenizer(file)
    check_vocabulary(config.vocab_size, tokenizer, file.path)
    model = empty_model(config)
    assert isinstance(model, Decoder)
    names = dict(_names(config, dict(model.named_parameters())))
    _check(file, model, names)
    for theirs, ours in names.items():
        tensor = file.read(theirs, dtype)
        if theirs.startswith("blk.") and ".attn_q." in theirs:
            tensor = _to_halves(tensor, config.n_heads)
        elif theirs.startswith("blk.") and ".attn_k." in theirs:
            tensor = _to_halves(tensor, config.n_kv_heads)
        put(model, ours, tensor.to(device))
    complete(model, device)
    return model, tokenizer
