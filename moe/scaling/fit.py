"""Fits of laws to runs: first the exponents alone, with the best coefficients for each, then all together and robustly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, minimize, nnls
from scipy.stats import qmc

from moe.errors import DataError
from moe.scaling.laws import Column, Law, Points

_SOFT = 3e-3  # of log loss: residuals beyond it, or beyond what is usual where that is more, count for less
_BEST = 6  # starts that are followed to their end
_SIZES = ("total", "active", "average", "base", "tokens")
_LEVELS, _SAME = 3, 0.02
_SPAN = 2.0  # times, from the least tokens or parameters to the most, below which no exponent shows
_CLIP, _ODD = 4.0, 6.0  # standard deviations
_ALIVE, _FAINT = 1e-2, 1e-4  # share of the loss from which a term that vanished is tried again, and below which it has
_TINY = 1e-12
_FAR = 1e9  # nats that no run has
_AGAIN = 40  # steps of a fit that begins at the end of another
_WIDER = 0.5  # of a range: how far beyond it the last fit may go


class Fit(NamedTuple):
    """A law with values."""

    law: Law
    values: dict[str, float]
    residuals: Column  # of log loss, measured minus stated
    objective: float
    condition: float  # of the Jacobian with columns of unit length: beyond 1e4 some values mean little
    at_bounds: list[str]  # exponents that the data push out of their range, and coefficients that vanish

    def loss(self, points: Points) -> Column:
        return self.law.loss(self.values, points)

    @property
    def spread(self) -> float:
        """Standard deviation of the residuals, free values counted, and outliers no further than others go."""
        n = len(self.residuals)
        return float(np.sqrt(np.square(_clipped(self.residuals)).sum() / max(n - len(self.values), 1)))

    @property
    def aicc(self) -> float:
        """Akaike's criterion for small samples: of laws fitted to the same runs the one with the least is to be preferred."""
        n, k = len(self.residuals), len(self.values) + 1
        least = n * float(np.log(np.mean(np.square(_clipped(self.residuals))) + 1e-300)) + 2 * k
        return least + 2 * k * (k + 1) / (n - k - 1) if n > k + 1 else float("inf")


def fit(law: Law, points: Points, loss: Column, *, starts: int = 256, seed: int = 0) -> Fit:
    """The law that is nearest to runs of these losses; DataError if they are too few or lack spread."""
    check(law, points, loss)
    names = list(law.exponents)
    low, high = np.array([law.exponents[n] for n in names]).T
    logarithmic = (low > 0) & (high / np.maximum(low, _TINY) > 20)
    draws = qmc.Sobol(len(names), rng=seed).random(starts)
    by_factor = np.exp(np.log(np.maximum(low, _TINY)) * (1 - draws) + np.log(np.abs(high)) * draws)
    places = np.where(logarithmic, by_factor, low + (high - low) * draws)
    with np.errstate(over="ignore", invalid="ignore"):
        found = sorted((_coefficients(law, points, loss, dict(zip(names, place, strict=True))) for place in places), key=lambda f: f[0])
    soft = _usual(np.log(loss) - np.log(law.loss(found[0][1], points)))
    ends = [refine(law, points, loss, values, soft=soft) for _, values in found[:_BEST] if values]
    return min(ends, key=lambda end: end.objective)


