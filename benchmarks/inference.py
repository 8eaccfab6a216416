"""Inference on a CPU: ours beside llama.cpp and transformers, SmolLM2-135M-Instruct, same run.

Ours and llama.cpp read the same Q4_1 GGUF file as it is; transformers has the same weights in bf16.
Every side is a process of its own with 1 or with 2 threads; rounds are interleaved, figures are
medians. Greedy, the same prompts for all; the clocks count tokens that follow the first one
(decode), a prompt of 512 tokens with its first token (prefill), and 8 requests at once (together).

Memory: the peak of a fresh process that loads, reads 512 tokens and writes 128, above what it had
when its libraries were imported. MBU: the weights that a new token reads, times tokens/s, over the
memory bandwidth that `scratchlm doctor` measures. Agreement: 1,000 tokens of a text, ours beside
the plain twin, which has the same quantised weights as fp32 numbers. From the command to the first
token: first_token.py.

Needs `scratchlm pull smollm2-135m` and `pip install -r benchmarks/requirements.txt`.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import data_file, median, parser, record, wait_for_quiet

from llm_from_scratch.core.device import memory_bandwidth
from llm_from_scratch.generate.engine import Engine
from llm_from_scratch.generate.requests import Request
from llm_from_scratch.generate.sampling import SamplingSettings
from llm_from_scratch.quant.linear import QuantLinear
from llm_from_scratch.train.quantize import quantize
from llm_from_scratch.weights.folder import save_folder
from llm_from_scratch.weights.gguf_save import save_gguf
from llm_from_scratch.weights.packing import unpacked
from llm_from_scratch.weights.sources import load, locate

MODEL = "smollm2-135m"
TEXT = "wikitext2-valid/wiki.valid.tokens"
PREFILL, DECODE, SHORT = 512, 128, 32
TOGETHER, EACH = 8, 64  # texts, and tokens of each
TEACHER = 1000  # tokens on which the engine is compared with its plain twin
PEERS = ("ours", "llama.cpp", "transformers")


class Process:
    """One side with a number of threads."""

    def __init__(self, side: str, threads: int, path: Path) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        script = Path(__file__).with_name("inference_peers.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), side, str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip
        self.ask("load", path=str(path))

    def ask(self, do: str, **arguments: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"do": do, "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"A side of the benchmark ended: {self.process.args}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def rounds(paths: dict[str, Path], ids: list[int], count: int) -> dict[str, Any]:
    """tokens/s of every side, task and number of threads, all runs."""
    prompt, short = ids[:PREFILL], ids[:SHORT]
    many = [ids[i * SHORT : (i + 1) * SHORT] for i in range(TOGETHER)]
    found: dict[str, Any] = {}
    for threads in (1, 2):
        sides = {name: Process(name, threads, path) for name, path in paths.items()}
        raw: dict[str, dict[str, list[float]]] = {
            task: {name: [] for name in sides} for task in ("prefill", "decode", "together")
        }
        tokens: dict[str, list[int]] = {}
        for number in range(count + 1):  # the first round warms up
            for name, side in sides.items():
                prefill = PREFILL / side.ask("prefill", prompt=prompt)
                seconds, tokens[name] = side.ask("decode", prompt=short, new_tokens=DECODE)
                seconds_of_all = side.ask("together", prompts=many, new_tokens=EACH)
                if number:
                    raw["prefill"][name].append(prefill)
                    raw["decode"][name].append(DECODE / seconds)
                    raw["together"][name].append(TOGETHER * EACH / seconds_of_all)
            print(f"{threads} thread(s), round {number}", flush=True)
        for side in sides.values():
            side.close()
        middle = {task: {n: median(runs) for n, runs in by.items()} for task, by in raw.items()}
        found[str(threads)] = {"median": middle, "raw": raw, "tokens": tokens}
        found[str(threads)]["ratios"] = {
            "decode_to_llama_cpp": middle["decode"]["ours"] / middle["decode"]["llama.cpp"],
            "prefill_to_transformers": middle["prefill"]["ours"]
            / middle["prefill"]["transformers"],
            "together_to_llama_cpp": middle["together"]["ours"] / middle["together"]["llama.cpp"],
        }
        for task, by in middle.items():
            print(f"{threads} thread(s), {task}:", {n: round(v, 1) for n, v in by.items()})
        print(found[str(threads)]["ratios"], flush=True)
    return found


def memory(paths: dict[str, Path], ids: list[int], count: int) -> dict[str, Any]:
    """Bytes above the imported libraries at the peak, one fresh process each."""
    raw: dict[str, list[int]] = {name: [] for name in paths}
    for _ in range(count):
        for name, path in paths.items():
            side = Process(name, 1, path)
            side.ask("prefill", prompt=ids[:PREFILL])
            side.ask("decode", prompt=ids[:SHORT], new_tokens=DECODE)
            found = side.ask("memory")
            raw[name].append(found["end"]["peak"] - found["imported"]["now"])
            side.close()
    middle = {name: median(runs) for name, runs in raw.items()}
    print("Peak memory, MB:", {name: round(value / 1e6, 1) for name, value in middle.items()})
    return {
        "median": middle,
        "raw": raw,
        "ratio_to_llama_cpp": middle["ours"] / middle["llama.cpp"],
    }


def utilisation(speed: dict[str, Any]) -> dict[str, float]:
    """The share of the memory's bandwidth that writing one text takes, by threads."""
    model, _ = load(MODEL, device="cpu")
    read = sum(one.packed.nbytes for one in model.modules() if isinstance(one, QuantLinear))
    found = {}
    for threads, row in speed.items():
        torch.set_num_threads(int(threads))
        most = memory_bandwidth.__wrapped__("cpu")
        found[threads] = read * row["median"]["decode"]["ours"] / most
    return found


