"""What a verification says: a table for people, a record for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from moe.kernels import auto
from moe.model.transformer import sparse_layers
from moe.recipe import Recipe
from moe.verify.compare import FAMILIES, OF_SIZE, TOLERANCE, Row, causes
from moe.verify.plan import Check

_BEFORE = ("loads", "auxiliary", "loss")
_AFTER = ("norm", "buffer", "moment", "parameter")
_HEADS = {"auxiliary": "aux", "embeddings": "embed", "attention": "attent", "parameter": "params"}
_WIDTH = 8


def heading(name: str, small: Recipe, device: str, steps: int) -> str:
    """What is run in place of the recipe's model."""
    model, moe, train = small.model, small.model.moe, small.train
    experts = f", {sum(sparse_layers(model))} of them with {moe.experts} experts behind {moe.router['name']}" if moe else ""
    groups = "NCCL on GPUs" if device == "cuda" else "gloo on CPU"
    return (
        f"{name}: {model.layers} layers of width {model.d_model}{experts}; {steps} steps of {train.batch} x {small.data.sequence} "
        f"positions at lr={small.optimizer.lr:g}; {groups}"
    )


def table(checks: Sequence[Check], left_out: Sequence[tuple[str, str]], device: str) -> str:
    """A line a layout and dtype, the worse of both optimizers in each column, and below it what missed."""
    families = [of for of in FAMILIES if any(row.family == of for check in checks for row in check.rows)]
    columns: list[tuple[str, str | None]] = [(quantity, None) for quantity in _BEFORE]
    columns += [*(("gradient", of) for of in families), *((quantity, None) for quantity in _AFTER)]
    columns = [c for c in columns if any(_of(c, [check]) is not None for check in checks)]
    grouped: dict[tuple[str, str], list[Check]] = {}
    for check in checks:
        grouped.setdefault((check.layout, check.dtype), []).append(check)
    width = max(len(layout) for layout, _ in grouped)
    heads = "".join(_HEADS.get(word, word).rjust(_WIDTH) for word in (of or quantity for quantity, of in columns))
    lines = [f"{'largest relative difference to one process'.ljust(width)}  {'dtype':9}{heads}  backend"]
    for (layout, dtype), some in grouped.items():
        cells = "".join(_cell(_of(column, some)).rjust(_WIDTH) for column in columns)
        verdict = "PASS" if all(check.passes for check in some) else "FAIL"
        lines.append(f"{layout.ljust(width)}  {dtype:9}{cells}  {_backend(some[0], device):9} {verdict}")
        lines += [f"    {check.optimizer}: {line}" for check in some for line in misses(check)]
    for why in dict.fromkeys(why for _, why in left_out):
        lines.append(f"left out, because {why}: {'; '.join(layout for layout, reason in left_out if reason == why)}")
    dtypes = dict.fromkeys(check.dtype for check in checks)
    limits = {dtype: f"{TOLERANCE[dtype]:g}" if dtype in TOLERANCE else f"{OF_SIZE:g} of its size" for dtype in dtypes}
    allowed = ", ".join(f"{limit} in {dtype}" for dtype, limit in limits.items())
    lines.append(f"columns router … mlp are gradients of plain SGD; passes up to {allowed}")
    return "\n".join([*lines, _summary(len(checks), sum(not check.passes for check in checks)), ""])


def misses(check: Check) -> list[str]:
    """Why a check fails, cause first."""
    refusals = [case.refusal for case in (check.case, check.reference) if case.refusal]
    return refusals or [str(row) for row in causes(check.rows)]


def record(name: str, checks: Sequence[Check], left_out: Sequence[tuple[str, str]], device: str, steps: int) -> dict[str, Any]:
    """Everything that was found about a recipe, for JSON."""
    return {
        "recipe": name,
        "passes": all(check.passes for check in checks),
        "device": device,
        "steps": steps,
        "checks": [
            {
                "layout": check.layout,
                "dtype": check.dtype,
                "optimizer": check.optimizer,
                "backend": _backend(check, device),
                "passes": check.passes,
                "misses": misses(check),
                "rows": [_plain(row) for row in check.rows],
            }
            for check in checks
        ],
        "left_out": [{"layout": layout, "why": why} for layout, why in left_out],
    }


def _plain(row: Row) -> dict[str, Any]:
    difference = row.difference if math.isfinite(row.difference) else None  # JSON has no word for it
    return row._asdict() | {"difference": difference, "passes": row.passes}


def _of(column: tuple[str, str | None], checks: Sequence[Check]) -> float | None:
    quantity, of = column
    found = [row.difference for check in checks for row in check.rows if row.quantity == quantity and of in (None, row.family)]
    return max(found, key=lambda x: math.inf if math.isnan(x) else x) if found else None


def _cell(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.0e}"


def _backend(check: Check, device: str) -> str:
    """The backend that multiplies experts; instead of "auto" what it takes here."""
    model, moe = check.small.model, check.small.model.moe
    if moe is None:
        return "dense"
    dtype = getattr(torch, check.dtype)
    return auto.choose(auto.machine(device), dtype, model.d_model, moe.d_expert).name if moe.backend == "auto" else moe.backend


def _summary(checks: int, failed: int) -> str:
    return f"all {checks} checks PASS" if not failed else f"{failed} of {checks} checks FAIL"
