"""One mixture-of-experts layer beside transformers': one token, a few, and a training batch.

The peers are the three ways in which `Qwen3MoeSparseMoeBlock` can compute the same layer: a loop
over the experts (eager), gathered matrices (batched_mm) and grouped products (grouped_mm). All have
the same weights and inputs and agree before they are timed. Rounds of the four are interleaved; the
figures are medians over rounds. fp32, one thread unless `--threads` says otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from common import median, parser, record, wait_for_quiet
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from llm_from_scratch.model.config import ExpertsConfig, ModelConfig
from llm_from_scratch.model.experts import Experts

# name -> experts, active ones, width of the model, width of an expert, tokens, with gradients?
CASES = {
    "one token": (128, 8, 1024, 384, 1, False),
    "eight tokens": (128, 8, 1024, 384, 8, False),
    "reading 512 tokens": (64, 8, 1024, 256, 512, False),
    "training step, 8 experts": (8, 2, 256, 384, 2048, True),
    "training step, 64 experts": (64, 4, 256, 128, 2048, True),
}
NAMES = ("experts", "active", "d_model", "d_ff", "tokens")
PEERS = ("eager", "batched_mm", "grouped_mm")
MOST_GATHERED = 2**28  # numbers that batched_mm may copy: more would not fit into memory


def ours(e: int, a: int, m: int, f: int) -> Experts:
    config = ModelConfig(
        vocab_size=2, d_model=m, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=2, d_ff=f,
        max_seq_len=2, experts=ExpertsConfig(e, a, f, layers=(0,)),
    )  # fmt: skip
    return Experts(config)


def theirs(made: Experts, kind: str) -> Qwen3MoeSparseMoeBlock:
    s, m = made.settings, made.config.d_model
    config = Qwen3MoeConfig(
        hidden_size=m, moe_intermediate_size=s.d_ff, num_experts=s.n_experts,
        num_experts_per_tok=s.n_active, norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = kind
    block = Qwen3MoeSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(made.router.weight)
        block.experts.gate_up_proj.copy_(torch.cat([made.gate, made.up], 1))
        block.experts.down_proj.copy_(made.down)
    return block


def runner(part: nn.Module, x: Tensor, train: bool) -> Callable[[], Tensor]:
    def run() -> Tensor:
        if not train:
            with torch.no_grad():
                return part(x)
        part.zero_grad()
        x.grad = None
        y = part(x)
        y.square().sum().backward()
        return y

    return run


def measure(case: tuple[int, int, int, int, int, bool], rounds: int) -> dict[str, Any]:
    e, a, m, f, n, train = case
    torch.manual_seed(0)
    made = ours(e, a, m, f)
    x = torch.randn(1, n, m, requires_grad=train)
    runs = {"ours": runner(made, x, train)}
    for kind in PEERS:
        if kind != "batched_mm" or n * a * 3 * m * f <= MOST_GATHERED:
            runs[f"transformers {kind}"] = runner(theirs(made, kind), x, train)
    wanted = runs["ours"]().detach()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        torch.testing.assert_close(run().detach(), wanted, atol=1e-4, rtol=1e-3, msg=name)
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: median(values) for name, values in seconds.items()}
    best = min(value for name, value in medians.items() if name != "ours")
    return {
        "shape": dict(zip(NAMES, case[:5], strict=True)),
        "training": train,
        "median_seconds": medians,
        "ours_over_best_peer": medians["ours"] / best,
        "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    made = parser(__doc__ or "", "experts.json")
    made.add_argument("--rounds", type=int, default=15)
    made.add_argument("--threads", type=int, default=1)
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for name, case in CASES.items():
        wait_for_quiet(args.force)
        results[name] = measure(case, args.rounds)
        said = ", ".join(f"{k} {1e3 * v:.2f}" for k, v in results[name]["median_seconds"].items())
        print(f"{name}: {said} ms; ours / best {results[name]['ours_over_best_peer']:.2f}")
    record(args.out, {"threads": args.threads, "layers": results}, [], ["transformers"])


if __name__ == "__main__":
    main()
