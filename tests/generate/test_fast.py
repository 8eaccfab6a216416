"""The kernel runner gives what the plain one gives: logits, pages and answers."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

from llm_from_scratch.generate.engine import Engine, room_for
from llm_from_scratch.generate.fast import KernelRunner, make_runner, why_plain
from llm_from_scratch.generate.requests import Request
from llm_from_scratch.generate.runner import PlainRunner
from llm_from_scratch.generate.sampling import SamplingSettings
from llm_from_scratch.generate.speculative import Draft, Lookup
from llm_from_scratch.model.cache import PagePool
from llm_from_scratch.model.config import ModelConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.layers import Linear
from llm_from_scratch.quant import kernels
from llm_from_scratch.quant.linear import QuantLinear, set_module
from llm_from_scratch.quant.packed import PackedWeight
from tests.generate.engines import answers, finish, listen, said

LLAMA = ModelConfig(
    vocab_size=83, d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=96,
    max_seq_len=96, init_std=0.15, tie_embeddings=False,
)  # fmt: skip
SHAPES = {
    "llama": LLAMA,
    "one key-value head": replace(LLAMA, n_kv_heads=1, head_dim=16),
    "qwen2": replace(LLAMA, attention_bias=True),
    "qwen3": replace(LLAMA, qk_norm="head", tie_embeddings=True),
    "mistral": replace(LLAMA, window=11, window_layers=(0, 1, 2)),
    "gemma3": replace(
        LLAMA, norm="rms_plus_one", residual="sandwich", qk_norm="head", activation="gelu_tanh",
        scale_embedding=True, window=7, window_layers=(0, 2), local_rope_theta=100.0,
    ),
    "gemma2": replace(
        LLAMA, norm="rms_plus_one", residual="sandwich", activation="gelu_tanh", window=9,
        window_layers=(1,), attention_softcap=5.0, logit_softcap=6.0, attention_width=24,
    ),
    "olmo2": replace(LLAMA, residual="branch_end", first_norm=True, qk_norm="all"),
    "turned in part": replace(LLAMA, rope_share=0.5),
}  # fmt: skip
pytestmark = pytest.mark.skipif(not kernels.available(), reason="there is no C++ compiler")


def packed_model(config: ModelConfig, bits: int = 8) -> Decoder:
    """Random weights in groups of 32, norms and biases away from one and zero."""
    model = Decoder(config).eval()
    model.initialise(seed=2)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear):
            groups = module.weight.detach().unflatten(1, (-1, 32))
            most = 2**bits - 1
            low = groups.amin(-1, keepdim=True)
            scale = (groups.amax(-1, keepdim=True) - low) / most
            codes = ((groups - low) / scale).round().clamp(0, most).to(torch.uint8)
            packed = PackedWeight.from_groups(codes.flatten(1), scale[..., 0], low[..., 0], bits)
            set_module(model, name, QuantLinear(packed, module.bias))
    return model


def plain_copy(model: Decoder) -> Decoder:
    """The same weights, dense in fp32."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, QuantLinear):
            linear = Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight = nn.Parameter(module.dequantize())
            linear.bias = module.bias
            set_module(twin, name, linear)
    return twin


def engine_of(model: Decoder, prompts: Sequence[Sequence[int]], kernel: bool, **more: object):
    settings = SamplingSettings(max_new_tokens=20, temperature=0.0)
    engine = Engine(model, **{"cache_tokens": room_for(model, prompts, settings), **more})
    engine.runner = (KernelRunner if kernel else PlainRunner)(model, engine.pool)
    for prompt in prompts:
        engine.submit(Request(prompt, settings))
    return engine


def logits_of(engine: Engine, steps: int = 21) -> list[torch.Tensor]:
    """What every pass computed."""
    run, heard = engine.runner.run, []
    engine.runner.run = lambda feeds: heard.append(run(feeds)) or heard[-1]  # type: ignore
    for _ in range(steps):
        engine.step()
    return heard


PROMPTS = [[5, 9, 2], [(3 * i + 1) % 83 for i in range(40)], [(7 * i) % 83 for i in range(17)]]


@pytest.mark.parametrize("name", list(SHAPES))
def test_logits_equal_the_plain_twin(name: str) -> None:
    """Prompts in chunks, then token by token, past the window and over page borders."""
    model = packed_model(SHAPES[name])
    assert why_plain(model, PagePool(model.config, 2, 16)) is None
    fast = logits_of(engine_of(model, PROMPTS, True, chunk=25))
    plain = logits_of(engine_of(plain_copy(model), PROMPTS, False, chunk=25))
    assert len(fast) == len(plain) and len(plain) >= 20
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3 * float(b.abs().max()), rtol=0)


