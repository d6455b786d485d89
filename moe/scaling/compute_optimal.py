"""The best model for a budget, as a law has it: sizes at which the loss can only rise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq

from moe.errors import ConfigError
from moe.scaling.laws import Column, Law

_LEAST, _GRID = 1e4, 400  # parameters of the smallest dense twin that is asked about, and sizes at which the search begins
_STEP, _NEAR = 1e-4, 1e-8  # in log size: of the slope, and how near the search comes to the largest model that is affordable
_DENSER = (0.05, 1e4)  # how many times the FLOPs a dense model is given to catch up
_MISSED = 10.0  # nats


class Budget(NamedTuple):
    """What may be spent."""

    flops: float  # of training, and of `served`
    total: float = np.inf  # parameters at most, of a memory
    active: float = np.inf  # parameters that a token meets at most, of what a written token may cost
    served: float = 0.0  # tokens that the model will write or read afterwards, of the same FLOPs

    @property
    def limited(self) -> bool:
        return bool(np.isfinite(min(self.total, self.active)))

    def __str__(self) -> str:
        served = f", out of which {compute(self.served)} tokens are served," if self.served else ""
        return f"{compute(self.flops)} FLOPs{served}"


def compute(flops: float) -> str:
    """FLOPs in three digits, as they are typed: 3e18."""
    front, _, power = f"{flops:.3g}".partition("e")
    return f"{front}e{int(power)}" if power else front


class Choice(NamedTuple):
    """How a layer is divided: a dense layer's width is cut into `granularity` pieces; a token meets `top_k` of `experts` such pieces."""

    experts: int = 1
    top_k: int = 1
    granularity: float = 1.0

    def __str__(self) -> str:
        if self.experts == 1:
            return "dense"
        return f"{self.experts} experts, top-{self.top_k}, granularity {self.granularity:g}"


DENSE = Choice()


class Sizes(NamedTuple):
    """Parameters of models of one choice and many sizes."""

    base: Column  # of the dense twin
    active: Column
    total: Column


class Family(NamedTuple):
    """How sizes hang together in a line of models, and what a token costs in training."""

    replaced: Callable[[Column], Column]  # of a dense model's parameters, those in the layers that experts take the place of
    price: Callable[[Sizes, Choice], Column]  # FLOPs a token, forward and backward
    extra: Callable[[Column, int], Column] = lambda base, experts: 0 * base  # parameters that come with so many experts: routers

    def sizes(self, base: Column, choice: Choice) -> Sizes:
        replaced, (experts, top_k, granularity) = self.replaced(base), choice
        outside = base - replaced + (self.extra(base, experts) if experts > 1 else 0)
        return Sizes(base, outside + top_k / granularity * replaced, outside + experts / granularity * replaced)


def six(sizes: Sizes, choice: Choice) -> Column:
    """FLOPs a token by the rule of thumb: six a parameter that it meets."""
    return 6 * sizes.active


PLAIN = Family(lambda base: base, six)  # every parameter is an expert's


class Optimum(NamedTuple):
    """The sizes that a law calls best at a budget."""

    choice: Choice
    base: float
    active: float
    total: float
    tokens: float
    loss: float
    slope: float  # of the loss in log size: zero but for rounding, unless a limit was met
    limit: str | None  # "memory" or "inference": which one keeps the model from growing

    @property
    def least(self) -> bool:
        """Whether it is the smallest model that is asked about, and the best one still smaller."""
        return self.base < _LEAST * (1 + 1e-9) and self.slope > 0


def points_of(sizes: Sizes, tokens: Column, choice: Choice) -> dict[str, Column]:
    """Columns as laws name them."""
    one = np.ones_like(tokens)
    return {
        "base": sizes.base, "active": sizes.active, "average": sizes.active, "total": sizes.total, "tokens": tokens,
        "experts": one * choice.experts / choice.top_k, "sparsity": one * (1 - choice.top_k / choice.experts),
        "granularity": one * choice.granularity,
    }  # fmt: skip


