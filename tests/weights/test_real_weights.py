"""Published models, the real thing: what they answer, and that it is what the reference computes.

SmolLM2 and MiniLM are pulled where they are not here yet; the others are read where they lie
(`real_files.py`).
"""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from llm_from_scratch.cli.main import main
from llm_from_scratch.cli.main import run as run_command
from llm_from_scratch.core.errors import RunError
from llm_from_scratch.model.cache import KVCache
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.catalogue import CATALOGUE, pull
from llm_from_scratch.weights.sources import load
from tests.weights.real_files import real

pytestmark = pytest.mark.weights
NAME = "smollm2-135m"
PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def path() -> Path:
    return fetched(NAME)


def fetched(name: str) -> Path:
    """A model of the catalogue; the test is skipped where it is not here and cannot be fetched."""
    try:
        return pull(name)
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
    cache = KVCache(model.config, capacity=len(ids) + most, dtype=next(model.parameters()).dtype)
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
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    model, tokenizer = load(NAME, dtype=torch.float32, device="cpu")
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )  # fmt: skip
    theirs = filled(LlamaForCausalLM(config), path, heads={"attn_q": 9, "attn_k": 3})
    auto = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    prompt = PROMPT.format("In 1984, what's 12345 + 67?  日本の首都は🍣")
    ids = tokenizer.encode(prompt, special=True)
    assert ids == auto(prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer.stop_ids == {auto.convert_tokens_to_ids("<|im_end|>")}
    assert_same_logits(model, theirs, ids)


def filled(theirs: Any, path: Path, heads: dict[str, int] | None = None) -> Any:
    """A model of `transformers` with the weights of a GGUF, decoded by the `gguf` package.

    llama.cpp's converter reorders the rows of the tensors in `heads` (for the architecture llama).
    """
    from gguf import GGUFReader, quants

    file = GGUFReader(path)
    architecture = str(file.fields["general.architecture"].contents())
    for tensor in file.tensors:
        value = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for mark, count in (heads or {}).items():
            if mark in tensor.name:
                pairs = len(value) // count // 2
                value = value.view(count, pairs, 2, -1).transpose(1, 2).reshape(value.shape)
        if architecture == "gemma3" and "norm" in tensor.name:
            value = value - 1  # stored as what the norm multiplies with
        theirs.get_parameter(hf_name(tensor.name, architecture)).data = value
    return theirs.eval()


def hf_name(name: str, architecture: str) -> str:
    names = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
        "blk": "model.layers", "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
        "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    if architecture == "gemma3":
        names["ffn_norm"] = "pre_feedforward_layernorm"
        names["post_attention_norm"] = "post_attention_layernorm"
        names["post_ffw_norm"] = "post_feedforward_layernorm"
    return ".".join(names.get(part, part) for part in name.split("."))


@torch.inference_mode()
def assert_same_logits(ours: Any, theirs: Any, ids: list[int], most: float = 1e-3) -> None:
    wanted, got = theirs(torch.tensor([ids])).logits, ours(torch.tensor([ids]))
    torch.testing.assert_close(got, wanted, atol=most, rtol=0)
    assert torch.equal(got.argmax(-1), wanted.argmax(-1))


# --- models that lie somewhere on this machine ----------------------------------------------------


def said(capsys: pytest.CaptureFixture[str], model: Path | str, prompt: str, *words: str) -> str:
    """What `scratchlm generate` answers, the likeliest token every time."""
    capsys.readouterr()
    line = ["generate", str(model), prompt, "--temperature", "0", "--device", "cpu", "--json"]
    assert run_command([*line, *words]) == 0
    text: str = json.loads(capsys.readouterr().out)["text"]
    return text


def test_qwen_writes_code_that_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    path = real("qwen2.5-coder-0.5b") / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    ask = "Write a Python function is_prime(n). Answer with the code only."
    answer = said(capsys, path, ask, "--chat", "--max_new_tokens", "200")
    code = re.findall(r"```python\n(.*?)```", answer, re.DOTALL)
    assert code, answer
    place: dict[str, Any] = {}
    exec(code[0], place)
    primes = [n for n in range(50) if place["is_prime"](n)]
    assert primes == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47]
    answer = said(capsys, path, "日本の首都はどこですか。", "--chat", "--max_new_tokens", "30")
    assert "東京" in answer or "东京" in answer


def test_gemma_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    path = real("gemma-3-270m") / "gemma-3-270m-q4_k_m.gguf"
    text = "Question: What is the capital of France?\nAnswer:"
    assert said(capsys, path, text, "--max_new_tokens", "2").strip() == "Paris"
    text = said(capsys, path, "The days of the week are Monday, Tuesday,", "--max_new_tokens", "10")
    assert text.startswith(" Wednesday, Thursday, Friday, Saturday, Sunday")


@pytest.mark.full
def test_qwen_computes_what_the_reference_computes() -> None:
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    path = real("qwen2.5-coder-0.5b") / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    model, tokenizer = load(path, dtype=torch.float32, device="cpu")
    config = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32768,
        rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,  # this file holds the matrix twice, each with its own rounding
    )  # fmt: skip
    auto = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    prompt = PROMPT.format("In 1984, what's 12345 + 67?\n\n\tdef f(x):  日本の首都は🍣")
    ids = tokenizer.encode(prompt, special=True)
    assert ids == auto(prompt, add_special_tokens=False)["input_ids"]
    assert_same_logits(model, filled(Qwen2ForCausalLM(config), path), ids, most=2e-3)


