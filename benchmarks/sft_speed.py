"""Supervised fine-tuning beside TRL and PEFT: tokens per second and peak memory.

The same weights (SmolLM2-135M, fp32 with bf16 arithmetic), the same conversations in the same
order, the same optimiser (AdamW), batches of 8 conversations, loss on all tokens. Full
fine-tuning, and LoRA of rank 16 on all linear layers of the blocks. Tokens are those of the
conversations; padding does not count.

Both sides run keeping their activations and recomputing them (TRL's `gradient_checkpointing`, its
default; ours is `sft.recompute`), which saves memory and takes time. Every runner is a process of
its own, whose peak memory is that of the whole process; rounds are interleaved, and the figures are
medians over rounds. The first steps are outside the clock.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import data_file, median, parser, record, wait_for_quiet

MODEL = "smollm2-135m"
DATA = "instruction-data/instruction-data.json"
BATCH, RANK, RATE = 8, 16, 2e-5
WARM_UP, STEPS = 2, 8
RUNNERS = tuple(
    f"{who} {what}{recomputing}"
    for what in ("full", "lora")
    for recomputing in ("", ", recomputing")
    for who in ("ours", "trl")
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peak_gb() -> float:
    """The most memory that this process has had, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Clock:
    """Seconds of each step after the warm-up."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last = time.perf_counter()

    def tick(self) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def settings(lora: bool, recompute: bool = False) -> Any:
    from llm_from_scratch.core.config import from_dict
    from llm_from_scratch.train.methods.sft import SftConfig

    return from_dict(SftConfig, {
        "model": MODEL,
        "sft": {"template": "alpaca", "loss_on": "all", "recompute": recompute},
        "lora": {"rank": RANK if lora else 0, "alpha": 2.0 * RANK},
        "train": {
            "batch_size": BATCH, "learning_rate": RATE, "schedule": "constant", "warmup_steps": 0,
            "precision": "bf16", "device": "cpu", "max_steps": 10**6, "epochs": None,
        },
    })  # fmt: skip


def ours(lora: bool, recompute: bool, items: list[list[int]]) -> dict[str, Any]:
    """The project's loop with its method sft."""
    import torch

    from llm_from_scratch.core.runlog import LiveLine
    from llm_from_scratch.text.chat import ChatTokens
    from llm_from_scratch.train.adapt import adapt
    from llm_from_scratch.train.loop import Loop
    from llm_from_scratch.train.methods.sft import Sft

    class InOrder:
        def batch(self, start: int, count: int) -> Any:
            rows = [items[i % len(items)] for i in range(start, start + count)]
            return method.collate([ChatTokens(ids, [1] * len(ids)) for ids in rows])

    config = settings(lora, recompute)
    method = Sft(config)
    model = method.open()
    adapt(model, config.lora, config.freeze, 1, LiveLine(quiet=True))
    device = torch.device("cpu")
    loop = Loop(model, method, InOrder(), config.train, device=device, quiet=True)
    model.train()
    clock = Clock()
    losses = []
    for _ in range(WARM_UP + STEPS):
        losses.append(loop.step()["loss"])
        clock.tick()
    return {"losses": losses, "seconds": clock.seconds}


def theirs(lora: bool, recompute: bool, items: list[list[int]], folder: str) -> dict[str, Any]:
    """TRL's SFTTrainer, with PEFT's LoRA."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    clock, losses = Clock(), []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.tick()

        def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    class InOrder(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset or self.train_dataset)

    steps = WARM_UP + STEPS
    rows = [items[i % len(items)] for i in range(BATCH * steps)]
    with tempfile.TemporaryDirectory() as out:
        trainer = InOrder(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(folder),
            args=SFTConfig(
                output_dir=out, use_cpu=True, bf16=True, per_device_train_batch_size=BATCH,
                max_steps=steps, learning_rate=RATE, lr_scheduler_type="constant",
                weight_decay=0.01, max_grad_norm=1.0, logging_steps=1, save_strategy="no",
                report_to="none", disable_tqdm=True, gradient_checkpointing=recompute,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in rows]),
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
            if lora
            else None,
            callbacks=[Watch()],
        )  # fmt: skip
        clock.last = time.perf_counter()
        trainer.train()
    return {"losses": losses, "seconds": clock.seconds}


def one(name: str, files: str) -> None:
    """Run one runner in this process, and print what it found as JSON."""
    import torch

    torch.set_num_threads(int(os.environ["SFT_THREADS"]))
    items = json.loads((Path(files) / "items.json").read_text(encoding="utf-8"))
    kind, _, variant = name.partition(", ")
    who, what = kind.split()
    lora = what == "lora"
    if who == "ours":
        found = ours(lora, bool(variant), items)
    else:
        found = theirs(lora, bool(variant), items, str(Path(files) / "model"))
    tokens = [
        sum(len(items[i % len(items)]) for i in range(n * BATCH, (n + 1) * BATCH))
        for n in range(WARM_UP, WARM_UP + STEPS)
    ]
    found["tokens"] = sum(tokens)
    found["tokens_per_second"] = sum(tokens) / sum(found.pop("seconds")[WARM_UP:])
    found["peak_gb"] = peak_gb()
    print("\n" + json.dumps(found))


def prepare(folder: Path) -> None:
    """The conversations as token ids, and the weights as a folder that everybody reads."""
    import llm_from_scratch as llm
    from llm_from_scratch.train.methods.sft import Sft

    method = Sft(settings(False))
    model = method.open()
    rows = json.loads(data_file(DATA).read_text(encoding="utf-8"))[: BATCH * (WARM_UP + STEPS)]
    items = [method.encode(method.check(row)).ids for row in rows]
    (folder / "items.json").write_text(json.dumps(items), encoding="utf-8")
    llm.save(model, method.tokenizer, folder / "model")


def main() -> None:
    arguments = parser(__doc__, "sft_speed.json")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--only", nargs="+", choices=RUNNERS, default=RUNNERS)
    arguments.add_argument("--one", choices=RUNNERS, help="(used by this script itself)")
    arguments.add_argument("--files", help="(used by this script itself)")
    args = arguments.parse_args()
    if args.one:
        one(args.one, args.files)
        return
    wait_for_quiet(args.force)
    raw: dict[str, list[dict[str, Any]]] = {name: [] for name in args.only}
    with tempfile.TemporaryDirectory() as folder:
        again = [sys.executable, __file__, "--files", folder, "--one"]
        prepare(Path(folder))
        environment = {
            **os.environ, "SFT_THREADS": str(args.threads), "OMP_NUM_THREADS": str(args.threads),
            "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        for _ in range(args.rounds):
            for name in args.only:
                done = subprocess.run(
                    [*again, name], env=environment, stdout=subprocess.PIPE, text=True, check=True
                )
                found = json.loads(done.stdout.strip().split("\n")[-1])
                raw[name].append(found)
                rate, peak = found["tokens_per_second"], found["peak_gb"]
                print(f"{name:<28} {rate:>7.1f} tokens/s  peak {peak:.2f} GB", flush=True)
    rates = {n: median([run["tokens_per_second"] for run in runs]) for n, runs in raw.items()}
    peaks = {n: median([run["peak_gb"] for run in runs]) for n, runs in raw.items()}
    results = {
        "model": MODEL, "batch": BATCH, "rank": RANK, "threads": args.threads, "steps": STEPS,
        "tokens_per_second": rates, "peak_gb": peaks, "raw": raw,
    }  # fmt: skip
    record(args.out, results, [DATA], ["trl", "peft", "transformers", "torch"])


if __name__ == "__main__":
    main()
