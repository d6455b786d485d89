"""How the sizes of a study's runs hang together, read from their rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.optimize import nnls

from moe.scaling.compute_optimal import DENSE, Choice, Family, Sizes, six
from moe.scaling.laws import Column
from moe.scaling.results import Row

_LOOKED_UP = 0.5  # of a model's parameters at most are an embedding, with which nothing is multiplied


def choice_of(row: Row) -> Choice:
    """How a run's layers were divided."""
    if row.experts == 1:
        return DENSE
    return Choice(row.experts, round(row.experts * (1 - row.sparsity)), row.granularity)


def choices(rows: Sequence[Row]) -> list[Choice]:
    """Every division that was run, the dense one first."""
    return sorted({choice_of(row) for row in rows} | {DENSE})


def family(rows: Sequence[Row]) -> Family:
    """Sizes and prices of models like these, and larger ones."""
    line = _Line(rows)

    def replaced(base: Column) -> Column:
        return line.replaced * line.place(base)[1]

    def extra(base: Column, experts: int) -> Column:
        width, square = line.place(base)
        return (line.router * experts + line.shared) * square / width

    def price(sizes: Sizes, choice: Choice) -> Column:
        width, square = line.place(sizes.base)
        cost = six(sizes, choice)
        return np.maximum(cost + line.by_width * width + line.by_depth * square / width, (1 - _LOOKED_UP) * cost)

    return Family(replaced, price, extra)


class _Line:
    """A line of models along the size of their dense twin.

    Embeddings and norms go with the width d, attention and feed-forward layers with d² · depth; routers, shared experts and attention's
    scores with d · depth. That is exact where depth is a power of the width, and heads and layers keep their proportions.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        sparse = [row for row in rows if row.experts > choice_of(row).top_k]  # a token that meets all experts tells nothing
        known = sparse or rows
        width, square, base = _width(known), _square(known), np.array([row.base for row in known], float)
        inside = np.array([_replaced(row) for row in sparse]) if sparse else np.zeros_like(base)
        self.replaced = float(np.mean(inside / square))
        (layers, embedding), _ = nnls(np.stack([square, width], 1) / base[:, None], 1 - inside / base)
        self.power, self.start = _power(square, width)
        at = np.linspace(-20, 80, 2501)  # logarithms of d² · depth
        whole = embedding * np.exp(self.start + self.power * at) + (layers + self.replaced) * np.exp(at)
        self.log_square = CubicSpline(np.log(whole), at)  # of log base

        many = np.array([row.experts for row in sparse], float)
        met = [row.active - row.base - (choice_of(row).top_k / row.granularity - 1) * _replaced(row) for row in sparse]
        deep = square / width
        self.router, self.shared = _solved([many * deep, deep], np.array(met), base) if sparse else (0.0, 0.0)
        every, cost = _width(rows), np.array([6 * row.average for row in rows])
        beyond = np.array([row.flops / row.tokens for row in rows]) - cost
        self.by_width, self.by_depth = _solved([every, _square(rows) / every], beyond, cost)

    def place(self, base: Column) -> tuple[Column, Column]:
        """Width, and d² · depth, of the twin of so many parameters."""
        at = self.log_square(np.log(base))
        return np.exp(self.start + self.power * at), np.exp(at)


def _width(rows: Sequence[Row]) -> Column:
    return np.array([row.axes["d_model"] for row in rows], float)


def _square(rows: Sequence[Row]) -> Column:
    return _width(rows) ** 2 * np.array([row.axes["layers"] for row in rows], float)


def _replaced(row: Row) -> float:
    """Parameters of the dense twin's layers that experts took the place of."""
    choice = choice_of(row)
    return (row.total - row.active) * choice.granularity / (choice.experts - choice.top_k)


def _power(x: Column, y: Column) -> tuple[float, float]:
    """Exponent and log factor of the power of x that y follows; a square root where x has but one value."""
    slope = float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(np.unique(x)) > 1 else 0.5
    return slope, float(np.mean(np.log(y) - slope * np.log(x)))


def _solved(columns: Sequence[Column], y: Column, scale: Column) -> tuple[float, ...]:
    """Factors of the columns whose sum is y, in shares of `scale`; the smallest where many would do."""
    sizes = [float(np.mean(column)) for column in columns]
    left = np.stack([column / size / scale for column, size in zip(columns, sizes, strict=True)], 1)
    factors = np.linalg.lstsq(left, y / scale, rcond=1e-9)[0]
    return tuple(float(factor / size) for factor, size in zip(factors, sizes, strict=True))
