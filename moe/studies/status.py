"""What of a study is done, running and failed, and how long the rest takes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from moe.errors import ConfigError
from moe.scaling.results import RESULTS, RUNS, STUDY, Row, latest, shape
from moe.studies.cost_estimate import counted, hours, remembered
from moe.studies.grid import Run, grid
from moe.studies.queue import Board
from moe.studies.run_process import locked, step_now, workers_of
from moe.studies.spec import Means, opened
from moe.studies.warm_start import has_weights

WIDE = 140  # columns, where no terminal says
_LOOK_SECONDS = 5


class Progress:
    """A line of how far a study is; a line of text for each run that ends."""

    def __init__(self, board: Board, console: Console, workers: int) -> None:
        self.board, self.console, self.workers = board, console, workers
        self.whole, self.start, self.looked = board.left(), time.monotonic(), 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
        self.bar = Bar(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task(self._told(self.whole), total=max(self.whole, 1.0))

    def __enter__(self) -> Progress:
        self.bar.__enter__()
        return self

    def __exit__(self, *ending: Any) -> None:
        self.bar.__exit__(*ending)

    def look(self) -> None:
        """Bring the line up to date, now and then."""
        if time.monotonic() - self.looked < _LOOK_SECONDS:
            return
        self.looked = time.monotonic()
        left = self.board.left()
        self.bar.update(self.task, completed=self.whole - left, description=self._told(left))

    def ended(self, row: Row) -> None:
        """Say how a run ended."""
        result = f"loss {row.loss:.4f}" if row.loss is not None else f"{row.status}: {row.why}"
        self.console.print(f"{place(row.axes)}: {result} ({self._told(self.board.left())})", markup=False)

    def _told(self, left: float) -> str:
        seconds, spent = time.monotonic() - self.start, self.whole - left
        rate = spent / seconds if seconds > 60 and spent > 0.02 * self.whole else self.workers  # of what was foreseen
        return f"{len(self.board.rows)} of {counted(len(self.board.runs), 'run')}, {hours(left / rate)} left"


def place(axes: dict[str, Any]) -> str:
    """Where a run stands, in a few words."""
    size = f"d={axes['d_model']} l={axes['layers']}"
    model, more = shape(axes), ""
    if "begin" in axes:
        how = axes["begin"] if model == "dense" else f"{model}, {axes['begin']}"
        model, more = f"{how} after {axes['dense'] / 1e6:.3g}M tokens", "more "
    factor = f" lr×{axes['lr_factor']:g}" if axes["lr_factor"] != 1 else ""
    return f"{size} {model}, {axes['tokens'] / 1e6:.3g}M {more}tokens, seed {axes['seed']}{factor}"


def home(path: Path) -> Path | None:
    """The study's folder that a path is, or whose own YAML file it is, wherever that was moved; None for a YAML file elsewhere."""
    if path.is_dir():
        return path
    return path.parent if path.name == STUDY and any((path.parent / name).exists() for name in (RUNS, RESULTS)) else None


def folder_of(path: Path) -> Path:
    """A study's folder, by itself or by its YAML file."""
    if not path.exists():
        raise ConfigError(f"{path} is neither a study's folder nor its YAML file; give what moe study run was given")
    return home(path) or opened(path)[1]


def status(path: Path) -> None:
    """Print how far a study is, by its folder or YAML file."""
    study, folder = opened(home(path) or path)
    show(folder, grid(study), study.means, Console(highlight=False, width=None if sys.stdout.isatty() else WIDE))


def show(folder: Path, runs: list[Run], means: Means, console: Console) -> None:
    """Print every run of a study with its state."""
    rows, running, lines = latest(folder), set(), Table(box=None, header_style="bold", pad_edge=False)
    for title in ("run", "where", "FLOP", "state", "loss", "bits/byte"):
        lines.add_column(title, overflow="fold")
    counts: dict[str, int] = {}
    for run in runs:
        row = rows.get(run.id)
        state, active = _state(folder, run, row)
        running |= {run.trunk.id if run.trunk and state.startswith("trunk") else run.id} if active else set()
        name = row.status if row else state.split(",")[0]
        counts[name] = counts.get(name, 0) + 1
        loss = ("", "") if row is None or row.loss is None else (f"{row.loss:.4f}", f"{row.bits_per_byte:.4f}")
        lines.add_row(run.id, place(run.axes), f"{run.flops:.2e}", state, *loss)
    console.print(lines, markup=False)  # a reason is what a process said
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    left = _left(folder, runs, means, len(running) or workers_of(means)) if len(rows) < len(runs) else None
    console.print(f"{told}{left or ''}", markup=False)
    if others := len(rows.keys() - {run.id for run in runs}):
        console.print(f"{folder} also holds {counted(others, 'run')} that the study as it is now does not ask for", markup=False)
    if any(row.status != "done" for row in rows.values()):
        console.print(f"moe study retry {folder} --failed tries again what did not end well", markup=False)


def _state(folder: Path, run: Run, row: Row | None) -> tuple[str, bool]:
    """A run's state in words, and whether a process is at it."""
    if row is not None:
        return (row.status if row.why is None else f"{row.status}: {row.why}"), False
    now, steps = step_now(folder, run.id), run.recipe.train.steps
    if locked(folder, run.id):
        return f"running, step {now} of {steps}", True
    if not now and run.origin is not None and not has_weights(folder, run.origin.id):
        if run.origin.asked is not None and locked(folder, run.origin.id):
            return "waiting, its dense twin is being made sparse", False
        return "waiting, its dense twin is not ready", False
    if now or run.trunk is None:
        return (f"waiting, step {now} of {steps}" if now else "waiting"), False
    grown, start = step_now(folder, run.trunk.id), run.trunk.start
    if grown < start and locked(folder, run.trunk.id):
        return f"trunk running, step {grown} of {start}", True
    return (f"waiting, its trunk at step {min(grown, start)} of {start}" if grown else "waiting"), False


def _left(folder: Path, runs: list[Run], means: Means, workers: int) -> str:
    before = remembered(folder)
    if before is None:
        return ""
    left = Board(folder, runs, means, before[0]).left()
    return f"; {hours(left / workers)} of work left for {workers} at once"
