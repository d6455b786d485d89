"""Run a study: several ordinary runs at once, until each has its row."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from moe.config import load
from moe.errors import ConfigError, Preempted
from moe.scaling.results import RUNS, STUDY, Row, append, check_unedited, every, latest, newest
from moe.studies import cost_estimate, identifiability, inference_speed
from moe.studies.grid import Run, grid
from moe.studies.queue import Board, Share, needed
from moe.studies.run_process import (
    STOP_SECONDS,
    TOKENS,
    Job,
    Outcome,
    Process,
    devices,
    locked,
    make,
    prepare_corpus,
    quoted,
    reached,
    row_of,
    spent,
    take,
    workers_of,
)
from moe.studies.spec import Means, Study, opened
from moe.studies.status import WIDE, Progress, home, show
from moe.studies.warm_start import has_weights, remove
from moe.train.folder import flatten, write_whole

_LOOK_SECONDS = 0.5


def run(words: Sequence[str], *, yes: bool = False, workers: int | None = None, share: str = "0/1") -> int:
    """Run what is missing of a study; the exit code is 0 if all of it is done, or if others are at what is left."""
    files, settings = [Path(word) for word in words if "=" not in word], [word for word in words if "=" in word]
    if not files:
        raise ConfigError("no study is named; give a YAML file, such as configs/studies/debug.yaml")
    if gone := [file for file in files if not file.exists()]:
        raise ConfigError(f"{gone[0]} is not there; give a study's YAML file, such as configs/studies/debug.yaml, or a study's folder")
    if own := [folder for file in files if (folder := home(file)) is not None]:
        opened(own[-1])
        settings = [f"means.folder={quoted(own[-1])}", *settings]  # it may have been moved
    study = load([file / STUDY if file.is_dir() else file for file in files], settings, Study)
    return _run(study, Path(study.means.folder), yes=yes, workers=workers, share=Share.read(share))


def retry(path: Path, *, failed: bool, workers: int | None = None) -> int:
    """Run again what did not end well."""
    if not failed:
        raise ConfigError("moe study retry says nothing of what to try again; add --failed")
    study, folder = opened(home(path) or path)
    ended = every(folder)
    counts = Counter(row.id for row in ended)
    again = {row.id: counts[row.id] for row in newest(ended).values() if row.status != "done"}
    return _run(study, folder, yes=True, workers=workers, share=Share(), again=again)


def _run(study: Study, folder: Path, *, yes: bool, workers: int | None, share: Share, again: Mapping[str, int] | None = None) -> int:
    """`again`: the runs to be done, and how many rows each had when it was decided to try them again; None for all that is missing."""
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)
    means = study.means.model_copy(update={"folder": str(folder)})  # which may have been moved
    study = study.model_copy(update={"means": means})
    runs = grid(study)
    _own(folder)
    _same_ground(study, folder)
    for one in runs:
        check_unedited(folder / "runs" / one.id)
    workers = workers or workers_of(means)
    held = latest(folder)
    asked = needed(runs, again)
    missing = [one for one in runs if one.id in asked and (one.id not in held or one.id in (again or ()))]
    if missing and not held:
        _judge(study, runs, console)
    corpus = prepare_corpus(folder, study.recipe)
    if missing:
        _same_corpus(folder, held, corpus, Path(study.recipe.data.tokenizer).name)
    write_whole(folder / STUDY, json.dumps(study.model_dump(mode="json", exclude_unset=True), indent=1) + "\n")
    pace = cost_estimate.measure(folder, runs, means) if missing else cost_estimate.Pace(0.0, 0.0, 0.0)
    board = Board(folder, runs, means, pace, share=share, again=again or {}, only=again)
    if missing:
        size = sum(path.stat().st_size for path in (folder / TOKENS).rglob("*") if path.is_file())
        _confirm(board.missing(), cost_estimate.estimate(board.missing(), pace, means, workers, size), means, workers, yes, console)
        Crew(board, corpus, console).work(workers)
    if len(board.rows) == len(runs) and (said := inference_speed.measure(folder, runs)) is not None:
        console.print(said, markup=False)
    board.sweep()
    rows = latest(folder)
    show(folder, runs, means, console)
    return 0 if all(rows[one.id].status == "done" for one in runs if one.id in rows) else 1


def _own(folder: Path) -> None:
    """Make the study's folder; ConfigError if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"means.folder={folder} is a file, or below one; choose a folder") from None


