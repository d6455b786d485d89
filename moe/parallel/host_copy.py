"""Copies between the host and a device that leave the device's queue running: the only place where the host waits for a GPU.

A plain `.cpu()`, `.item()` or `torch.tensor(list, device=...)` goes through pageable memory and waits for everything queued.
Here copies go through pinned memory: `to_device` never waits, `begin_to_host` only where `Pending.read` is called.

    host    launch … begin ──── launch more ──────────── read() ─── use the numbers
    device  kernels ──────────── copy, event ── kernels ──────────→   waits for the event, not for the later kernels
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.parallel import deadline


class Pending:
    """A copy of a tensor on its way to the host. On a CPU it is the tensor itself, which nobody may write to until it is read."""

    def __init__(self, tensor: Tensor, done: Callable[[], bool] | None = None, work: Any = None, reads: Tensor | None = None) -> None:
        self.tensor, self.done, self.work, self.reads = tensor, done, work, reads

    def read(self) -> Tensor:
        """The values, on the host. Waits for the copy, and raises CollectiveTimeout if it does not come within `parallel.timeout`."""
        if self.work is not None:
            self.work.wait()
        deadline.wait(self.done)
        self.done = self.work = self.reads = None
        return self.tensor


def to_host(tensor: Tensor) -> Tensor:
    """A copy of a tensor on the host (on a CPU the tensor itself), for which the host waits: `begin_to_host` and `Pending.read`."""
    return begin_to_host(tensor).read()


def begin_to_host(tensor: Tensor, after: Any = None, reads: Tensor | None = None) -> Pending:
    """Begin to copy a tensor to the host, behind what the current stream has queued.

    after: a collective's work that fills the tensor from `reads`. The copy then runs on a side stream as soon as that work is
    done, whatever the current stream still has to do.
    """
    tensor, device = tensor.detach(), tensor.device
    if device.type != "cuda":
        return Pending(tensor, deadline.mark(device), after, reads)
    stream = torch.cuda.current_stream(device) if after is None else _side_stream(device)
    with torch.cuda.stream(stream):
        if after is not None:
            after.wait()  # the side stream waits, not the host
            for used in (tensor, reads):
                if used is not None:
                    used.record_stream(stream)  # its memory is not given away before the work is done with it
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
        return Pending(copy, deadline.mark(device))


def to_device(values: Any, device: torch.device | str) -> Tensor:
    """A list, array or tensor of the host as a tensor on a device, without waiting for it; on a CPU it may share memory."""
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(values) if isinstance(values, np.ndarray) else torch.tensor(values)
    device = torch.device(device)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def index_on(places: Sequence[int] | NDArray[np.int64], device: torch.device) -> Tensor:
    """Indices of the host as an int64 tensor on a device, made once for the same ones; not to be written to.

    A list as an index of a CUDA tensor would be copied through pageable memory at every use.
    """
    return _index(np.asarray(places, dtype=np.int64).tobytes(), device)


@lru_cache(maxsize=4096)
def _index(places: bytes, device: torch.device) -> Tensor:
    return to_device(np.frombuffer(bytearray(places), dtype=np.int64), device)


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
