"""Loading holds the weights once: what is read is mapped, and one tensor at a time is converted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm_from_scratch.model.config import ExpertsConfig, ModelConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.weights.assemble import empty_model
from llm_from_scratch.weights.folder import save_folder

# Prints the anonymous memory that was resident before, at its highest, and after loading. It is
# looked at whenever a parameter takes its place, which is when one tensor is there twice.
MEASURE = """
import json, sys, threading, torch
from llm_from_scratch.weights import assemble, folder
torch.set_num_threads(1)

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

folder.load_folder(sys.argv[2])  # warm: what the libraries need themselves is there
seen = [anonymous()]
stop = threading.Event()

def watch():
    while not stop.wait(0.0005):
        seen.append(anonymous())

put = folder.put
def put_and_look(*args):
    put(*args)
    seen.append(anonymous())
folder.put = put_and_look
watcher = threading.Thread(target=watch)
watcher.start()
model, _ = folder.load_folder(sys.argv[1], dtype=getattr(torch, sys.argv[3]))
stop.set()
watcher.join()
weights = sum(p.nbytes for p in model.parameters())
print(json.dumps({"before": seen[0], "highest": max(seen), "weights": weights}))
"""


def write_folder(path: Path, family: str, d_model: int, dtype: torch.dtype) -> None:
    """A model of this width, in shards, none of whose tensors is more than a tenth of it."""
    fields = {
        "vocab_size": 4 * d_model, "d_model": d_model, "n_layers": 6, "n_heads": 8,
        "n_kv_heads": 8, "head_dim": d_model // 8, "d_ff": 3 * d_model, "max_seq_len": 64,
        "family": family,
    }  # fmt: skip
    more = {
        "llama": {},
        "gpt2": {
            "norm": "layer", "gated": False, "attention_bias": True, "output_bias": True,
            "feed_forward_bias": True, "position": "learned",
        },
        "qwen3_moe": {
            "qk_norm": "head",
            "experts": ExpertsConfig(4, 2, d_model // 2, layers=tuple(range(6))),
        },
    }[family]  # fmt: skip
    model = empty_model(ModelConfig(**fields, **more))  # type: ignore[arg-type]
    assert isinstance(model, Decoder)
    model.to_empty(device="cpu")
    model.to(dtype)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    save_folder(model, None, path, shard_bytes=20_000_000)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("family", "stored", "wanted"),
    [
        ("llama", "bfloat16", "float32"),
        ("llama", "float32", "bfloat16"),
        ("gpt2", "float32", "float32"),
        ("qwen3_moe", "bfloat16", "bfloat16"),
    ],
)
def test_loading_takes_little_more_than_the_weights(
    family: str, stored: str, wanted: str, tmp_path: Path
) -> None:
    write_folder(tmp_path / "large", family, 640, getattr(torch, stored))
    write_folder(tmp_path / "small", family, 64, getattr(torch, stored))
    command = [sys.executable, "-c", MEASURE, tmp_path / "large", tmp_path / "small", wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["weights"] > 40_000_000
    taken = seen["highest"] - seen["before"]
    assert 0.9 * seen["weights"] < taken <= 1.15 * seen["weights"], taken / seen["weights"]
