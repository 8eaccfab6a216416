"""From the command to the first token of `scratchlm generate smollm2-135m ... --chat`.

The file is in the system's page cache (one run before the clock starts). What is timed is the whole
process: Python, imports, reading the 98 MB Q4_1 file, the prompt, one new token. "cold" is the
first use on a machine: the kernels are still to be compiled, with 2 threads.
Needs `scratchlm pull smollm2-135m` first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import median, parser, record, wait_for_quiet

from llm_from_scratch.core.files import cache_folder

PROMPT = "What is the capital of France?"


def once(threads: int, new_tokens: int, cache: str | None = None) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "llm_from_scratch", "generate", "smollm2-135m", PROMPT, "--chat",
        "--max_new_tokens", str(new_tokens), "--json",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if cache is not None:  # one that has the model, but no kernels
        (Path(cache) / "models").symlink_to(cache_folder() / "models")
        env["SCRATCHLM_CACHE"] = cache
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    seconds = time.perf_counter() - start
    return {**json.loads(done.stdout), "wall_seconds": seconds}


def main() -> None:
    arguments = parser(__doc__, "first_token.json")
    arguments.add_argument("--runs", type=int, default=7)
    args = arguments.parse_args()
    answer = once(2, 24)["text"]
    wait_for_quiet(args.force)
    results: dict[str, Any] = {"prompt": PROMPT, "answer": answer, "seconds": {}, "raw": {}}
    raw: dict[str, list[float]] = {"1": [], "2": [], "cold": []}
    for _ in range(args.runs):
        raw["1"].append(once(1, 1)["wall_seconds"])
        raw["2"].append(once(2, 1)["wall_seconds"])
        with tempfile.TemporaryDirectory() as cache:
            raw["cold"].append(once(2, 1, cache)["wall_seconds"])
    results["raw"] = raw
    for name, values in raw.items():
        results["seconds"][name] = median(values)
        print(f"{name}: {median(values):.2f} s from command to first token")
    print(f"Answer: {answer}")
    record(args.out, results, [], [])


if __name__ == "__main__":
    main()