def test_a_pass_that_only_reads() -> None:
    """Of a prompt longer than a chunk no logits are wanted before its end."""
    model = packed_model(LLAMA)
    fast = logits_of(engine_of(model, PROMPTS[1:2], True, chunk=9), 7)
    plain = logits_of(engine_of(plain_copy(model), PROMPTS[1:2], False, chunk=9), 7)
    assert [len(one) for one in fast] == [0, 0, 0, 0, 1, 1, 1]
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3 * float(plain[-1].abs().max()), rtol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("threads", [1, 2])
def test_company_changes_nothing_at_all(bits: int, threads: int) -> None:
    """Each row is computed by itself: together and alone are equal to the last bit."""
    model = packed_model(LLAMA, bits)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = logits_of(engine_of(model, PROMPTS, True), 15)
        for row, prompt in enumerate(PROMPTS):
            alone = logits_of(engine_of(model, [prompt], True), 15)
            for a, b in zip(together, alone, strict=True):
                assert torch.equal(a[row], b[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03), (torch.int8, 0.05)]
)
def test_caches_of_less_precision(dtype: torch.dtype, bound: float) -> None:
    model = packed_model(LLAMA)
    exact = logits_of(engine_of(plain_copy(model), PROMPTS, False), 12)
    rough = logits_of(engine_of(model, PROMPTS, True, cache_dtype=dtype), 12)
    for a, b in zip(exact[:1], rough[:1], strict=True):
        assert (a - b).abs().mean() < bound * b.abs().max()
    assert all(math.isfinite(float(one.sum())) for one in rough)


def test_only_what_the_kernels_know_is_given_to_them() -> None:
    model = packed_model(LLAMA)
    pool = PagePool(LLAMA, 2, 16)
    assert isinstance(make_runner(model, pool), KernelRunner)
    assert isinstance(make_runner(plain_copy(model), pool), PlainRunner)
    assert isinstance(make_runner(model, PagePool(LLAMA, 2, 8)), PlainRunner)
    assert isinstance(make_runner(model, PagePool(LLAMA, 2, 16, torch.float64)), PlainRunner)
    assert isinstance(Draft(model).runner, KernelRunner)
    biased = packed_model(SHAPES["qwen2"])
    assert why_plain(biased, pool) is None
    assert "biases" in str(why_plain(biased.bfloat16(), pool))
    assert "another way" in str(why_plain(packed_model(replace(LLAMA, final_norm=False)), pool))
    gpt2 = Decoder(replace(LLAMA, norm="layer", position="learned", gated=False, n_kv_heads=4))
    assert "another way" in str(why_plain(gpt2, pool))


def test_the_matrices_that_are_joined_lie_in_memory_once() -> None:
    model = packed_model(LLAMA)
    before = sum(m.packed.nbytes for m in model.modules() if isinstance(m, QuantLinear))
    wanted = [m.dequantize() for m in model.modules() if isinstance(m, QuantLinear)]
    KernelRunner(model, PagePool(LLAMA, 2, 16))
    storages = {
        m.packed.data.untyped_storage().data_ptr(): m.packed.data.untyped_storage().nbytes()
        for m in model.modules()
        if isinstance(m, QuantLinear)
    }
    assert sum(storages.values()) == before
    found = [m.dequantize() for m in model.modules() if isinstance(m, QuantLinear)]
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("guesser", ["draft", "lookup"])
def test_guesses_are_checked_by_the_kernels(guesser: str) -> None:
    """Draft and model go through the kernels, and what comes out is what the model writes alone."""
    model, settings = packed_model(LLAMA), SamplingSettings(max_new_tokens=30, temperature=0.0)
    requests = [Request(prompt, settings) for prompt in [*PROMPTS, [1, 2, 3] * 7]]
    proposer = Draft(packed_model(LLAMA, 4), most=3) if guesser == "draft" else Lookup()
    engine = Engine(model, cache_tokens=400, proposer=proposer)
    for request in requests:
        engine.submit(request)
    heard = listen(engine)
    texts = finish(engine)
    assert heard.passes < 30
    for number, request in enumerate(requests):
        assert said(texts[number, 0]) == answers(model, request)[0]


def test_engines_in_several_threads_do_not_meet() -> None:
    """Each records its own programs, whatever other threads compute meanwhile."""
    model = packed_model(LLAMA)
    wanted = logits_of(engine_of(model, PROMPTS, True), 15)

    def work(_: int) -> bool:
        found = logits_of(engine_of(model, PROMPTS, True), 15)
        return all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(12)))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at Linux's list of threads")
def test_pytorch_wakes_no_threads_beside_the_kernels() -> None:
    """Once woken they would take the cores of the kernels' workers, step after step."""
    code = (
        "import os, torch; torch.set_num_threads(1)\n"
        "from dataclasses import replace\n"
        "from llm_from_scratch.generate.engine import Engine\n"
        "from llm_from_scratch.generate.requests import Request\n"
        "from llm_from_scratch.generate.sampling import SamplingSettings\n"
        "from tests.generate.test_fast import LLAMA, packed_model\n"
        "model = packed_model(replace(LLAMA, vocab_size=33_000))\n"
        "engine = Engine(model, cache_tokens=1000)\n"
        "torch.set_num_threads(2)\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "before = count()\n"
        "ways = [{'temperature': 0.0}, {'temperature': 0.8, 'top_k': 40, 'top_p': 0.9},\n"
        "        {'temperature': 0.0, 'repetition_penalty': 1.1, 'logprobs': 2}]\n"
        "for n in range(9):\n"
        "    settings = SamplingSettings(max_new_tokens=4, **ways[n % 3])\n"
        "    engine.submit(Request(list(range(n + 1)), settings))\n"
        "while engine.busy: engine.step()\n"
        "assert count() == before + 1, (before, count())  # the kernels' worker\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)