def _same_corpus(folder: Path, held: Mapping[str, Row], corpus: str, tokenizer: str) -> None:
    """ConfigError if runs that have ended read something else."""
    for row in held.values():
        for what, old, new in (("corpus", row.corpus[:16], corpus[:16]), ("tokenizer", row.tokenizer, tokenizer)):
            if old != new:
                raise ConfigError(
                    f"{folder} holds run {row.id} with {what} {old}, and recipe.data now makes {new}, so that their losses could not be "
                    "compared; restore the files of recipe.data.sources, or set means.folder to a new folder"
                )


def _same_ground(study: Study, folder: Path) -> None:
    """ConfigError if the folder holds a study whose runs differ from this one's in more than axes."""
    if not (folder / STUDY).exists() or not latest(folder):
        return
    before = load([folder / STUDY], [], Study)
    for section in ("recipe", "scaling"):
        old, new = (flatten(getattr(one, section).model_dump(), section) for one in (before, study))
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                raise ConfigError(
                    f"{folder} holds runs with {key}={old.get(key)}, and it is now {new.get(key)}, so that they could not be compared; "
                    "restore that, or set means.folder to a new folder"
                )


def _judge(study: Study, runs: list[Run], console: Console) -> None:
    """Print what the design can identify; ConfigError if that is too little and no reason is given to go on.

    Runs that begin with a dense twin teach no law of runs from scratch: a study that has such is judged where it names its aim.
    """
    scratch = [run for run in runs if run.origin is None]
    if len(scratch) < len(runs) and "aim" not in study.model_fields_set:
        console.print("no law is to be identified: runs begin with others, and the study names no aim")
        return
    found, sentence = identifiability.judge(study.aim, scratch)
    console.print(identifiability.table(study.aim, found, sentence))
    if sentence is None:
        return
    if study.aim.go_on is None:
        raise ConfigError(f"{sentence}; or say in aim.go_on why to start all the same")
    console.print(f"going on all the same: {study.aim.go_on}", markup=False)


def _confirm(missing: list[Run], found: cost_estimate.Estimate, means: Means, workers: int, yes: bool, console: Console) -> None:
    """Print what is to come, and ask."""
    console.print(cost_estimate.table(missing, found, workers, means))
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError("nobody is here to be asked whether to start; add --yes")
    typer.confirm("start?", abort=True)


