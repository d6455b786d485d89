"""How a hang ends: every wait of the host for its GPU is bounded, and a roll call says which rank is silent.

A collective on a GPU returns to the host at once, so the host notices a hang only where it reads a number. There it asks the GPU
again and again until `parallel.timeout` is over, instead of waiting inside CUDA for good:

    time               0 ────────── timeout ── + roll call ────────────── 2 x timeout + 60 s
    a healthy rank     collective, host waits │ CollectiveTimeout: "no answer from rank 1"
    the silent rank    stopped, or asleep in the data loader …
    NCCL's watchdog                                                      │ SIGABRT, if the host was never in a bounded wait

On gloo the collective itself raises; `launch` turns that into the same sentence.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from moe.errors import CollectiveTimeout

ROLL_CALL_SECONDS = 5  # what a rank may take to answer after a collective has failed
_WAITING = ("deadline.py", "host_copy.py")
_SPIN_SECONDS = 0.001  # of asking without a pause; later pauses are a share of what was waited already, so that no step gets longer
_roll_call: Any = None  # process-wide like torch's default group: the error path has no Mesh at hand
_limit: float | None = None  # seconds; None alone, where no other rank can be waited for


def arm(timeout: timedelta) -> None:
    """From now on waits of this process are bounded; every rank of a job of several must call it."""
    global _roll_call, _limit
    # a group of its own: after a timeout the pairs of the failed group are unusable
    _roll_call = dist.new_group(backend="gloo", timeout=timeout)
    dist.monitored_barrier(_roll_call, timeout=timeout)
    _limit = timeout.total_seconds()


def meet() -> None:
    """Wait for all ranks, on the host: NCCL's barrier would do so inside CUDA."""
    dist.barrier(group=_roll_call)


def of_groups(timeout: timedelta, device: torch.device) -> timedelta:
    """The timeout of a process group: NCCL's watchdog kills a rank without a sentence, so it comes after the end of our own wait.

    Twice as long and a minute, because it counts from the start of a collective, and the host may come to wait only later.
    """
    return 2 * timeout + timedelta(seconds=60) if device.type == "cuda" else timeout


def wait_for_device(device: torch.device) -> None:
    """Wait, but no longer than `parallel.timeout`, until everything is done that was started on the stream of now."""
    wait(mark(device))


def wait(done: Callable[[], bool] | None) -> None:
    """Wait until `done`, a mark on a device, says so, but no longer than `parallel.timeout`.

    Raises CollectiveTimeout with the name of the silent rank.
    """
    if done is None:
        return
    began = time.monotonic()
    while not done():
        waited = time.monotonic() - began
        if _limit is not None and waited > _limit:
            where = place(traceback.extract_stack())
            raise CollectiveTimeout(f"a collective before {where} did not end within parallel.timeout={_limit:g} s: {roll_call()}")
        if waited > _SPIN_SECONDS:
            time.sleep(min(waited / 200, 0.01))


def mark(device: torch.device) -> Callable[[], bool] | None:
    """Whether `device` has come as far as it was asked to by now; None on a CPU, where everything is over when it returns."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event.query


def roll_call() -> str:
    """Who does not answer, in words, after a collective has failed; takes up to ROLL_CALL_SECONDS."""
    if _roll_call is None:
        return "no roll was called"
    try:
        dist.monitored_barrier(_roll_call, timeout=timedelta(seconds=ROLL_CALL_SECONDS), wait_all_ranks=True)
    except RuntimeError as error:
        named = re.search(r"Ranks ([\d, ]+) failed", str(error))
        if named:
            return f"no answer from rank {named[1]} within {ROLL_CALL_SECONDS} s"
        return "the first rank cannot say who is missing" if dist.get_rank() == 0 else "rank 0 does not answer, or knows who does not"
    return "every rank answers"


def place(frames: traceback.StackSummary) -> str:
    """The innermost place of this package outside the files that wait for others, in words."""
    package = str(Path(__file__).parents[1])
    ours = [frame for frame in frames if frame.filename.startswith(package) and Path(frame.filename).name not in _WAITING]
    return f"{Path(ours[-1].filename).relative_to(package)}:{ours[-1].lineno} ({ours[-1].name})" if ours else "the program"
