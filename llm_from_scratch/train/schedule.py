"""The learning rate as a pure function of the step: nothing to save, nothing to get wrong."""

from __future__ import annotations

import math

SCHEDULES = ("wsd", "cosine", "constant")


def learning_rate_share(
    step: int, max_steps: int, warmup_steps: int, schedule: str, floor: float, decay_share: float
) -> float:
    """Share of the peak learning rate in step `step` (counted from 0): in (0, 1].

    Warm-up rises linearly over the first `warmup_steps`. Then `cosine` falls along half a cosine,
    which would reach `floor` in the step after the last (arXiv:1608.03983); `wsd` stays and falls
    linearly likewise over the last `decay_share` of the steps (warm-up-stable-decay,
    arXiv:2404.06395); `constant` stays.
    """
    assert schedule in SCHEDULES, schedule
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        done = (step - warmup_steps) / max(1, max_steps - warmup_steps)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    decay_steps = max(1, min(round(decay_share * max_steps), max_steps - warmup_steps))
    left = min(1.0, (max_steps - step) / decay_steps)
    return floor + (1 - floor) * left
