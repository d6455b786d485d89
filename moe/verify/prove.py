"""`moe verify`: run a small form of a recipe on one process and under each layout, and print what differs."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from moe.errors import ConfigError, MoeError
from moe.parallel.launch import launch
from moe.recipe import Recipe
from moe.verify.compare import compare
from moe.verify.layouts import parse
from moe.verify.plan import Case, plan
from moe.verify.report import heading, record, table

_AT_ONCE = 32  # cases that share processes: each has process groups of its own


def verify(
    recipes: dict[str, Recipe], wanted: Sequence[str] = (), *, steps: int = 3, dtypes: Sequence[str] = (), out: Path | None = None
) -> bool:
    """Whether every recipe trains the same under every layout; prints a table for each and writes all of them as JSON."""
    plans = {name: plan(recipe, [parse(text) for text in wanted], dtypes) for name, recipe in recipes.items()}
    report = []
    for name, (checks, left_out, device) in plans.items():
        print(heading(name, checks[0].small, device, steps), flush=True)
        run([case for check in checks for case in (check.reference, check.case)], steps)
        for check in checks:
            if check.case.trace is not None and check.reference.trace is not None:
                check.rows = compare(check.case.trace, check.reference.trace, check.dtype)
        print(table(checks, left_out, device), flush=True)
        report.append(record(name, checks, left_out, device, steps))
    if out is not None:
        _write(out, report)
    return all(entry["passes"] for entry in report)


def _write(path: Path, report: list[dict[str, Any]]) -> None:
    try:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); give --json a file in a folder that can") from None


def run(cases: Sequence[Case], steps: int) -> None:
    """Run each case once, on processes of their own for each number of ranks."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    unique = list({id(case): case for case in cases}.values())
    for world in sorted({case.world for case in unique}):
        of_world = [case for case in unique if case.world == world]
        for first in range(0, len(of_world), _AT_ONCE):
            _launch(of_world[first : first + _AT_ONCE], world, steps)


def _launch(cases: Sequence[Case], world: int, steps: int) -> None:
    with tempfile.TemporaryDirectory(prefix="moe-verify-") as name:
        folder = Path(name)
        job = [{"words": case.words, "name": case.name, "ranks": case.ranks, "steps": steps} for case in cases]
        (folder / "cases.json").write_text(json.dumps(job))
        if code := launch([name], world, program=("-m", "moe.verify.rank")):
            error = MoeError(f"the verification stopped on {world} ranks; the reason is above")
            error.exit_code = code
            raise error
        for number, case in enumerate(cases):
            if (folder / f"{number}.txt").exists():
                case.refusal = (folder / f"{number}.txt").read_text()
            else:
                case.trace = load_file(folder / f"{number}.safetensors")