def check(law: Law, points: Points, loss: Column) -> None:
    """Raise DataError if a law cannot be fitted to runs of these columns."""
    if missing := [name for name in law.columns if name not in points]:
        raise DataError(f"the law {law.name} needs the column {missing[0]} of every run; it needs {', '.join(law.columns)}")
    count = len(law.coefficients) + len(law.exponents)
    narrow = [name for name in law.columns if name in _SIZES and points[name].max() < _SPAN * points[name].min()]
    levels = {name: _levels(1 - points[name] if name == "sparsity" else points[name]) for name in law.columns}
    if flat := [f"{found} of {name}" for name, found in levels.items() if found < _LEVELS]:
        raise DataError(
            f"the law {law.name} needs runs of at least {_LEVELS} values of each column and these have {' and '.join(flat)}; "
            "add runs, or choose another law"
        )
    if narrow:
        least, most = points[narrow[0]].min(), points[narrow[0]].max()
        raise DataError(
            f"the law {law.name} needs runs whose {narrow[0]} differ by {_SPAN:g}x or more and these have {least:.3g} to {most:.3g}; "
            "add runs with less or more"
        )
    if len(loss) <= count:
        raise DataError(f"the law {law.name} has {count} free values and there are {len(loss)} runs; add at least {count + 1 - len(loss)}")


def _levels(column: Column) -> int:
    """How many values there are, those not counted that lie less than _SAME apart: a router's rows make no other size."""
    values = np.unique(column)
    return 1 + int((np.diff(values) > _SAME * np.abs(values[1:])).sum())


