"""SmolLM2-135M-Instruct, the real thing: fetched with `scratchlm pull smollm2-135m`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_from_scratch.model.cache import KVCache
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.catalogue import local_file
from llm_from_scratch.weights.sources import load

pytestmark = pytest.mark.weights
NAME = "smollm2-135m"
PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def path() -> Path:
    found = local_file(NAME)
    if found is None:
        pytest.skip(f"not here: scratchlm pull {NAME}")
    return found


@torch.inference_mode()
def greedy(model: torch.nn.Module, tokenizer: Tokenizer, prompt: str, most: int = 30) -> str:
    ids = tokenizer.encode(prompt, special=True)
    cache = KVCache(model.config, capacity=len(ids) + most, dtype=model.embedding.weight.dtype)
    out: list[int] = []
    new = ids
    while len(out) < most:
        new = [int(model(torch.tensor([new]), cache=cache)[0, -1].argmax())]
        if new[0] in tokenizer.stop_ids:
            break
        out += new
    return tokenizer.decode(out)


def test_the_capital_of_france(path: Path) -> None:
    model, tokenizer = load(NAME, device="cpu")
    assert "Paris" in greedy(model, tokenizer, PROMPT.format("What is the capital of France?"))


@pytest.mark.full
def test_tokens_and_logits_equal_those_of_the_reference(path: Path) -> None:
    """Decoded by the `gguf` package, run by `transformers`, tokenised by both."""
    from gguf import GGUFReader, quants
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    model, tokenizer = load(NAME, dtype=torch.float32, device="cpu")
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    for tensor in GGUFReader(path).tensors:
        value = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for mark, heads in (("attn_q", 9), ("attn_k", 3)):
            if mark in tensor.name:
                value = value.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(-1, 576)
        theirs.get_parameter(hf_name(tensor.name)).data = value
    auto = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    prompt = PROMPT.format("In 1984, what's 12345 + 67?  日本の首都は🍣")
    ids = tokenizer.encode(prompt, special=True)
    assert ids == auto(prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer.stop_ids == {auto.convert_tokens_to_ids("<|im_end|>")}
    with torch.inference_mode():
        wanted, got = theirs(torch.tensor([ids])).logits, model(torch.tensor([ids]))
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=0)
    assert torch.equal(got.argmax(-1), wanted.argmax(-1))


def hf_name(name: str) -> str:
    names = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "blk": "model.layers",
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    return ".".join(names.get(part, part) for part in name.split("."))
