"""SmolLM2-135M-Instruct, the real thing, pulled where it is not here yet."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from llm_from_scratch.cli.main import main
from llm_from_scratch.core.errors import RunError
from llm_from_scratch.model.cache import KVCache
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.catalogue import pull
from llm_from_scratch.weights.sources import load

pytestmark = pytest.mark.weights
NAME = "smollm2-135m"
PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def path() -> Path:
    try:
        return pull(NAME)
    except RunError as error:
        if online() or "could not download" not in str(error):
            raise
        # As a warning, too: pytest shows those without being asked, and reasons of skips not.
        warnings.warn(f"Real weights were not tested: no network. {error}", stacklevel=1)
        pytest.skip(f"no network: {error}")


def online() -> bool:
    """Whether pip can reach the packages at all (asked for the list of versions of a small one)."""
    words = [sys.executable, "-P", "-m", "pip", "index", "versions", "six"]
    return subprocess.run(words, capture_output=True, timeout=120).returncode == 0


def test_the_command_knows_the_capital_of_france(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["generate", NAME, "What is the capital of France?", "--chat", "--json"]
    monkeypatch.setattr(sys, "argv", ["scratchlm", *words, "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert "Paris" in said["text"]
    assert (said["model"], said["finish_reason"]) == (NAME, "stop")


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
