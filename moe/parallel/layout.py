"""Layout: how the ranks of a job are used, and whether a world of a given size can be used so."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt, model_validator

from moe.config import Settings, wrong
from moe.errors import ConfigError


class Layout(Settings):
    """How ranks are used."""

    ranks: PositiveInt | None = None  # the world size this recipe is meant for; null for any
    device: Literal["auto", "cpu", "cuda"] = "auto"
    replicas: PositiveInt = 1  # fsdp2: copies of the sharded model (HSDP)
    timeout: PositiveInt = 600  # seconds a collective may take before the run stops with the silent rank's name

    @model_validator(mode="after")
    def _replicas_divide_ranks(self) -> Layout:
        if self.ranks is not None and self.ranks % self.replicas:
            raise wrong("replicas", _unequal(self.replicas, self.ranks))
        return self

    def check(self, world: int, batch: int, accumulate: int) -> None:
        """Raise ConfigError if `world` ranks cannot be used so, or cannot share `batch` sequences in `accumulate` micro-batches."""
        if self.ranks is not None and world != self.ranks:
            started = "1 process was" if world == 1 else f"{world} processes were"
            raise ConfigError(
                f"parallel.ranks={self.ranks} but {started} started; start with --nproc {self.ranks} or set parallel.ranks={world}"
            )
        if world % self.replicas:
            raise ConfigError(_unequal(self.replicas, world))
        parts = world * accumulate
        if batch % parts:
            below, above = batch // parts * parts, (batch // parts + 1) * parts
            fitting = f"{below} or {above}" if below else f"{above}"
            ranks = ", ".join(str(n) for n in range(1, batch + 1) if batch % (n * accumulate) == 0)
            raise ConfigError(
                f"train.batch={batch} does not split over {_count(world, 'rank')} in train.accumulate={accumulate} micro-batches each; "
                f"choose train.batch={fitting}, or a number of ranks from {ranks or 'none, unless train.accumulate divides train.batch'}"
            )


def _unequal(replicas: int, world: int) -> str:
    fitting = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
    return f"parallel.replicas={replicas} does not divide {_count(world, 'rank')}; choose parallel.replicas from {fitting}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