@pytest.mark.full
def test_gemma_computes_what_the_reference_computes() -> None:
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    path = real("gemma-3-270m") / "gemma-3-270m-q4_k_m.gguf"
    model, tokenizer = load(path, dtype=torch.float32, device="cpu")
    config = Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256,
        sliding_window=512, max_position_embeddings=32768, rms_norm_eps=1e-6,
        layer_types=["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(18)],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
    )  # fmt: skip
    auto = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    prompt = "In 1984, what's 12345 + 67?\n\n  日本の首都は🍣. " * 20  # longer than the window
    ids = tokenizer.encode(prompt)
    assert ids == auto(prompt, add_special_tokens=False)["input_ids"]
    assert len(ids) > 512
    assert_same_logits(model, filled(Gemma3ForCausalLM(config), path), ids, most=5e-3)


def test_stories_are_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of llama2.c, through the script in examples/."""
    from transformers import LlamaForCausalLM

    folder = real("stories15M")
    script = Path(__file__).resolve().parents[2] / "examples" / "convert_llama2c.py"
    words = [folder / "stories15M.bin", "--tokenizer", folder / "tokenizer.bin"]
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, words), "--out", str(tmp_path / "m")])
    runpy.run_path(str(script), run_name="__main__")
    story = said(capsys, tmp_path / "m", "Once upon a time", "--max_new_tokens", "100")
    assert story.startswith(", there was a little girl named Lily. She loved to play outside")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "m").eval()
    tokenizer = Tokenizer.load(tmp_path / "m")
    ids = [1, *tokenizer.encode("Once upon a time")]
    out = theirs.generate(torch.tensor([ids]), max_new_tokens=100, do_sample=False)
    assert tokenizer.decode(out[0, len(ids) :].tolist()).strip() == story.strip()


SENTENCES = [
    "A man is eating food.",
    "Someone is having a meal.",
    "A cheetah chases its prey across the field.",
    "What is the capital of France?",
    "Paris is France's capital city.",
    "naïve café, 東京 🍣 unbelievably",
]


@pytest.mark.parametrize("name", ["all-minilm-l6-v2", "all-mpnet-base-v2"])
@torch.inference_mode()
def test_embeddings_equal_those_of_the_reference(name: str) -> None:
    """Mean of the states, scaled to length 1: each sentence is nearest to the one that means it."""
    from transformers import AutoModel, AutoTokenizer

    folder = fetched(name) if name in CATALOGUE else real(name)
    model, tokenizer = load(folder, head="embedding", device="cpu")
    auto = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    batch = tokenizer.encode_inputs(SENTENCES)
    tokens = torch.tensor(batch.ids)
    assert torch.equal(tokens, auto["input_ids"])
    mask = torch.tensor(batch.mask)
    assert torch.equal(mask, auto["attention_mask"])
    states = AutoModel.from_pretrained(folder).eval()(**auto).last_hidden_state
    weights = auto["attention_mask"][..., None]
    wanted = normalize((states * weights).sum(1) / weights.sum(1), dim=-1)
    got = model(tokens, attention_mask=mask)
    assert cosine_similarity(got, wanted).min() > 1 - 1e-6
    assert torch.allclose(got.norm(dim=-1), torch.ones(len(SENTENCES)))
    near = (got @ got.T).fill_diagonal_(-1)
    assert near[:2].argmax(1).tolist() == [1, 0] and near[3:5].argmax(1).tolist() == [4, 3]
    assert near[0, 1] > 0.6 > 0.2 > near[0, 3:].max()


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
@torch.inference_mode()
def test_opus_translates(tmp_path: Path) -> None:
    """A pickle of former times, through `scratchlm convert`; `transformers` loads both."""
    from transformers import MarianMTModel, MarianTokenizer

    folder = real("opus-mt-en-fr")
    assert run_command(["convert", str(folder), "--to", "hf", "--out", str(tmp_path / "m")]) == 0
    model, tokenizer = load(tmp_path / "m", device="cpu")
    texts = ["The cat sat on the mat.", "I would like to learn how language models work."]
    auto = MarianTokenizer.from_pretrained(folder)
    source = auto(texts, padding=True, return_tensors="pt")
    batch = tokenizer.encode_inputs(texts)
    assert batch.ids == source["input_ids"].tolist()
    mask = source["attention_mask"]
    theirs = MarianMTModel.from_pretrained(folder).eval()
    out = theirs.generate(**source, num_beams=1, do_sample=False, max_new_tokens=40)
    wanted = theirs(**source, decoder_input_ids=out).logits
    got = model(source["input_ids"], out, attention_mask=mask)
    again = MarianMTModel.from_pretrained(tmp_path / "m").eval()(**source, decoder_input_ids=out)
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=0)
    torch.testing.assert_close(again.logits, wanted, atol=1e-3, rtol=0)
    for row, text in enumerate(texts):
        ids = torch.tensor([tokenizer.encode_inputs([text]).ids[0]])
        encoded, said = model.encoder(ids), [model.config.start_id]
        while len(said) < 40 and said[-1] != tokenizer.eos_id:
            logits = model.logits(model.hidden(torch.tensor([said]), encoded))[0, -1]
            logits[tokenizer.pad_id] = -torch.inf  # as generation_config.json asks
            said.append(int(logits.argmax()))
        translation = tokenizer.target.decode(said[1:], skip_special=True).strip()
        assert translation == auto.decode(out[row], skip_special_tokens=True).strip()
        if row == 0:
            assert "chat" in translation and "tapis" in translation
