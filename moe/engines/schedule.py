"""The learning rate of a step: a pure function, so that resuming needs no state."""

from __future__ import annotations

import math

from moe.engines.settings import Schedule


def learning_rate(schedule: Schedule, step: int, steps: int, lr: float) -> float:
    """The rate of step 0 … steps-1: linear warm-up to `lr`, then the schedule; the last step has schedule.final * lr.

    cosine: Loshchilov & Hutter, 2017. wsd: constant, then a decay along 1 - sqrt (Hägele et al., 2024).
    """
    if step < schedule.warmup:
        return lr * (step + 1) / schedule.warmup
    if schedule.name == "constant":
        return lr
    start = schedule.warmup
    if schedule.name == "wsd":
        start = max(start, steps - round(schedule.decay * steps))
    done = min(max(0.0, (step - start) / max(1, steps - 1 - start)), 1.0)
    height = (1 + math.cos(math.pi * done)) / 2 if schedule.name == "cosine" else 1 - math.sqrt(done)
    return lr * (schedule.final + (1 - schedule.final) * height)
