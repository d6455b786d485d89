"""Layout: how the ranks of a job are used, and whether a world of a given size can be used so."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from moe.config import Settings, wrong
from moe.errors import ConfigError
from moe.parallel import OWNERS, POLICIES


class Copies(Settings):
    """Copies of experts for a step, on the ranks where they pay (fully sharded sparse data parallelism)."""

    policy: Literal[*POLICIES] = "even"  # even: no copies
    copies: PositiveInt = 2  # of a layer's experts that a rank may hold beside its own
    hidden: PositiveInt | None = None  # experts whose copies travel while attention computes; null: as parallel.hardware says
    # When: ahead of attention, from foreseen loads; after the routers, from the loads themselves; or both, then adding copies
    # where the loads make up for their travel, which nothing hides.
    chosen: Literal["ahead", "after", "both"] = "ahead"
    window: PositiveInt = 5  # steps whose loads are averaged to foresee the next one's
    rematerialise: bool = False  # fetch copies again in the backward pass instead of keeping them
    relay: bool = True  # over the network once to each machine, and on from there
    owners: Literal[*OWNERS] = "even"  # who keeps which experts; even: as many of each layer on every rank, for good
    owners_every: PositiveInt = 100  # steps between changes of owners, with parameters and moments

    @property
    def active(self) -> bool:
        """Whether experts are ever anywhere but where an even share puts them."""
        return self.policy != "even" or self.owners != "even"

    def idle(self) -> dict[str, str]:
        idle = {} if self.owners != "even" else {"owners_every": "with parallel.copies.owners=even"}
        if self.chosen == "after" and self.owners == "even":
            idle["window"] = "with parallel.copies.chosen=after"
        if "hecate" not in (self.policy, self.owners):
            idle["hidden"] = f"with parallel.copies.policy={self.policy}"
        if self.policy == "even":
            of_policy = ["copies", "hidden", "chosen", "rematerialise", "relay"] + ["window"] * (not self.active)
            idle |= dict.fromkeys(of_policy, "with parallel.copies.policy=even")
        return idle

    @model_validator(mode="after")
    def _memory_is_kept(self) -> Copies:
        if self.policy == "flex_moe" and self.chosen == "after":
            raise wrong(
                "chosen",
                "parallel.copies.policy=flex_moe goes on from the last step's copies, and parallel.copies.chosen=after keeps none; "
                "choose parallel.copies.chosen=ahead",
            )
        return self


_Figure = Annotated[float, Field(ge=1e-6, le=1e9)]  # such that whole bytes, nanoseconds and picoseconds come of it, and 64 bits hold them


class Hardware(Settings):
    """What policies take the machines for; it is stated, because no clock decides what is trained."""

    between_gbit: _Figure = 400.0  # of a machine's link to the others, each way
    within_gbit: _Figure = 3600.0  # of a rank's link to the others of its machine, each way
    latency_us: _Figure = 20.0  # of an exchange between ranks
    tflops: _Figure = 400.0  # of a rank


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
    # Chunks of a layer's tokens whose all-to-alls overlap with the experts of other chunks; 1: none do.
    overlap: PositiveInt = 1
    copies: Copies = Field(default_factory=Copies)
    hardware: Hardware = Field(default_factory=Hardware)
    machine_ranks: PositiveInt | None = None  # ranks on one machine; null: as torchrun started them
    timeout: PositiveInt = 600  # seconds a collective may take before the run stops with the silent rank's name

    def idle(self) -> dict[str, str]:
        idle = {} if self.exchange == "fixed" else {"exchange_room": f"with parallel.exchange={self.exchange}"}
        if not self.copies.active:
            of_policy = ["machine_ranks", *(f"hardware.{name}" for name in Hardware.model_fields)]
            idle |= dict.fromkeys(of_policy, "with parallel.copies.policy=even")
        of_groups = ("exchange", "exchange_room", "overlap", "copies.policy", "copies.owners", "machine_ranks")
        alone = dict.fromkeys(of_groups, "with parallel.expert_ranks=1")
        return idle if self.expert_ranks > 1 else {**idle, **alone}

    @model_validator(mode="after")
    def _waits_for_loads(self) -> Layout:
        if self.exchange == "fixed" and self.copies.policy != "even" and self.copies.chosen != "ahead":
            raise wrong(
                "exchange",
                f"parallel.exchange=fixed is for ranks that wait for nobody's loads, and parallel.copies.chosen={self.copies.chosen} waits "
                "for them; choose parallel.exchange=rows or tokens, or parallel.copies.chosen=ahead",
            )
        return self

    @model_validator(mode="after")
    def _gathers_once(self) -> Layout:
        if self.overlap > 1 and self.copies.policy != "even" and self.copies.rematerialise:
            raise wrong(
                "overlap",
                f"parallel.overlap={self.overlap} runs a layer's experts once for each chunk, and parallel.copies.rematerialise=true "
                "would fetch their copies again for each; choose parallel.copies.rematerialise=false or parallel.overlap=1",
            )
        return self

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
