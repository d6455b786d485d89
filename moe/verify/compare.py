"""Two traces side by side: the largest relative difference of every quantity and family of parameters."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moe.verify.trace import Trace

# What happens in a step, in the order of cause and effect, and what is left after the last one.
PER_STEP = ("loads", "auxiliary", "loss", "gradient", "norm", "buffer")
AT_THE_END = ("moment", "parameter")
FAMILIES = ("router", "experts", "attention", "norms", "embeddings", "mlp")
# Largest difference that passes: float64 proves the layout. Below it sums in another order differ, and now and then a token whose
# best experts are nearly equal takes another one; bfloat16 can only show that no factor is wrong.
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.1}


class Row(NamedTuple):
    """One quantity of a trace against the reference's."""

    quantity: str
    family: str | None  # of a gradient, moment or parameter
    difference: float  # largest of any element, relative to the largest element of this quantity (and family, and step)
    tolerance: float
    worst: str | None  # the tensor in which it is
    step: int | None  # in which it is, from 0

    @property
    def passes(self) -> bool:
        return self.difference <= self.tolerance  # false for NaN

    def __str__(self) -> str:
        where = self.worst if self.worst != self.quantity else None
        of = f" of {self.family}" if self.family else ""
        at = ", ".join(filter(None, (where, None if self.step is None else f"step {self.step}")))
        return f"{self.quantity}{of} differs by {self.difference:.1e}{f' ({at})' if at else ''}"


def compare(trace: Trace, reference: Trace, tolerance: float) -> list[Row]:
    """A row for each quantity and family, in the order of cause and effect.

    Quantities of a step are compared up to the first step in which one of them misses: all later ones differ in everything, and
    would hide where it began.
    """
    if trace.keys() != reference.keys():
        return [Row("names", None, math.inf, tolerance, min(trace.keys() ^ reference.keys()), None)]
    groups: dict[tuple[str, str | None, str | None], list[str]] = {}
    for name in sorted(reference, key=_order):
        groups.setdefault(_group(name), []).append(name)
    by_step = {key: _by_step(names, trace, reference) for key, names in groups.items() if key[0] in PER_STEP}
    missed = torch.stack([~(found <= tolerance) for found, _ in by_step.values()]).any(0)
    upto = int(missed.int().argmax()) + 1 if missed.any() else len(missed)
    rows = []
    for key, names in groups.items():
        found, worst = by_step.get(key) or _by_step(names, *({n: side[n][None] for n in names} for side in (trace, reference)))
        step = _largest(found[:upto])
        rows.append(Row(key[0], key[1], found[step].item(), tolerance, worst[step], step if key[0] in PER_STEP else None))
    return rows


def causes(rows: list[Row]) -> list[Row]:
    """The rows that miss: those of the first step in which any does, or else those at the end."""
    missed = [row for row in rows if not row.passes]
    return [row for row in missed if row.step is not None] or missed


def _by_step(names: list[str], trace: Trace, reference: Trace) -> tuple[Tensor, list[str]]:
    """Relative difference in each step, and the tensor in which it is."""
    each = torch.stack([_most(trace[name] - reference[name]) for name in names])
    scale = torch.stack([_most(reference[name]) for name in names]).amax(0)
    relative = each / torch.where(scale > 0, scale, 1)
    worst = [names[_largest(column)].partition("/")[2] or names[0] for column in relative.unbind(1)]
    return relative.amax(0), worst


def _most(x: Tensor) -> Tensor:
    return x.abs().reshape(len(x), -1).amax(1) if x.numel() else x.new_zeros(len(x))


def _largest(x: Tensor) -> int:
    return int(torch.where(x.isnan(), torch.inf, x).argmax())


def _group(name: str) -> tuple[str, str | None, str | None]:
    """Quantity, family, and kind of moment: what has a scale in common."""
    quantity, _, rest = name.partition("/")
    moment = None
    if quantity == "moment":
        moment, _, rest = rest.partition(".")
    return quantity, family(rest) if rest and quantity != "buffer" else None, moment


def _order(name: str) -> tuple[int, int, str]:
    quantity, of, _ = _group(name)
    return (PER_STEP + AT_THE_END).index(quantity), FAMILIES.index(of) if of else 0, name


def family(name: str) -> str:
    """Which family a parameter belongs to, by its name in the model."""
    if ".router." in name:
        return "router"
    if name.endswith("norm.weight"):
        return "norms"
    if ".experts." in name:
        return "experts"
    if ".attention." in name:
        return "attention"
    return "embeddings" if name.startswith(("embed.", "head.")) else "mlp"
