"""Memory that is given back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from pathlib import Path

import torch

from llm_from_scratch.core.freed import return_large


def held() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


if sys.argv[1] == "returned":
    return_large()
torch.ones(6 << 20).sum()  # 24 MB: from now on the heap would serve what is smaller, did we not ask
before, kept = held(), []
for _ in range(3):
    large = [torch.ones(1 << 19) for _ in range(40)]
    kept += [tensor[:1].clone().expand(1 << 10).clone() for tensor in large]  # between them
    del large[::2]
    large = []
print((held() - before) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_large_tensors_leave_no_holes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "returned"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 8  # of 80 MB
