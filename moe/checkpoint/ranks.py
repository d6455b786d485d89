"""The ranks that share a checkpoint: they pass every phase together, or fail together with the same error."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from moe.checkpoint.manifest import Damaged
from moe.errors import CheckpointError, MoeError, NoSpace
from moe.parallel.mesh import Mesh

T = TypeVar("T")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Ranks:
    """Agreement over a gloo group of its own, so that it may run beside training. Every rank must construct it; None is one process."""

    def __init__(self, mesh: Mesh | None) -> None:
        self.rank, self.world = (mesh.rank, mesh.world) if mesh else (0, 1)
        self.first = self.rank == 0
        # with gloo's own timeout of half an hour: ranks wait here for each other's disks
        self.group: Any = dist.new_group(backend="gloo") if self.world > 1 else None

    def together(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank and return all results by rank; if it failed anywhere, raise the same error everywhere."""
        result, error = None, None
        try:
            result = work()
        except (Exception, CheckpointException) as caught:  # torch's CheckpointException is a BaseException
            error = translate(caught)
        outcomes = self._gather((result, error))
        errors = [error for _, error in outcomes if error is not None]
        if errors:  # an error that no older checkpoint can mend comes first
            raise next((error for error in errors if not isinstance(error, Damaged)), errors[0])
        return [result for result, _ in outcomes]

    def first_does(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and return its result on every rank."""
        return self.together(lambda: work() if self.first else None)[0]  # type: ignore[return-value]

    def _gather(self, item: Any) -> list[Any]:
        if self.group is None:
            return [item]
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item, group=self.group)
        return items


def translate(error: BaseException) -> MoeError:
    """The error of this package that tells a failure of the disk or of torch's checkpointing."""
    if isinstance(error, CheckpointException):
        causes = [translate(cause) for _, (cause, _) in sorted(error.failures.items())]
        return next((cause for cause in causes if not isinstance(cause, Damaged)), causes[0])
    if isinstance(error, MoeError):
        return error
    if isinstance(error, OSError) and error.errno in _FULL:
        return NoSpace(f"{os.strerror(error.errno)}{f': {error.filename}' if error.filename else ''}")
    return CheckpointError(f"{type(error).__name__}: {error}")
