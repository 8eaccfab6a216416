"""Fixtures that every test may use: the real data where there is some, and a quiet machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# As the command does: threads that wait sleep, so that tests are not slow on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, which share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real data: `$SCRATCHLM_DATA`, or `shared/data` beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SCRATCHLM_DATA", beside))
    if not folder.is_dir():
        pytest.skip("no real data here (set SCRATCHLM_DATA to have this test run)")
    return folder
