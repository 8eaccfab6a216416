"""Sums and differences of two-digit numbers: a weak calculator, and what GRPO makes of it.

The starting model reads one line per problem. The writer of a line is drawn: RIGHT of them
calculate well, the others have two habits of schoolchildren (Brown and Burton, "Diagnostic models
for procedural bugs in basic mathematical skills", 1978): they forget every carry (47+38=75,
57+61=18), and in a difference take the smaller digit from the larger one (52-38=26). The model
learns to write as both do, and, asked for its likeliest answer, writes as most do. Then GRPO
rewards right numbers and nothing else.

1,000 pairs of operands are in no text that is learnt from and in no prompt, neither way round; all
figures are on their sums and differences.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, parser, record, wait_for_quiet

IMAGES = ROOT / "docs" / "images"
RIGHT = 0.2  # of the writers
HELD_OUT = 1000  # pairs
VALIDATION = 150  # pairs, on which the best model is chosen
SAMPLES = 8  # answers drawn per problem, to see what the start can do at all

START = {
    "data.seq_len": 64, "data.val_fraction": 0.05, "data.drop_duplicates": "false",
    "tokenizer.kind": "char", "model.d_model": 96, "model.n_layers": 3, "model.n_heads": 4,
    "model.max_seq_len": 64, "train.max_steps": 1500, "train.batch_size": 32,
    "train.learning_rate": 3e-3, "train.eval_every": 150, "train.patience": 3,
    "train.sample_every": 0, "train.precision": "fp32",
}  # fmt: skip
GRPO = {
    "data.drop_duplicates": "false", "grpo.max_new_tokens": 5, "grpo.group_size": 16,
    "grpo.steps_per_rollout": 2, "grpo.at_once": 512, "grpo.kl": 0.01, "train.epochs": "null",
    "train.max_steps": 160, "train.batch_size": 256, "train.learning_rate": 1e-4,
    "train.eval_every": 10, "train.sample_every": 0, "train.precision": "fp32",
}  # fmt: skip
CURVES = (
    "reward", "val_accuracy", "policy_loss", "kl", "clip_fraction", "zero_variance", "entropy",
    "completion_length", "truncated", "grad_norm", "reward_std",
)  # fmt: skip

Problem = tuple[int, str, int]


def problems_of(pairs: Sequence[tuple[int, int]]) -> list[Problem]:
    return [(a, sign, b) for a, b in pairs for sign in "+-"]


def right(a: int, sign: str, b: int) -> int:
    return a + b if sign == "+" else a - b


def careless(a: int, sign: str, b: int) -> int:
    """Digit by digit: no carry, and always the smaller from the larger."""
    tens, ones = (a // 10, b // 10), (a % 10, b % 10)
    if sign == "+":
        return sum(tens) % 10 * 10 + sum(ones) % 10
    return abs(tens[0] - tens[1]) * 10 + abs(ones[0] - ones[1])


def divided(seed: int) -> dict[str, list[tuple[int, int]]]:
    """All pairs of two-digit numbers: those held out and those to choose on, one way round, and the
    rest, both ways round."""
    draw = random.Random(seed)
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    draw.shuffle(pairs)
    turned = [pair if draw.random() < 0.5 else pair[::-1] for pair in pairs]
    rest = pairs[HELD_OUT + VALIDATION :]
    return {
        "test": turned[:HELD_OUT],
        "val": turned[HELD_OUT : HELD_OUT + VALIDATION],
        "train": list(dict.fromkeys(rest + [(b, a) for a, b in rest])),
    }


def write_data(folder: Path, seed: int) -> dict[str, int]:
    """start.jsonl to read, and prompts with their answers; how many of each."""
    parts, draw, counts = divided(seed), random.Random(seed + 1000), {}
    lines = []
    for problem in problems_of(parts["train"]):
        writer = right if draw.random() < RIGHT else careless
        a, sign, b = problem
        lines.append({"text": f"{a}{sign}{b}={writer(*problem)}"})
    draw.shuffle(lines)
    tables = {"start": lines}
    for name, pairs in parts.items():
        tables[name] = [
            {"prompt": f"{a}{sign}{b}=", "answer": str(right(a, sign, b))}
            for a, sign, b in problems_of(pairs)
        ]
    for name, rows in tables.items():
        counts[f"{name}_lines"] = len(rows)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return counts


def command(*words: Any, **settings: Any) -> dict[str, Any]:
    """`scratchlm ...` in a process of its own; its summary and how long it took."""
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "llm_from_scratch", *map(str, words), *flags],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    summary: dict[str, Any] = json.loads(done.stdout)
    return {**summary, "wall_seconds": round(time.perf_counter() - start, 1)}


def shares(model: Path, problems: Sequence[Problem]) -> dict[str, float]:
    """How often a model is right: greedily, by kind of problem, and when it is let draw."""
    import llm_from_scratch as llm
    from llm_from_scratch.generate.generate import encode_prompt
    from llm_from_scratch.train.rollouts import write

    loaded, tokenizer = llm.load(str(model))
    prompts = [encode_prompt(tokenizer, f"{a}{sign}{b}=") for a, sign, b in problems]

    def hits(size: int, temperature: float) -> list[int]:
        written = write(
            loaded, prompts, size, max_new_tokens=5, temperature=temperature,
            end_ids=frozenset(tokenizer.stop_ids), seed=0, at_once=256,
        )  # fmt: skip
        return [
            sum(tokenizer.decode(w.tokens[:-1]) == str(right(*problem)) for w in group if w.ended)
            for group, problem in zip(written, problems, strict=True)
        ]

    greedy, drawn = hits(1, 0.0), hits(SAMPLES, 1.0)

    def share(kind: Callable[[Problem], bool]) -> float:
        chosen = [hit for hit, problem in zip(greedy, problems, strict=True) if kind(problem)]
        return sum(chosen) / len(chosen)

    return {
        "greedy": share(lambda p: True),
        "sums": share(lambda p: p[1] == "+"),
        "differences": share(lambda p: p[1] == "-"),
        "where_the_careless_are_right": share(lambda p: right(*p) == careless(*p)),
        "where_they_are_wrong": share(lambda p: right(*p) != careless(*p)),
        "drawn": sum(drawn) / len(drawn) / SAMPLES,
        "right_once_in_8": sum(hit > 0 for hit in drawn) / len(drawn),
    }


def one(folder: Path, seed: int, steps: dict[str, int]) -> dict[str, Any]:
    """A start from nothing, and GRPO from there."""
    began = time.perf_counter()
    counts = write_data(folder, seed)
    begin, run = folder / "start", folder / "grpo"
    pretrained = command(
        "pretrain", "--data", folder / "start.jsonl", "--out", begin, "--json",
        **{**START, "train.max_steps": steps["start"], "train.seed": seed},
    )  # fmt: skip
    tuned = command(
        "finetune", "grpo", begin, "--data", folder / "train.jsonl", "--val", folder / "val.jsonl",
        "--test", folder / "test.jsonl", "--out", run, "--json",
        **{**GRPO, "train.max_steps": steps["grpo"], "train.seed": seed},
    )  # fmt: skip
    wall = time.perf_counter() - began
    held_out = problems_of(divided(seed)["test"])
    return {
        "seed": seed, "wall_seconds": round(wall, 1), **counts,
        "start": pretrained, "grpo": tuned,
        "before": shares(begin, held_out), "after": shares(run, held_out),
        "curves": curves(run), "start_curve": curves(begin, ("val_loss",))["val_loss"],
    }  # fmt: skip


def curves(run: Path, names: Sequence[str] = CURVES) -> dict[str, list[list[float]]]:
    """[step, value] of what was logged."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return {
        name: [[r["step"], float(f"{r[name]:.4g}")] for r in records if name in r] for name in names
    }


