"""Which runs of a study are done, which can start, and what is to be done first: read off the disk, so that a kill loses nothing."""

from __future__ import annotations

import fcntl
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe.checkpoint import shelf
from moe.errors import ConfigError
from moe.scaling.results import RUNS, Row, every, newest
from moe.scaling.speeds import SPEEDS
from moe.studies.cost_estimate import Pace, seconds_of
from moe.studies.grid import Run
from moe.studies.inference_speed import timed
from moe.studies.run_process import Job, branch, reached, step_now, take, tidy
from moe.studies.spec import Means
from moe.studies.warm_start import has_weights, remove


class Share(NamedTuple):
    """Which part of a study a worker takes first, of several that work beside each other: 0/4 … 3/4."""

    index: int = 0
    of: int = 1

    @classmethod
    def read(cls, text: str) -> Share:
        index, slash, of = text.partition("/")
        if not slash or not index.isdecimal() or not of.isdecimal() or int(index) >= int(of):
            raise ConfigError(f"--share {text} is no part of a study; write 0/4 for the first of four workers, 3/4 for the last")
        return cls(int(index), int(of))

    def mine(self, name: str) -> bool:
        return int(name[:8], 16) % self.of == self.index


def needed(runs: Sequence[Run], only: Collection[str] | None) -> set[str]:
    """Which runs are to be done if only these are asked for."""
    asked = [run for run in runs if only is None or run.id in only]
    return {run.id for run in asked} | {run.origin.twin.id for run in asked if run.origin is not None}


