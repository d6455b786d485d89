"""Layout: how the ranks of a job are used, and whether a world of a given size can be used so."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from moe.config import Settings, wrong
from moe.errors import ConfigError
from moe.parallel import POLICIES


class Copies(Settings):
    """Copies of experts for a step, on the ranks where they pay (fully sharded sparse data parallelism)."""

    policy: Literal[*POLICIES] = "even"  # even: no copies
    copies: PositiveInt = 2  # of a layer's experts that a rank may hold beside its own
    hidden: PositiveInt = 4  # hecate: experts whose copies travel while attention computes
    window: PositiveInt = 5  # steps whose loads are averaged to foresee the next one's
    rematerialise: bool = False  # fetch copies again in the backward pass instead of keeping them
    relay: bool = True  # over the network once to each machine, and on from there

    def idle(self) -> dict[str, str]:
        others = [name for name in type(self).model_fields if name != "policy"]
        return dict.fromkeys(others, "with parallel.copies.policy=even") if self.policy == "even" else {}


class Layout(Settings):
    """How ranks are used."""

    ranks: PositiveInt | None = None  # the world size this recipe is meant for; null for any
    device: Literal["auto", "cpu", "cuda"] = "auto"
    replicas: PositiveInt = 1  # fsdp2: copies of the sharded model (HSDP)
    expert_ranks: PositiveInt = 1  # ranks that share out a layer's experts among them; tokens travel
    # What travels: a row for each expert of a token; a token once for each rank that holds some of its experts; or buffers of
    # a fixed size, for which no rank waits, and a step that does not fit runs again.
    exchange: Literal["rows", "tokens", "fixed"] = "rows"
    exchange_room: float = Field(default=2.0, gt=0)  # fixed: size of a buffer, as a multiple of an even share
    copies: Copies = Field(default_factory=Copies)
    machine_ranks: PositiveInt | None = None  # ranks on one machine; null: as torchrun started them
    timeout: PositiveInt = 600  # seconds a collective may take before the run stops with the silent rank's name

    def idle(self) -> dict[str, str]:
        idle = {} if self.exchange == "fixed" else {"exchange_room": f"with parallel.exchange={self.exchange}"}
        if self.copies.policy == "even":
            idle["machine_ranks"] = "with parallel.copies.policy=even"
        alone = dict.fromkeys(("exchange", "exchange_room", "copies.policy", "machine_ranks"), "with parallel.expert_ranks=1")
        return idle if self.expert_ranks > 1 else {**idle, **alone}

    @model_validator(mode="after")
    def _groups_divide_ranks(self) -> Layout:
        if self.ranks is not None and (unequal := self._unequal(self.ranks)):
            raise wrong(*unequal)
        return self

    def check(self, world: int, batch: int, accumulate: int, experts: int = 0) -> None:
        """Raise ConfigError if `world` ranks cannot be used so, or cannot share `batch` sequences in `accumulate` micro-batches.

        experts: of a layer, to name only numbers of expert ranks that share them out; 0 for any number.
        """
        if self.ranks is not None and world != self.ranks:
            started = "1 process was" if world == 1 else f"{world} processes were"
            raise ConfigError(
                f"parallel.ranks={self.ranks} but {started} started; start with --nproc {self.ranks} or set parallel.ranks={world}"
            )
        if unequal := self._unequal(world, experts):
            enough = self.replicas * self.expert_ranks
            raise ConfigError(unequal[1] + (f", or start with --nproc {enough}" if world < enough else ""))
        if self.machine_ranks is not None and world % self.machine_ranks:
            fitting = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
            raise ConfigError(
                f"parallel.machine_ranks={self.machine_ranks} does not divide {_count(world, 'rank')}; "
                f"choose parallel.machine_ranks from {fitting}, or leave it out"
            )
        parts = world * accumulate
        if batch % parts:
            below, above = batch // parts * parts, (batch // parts + 1) * parts
            fitting = f"{below} or {above}" if below else f"{above}"
            ranks = ", ".join(str(n) for n in range(1, batch + 1) if batch % (n * accumulate) == 0)
            raise ConfigError(
                f"train.batch={batch} does not split over {_count(world, 'rank')} in train.accumulate={accumulate} micro-batches each; "
                f"choose train.batch={fitting}, or a number of ranks from {ranks or 'none, unless train.accumulate divides train.batch'}"
            )

    def _unequal(self, world: int, experts: int = 0) -> tuple[str, str] | None:
        """The setting that does not divide `world` ranks, and what to type instead; None if all do."""
        each = world // self.replicas
        if world % self.replicas:
            name, value, of, fit = "replicas", self.replicas, _count(world, "rank"), world
        elif each % self.expert_ranks:
            of = _count(each, "rank") + (" of a replica" if self.replicas > 1 else "")
            name, value, fit = "expert_ranks", self.expert_ranks, math.gcd(each, experts)
        else:
            return None
        fitting = ", ".join(str(n) for n in range(1, fit + 1) if fit % n == 0)
        return name, f"parallel.{name}={value} does not divide {of}; choose parallel.{name} from {fitting}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