class Crew:
    """The processes that are under way."""

    def __init__(self, board: Board, corpus: str, console: Console) -> None:
        self.board, self.corpus, self.means, self.console = board, corpus, board.means, console
        self.under_way: list[Process] = []
        self.asked = False
        self.devices = devices()

    def work(self, workers: int) -> None:
        """Go on until every run has its row, or, with a share of the study, until others are at each that is left."""
        self.board.sweep()
        self.board.claim()
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with Progress(self.board, self.console, workers) as progress:
                while (self.board.missing() or self.under_way) and not self.asked:
                    self._give_up(progress)
                    started = self._fill(workers)
                    if not self.under_way and not started:
                        if self.board.share.of > 1 and all(locked(self.board.study, run.id) for run in self.board.missing()):
                            return
                        time.sleep(4 * _LOOK_SECONDS)
                        self.board.look()
                    self._reap(progress)
                    progress.look()
                    time.sleep(_LOOK_SECONDS)
            if self.asked:
                self._stop()
                raise Preempted("the study was stopped, and its runs have saved; the same command goes on from there")
        finally:
            self.board.disclaim()
            for process in self.under_way:
                process.stop()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _fill(self, workers: int) -> int:
        """Start what can be started; how many processes that were."""
        started = 0
        if len(self.under_way) >= workers:
            return started
        busy = {process.job.id for process in self.under_way}
        for job in self.board.jobs():
            if len(self.under_way) >= workers:
                break
            if job.id not in busy and self._start(job):
                busy.add(job.id)
                started += 1
        return started

    def _start(self, job: Job) -> bool:
        lock = take(self.board.study, job.id)
        if lock is None:
            return False
        if not self.board.ready(job):
            lock.close()
            return False
        if job.recipe is not None:
            make(self.board.study, job.recipe, job.id)
        used = [process.device for process in self.under_way]
        device = min(self.devices, key=used.count, default=None)
        seconds = 3600 * self.means.timeout
        self.under_way.append(Process(job, self.board.study, lock, threads=self.means.threads, seconds=seconds, device=device))
        return True

    def _reap(self, progress: Any) -> None:
        for process in [one for one in self.under_way if one.ended()]:
            self.under_way.remove(process)
            self._record(process, progress)

    def _record(self, process: Process, progress: Any) -> None:
        """What follows from the end of a process: a row, or for a trunk or a conversion that failed a row of each run that needs it."""
        job, seconds = process.job, time.monotonic() - process.start
        outcome = process.outcome()
        if job.recipe is not None and job.run is None:
            remove(self.board.study / RUNS / job.id / "weights")  # nothing begins with a trunk's
        if outcome is not None and job.run is not None:
            self._add(job.run, outcome, spent(self.board.study, job.id, seconds), progress)
            if job.id in self.board.begun:
                self._no_twin(job.run, outcome, progress)
        elif outcome is not None and outcome.status != "done" and job.origin is not None:
            why = Outcome("failed", f"making its dense twin sparse ({job.id}) {outcome.status}: {outcome.why}")
            self._end([run for run in self.board.begun[job.id] if self.board.waits(run)], why, progress)
        elif outcome is not None and outcome.status != "done":
            why = Outcome(outcome.status, f"its trunk {job.id} {outcome.status}: {outcome.why}")
            left = [run for run in self.board.sharing[job.id] if run.trunk and run.trunk.start >= job.steps]
            self._end([run for run in left if not reached(self.board.study, run.id)], why, progress)
        elif job.run is not None:
            spent(self.board.study, job.id, seconds)
        process.lock.close()

    def _give_up(self, progress: Any) -> None:
        """Give a row to each run whose dense twin did not end well."""
        for run, twin in self.board.doomed():
            self._end([run], Outcome("failed", f"its dense twin {twin.id} {twin.status}: {twin.why}"), progress)

    def _no_twin(self, twin: Run, how: Outcome, progress: Any) -> None:
        """End the runs that wait for a dense twin's weights where it was done before and could not be trained once more."""
        study = self.board.study
        if latest(study)[twin.id].status == "done" and not has_weights(study, twin.id):
            why = Outcome("failed", f"its dense twin {twin.id}, trained once more for its weights, {how.status}: {how.why}")
            waiting = [run for run in self.board.begun[twin.id] if self.board.waits(run)]
            self._end([run for run in waiting if run.origin and not has_weights(study, run.origin.id)], why, progress)

    def _end(self, runs: list[Run], why: Outcome, progress: Any) -> None:
        """Give a row to runs that never began, but for those that a process is at."""
        for run in runs:
            lock = take(self.board.study, run.id)
            if lock is None:
                continue
            self.board.look()
            if run.id not in self.board.rows:
                self._add(run, why, 0.0, progress)
            lock.close()

    def _add(self, run: Run, how: Outcome, seconds: float, progress: Any) -> None:
        row = row_of(self.board.study, run, how, self.corpus, seconds)
        append(self.board.study, row)
        self.board.look()
        self.board.clear(run)
        progress.ended(row)

    def _stop(self) -> None:
        for process in self.under_way:
            process.stop()
        deadline = time.monotonic() + STOP_SECONDS
        for process in list(self.under_way):
            process.wait(max(0.0, deadline - time.monotonic()))
            self.under_way.remove(process)
            self._record(process, _Silent())

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True


class _Silent:
    def ended(self, row: Row) -> None: ...