def optimum(law: Law, values: Mapping[str, float], budget: Budget, choice: Choice = DENSE, family: Family = PLAIN) -> Optimum:
    """The size and the tokens of least loss within a budget; ConfigError if no model fits into it."""
    check(budget)
    if "tokens" not in law.columns:
        raise ConfigError(f"the law {law.name} knows nothing of tokens, so no budget divides between size and tokens; choose another law")

    def tokens(sizes: Sizes) -> Column:
        return (budget.flops - 2 * sizes.active * budget.served) / family.price(sizes, choice)

    def loss(log_base: Any) -> Column:
        sizes = family.sizes(np.exp(np.atleast_1d(np.asarray(log_base, float))), choice)
        return law.loss(values, points_of(sizes, np.maximum(tokens(sizes), _NEAR), choice))

    def slope(at: float) -> float:
        step = min(_STEP, (end - at) / 4)
        a, b, c, d = loss(at + step * np.array([-2, -1, 1, 2]))
        return float(a - 8 * b + 8 * c - d) / (12 * step)

    end = _end(family, choice, budget)
    top, limit = _top(family, choice, budget, end)
    near = top
    if slope(top) > 0:
        grid = np.linspace(np.log(_LEAST), top, _GRID)
        at = int(np.argmin(loss(grid)))
        low, high = float(grid[max(at - 1, 0)]), float(grid[min(at + 1, _GRID - 1)])
        root: Any = brentq(slope, low, high, xtol=1e-13) if slope(low) < 0 else low
        near, limit = float(root), None
    sizes = family.sizes(np.exp(np.array([near])), choice)
    base, active, total = (float(column[0]) for column in sizes)
    return Optimum(choice, base, active, total, float(tokens(sizes)[0]), float(loss(near)[0]), slope(near), limit)


def best(law: Law, values: Mapping[str, float], budget: Budget, choices: Iterable[Choice], family: Family = PLAIN) -> list[Optimum]:
    """The optimum of every choice, the one of least loss first."""
    return sorted((optimum(law, values, budget, choice, family) for choice in choices), key=lambda found: found.loss)


def dense_multiple(law: Law, values: Mapping[str, float], budget: Budget, loss: float, family: Family = PLAIN) -> float | None:
    """How many times the FLOPs a dense model needs for a loss, within the same memory and inference; None if none are enough."""

    def short(log_times: float) -> float:
        asked = budget._replace(flops=budget.flops * float(np.exp(log_times)))
        try:
            return min(optimum(law, values, asked, DENSE, family).loss - loss, _MISSED)
        except ConfigError:  # of so little no dense model can be had
            return _MISSED

    low, high = np.log(_DENSER)
    if short(high) > 0:
        return None
    if short(low) < 0:
        return float(np.exp(low))
    root: Any = brentq(short, low, high, xtol=1e-6)
    return float(np.exp(root))


def check(budget: Budget) -> None:
    """Raise ConfigError if a budget is none."""
    for name, value in budget._asdict().items():
        if not value >= 0 or (value == 0 and name != "served"):
            raise ConfigError(
                f"a budget of {name}={value:g} is none; give {'0 or a number above it' if name == 'served' else 'a number above 0'}"
            )
    for name in ("flops", "served"):
        if not np.isfinite(getattr(budget, name)):
            raise ConfigError(f"a budget of {name}={getattr(budget, name):g} is none; give a finite number, such as 1e21")


def smallest(choice: Choice) -> str:
    """The smallest model of a choice that is asked about, in words."""
    dense = f"a dense model of {_LEAST:,.0f} parameters, the smallest that is asked about"
    return dense if choice == DENSE else f"{choice}, in the layers of {dense}"


def _end(family: Family, choice: Choice, budget: Budget) -> float:
    """The logarithm of the dense twin of the model that a budget trains for one token."""

    def over(log_base: float) -> float:
        sizes = family.sizes(np.exp(np.array([log_base])), choice)
        return float(np.log(family.price(sizes, choice) + 2 * sizes.active * budget.served)[0] - np.log(budget.flops))

    low = float(np.log(_LEAST))
    if over(low) >= 0:
        more = "raise --flops, or lower --served" if budget.served else "raise --flops"
        raise ConfigError(f"{budget} pay for no token of training of {smallest(choice)}; {more}")
    high = low + 1
    while over(high) < 0:
        high += 2
    root: Any = brentq(over, low, high, xtol=1e-12)
    return float(root)


def _top(family: Family, choice: Choice, budget: Budget, end: float) -> tuple[float, str | None]:
    """The logarithm of the largest dense twin within the limits, and which of them it is."""
    low, top, limit = float(np.log(_LEAST)), end - _NEAR, None
    for name, option, most, column in (("memory", "--memory", budget.total, 2), ("inference", "--active", budget.active, 1)):

        def room(log_base: float, column: int = column, most: float = most) -> float:
            return float(np.log(family.sizes(np.exp(np.array([log_base])), choice)[column][0]) - np.log(most))

        if room(top) <= 0:
            continue
        if room(low) >= 0:
            of = "in all" if name == "memory" else "that a token meets"
            raise ConfigError(f"{option} leaves {most:,.6g} parameters {of}, too few for {smallest(choice)}; raise the limit of {name}")
        root: Any = brentq(room, low, top, xtol=1e-12)
        top, limit = float(root), name
    return top, limit