class Board:
    """The state of a study. `again`: runs to be tried once more, and how many rows each had when that was asked for.

    `only`: runs that are to be done, with the dense twins they need; None for all.
    """

    def __init__(
        self,
        study: Path,
        runs: list[Run],
        means: Means,
        pace: Pace,
        *,
        share: Share = Share(),
        again: Mapping[str, int] = {},
        only: Collection[str] | None = None,
    ) -> None:
        self.study, self.runs, self.means, self.pace, self.share = study, {run.id: run for run in runs}, means, pace, share
        self.again, self.only = again, needed(runs, only)
        self.rows: dict[str, Row] = {}
        self.sharing: dict[str, list[Run]] = {}
        for run in runs:
            if run.trunk is not None:
                self.sharing.setdefault(run.trunk.id, []).append(run)
        self.begun: dict[str, list[Run]] = {}  # by what they begin with, and by its dense twin
        for run in runs:
            for name in {run.origin.id, run.origin.twin.id} if run.origin is not None else ():
                self.begun.setdefault(name, []).append(run)
        self.timed = set(timed(runs).values())
        self.claims: dict[str, Any] = {}
        self.look()

    def look(self) -> None:
        """Read what other workers recorded. A dense twin whose weights are gone and needed once more has no row."""
        ended = every(self.study)
        counts = Counter(row.id for row in ended)
        self.rows = {name: row for name, row in newest(ended).items() if name in self.runs and counts[name] > self.again.get(name, 0)}
        for run in self.missing():
            if run.origin is not None and self.waits(run) and not has_weights(self.study, run.origin.id):
                twin = run.origin.twin.id
                if twin in self.rows and self.rows[twin].status == "done" and not has_weights(self.study, twin):
                    del self.rows[twin]

    def doomed(self) -> list[tuple[Run, Row]]:
        """Runs that cannot begin because their dense twin did not end well, whose row it is."""
        twins = [(run, self.rows.get(run.origin.twin.id)) for run in self.missing() if run.origin is not None]
        return [(run, row) for run, row in twins if row is not None and row.status != "done" and self.waits(run)]

    def missing(self) -> list[Run]:
        """Runs without a row that are to be done, in the study's order."""
        return [run for name, run in self.runs.items() if name in self.only and name not in self.rows]

    def jobs(self) -> list[Job]:
        """What could start now, the worker's own share first, and of that the longest chain of processes."""
        found: dict[str, tuple[Job, float]] = {}
        for run in self.missing():
            job, chain = self._next(run)
            if chain > found.get(job.id, (job, 0.0))[1]:
                found[job.id] = job, chain
        ordered = sorted(found.values(), key=lambda pair: (not self.share.mine(self._group(pair[0])), -pair[1]))
        return [job for job, _ in ordered]

    def _group(self, job: Job) -> str:
        return job.run.trunk.id if job.run and job.run.trunk else job.id

    def _next(self, run: Run) -> tuple[Job, float]:
        """The process that brings a run forward, and the seconds until the run is done."""
        own, trunk = reached(self.study, run.id), run.trunk
        chain = seconds_of(run, self.pace, own or (trunk.start if trunk else 0))
        job = Job(run.id, run.recipe, run.recipe.train.steps, run, chain)
        if trunk is not None and not own and (at := reached(self.study, trunk.id)) < trunk.start:
            until = min(start for start in self.starts(trunk.id) if start > at)
            job = Job(trunk.id, trunk.recipe, until, None, seconds_of(run, self.pace, at, until))
            chain += seconds_of(run, self.pace, at, trunk.start)
        if run.origin is None or not self.waits(run) or has_weights(self.study, run.origin.id):
            return job, chain
        chain += self.pace.around
        if run.origin.twin.id not in self.rows:
            job, before = self._next(self.runs[run.origin.twin.id])
            return job, before + chain
        return Job(run.origin.id, None, 0, None, self.pace.around, run.origin), chain

    def waits(self, run: Run) -> bool:
        """Whether a run that is to begin with another has not done so: neither it nor its trunk has a checkpoint to go on from."""
        if reached(self.study, run.id):
            return False
        trunk = run.trunk
        return trunk is None or not any(step <= trunk.start for step in shelf.committed(self.study / RUNS / trunk.id / "checkpoints"))

    def _can_begin(self, run: Run) -> bool:
        """Whether what a run begins with is there, or needed no more."""
        if run.origin is None or not self.waits(run):
            return True
        twin = self.rows.get(run.origin.twin.id)  # whose weights may be there before it is known how it ended
        return twin is not None and twin.status == "done" and has_weights(self.study, run.origin.id)

    def starts(self, trunk: str) -> list[int]:
        """At which steps runs without a row leave a trunk."""
        return sorted({run.trunk.start for run in self.sharing[trunk] if run.trunk and run.id not in self.rows})

    def ready(self, job: Job) -> bool:
        """Whether a job whose lock is held is still to be done, once what it begins with lies in place."""
        self.look()
        if job.origin is not None:
            twin, users = self.rows.get(job.origin.twin.id), (run for run in self.begun[job.id] if run.id not in self.rows)
            done = twin is not None and twin.status == "done" and not has_weights(self.study, job.id)
            return done and any(self.waits(run) for run in users)
        if job.run is not None:
            return job.id not in self.rows and self._begins(job.run) and self._can_begin(job.run)
        for run in self.sharing[job.id]:
            assert run.trunk is not None
            if run.id not in self.rows and run.trunk.start <= reached(self.study, job.id):
                self._begins(run, holding=True)
        at = reached(self.study, job.id)
        return job.steps in self.starts(job.id) and at < job.steps and (at > 0 or self._can_begin(self.sharing[job.id][0]))

    def _begins(self, run: Run, *, holding: bool = False) -> bool:
        """Give a run its trunk's checkpoint, if it has none yet; False while another process grows the trunk.

        A trunk that has gone on beyond it and kept nothing that is early enough leaves the run to itself.
        """
        if run.trunk is None or shelf.committed(self.study / RUNS / run.id / "checkpoints"):
            return True
        lock = None if holding else take(self.study, run.trunk.id)
        if lock is None and not holding:
            return False
        branch(self.study, run)
        if lock is not None:
            lock.close()
        return True

    def sweep(self) -> None:
        """Remove what a study that was killed had recorded and not yet removed."""
        for name in self.rows:
            lock = take(self.study, name)
            if lock is not None:  # else another worker trains it once more
                self.clear(self.runs[name])
                lock.close()
        for path in (self.study / RUNS).glob(".*.partial"):
            name = path.name.removeprefix(".").removesuffix(".partial")
            lock = None if self._needed(name) else take(self.study, name)
            if lock is not None:  # a conversion that a kill cut short, and nothing begins with any more
                shutil.rmtree(path, ignore_errors=True)
                lock.close()

    def clear(self, run: Run) -> None:
        """Remove what a run that is done needs no more, its trunk's if it was the last, and what both began with. Its lock is held."""
        if not self._done(run):
            return
        tidy(self.study, run.id, weights=self.means.keep_weights or self._needed(run.id))
        if run.origin is not None and not self.means.keep_weights:
            for name in {run.origin.id, run.origin.twin.id}:
                lock = None if self._needed(name) else take(self.study, name)
                if lock is not None:
                    remove(self.study / RUNS / (name if name not in self.runs else f"{name}/weights"))
                    lock.close()
        if run.trunk is None or not all(self._done(one) for one in self.sharing[run.trunk.id]):
            return
        lock = take(self.study, run.trunk.id)
        if lock is not None:
            tidy(self.study, run.trunk.id, keep=int(self.means.keep_trunks))
            lock.close()

    def _done(self, run: Run) -> bool:
        return run.id in self.rows and self.rows[run.id].status == "done"

    def _wanted(self, name: str) -> bool:
        """Whether the weights of a dense twin or of a conversion are still of use: to runs, or to be timed."""
        if name in self.timed and not (self.study / SPEEDS).exists():
            return True
        return any(not self._done(run) for run in self.begun.get(name, ()))

    def claim(self) -> None:
        """Tell other workers, whose study may ask for other runs, which weights this one has a use for."""
        (self.study / RUNS).mkdir(exist_ok=True)
        for name in self.begun:
            if self._wanted(name) and name not in self.claims:
                self.claims[name] = (self.study / RUNS / f"{name}.needed").open("a+")
                fcntl.flock(self.claims[name], fcntl.LOCK_SH)

    def disclaim(self) -> None:
        """Have no use for any weights."""
        for file in self.claims.values():
            file.close()
        self.claims.clear()

    def _needed(self, name: str) -> bool:
        """Whether the weights of a dense twin or of a conversion are still of use to this or to another worker."""
        if self._wanted(name):
            return True
        if name in self.claims:
            self.claims.pop(name).close()
        path = self.study / RUNS / f"{name}.needed"
        if not path.exists():
            return False
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    def left(self) -> float:
        """Seconds of all processes that the missing runs still take, as it was measured before."""
        seconds, trunks = 0.0, {}
        for run in self.missing():
            now = step_now(self.study, run.id)
            seconds += seconds_of(run, self.pace, max(now, run.trunk.start if run.trunk else 0))
            if run.trunk is not None and not now:
                trunks[run.trunk.id] = max(run, trunks.get(run.trunk.id, run), key=lambda one: one.trunk.start if one.trunk else 0)
        for run in trunks.values():
            now = step_now(self.study, run.trunk.id)
            seconds += seconds_of(run, self.pace, now, run.trunk.start) if now < run.trunk.start else 0
        return seconds
