"""llama.cpp beside ours on GGUF files that we wrote, of SmolLM2-135M-Instruct in five formats.

F32: the same greedy tokens from both. The others: both read the same file, see the same text, and
are compared at every position: how often they find the same token likeliest, and how far the
distribution of llama.cpp is from ours (KL divergence in nats). For information also: how far it is
from ours in fp32, which is mostly what the format itself costs. Both compute on the CPU; llama.cpp
rounds what goes into a matrix to the precision of the matrix (8 bits for Q8_0 and Q4_0), ours
decodes the matrix to fp32. Needs `pip install -r benchmarks/requirements.txt`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import data_file, parser, record

from llm_from_scratch.generate.generate import encode_prompt
from llm_from_scratch.model.cache import KVCache
from llm_from_scratch.weights.gguf_load import load_gguf
from llm_from_scratch.weights.gguf_save import KINDS, save_gguf
from llm_from_scratch.weights.sources import load

try:
    from llama_cpp import Llama
except ImportError:
    sys.exit("llama.cpp is missing: pip install -r benchmarks/requirements.txt")

MODEL = "smollm2-135m"
TEXT = "gutenberg/carroll-alice.txt"
POSITIONS, GREEDY = 512, 64
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "日本の首都は",
)


def peer(path: Path) -> Llama:
    """llama.cpp with the file, everything but the matrices in fp32."""
    return Llama(
        str(path), n_ctx=POSITIONS, n_batch=POSITIONS, n_ubatch=POSITIONS, logits_all=True,
        type_k=0, type_v=0, verbose=False,
    )  # fmt: skip


def peer_logits(llama: Llama, ids: list[int]) -> torch.Tensor:
    llama.reset()
    llama.eval(ids)
    return torch.from_numpy(llama.scores[: len(ids)].copy())


@torch.inference_mode()
def our_logits(model: Any, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]))[0]


def peer_greedy(llama: Llama, ids: list[int]) -> list[int]:
    llama.reset()
    llama.eval(ids)
    found: list[int] = []
    while True:
        found.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        if len(found) == GREEDY:
            return found
        llama.eval(found[-1:])


@torch.inference_mode()
def our_greedy(model: Any, ids: list[int]) -> list[int]:
    cache = KVCache(model.config, capacity=len(ids) + GREEDY, dtype=torch.float32)
    found: list[int] = []
    new = ids
    while True:
        found.append(int(model(torch.tensor([new]), cache=cache)[0, -1].argmax()))
        if len(found) == GREEDY:
            return found
        new = found[-1:]


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each position, in nats, from logits."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def compare(theirs: torch.Tensor, ours: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    apart, cost = divergence(theirs, ours), divergence(exact, theirs)
    return {
        "top1_agreement": float((theirs.argmax(-1) == ours.argmax(-1)).double().mean()),
        "mean_kl": float(apart.mean()),
        "largest_kl": float(apart.max()),
        "mean_kl_to_fp32": float(cost.mean()),
        "top1_agreement_with_fp32": float((theirs.argmax(-1) == exact.argmax(-1)).double().mean()),
    }


def main() -> None:
    args = parser(__doc__, "gguf_parity.json").parse_args()
    model, tokenizer = load(MODEL, dtype="fp32", device="cpu")
    text = data_file(TEXT).read_text(encoding="utf-8")
    ids = tokenizer.encode(text)[:POSITIONS]
    exact = our_logits(model, ids)
    results: dict[str, Any] = {"model": MODEL, "positions": len(ids), "formats": {}}
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            path = Path(folder) / f"{kind}.gguf"
            save_gguf(model, tokenizer, path, kind)
            llama, (back, own) = peer(path), load_gguf(path)
            assert own is not None
            assert (
                llama.tokenize(text.encode(), add_bos=False)[:POSITIONS]
                == own.encode(text)[:POSITIONS]
            )
            row: dict[str, Any] = {"bytes": path.stat().st_size}
            row |= compare(peer_logits(llama, ids), our_logits(back, ids), exact)
            if kind == "F32":
                results["greedy"] = []
                for prompt in PROMPTS:
                    start = encode_prompt(own, prompt)
                    theirs, ours = peer_greedy(llama, start), our_greedy(back, start)
                    same = {"prompt": prompt, "theirs": theirs, "ours": ours}
                    results["greedy"].append(same)
                    print(f"{prompt!r}: {own.decode(ours)!r}, equal: {theirs == ours}")
            results["formats"][kind] = row
            print(kind, {name: round(value, 6) for name, value in row.items()}, flush=True)
            llama.close()
            path.unlink()
    record(args.out, results, [TEXT], ["llama_cpp_python"])


if __name__ == "__main__":
    main()