def _coefficients(law: Law, points: Points, loss: Column, exponents: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """How well the best coefficients do for these exponents, and all values."""
    terms = law.terms(points, exponents)
    if law.decadic:
        best = np.linalg.lstsq(terms, np.log10(loss), rcond=None)[0]
    else:
        relative = terms / loss[:, None]
        scale = np.linalg.norm(relative, axis=0)
        try:
            best = nnls(relative / scale, np.ones(len(loss)))[0] / scale
        except RuntimeError:  # it did not end
            return np.inf, {}
    values = {**exponents, **dict(zip(law.coefficients, best.tolist(), strict=True))}
    stated = law.loss(values, points)
    return (_robust(np.log(loss) - np.log(stated)) if (stated > 0).all() else np.inf), values


def refine(
    law: Law, points: Points, loss: Column, values: Mapping[str, float], *, soft: float = _SOFT, most: int = 400, near: float = 1e-8
) -> Fit:
    """The nearest fit to `values`: least squares of log loss that residuals beyond `soft` do not rule.

    most: steps at most; near: a relative change that is none.
    """
    names, measured, vector = list(law.exponents), np.log(loss), _Vector(law, points)
    reach = {n: _WIDER * (high - low) for n, (low, high) in law.exponents.items()}
    low = np.array([law.exponents[n][0] - (0 if law.exponents[n][0] > 0 else reach[n]) for n in names])
    high = np.array([law.exponents[n][1] + reach[n] for n in names])
    start, free = vector.of(_alive(law, points, loss, values)), np.full(len(law.coefficients), np.inf)
    start[: len(names)] = np.clip(start[: len(names)], low + 1e-9, high - 1e-9)
    slopes: Any = vector.slopes  # scipy's types know names alone
    end = least_squares(
        lambda theta: vector.stated(theta) - measured, start, slopes,
        bounds=(np.concatenate([low, -free]), np.concatenate([high, free])), loss="soft_l1", f_scale=soft, x_scale="jac",
        max_nfev=most, ftol=near, xtol=near,
    )  # fmt: skip
    final, rest = vector.named(end.x), measured - vector.stated(end.x)
    columns = vector.slopes(end.x)
    lengths = np.linalg.norm(columns, axis=0)
    condition = float(np.linalg.cond(columns / lengths)) if (lengths > 0).all() else np.inf
    slack = {n: 1e-6 * (high - low) for n, (low, high) in law.exponents.items()}
    pushed = [n for n, (low, high) in law.exponents.items() if not low + slack[n] < final[n] < high - slack[n]]
    if not law.decadic:
        shares = law.terms(points, final) * np.array([final[n] for n in law.coefficients]) / np.exp(vector.stated(end.x))[:, None]
        pushed += [n for n, share in zip(law.coefficients, shares.max(0), strict=True) if share < _FAINT]
    return Fit(law, final, rest, _robust(rest, soft), condition, pushed)


def _alive(law: Law, points: Points, loss: Column, values: Mapping[str, float]) -> dict[str, float]:
    """Values none of which has vanished: the logarithm of nothing has no slope, so that it could not come back."""
    if law.decadic:
        return dict(values)
    least = _ALIVE * np.median(loss[:, None] / np.maximum(law.terms(points, values), _TINY), axis=0)
    return {**values, **{n: max(values[n], float(low)) for n, low in zip(law.coefficients, least, strict=True) if values[n] < 10 * _TINY}}


class _Vector(NamedTuple):
    """A law's values as one vector, exponents first; coefficients that must be positive as their logarithms."""

    law: Law
    points: Points

    def of(self, values: Mapping[str, float]) -> NDArray[np.float64]:
        shown = np.array([values[n] for n in self.law.coefficients])
        return np.array([*(values[n] for n in self.law.exponents), *(shown if self.law.decadic else np.log(np.maximum(shown, _TINY)))])

    def named(self, theta: NDArray[np.float64]) -> dict[str, float]:
        exponents, shown = np.split(theta, [len(self.law.exponents)])
        of_terms = shown if self.law.decadic else np.exp(shown)
        return dict(zip([*self.law.exponents, *self.law.coefficients], [*exponents.tolist(), *of_terms.tolist()], strict=True))

    def stated(self, theta: NDArray[np.float64]) -> Column:
        """The logarithms of the losses."""
        with np.errstate(over="ignore", invalid="ignore"):
            stated = self.law.loss(self.named(theta), self.points)
        return np.log(np.clip(np.nan_to_num(stated, nan=_FAR, posinf=_FAR), 1 / _FAR, _FAR))

    def slopes(self, theta: NDArray[np.float64]) -> NDArray[np.float64]:
        """Their derivatives: of coefficients exact, of exponents by a small step."""
        values, log_loss = self.named(theta), self.stated(theta)
        shown = np.array([values[n] for n in self.law.coefficients])
        with np.errstate(over="ignore", invalid="ignore"):
            terms = self.law.terms(self.points, values)
            moved = []
            for name in self.law.exponents:
                step = 1e-7 * max(1.0, abs(values[name]))
                moved.append((self.law.terms(self.points, values | {name: values[name] + step}) - terms) @ shown / step)
            every = np.column_stack([*moved, terms if self.law.decadic else terms * shown])
            every = every * np.log(10) if self.law.decadic else every / np.exp(log_loss)[:, None]
        return np.clip(np.nan_to_num(every, nan=0.0), -_FAR, _FAR)


def _robust(residuals: Column, soft: float = _SOFT) -> float:
    return float(np.sum(np.sqrt(1 + np.square(residuals / soft)) - 1))


def unusual(residuals: Column) -> NDArray[np.bool_]:
    """Which residuals chance does not explain."""
    return np.abs(residuals - np.median(residuals)) > _ODD * _usual(residuals)


def _clipped(residuals: Column) -> Column:
    """Residuals, those beyond nearly all that chance brings taken for the last that it does."""
    far = _CLIP * 1.48 * float(np.median(np.abs(residuals - np.median(residuals))))
    return np.clip(residuals, -far, far) if far > 0 else residuals


def _usual(residuals: Column) -> float:
    """The standard deviation that the middle half of the residuals speaks of, _SOFT at least."""
    return max(_SOFT, 1.48 * float(np.median(np.abs(residuals - np.median(residuals)))))


def bootstrap(
    found: Fit, points: Points, loss: Column, *, draws: int = 200, seed: int = 0, groups: NDArray[np.int64] | None = None
) -> list[Fit]:
    """Fits to losses as they might have come out as well: what the law states, times residuals drawn from its own.

    Residuals are made as wide as the errors are, of which the fit has absorbed its share. groups: a number a run; runs of one number
    share most of their steps, so what they miss by is kept together and only its sign is drawn (Cameron, Gelbach and Miller, 2008).
    """
    chance, stated = np.random.default_rng(seed), np.log(found.loss(points))
    n = len(loss)
    numbers, place = np.unique(np.arange(n) if groups is None else groups, return_inverse=True)
    apart = len(numbers)
    wide = found.residuals * np.sqrt(apart / max(apart - len(found.values), 1))
    soft = _usual(found.residuals)

    def drawn() -> Column:
        if groups is None:
            return (wide - wide.mean())[chance.integers(n, size=n)]
        return wide * np.where(chance.random(apart) < 0.5, -1.0, 1.0)[place]

    return [refine(found.law, points, np.exp(stated + drawn()), found.values, soft=soft, most=_AGAIN, near=1e-5) for _ in range(draws)]


def interval(fits: list[Fit], points: Points, level: float = 0.95) -> tuple[Column, Column]:
    """Between which losses the share `level` of `fits` lies at each point."""
    losses = np.stack([one.loss(points) for one in fits])
    low, high = np.quantile(losses, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


class Identified(NamedTuple):
    """What a design of runs would teach of a law, by simulation."""

    deviation: dict[str, float]  # of each exponent, relative to its size
    error: float  # that nine of ten fits stay below, relative, at the worst of the points asked for

    def says(self, most: float) -> str | None:
        """Why a study of this design should not start; None if it may."""
        if self.error <= most:
            return None
        worst = max(self.deviation, key=lambda name: self.deviation[name])
        return (
            f"runs of this design would leave the loss open by {self.error:.1%} where at most {most:.1%} was asked for, and {worst} by "
            f"{self.deviation[worst]:.0%}; add values to its axes, or seeds"
        )


def identify(
    law: Law, values: Mapping[str, float], design: Points, wanted: Points, *, noise: float, draws: int = 30, seed: int = 0
) -> Identified:
    """Fit the law to simulated runs of a design, if `values` were the truth, and see how well it foresees the points `wanted`."""
    chance, truth = np.random.default_rng(seed), law.loss(values, design)
    check(law, design, truth)
    fits = [fit(law, design, truth * np.exp(chance.normal(0, noise, len(truth))), starts=64) for _ in range(draws)]
    spread = {n: float(np.std([f.values[n] for f in fits]) / max(abs(values[n]), 1e-3)) for n in law.exponents}
    errors = np.abs(np.stack([f.loss(wanted) for f in fits]) / law.loss(values, wanted) - 1)
    return Identified(spread, float(np.quantile(errors, 0.9, axis=0).max()))


def cross_check(
    law: Law, points: Points, loss: Column, *, starts: int = 32, delta: float = 1e-3, seed: int = 0, also: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The values that the papers' own procedure finds: Huber's loss of log loss, L-BFGS from many starts, and from `also`."""
    check(law, points, loss)
    names = list(law.exponents)
    low, high = np.array([law.exponents[n] for n in names]).T
    measured, vector = np.log(loss), _Vector(law, points)

    def objective(theta: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        rest = vector.stated(theta) - measured
        size = np.abs(rest)
        huber = np.where(size <= delta, 0.5 * rest**2, delta * (size - 0.5 * delta))
        return float(huber.sum()), np.clip(rest, -delta, delta) @ vector.slopes(theta)

    best: tuple[float, dict[str, float]] = (np.inf, {})
    draws = low + (high - low) * qmc.Sobol(len(names), rng=seed).random(starts)
    begins = [_coefficients(law, points, loss, dict(zip(names, draw, strict=True)))[1] for draw in draws]
    for values in [*begins, *([dict(also)] if also else [])]:
        if not values:
            continue
        end = minimize(objective, vector.of(values), jac=True, method="L-BFGS-B", options={"maxiter": 500})
        best = min(best, (float(end.fun), vector.named(end.x)), key=lambda pair: pair[0])
    return best[1]
