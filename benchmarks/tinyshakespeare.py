"""Character-level tinyshakespeare: 2,000 steps of 12 x 64 tokens, at most 0.81 M parameters.

nanoGPT's recipe for the CPU reaches 1.88 nats per character in the same steps. Three seeds; the
loss is over the whole last 10 % in windows of 64, and once more computed by `transformers` from the
saved folder. Settings were chosen on the 10 % before (LAB_NOTES.md).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import data_file, parser, record

from llm_from_scratch.core.config import from_dict
from llm_from_scratch.data.loader import evaluation_batches
from llm_from_scratch.data.shards import TokenStore
from llm_from_scratch.train.pretrain import pretrain
from llm_from_scratch.train.settings import PretrainConfig

RECIPE: dict[str, Any] = {
    "data": {"seq_len": 64, "val_fraction": 0.1},
    "tokenizer": {"kind": "char"},
    "model": {"family": "llama", "d_model": 128, "n_layers": 4, "n_heads": 4, "d_ff": 344},
    "train": {
        "max_steps": 2000, "batch_size": 12, "learning_rate": 3e-3, "warmup_steps": 50,
        "schedule": "wsd", "decay_share": 1.0, "weight_decay": 0.1, "optimizer": "muon",
        "eval_every": 500, "eval_tokens": 10_000_000, "sample_every": 0, "checkpoint_every": 0,
    },
}  # fmt: skip


def loss_by_transformers(run: Path) -> float:
    """The same loss from the saved folder, by the library that others use."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in evaluation_batches(TokenStore.open(run / "tokens" / "val"), 64, 64):
            logits = model(input_ids=batch.tokens).logits.flatten(0, 1)
            total += F.cross_entropy(logits, batch.targets.flatten(), reduction="sum").item()
            count += int((batch.targets != -100).sum())
    return total / count


def main() -> None:
    arguments = parser(__doc__, "tinyshakespeare.json")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = arguments.parse_args()
    path = data_file("tinyshakespeare/input.txt")
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            out = Path(folder) / f"seed-{seed}"
            values = {**RECIPE, "out": str(out)}
            values["data"] = {**RECIPE["data"], "paths": [str(path)]}
            values["train"] = {**RECIPE["train"], "seed": seed}
            start = time.perf_counter()
            run = pretrain(from_dict(PretrainConfig, values), quiet=True)
            seconds = time.perf_counter() - start
            row = {
                "seed": seed, "val_loss": run.summary["val_loss"],
                "val_loss_by_transformers": loss_by_transformers(out),
                "parameters": run.summary["parameters"], "seconds": seconds,
                "precision": from_config(out),
            }  # fmt: skip
            print(row, flush=True)
            runs.append(row)
    mean = sum(r["val_loss"] for r in runs) / len(runs)
    print(f"mean of {len(runs)} seeds: {mean:.4f}")
    results = {"recipe": RECIPE, "runs": runs, "mean_val_loss": mean}
    record(args.out, results, ["tinyshakespeare/input.txt"], ["transformers"])


def from_config(run: Path) -> str:
    from llm_from_scratch.core.config import read_yaml

    return str(read_yaml(run / "config.yaml")["train"]["precision"])


if __name__ == "__main__":
    main()
