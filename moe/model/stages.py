"""Stages of a training step by name: how a profiler's trace, clocks and memory counters learn what is running.

step ─┬─ forward ──┬─ layer 0 ─┬─ attention
      │            │           └─ route → dispatch → experts → combine
      │            └─ loss
      ├─ backward
      ├─ wait for figures
      └─ optimizer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler

from moe.kernels.reference import Rows

STEP = ("forward", "backward", "wait for figures", "optimizer")  # follow one another, and repeat with gradient accumulation
LAYER = ("attention", "feed-forward", "route", "dispatch", "experts", "combine")  # of one layer
OTHERS = ("read batch", "loss", "all-reduce")

_NOBODY: AbstractContextManager[Any] = nullcontext()
_watchers: list[Callable[[str], AbstractContextManager[Any]]] = []


def stage(name: str) -> AbstractContextManager[Any]:
    """Around a stage: a `record_function` while a torch profiler runs, and what `watching` asks for; else nothing."""
    if torch.compiler.is_compiling() or not (_watchers or profiler._is_profiler_enabled):
        return _NOBODY
    return _watched(name)


@contextmanager
def _watched(name: str) -> Iterator[None]:
    with ExitStack() as stack:
        for watcher in (profiler.record_function, *_watchers):
            stack.enter_context(watcher(name))
        yield


@contextmanager
def watching(watcher: Callable[[str], AbstractContextManager[Any]]) -> Iterator[None]:
    """While open, every stage also runs within `watcher(name)`."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


class Observer:
    """What an MoE layer tells of its stages. This one only names them; telemetry gives a layer one that reads clocks.

    Borders mark where stages meet in the backward pass: the gradient that arrives at `x` ends one stage and begins another.
    """

    def stage(self, name: str) -> AbstractContextManager[Any]:
        """Around a stage of the forward pass, or of its recomputation."""
        return stage(name)

    def border(self, x: Tensor, ends: str | None, begins: str | None) -> Tensor:
        """`x`, whose gradient's arrival ends the backward of stage `ends` and begins that of `begins`."""
        return x

    def dispatched(self, rows: Rows) -> None:
        """The permuted tokens that the experts of this rank are about to take."""
