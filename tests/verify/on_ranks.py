"""Checks of a plan on ranks out of the test's fork server, instead of launched processes."""

from __future__ import annotations

from collections.abc import Sequence

from moe.parallel.layout import Layout
from moe.parallel.mesh import start
from moe.verify.compare import Row, compare
from moe.verify.plan import Check
from moe.verify.shrink import built
from moe.verify.trace import Trace, trace
from tests.verify import controls
from tests.workers import run_ranks


def traces(rank: int, world: int, jobs: Sequence[tuple[list[str], int, str | None]], steps: int) -> list[Trace] | None:
    """The trace of each job: words, ranks that are taken together, and the mistake to make."""
    mesh = start(Layout(device="cpu", timeout=60))
    found = [
        trace(built(words), mesh, steps=steps, ranks=ranks, **({"make": getattr(controls, mistake)} if mistake else {}))
        for words, ranks, mistake in jobs
    ]
    return found if rank == 0 else None


def rows(checks: Sequence[Check], mistakes: Sequence[str | None] = (), *, steps: int = 2) -> list[list[Row]]:
    """What each check finds; `mistakes` are made in the layouts, never in the reference."""
    mistakes = mistakes or [None] * len(checks)
    references = {id(check.reference): check.reference for check in checks}
    jobs = [(case.words, case.ranks, None) for case in references.values()]
    alone = dict(zip(references, run_ranks(1, traces, jobs, steps, timeout=120)[0], strict=True))
    found: dict[int, Trace] = {}
    for world in sorted({check.case.world for check in checks}):
        some = [number for number, check in enumerate(checks) if check.case.world == world]
        jobs = [(checks[number].case.words, 1, mistakes[number]) for number in some]
        found |= zip(some, run_ranks(world, traces, jobs, steps, timeout=300)[0], strict=True)
    return [compare(found[number], alone[id(check.reference)], check.dtype) for number, check in enumerate(checks)]
