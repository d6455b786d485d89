"""Fault points: places where a test may kill, stop, delay or spoil this process. One `if` when unset.

    MOE_FAULTS="kill@step=3,rank=1,point=loop/step; delay=2.5@point=checkpoint/shard; kill@step=4,once=/tmp/marker"

A clause is an action, then conditions on `step`, `rank` and `point` (each optional), and `once=PATH`: a file that is made
when the fault strikes and disarms it from then on, so that a restarted process gets through. Actions: kill, stop, term,
exit0, raise, enospc, oom, delay=SECONDS, and nan (`point` returns True and the caller spoils its value).
"""

from __future__ import annotations

import errno
import os
import signal
import time
from typing import NamedTuple

ACTIONS = ("kill", "stop", "term", "exit0", "raise", "enospc", "oom", "delay", "nan")


class Fault(NamedTuple):
    """One clause of MOE_FAULTS."""

    action: str
    seconds: float
    conditions: dict[str, str]
    once: str | None


class InjectedFault(RuntimeError):
    """What the action `raise` raises."""


def parse(text: str) -> list[Fault]:
    """The clauses of MOE_FAULTS; ValueError names what cannot be read."""
    faults = []
    for clause in filter(None, (part.strip() for part in text.split(";"))):
        head, _, tail = clause.partition("@")
        action, _, value = head.strip().partition("=")
        pairs = [part.partition("=") for part in tail.split(",") if part]
        conditions = {key.strip(): wanted.strip() for key, _, wanted in pairs}
        once = conditions.pop("once", None)
        if action not in ACTIONS:
            raise ValueError(f"MOE_FAULTS has the action {action!r}; choose from {', '.join(ACTIONS)}")
        if unknown := conditions.keys() - {"step", "rank", "point"}:
            raise ValueError(f"MOE_FAULTS has the condition {min(unknown)!r}; choose from step, rank, point, once")
        faults.append(Fault(action, float(value or 0), conditions, once))
    return faults


def point(name: str, step: int | None = None) -> bool:
    """A place where a fault may strike; True asks the caller to spoil its value (action nan)."""
    if not _FAULTS:
        return False
    here = {"point": name, "step": str(step), "rank": os.environ.get("RANK", "0")}
    spoil = False
    for fault in _FAULTS:
        if all(here[key] == value for key, value in fault.conditions.items()) and _armed(fault):
            spoil |= _strike(fault, name, step)
    return spoil


def _armed(fault: Fault) -> bool:
    if fault.once is None:
        return True
    try:
        os.close(os.open(fault.once, os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    return True


def _strike(fault: Fault, name: str, step: int | None) -> bool:
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "exit0":
            os._exit(0)
        case "delay":
            time.sleep(fault.seconds)
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"fault point {name}")
        case "oom":
            import torch

            raise torch.OutOfMemoryError(f"injected at {name}: Tried to allocate 2.00 GiB.")
        case "raise":
            raise InjectedFault(f"injected at {name}, step {step}")
    return fault.action == "nan"


_FAULTS = parse(os.environ.get("MOE_FAULTS", ""))