@torch.inference_mode()
def engine_logits(
    model: Any, ids: list[int], cache_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """What the engine's runner computes for every position, prompts in pieces as ever."""
    settings = SamplingSettings(max_new_tokens=1, temperature=0.0, prompt_logprobs=0)
    engine = Engine(model, cache_tokens=len(ids) + 1, cache_dtype=cache_dtype)
    run, heard = engine.runner.run, []
    engine.runner.run = lambda feeds: heard.append(run(feeds).clone()) or heard[-1]
    engine.submit(Request(ids, settings))
    while engine.busy:
        engine.step()
    return torch.cat(heard)


def apart(twin: torch.Tensor, ours: torch.Tensor) -> dict[str, float]:
    """KL(twin || ours) in nats and the share of positions with the same likeliest token."""
    p, q = twin.double().log_softmax(-1), ours.double().log_softmax(-1)
    return {
        "mean_kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "top1_agreement": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
    }


def agreement(gguf: Path, ids: list[int]) -> dict[str, Any]:
    """Ours beside the plain twin: the same quantised weights as fp32 numbers, in PyTorch."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        dense, tokenizer = load(gguf, dtype="fp32", device="cpu")
        paths = {"Q4_1": gguf, "Q4_0": folder / "q4_0.gguf", "Q8_0": folder / "q8_0.gguf"}
        for kind in ("Q4_0", "Q8_0"):
            save_gguf(dense, tokenizer, paths[kind], kind)
        del dense
        for to in ("int8", "int4", "nf4"):
            paths[to] = folder / to
            quantize(str(gguf), to, paths[to])
        for name, path in paths.items():
            model, _ = load(path, device="cpu")
            with torch.inference_mode():
                twin = unpacked(copy.deepcopy(model).float())(torch.tensor([ids]))[0]
            caches = [torch.float32]
            if name == "Q4_1":
                caches += [torch.bfloat16, torch.int8]
            for dtype in caches:
                said = str(dtype).removeprefix("torch.")
                row = apart(twin, engine_logits(model, ids, dtype))
                found[f"{name}, {said} cache"] = row
                print(name, said, row, flush=True)
    return found


def main() -> None:
    arguments = parser(__doc__, "inference.json")
    arguments.add_argument("--rounds", type=int, default=7)
    args = arguments.parse_args()
    gguf = locate(MODEL)
    model, tokenizer = load(MODEL, dtype="bf16", device="cpu")
    ids = tokenizer.encode(data_file(TEXT).read_text(encoding="utf-8")[:8000])
    with tempfile.TemporaryDirectory() as folder:
        save_folder(model, tokenizer, Path(folder) / "bf16")
        del model
        paths = {"ours": gguf, "llama.cpp": gguf, "transformers": Path(folder) / "bf16"}
        wait_for_quiet(args.force)
        results: dict[str, Any] = {
            "model": MODEL, "prefill": PREFILL, "decode": DECODE, "together": TOGETHER,
            "each": EACH,
            "speed": rounds(paths, ids, args.rounds),
            "memory": memory(paths, ids, min(args.rounds, 3)),
        }  # fmt: skip
        results["agreement"] = {"tokens": TEACHER, "formats": agreement(gguf, ids[:TEACHER])}
        results["mbu"] = utilisation(results["speed"])
    record(args.out, results, [TEXT], ["llama_cpp_python", "transformers"])


if __name__ == "__main__":
    main()
