"""From the command to the first token of `scratchlm generate smollm2-135m ... --chat`.

The file is in the system's page cache (one run before the clock starts). What is timed is the whole
process: Python, imports, reading and decoding the 98 MB Q4_1 file, the prompt, one new token.
Needs `scratchlm pull smollm2-135m` first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

from common import median, parser, record, wait_for_quiet

PROMPT = "What is the capital of France?"


def once(threads: int, new_tokens: int) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "llm_from_scratch", "generate", "smollm2-135m", PROMPT, "--chat",
        "--max_new_tokens", str(new_tokens), "--json",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
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
    raw: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(args.runs):
        for threads, values in raw.items():
            values.append(once(threads, 1)["wall_seconds"])
    for threads, values in raw.items():
        results["seconds"][str(threads)] = median(values)
        results["raw"][str(threads)] = values
        print(f"{threads} thread(s): {median(values):.2f} s from command to first token")
    print(f"Answer: {answer}")
    record(args.out, results, [], [])


if __name__ == "__main__":
    main()
