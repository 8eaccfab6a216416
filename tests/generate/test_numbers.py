"""Logits that are no numbers are found, wherever they lie; infinities and nothing at all pass."""

from __future__ import annotations

import math

import pytest
import torch

from llm_from_scratch.core.errors import RunError
from llm_from_scratch.generate.requests import check_numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("place", [0, 5, 40, 66])
def test_nan_is_found_among_infinities(dtype: torch.dtype, place: int) -> None:
    logits = torch.linspace(-3, 3, 67, dtype=dtype).repeat(2, 1)
    logits[0, 7], logits[1, 8] = math.inf, -math.inf
    check_numbers(logits)
    logits[1, place] = math.nan
    with pytest.raises(RunError, match="The draft's output is not a number"):
        check_numbers(logits, "draft")


def test_nothing_allowed_is_no_error() -> None:
    check_numbers(torch.full((2, 9), -math.inf))


@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta: as on a GPU, PyTorch does the work
def test_a_pass_without_logits(device: str) -> None:
    """Of a long prompt's first chunks no logits are wanted."""
    check_numbers(torch.empty(0, 9, device=device))
