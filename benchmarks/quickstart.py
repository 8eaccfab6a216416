"""The quickstart as a user runs it, timed from outside: bits per byte beside gzip, bz2 and xz."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, median, parser, record, wait_for_quiet

PICTURE = ROOT / "docs" / "images" / "quickstart.png"


def main() -> None:
    arguments = parser(__doc__, "quickstart.json")
    arguments.add_argument("--runs", type=int, default=1)
    args = arguments.parse_args()
    rows = []
    for number in range(args.runs):
        wait_for_quiet(args.force)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "quickstart"
            command = [sys.executable, "-m", "llm_from_scratch", "quickstart", "--json"]
            start = time.perf_counter()
            done = subprocess.run(
                [*command, "--out", str(out), "--train.seed", str(number + 1)],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            row = {"wall_seconds": time.perf_counter() - start, "seed": number + 1}
            row.update(json.loads(done.stdout))
            row["config"] = (out / "config.yaml").read_text(encoding="utf-8")
            row["samples"] = (out / "samples.md").read_text(encoding="utf-8")
            if number == 0:
                PICTURE.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(out / "loss.png", PICTURE)
        best = min(row[f"{n}_bits_per_byte"] for n in ("gzip", "bz2", "xz"))
        row["share_of_best_compressor"] = row["bits_per_byte"] / best
        rows.append(row)
        print({k: v for k, v in row.items() if k not in ("config", "samples")}, flush=True)
    results = {
        "runs": rows,
        "wall_seconds": median([r["wall_seconds"] for r in rows]),
        "bits_per_byte": median([r["bits_per_byte"] for r in rows]),
        "share_of_best_compressor": median([r["share_of_best_compressor"] for r in rows]),
    }
    record(args.out, results, [], [])


if __name__ == "__main__":
    main()
