"""Small models, tokenizers and files that the tests of this folder write and read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from transformers import LlamaConfig, LlamaForCausalLM

from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.presets import ModelSettings, resolve
from llm_from_scratch.text.formats import bpe_spec
from llm_from_scratch.text.pretokenize import alphabet, byte_letters
from llm_from_scratch.text.tokenizer import Tokenizer

MERGES = ["t h", "th e", "Ġ the", "i n", "a n", "Ġ a"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = [
    *SPECIAL, *(byte_letters()[b] for b in alphabet()), *(m.replace(" ", "") for m in MERGES),
]  # fmt: skip


@pytest.fixture
def tokenizer() -> Tokenizer:
    """Three special tokens, 256 bytes, six merges: 265 entries."""
    spec = bpe_spec(VOCABULARY, MERGES, special=SPECIAL)
    config = {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>"
        "{% endfor %}",
    }
    return Tokenizer.from_spec(spec, config)


@pytest.fixture
def make_model() -> Callable[..., Decoder]:
    def make(family: str = "llama", vocab_size: int = 270, **settings: Any) -> Decoder:
        given = ModelSettings(family=family, depth=2, d_model=24, n_heads=4, **settings)
        model = Decoder(resolve(given, vocab_size, 32)).eval()
        model.initialise(seed=5)
        return model

    return make


def llama_cpp_order(tensor: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of Q and K (`LlamaModel.permute`)."""
    rows, *rest = tensor.shape
    return tensor.reshape(heads, 2, rows // heads // 2, *rest).swapaxes(1, 2).reshape(tensor.shape)


HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFCase:
    """A GGUF file under construction, and the reference model that it must equal.

    `edit` may change the writer before the tensors are written.
    """

    heads, kv_heads, layers, width, inner, vocab = 4, 2, 2, 256, 512, len(VOCABULARY) + 7

    def __init__(self, kind: GGMLQuantizationType, **changes: Any) -> None:
        self.kind = kind
        torch.manual_seed(3)
        rope = {"rope_type": "default", "rope_theta": 20_000.0}
        values = {
            "vocab_size": self.vocab, "hidden_size": self.width, "intermediate_size": self.inner,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "max_position_embeddings": 64,
            "rms_norm_eps": 1e-4, "rope_parameters": rope, "initializer_range": 0.1,
            "bos_token_id": None, "eos_token_id": None,
        }  # fmt: skip
        self.model = LlamaForCausalLM(LlamaConfig(**{**values, **changes})).eval()
        self.state = self.model.state_dict()
        for value in self.state.values():
            if value.dim() == 1:
                value.copy_(torch.randn_like(value) * 0.3 + 0.8)

    def _stored(self, name: str, heads: int | None) -> tuple[np.ndarray, GGMLQuantizationType]:
        """The bytes of a tensor; the reference model gets exactly what they decode to."""
        value = self.state[name].numpy()
        kind = self.kind if value.ndim == 2 else GGMLQuantizationType.F32
        if heads is not None:
            value = llama_cpp_order(value, heads)
        try:
            raw = quants.quantize(value, kind)
        except NotImplementedError:  # the package only decodes these: make the bytes up
            raw = self._random_blocks(value.shape, kind)
        decoded = quants.dequantize(raw, kind).reshape(value.shape)
        if heads is not None:
            back = np.empty_like(decoded)
            back[llama_cpp_order(np.arange(len(decoded)), heads)] = decoded
            decoded = back
        self.state[name].copy_(torch.from_numpy(decoded.astype(np.float32)))
        return raw, kind

    @staticmethod
    def _random_blocks(shape: tuple[int, ...], kind: GGMLQuantizationType) -> np.ndarray:
        from llm_from_scratch.quant.formats import FORMATS

        form = FORMATS[int(kind)]
        rng = np.random.default_rng(4)
        blocks = shape[1] // form.values
        raw = rng.integers(0, 256, (shape[0], blocks, form.bytes), dtype=np.uint8)
        scale = np.array([2e-4, 1e-3], dtype=np.float16).view(np.uint8)
        if form.name == "Q6_K":
            raw[..., -2:] = np.array([3e-5], dtype=np.float16).view(np.uint8)
        else:
            raw[..., :4] = scale
        return raw.reshape(shape[0], -1)

    def write(self, path: Path, edit: Callable[[GGUFWriter], None] | None = None) -> Path:
        writer = GGUFWriter(path, "llama")
        writer.add_block_count(self.layers)
        writer.add_context_length(64)
        writer.add_embedding_length(self.width)
        writer.add_feed_forward_length(self.inner)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_layer_norm_rms_eps(1e-4)
        writer.add_rope_freq_base(self.model.config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(self.width // self.heads)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        padding = [f"[PAD{i}]" for i in range(self.vocab - len(VOCABULARY))]
        writer.add_token_list([*VOCABULARY, *padding])
        writer.add_token_types([3] * 3 + [1] * (len(VOCABULARY) - 3) + [5] * len(padding))
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(2)
        writer.add_chat_template("{{ messages[0]['content'] }}")
        tensors = {"token_embd.weight": "model.embed_tokens.weight"}
        tensors["output_norm.weight"] = "model.norm.weight"
        if not self.model.config.tie_word_embeddings:
            tensors["output.weight"] = "lm_head.weight"
        for i in range(self.layers):
            for theirs, hf in HF_NAMES.items():
                for suffix in ("weight", "bias"):
                    if (name := f"model.layers.{i}.{hf}.{suffix}") in self.state:
                        tensors[f"blk.{i}.{theirs}.{suffix}"] = name
        heads = {".attn_q.": self.heads, ".attn_k.": self.kv_heads}
        for theirs, name in tensors.items():
            count = next((n for mark, n in heads.items() if mark in theirs), None)
            raw, kind = self._stored(name, count)
            writer.add_tensor(theirs, raw, raw_dtype=kind)
        if edit is not None:
            edit(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


@pytest.fixture(scope="session")
def gguf_case() -> type[GGUFCase]:
    return GGUFCase
