"""Training speed beside transformers' GPT-2: same architecture, same initial weights, same batches.

The peer is a bare AdamW loop in fp32 without a key-value cache. Ours is the project's own training
loop (which also measures the gradient norm), in bf16 and in fp32. Both sides use PyTorch's fused
AdamW and no dropout; a few steps of warm-up are outside the clock, and nothing is compiled.
Rounds of the three are interleaved; the figures are medians over rounds.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import data_file, median, parser, record, wait_for_quiet

from llm_from_scratch.data.loader import Batch
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.flops import parameter_count
from llm_from_scratch.model.presets import ModelSettings, resolve
from llm_from_scratch.train.loop import Loop
from llm_from_scratch.train.pretrain import NextToken
from llm_from_scratch.train.settings import TrainSettings
from llm_from_scratch.weights.folder import save_folder

SIZES = {"10.7M": ("gpt2-10m", 8, 256), "0.8M": ("nano-char", 12, 64)}
RATE = 3e-4


class Batches:
    """Equal batches for everyone: windows of tinyshakespeare, drawn by number."""

    def __init__(self, ids: torch.Tensor, batch: int, length: int) -> None:
        self.ids, self.size, self.length = ids, batch, length

    def batch(self, start: int, count: int) -> Batch:
        generator = torch.Generator().manual_seed(start)
        begins = torch.randint(0, len(self.ids) - self.length - 1, (count,), generator=generator)
        window = self.ids[begins[:, None] + torch.arange(self.length + 1)]
        return Batch(window[:, :-1], window[:, 1:])


class Ours:
    """The project's loop on a decoder with the shared initial weights."""

    def __init__(self, base: Decoder, data: Batches, dtype: torch.dtype | None) -> None:
        self.model = Decoder(base.config)
        self.model.load_state_dict(base.state_dict())
        self.model.compute_dtype = dtype
        settings = TrainSettings(
            batch_size=data.size, optimizer="adamw", learning_rate=RATE, schedule="constant",
            warmup_steps=0, weight_decay=0.01, beta2=0.999, grad_clip=0.0, max_steps=10**6,
        )  # fmt: skip
        device = torch.device("cpu")
        self.loop = Loop(self.model, NextToken(), data, settings, device=device, quiet=True)
        self.model.train()

    def step(self) -> float:
        return self.loop.step()["loss"]

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        logits = self.model(batch.tokens).float()
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).item()


class Theirs:
    """GPT2LMHeadModel with torch.optim.AdamW, fused as ours is."""

    def __init__(self, base: Decoder, data: Batches) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        with tempfile.TemporaryDirectory() as folder:
            save_folder(base, None, Path(folder) / "model")
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                Path(folder) / "model", dtype=torch.float32
            )
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            assert getattr(self.model.config, name) == 0.0, name
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, fused=True)
        self.data, self.done = data, 0

    def step(self) -> float:
        batch = self.data.batch(self.done * self.data.size, self.data.size)
        self.done += 1
        logits = self.model(input_ids=batch.tokens, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        logits = self.model(input_ids=batch.tokens).logits
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).item()


def runners(size: str, ids: torch.Tensor) -> tuple[dict[str, Any], Batches]:
    preset, batch, length = SIZES[size]
    base = Decoder(resolve(ModelSettings(preset=preset), 65, length))
    base.initialise(1)
    data = Batches(ids, batch, length)
    made = {
        "transformers fp32": Theirs(base, data),
        "ours fp32": Ours(base, data, None),
        "ours bf16": Ours(base, data, torch.bfloat16),
    }
    return made, data


def measure(size: str, ids: torch.Tensor, threads: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    made, data = runners(size, ids)
    steps = 3 if size == "10.7M" else 40
    for runner in made.values():
        for _ in range(2):
            runner.step()
    raw: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, runner in made.items():
            start = time.perf_counter()
            for _ in range(steps):
                runner.step()
            seconds = time.perf_counter() - start
            raw[name].append(steps * data.size * data.length / seconds)
    rates = {name: median(values) for name, values in raw.items()}
    base = rates["transformers fp32"]
    ratios = {name: rate / base for name, rate in rates.items()}
    for name, rate in rates.items():
        print(
            f"{size:>6} {threads} thread(s) {name:<18} {rate:>9,.0f} tokens/s {ratios[name]:.2f}x"
        )
    return {
        "size": size, "threads": threads, "batch": data.size, "seq_len": data.length,
        "parameters": parameter_count(made["ours fp32"].model.config), "steps_per_round": steps,
        "tokens_per_second": rates, "ratio": ratios, "raw_tokens_per_second": raw,
    }  # fmt: skip


def same_loss(size: str, ids: torch.Tensor, steps: int = 200) -> dict[str, Any]:
    """Loss on 16 further batches after `steps` equal ones, and how far apart they are."""
    torch.set_num_threads(2)
    made, data = runners(size, ids)
    made.pop("ours fp32")  # equal to the peer's but for rounding (tests/model); it takes minutes
    test = data.batch(10**9, 16 * data.size)
    losses: dict[str, float] = {}
    for name, runner in made.items():
        for _ in range(steps):
            runner.step()
        losses[name] = runner.loss(test)
        print(f"{size:>6} after {steps} batches: {name:<18} loss {losses[name]:.4f}")
    base = losses["transformers fp32"]
    apart = {name: abs(value / base - 1) for name, value in losses.items()}
    return {"size": size, "steps": steps, "loss": losses, "apart": apart}


def main() -> None:
    arguments = parser(__doc__, "train_speed.json")
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument(
        "--part", choices=("speed", "loss"), default="speed",
        help="loss: after 200 equal batches, into train_loss.json",
    )  # fmt: skip
    args = arguments.parse_args()
    text = data_file("tinyshakespeare/input.txt").read_text(encoding="utf-8")
    index = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([index[c] for c in text])
    if args.part == "speed":
        wait_for_quiet(args.force)
        results = {"speed": [measure(s, ids, t, args.rounds) for s in SIZES for t in (1, 2)]}
    else:
        args.out = args.out.with_name("train_loss.json")
        rows = [same_loss(s, ids) for s in SIZES]
        results = {"learning_rate": RATE, "loss_after_200": rows}
    record(args.out, results, ["tinyshakespeare/input.txt"], ["transformers"])


if __name__ == "__main__":
    main()
