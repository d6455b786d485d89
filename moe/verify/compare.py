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
# Largest difference that passes. float64 proves the layout; float32 adds up in another order. In bfloat16 tokens whose best experts
# are nearly equal take another one, so that single elements prove nothing: there a quantity is compared by its size alone, which
# shows a wrong factor, a missing sum or a missing part.
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.2}


class Row(NamedTuple):
    """One quantity of a trace against the reference's."""

    quantity: str
    family: str | None  # of a gradient, moment or parameter
    difference: float  # see `compare`
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


def compare(trace: Trace, reference: Trace, dtype: str) -> list[Row]:
    """A row for each quantity and family, in the order of cause and effect.

    The difference is the largest of any element, relative to the largest element of this quantity, family and step; in bfloat16
    the part by which the whole is too large or too small: 1 for twice the reference, whatever else it holds.
    Quantities of a step are compared up to the first step in which one of them misses: all later ones differ in everything, and
    would hide where it began.
    """
    tolerance, by_size = TOLERANCE[dtype], dtype == "bfloat16"
    if trace.keys() != reference.keys():
        return [Row("names", None, math.inf, tolerance, min(trace.keys() ^ reference.keys()), None)]
    groups: dict[tuple[str, str | None, str | None], list[str]] = {}
    for name in sorted(reference, key=_order):
        groups.setdefault(_group(name), []).append(name)
    by_step = {key: _by_step(names, trace, reference, by_size=by_size) for key, names in groups.items() if key[0] in PER_STEP}
    missed = torch.stack([~(found <= tolerance) for found, _ in by_step.values()]).any(0)
    upto = int(missed.int().argmax()) + 1 if missed.any() else len(missed)
    rows = []
    for key, names in groups.items():
        found, worst = by_step.get(key) or _by_step(names, *({n: x[n][None] for n in names} for x in (trace, reference)), by_size=by_size)
        step = _largest(found[:upto])
        rows.append(Row(key[0], key[1], found[step].item(), tolerance, worst[step], step if key[0] in PER_STEP else None))
    return rows


def causes(rows: list[Row]) -> list[Row]:
    """The rows that miss: those of the first step in which any does, or else those at the end."""
    missed = [row for row in rows if not row.passes]
    return [row for row in missed if row.step is not None] or missed


def _by_step(names: list[str], trace: Trace, reference: Trace, *, by_size: bool) -> tuple[Tensor, list[str]]:
    """Difference in each step, and the tensor that has the largest part in it."""
    pairs = [[side[name].reshape(len(side[name]), -1) for side in (trace, reference)] for name in names]
    if by_size:
        each = torch.stack([((a - b) * b).sum(1) for a, b in pairs])
        whole, scale = each.sum(0).abs(), torch.stack([b.square().sum(1) for _, b in pairs]).sum(0)
    else:
        each = torch.stack([(a - b).abs().amax(1) for a, b in pairs])
        whole, scale = each.amax(0), torch.stack([b.abs().amax(1) for _, b in pairs]).amax(0)
    worst = [names[_largest(column.abs())].partition("/")[2] or names[0] for column in each.unbind(1)]
    return whole / torch.where(scale > 0, scale, 1), worst


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
