"""Steps traced by torch's profiler: one Chrome trace a rank with the stages named, and a table of where the time goes."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console as Terminal
from rich.console import Group
from rich.table import Table
from torch.profiler import ProfilerActivity, schedule

from moe.model.stages import stage
from moe.parallel.mesh import Mesh
from moe.train.folder import write_whole, writing
from moe.train.trace import ORDER, Cost, Summary, backward_track, summarise

WIDTH = 100  # columns of the table where it is written to a file
TOP = 15  # operators shown


class Profiler:
    """Traces the given steps of a run; consecutive ones share a file. Costs one comparison a step where there are none left."""

    def __init__(self, steps: Sequence[int], folder: Path, mesh: Mesh, say: Callable[[str], None]) -> None:
        self.groups, self.folder, self.mesh, self.say = together(steps), folder, mesh, say
        self.profiler: Any = None
        self.found: list[Summary] = []

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step `number`, the first being 1."""
        while self.groups and self.profiler is None and self.groups[0][-1] < number:
            self.groups.pop(0)  # passed before this start of the run
        if not self.groups or number < self.groups[0][0] - 1:
            yield
            return
        steps = [step for step in self.groups[0] if step >= number]
        if self.profiler is None:
            self.profiler = self._profiler(steps, warm_up=number < steps[0])
            self.profiler.start()
        with stage(f"step {number}"):
            yield
        self.profiler.step()
        if number == steps[-1]:
            self.close()
            self.groups.pop(0)

    def close(self) -> None:
        """End a trace that has begun; what a failed step left of it is not written."""
        profiler, self.profiler = self.profiler, None
        if profiler is not None:
            profiler.stop()

    def _profiler(self, steps: list[int], *, warm_up: bool) -> Any:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints two lines of its own for every trace
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.mesh.device.type == "cuda")
        return torch.profiler.profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=int(warm_up), active=len(steps), repeat=1),
            on_trace_ready=lambda profiler: self._write(profiler, steps),
            acc_events=True,
        )

    def _write(self, profiler: Any, steps: list[int]) -> None:
        name = f"rank{self.mesh.rank}-step{steps[0]}" + f"-{steps[-1]}" * (len(steps) > 1)
        whole, partial = self.folder / f"{name}.json.gz", self.folder / f".{name}.json"
        with writing(whole):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                profiler.export_chrome_trace(str(partial))
                trace = json.loads(partial.read_text(encoding="utf-8", errors="replace"))
                summary = summarise(trace["traceEvents"], len(steps))
                trace["traceEvents"] += backward_track(trace["traceEvents"])
                trace["distributedInfo"] = {"rank": self.mesh.rank, "world_size": self.mesh.world}
                with gzip.open(partial, "wt", encoding="utf-8", compresslevel=4) as file:
                    json.dump(trace, file)
                os.replace(partial, whole)
            finally:
                partial.unlink(missing_ok=True)
        self.found.append(summary)
        write_whole(self.folder / f"{name}.txt", text(summary, name))
        self.say(f"trace of {'steps' if len(steps) > 1 else 'step'} {'-'.join(map(str, dict.fromkeys((steps[0], steps[-1]))))}: {whole}")


def together(steps: Sequence[int]) -> list[list[int]]:
    """Steps as runs of consecutive ones."""
    ordered = sorted(set(steps))
    cuts = [0, *(n for n, (a, b) in enumerate(pairwise(ordered), 1) if b > a + 1), len(ordered)]
    return [ordered[a:b] for a, b in pairwise(cuts) if a < b]


def tables(found: Summary) -> Group:
    """Time by stage and by operator, and where the host waited."""
    head = f"{found.span / found.steps / 1000:,.1f} ms a step, {found.steps} traced"
    if found.gpu:
        launches = sum(cost.launches for cost in found.stages.values()) / found.steps
        head += f"; the GPU is busy for {found.busy / max(found.span, 1e-9):.0%} of it; {launches:,.0f} launches a step"
    return Group("", head, "", _stages(found), "", _operators(found), "", _waits(found))


def text(found: Summary, name: str) -> str:
    """The tables as plain text."""
    out = io.StringIO()
    Terminal(file=out, width=WIDTH, force_terminal=False).print(name, tables(found), highlight=False, markup=False)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _stages(found: Summary) -> Table:
    """Milliseconds a step: on the GPU what was launched by a stage, else the stage's own time on the host."""
    device = ["GPU forward", "GPU backward"] if found.gpu else []
    columns = [*device, "host forward", "host backward", "share", *(["launches"] if found.gpu else []), "waits"]
    table = _table("stage, ms a step", *columns)
    none = Cost()
    whole = sum(_time(found, cost) for cost in found.stages.values()) or 1.0
    for name in sorted({name for name, _ in found.stages}, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
        pair = [found.stages.get((name, backward), none) for backward in (False, True)]
        milliseconds = [cost.device for cost in pair] * found.gpu + [cost.host for cost in pair]
        share = sum(_time(found, cost) for cost in pair) / whole
        launches = [f"{sum(cost.launches for cost in pair) / found.steps:,.0f}"] if found.gpu else []
        waits = sum(cost.waits for cost in pair) / found.steps
        cells = [f"{value / found.steps / 1000:,.2f}" if value else "" for value in milliseconds]
        table.add_row(name, *cells, f"{share:.1%}", *launches, f"{waits:,.0f}" if waits else "")
    return table


def _operators(found: Summary) -> Table:
    where = "GPU" if found.gpu else "host"
    table = _table(f"operator, a step, its own time on the {where}", "calls", "ms", "share")
    whole = sum(_time(found, cost) for cost in found.operators.values()) or 1.0
    for name, cost in sorted(found.operators.items(), key=lambda item: -_time(found, item[1]))[:TOP]:
        spent = _time(found, cost)
        table.add_row(name, f"{cost.calls / found.steps:,.0f}", f"{spent / found.steps / 1000:,.2f}", f"{spent / whole:.1%}")
    return table


def _waits(found: Summary) -> Table | str:
    if not found.waits:
        return "host waits: none found"
    table = _table("host waits, a step" if found.gpu else "values read by the host, a step (on a GPU it waits)", "stage", "times", "ms")
    for (name, place), cost in sorted(found.waits.items(), key=lambda item: (-item[1].waited, -item[1].waits))[:TOP]:
        table.add_row(name, place, f"{cost.waits / found.steps:,.1f}", f"{cost.waited / found.steps / 1000:,.2f}")
    return table


def _time(found: Summary, cost: Cost) -> float:
    return cost.device if found.gpu else cost.host


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, overflow="ellipsis", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    return table