# --- pictures ------------------------------------------------------------------------------------

PICTURES = {
    "grpo-reward": (("reward", "reward while learning"), ("val_accuracy", "greedy accuracy")),
    "grpo-curves": (
        ("policy_loss", "policy_loss"), ("kl", "kl"), ("entropy", "entropy (nats)"),
        ("zero_variance", "zero_variance"), ("clip_fraction", "clip_fraction"),
        ("completion_length", "completion_length"),
    ),
}  # fmt: skip


def draw(runs: Sequence[dict[str, Any]], folder: Path) -> None:
    """The pictures of docs/en/grpo.md, a line for each seed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for name, panels in PICTURES.items():
        columns = 2 if len(panels) == 2 else 3
        rows = len(panels) // columns
        figure, axes = plt.subplots(
            rows, columns, figsize=(3.2 * columns, 2.5 * rows), layout="constrained"
        )
        for axis, (figure_name, title) in zip(axes.flat, panels, strict=True):
            for place, run in enumerate(runs):
                steps, values = zip(*run["curves"][figure_name], strict=True)
                axis.plot(steps, values, lw=1.1, color=f"C{place}", label=f"seed {run['seed']}")
            values = sorted(value for run in runs for _, value in run["curves"][figure_name])
            usual = values[int(0.995 * len(values)) - 1]
            if values[-1] > 3 * usual > 0:  # a single spike would flatten everything else
                axis.set_ylim(min(0, values[0]) - 0.05 * usual, 1.2 * usual)
            axis.set_title(title, fontsize=9)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3)
        axes.flat[0].legend(fontsize=7)
        for axis in axes.flat[-columns:]:
            axis.set_xlabel("step", fontsize=8)
        figure.savefig(folder / f"{name}.png", dpi=110)
        plt.close(figure)


def main() -> None:
    arguments = parser(__doc__, "arithmetic.json")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--start_steps", type=int, default=START["train.max_steps"])
    arguments.add_argument("--grpo_steps", type=int, default=GRPO["train.max_steps"])
    arguments.add_argument("--images", type=Path, default=IMAGES, help="where the pictures go")
    arguments.add_argument("--keep", type=Path, help="keep the runs in this folder")
    arguments.add_argument("--draw", action="store_true", help="draw the pictures of --out anew")
    args = arguments.parse_args()
    if args.draw:
        draw(json.loads(args.out.read_text(encoding="utf-8"))["results"]["runs"], args.images)
        return
    steps = {"start": args.start_steps, "grpo": args.grpo_steps}
    runs = []
    for seed in range(1, args.seeds + 1):
        wait_for_quiet(args.force)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) if args.keep is None else args.keep / f"seed-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            runs.append(one(folder, seed, steps))
        row = runs[-1]
        print(seed, row["wall_seconds"], "s", row["before"], row["after"], flush=True)
    results = {
        "right_writers": RIGHT, "held_out_pairs": HELD_OUT, "start_settings": START,
        "grpo_settings": GRPO, "runs": runs,
    }  # fmt: skip
    record(args.out, results, [], [])
    draw(runs, args.images)


if __name__ == "__main__":
    main()
