"""Every benchmark, one after the other, each into its JSON under benchmarks/results/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NAMES = (
    "bpe_training", "unigram_training", "first_token", "inference", "quantization",
    "train_speed", "train_speed --part loss", "tinyshakespeare", "quickstart", "gguf_parity",
    "experts", "finetune --work build/finetune", "sft_speed", "arithmetic", "tables",
)  # fmt: skip


def main() -> None:
    folder = Path(__file__).resolve().parent
    failed = []
    for name in NAMES:
        print(f"\n== {name}\n", flush=True)
        script, *flags = name.split()
        if subprocess.run([sys.executable, str(folder / f"{script}.py"), *flags]).returncode:
            failed.append(name)
    sys.exit(f"Failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
