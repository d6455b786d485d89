"""Everything that looks at a run's steps while they run: clocks of the stages, profiler, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe.parallel.mesh import Mesh
from moe.parallel.telemetry import Telemetry
from moe.recipe import Recipe
from moe.train.memory import Memory
from moe.train.profiler import Profiler


class Watch:
    """What the recipe's section `log` asks to see of each step."""

    def __init__(self, recipe: Recipe, engine: Any, mesh: Mesh, folder: Path, say: Callable[[str], None]) -> None:
        self.telemetry = Telemetry(engine.model, engine.planner, mesh, on=recipe.log.stages)
        self.profiler = Profiler(recipe.log.profile, folder / "profile", mesh, say)
        self.memory = Memory(recipe, engine, mesh, folder / "memory", say)

    def figures(self) -> dict[str, Any]:
        """Of the last step, for `row_of`: where its time went and how much memory it took. Every rank must call it."""
        return {"stages": self.telemetry.figures(), "memory": self.memory.figures()}

    @contextmanager
    def step(self, number: int, logged: bool) -> Iterator[None]:
        """Around step `number`, the first being 1; `logged` alike on every rank."""
        with self.memory.step(number, logged), self.profiler.step(number), self.telemetry.watch(logged):
            yield
