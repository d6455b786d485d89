"""Scaling laws: the loss of a run as a sum of a few terms of its size, its tokens and its experts.

Given its exponents a law is linear in what is left, the coefficients; a fit lives on that. All losses are in nats a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.float64]
Points = Mapping[str, Column]  # of each run: what a law's `columns` name


@dataclass(frozen=True)
class Law:
    """L = Σ coefficient · term; with `decadic` it is log10 L that is the sum, and coefficients may be negative.

    Columns: "total", "active" and "average" parameters (of a run whose size changes, over its tokens), "base": parameters of the
    dense model whose layers were given experts; "tokens"; "experts": of a layer, for each one that a token meets; "granularity": how
    many times narrower than a dense layer's an expert is; "sparsity": the share of a layer's experts that a token leaves out.
    """

    name: str
    source: str
    columns: tuple[str, ...]
    coefficients: tuple[str, ...]
    exponents: Mapping[str, tuple[float, float]]  # and where to look for them
    terms: Callable[[Points, Mapping[str, float]], NDArray[np.float64]]  # [points, coefficients]
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    decadic: bool = False

    def loss(self, values: Mapping[str, float], points: Points) -> Column:
        """Nats a token that the law states, given its coefficients and exponents."""
        total = self.terms(points, values) @ np.array([values[name] for name in self.coefficients])
        return 10**total if self.decadic else total


def saturated(experts: Column, start: float, most: float) -> Column:
    """The number of experts that counts: `start` for one, at most `most` (Clark et al., arXiv 2202.01169)."""
    return 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / most)) + 1 / most)


def _chinchilla(size: str) -> Callable[[Points, Mapping[str, float]], NDArray[np.float64]]:
    def terms(x: Points, p: Mapping[str, float]) -> NDArray[np.float64]:
        return np.stack([x[size] ** -p["alpha"], x["tokens"] ** -p["beta"], np.ones_like(x[size])], 1)

    return terms


def _clark(x: Points, p: Mapping[str, float]) -> NDArray[np.float64]:
    size, experts = np.log10(x["base"]), np.log10(saturated(x["experts"], p["e_start"], p["e_max"]))
    return np.stack([size, experts, size * experts, np.ones_like(size)], 1)


def _krajewski(x: Points, p: Mapping[str, float]) -> NDArray[np.float64]:
    size = x["total"] ** -p["alpha"]
    return np.stack([size * x["granularity"] ** -p["gamma"], size, x["tokens"] ** -p["beta"], np.ones_like(size)], 1)


def _abnar(x: Points, p: Mapping[str, float]) -> NDArray[np.float64]:
    size, used = x["total"], 1 - x["sparsity"]
    by_use = used ** -p["lambda"]
    return np.stack(
        [size ** -p["alpha"], x["tokens"] ** -p["beta"], by_use, used ** -p["delta"] * size ** -p["gamma"], np.ones_like(size)], 1
    )


def _ludziejewski(x: Points, p: Mapping[str, float]) -> NDArray[np.float64]:
    experts = np.log(saturated(x["experts"], p["e_start"], p["e_max"]))
    size, tokens = np.log(x["active"]), np.log(x["tokens"])
    of_size = np.exp(p["delta"] * experts + (p["alpha"] + p["gamma"] * experts) * size)
    of_tokens = np.exp(p["omega"] * experts + (p["beta"] + p["zeta"] * experts) * tokens)
    return np.stack([of_size, of_tokens, np.ones_like(size)], 1)


_TWO = {"alpha": (0.02, 1.2), "beta": (0.02, 1.2)}

CHINCHILLA = Law(
    "chinchilla",
    "Hoffmann et al., arXiv 2203.15556",
    ("active", "tokens"),
    ("A", "B", "E"),
    _TWO,
    _chinchilla("active"),
    {"paper": {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}},
)

JOURNEY = Law(
    "journey",
    "The Journey Matters: Chinchilla's form over the average number of parameters",
    ("average", "tokens"),
    ("A", "B", "E"),
    _TWO,
    _chinchilla("average"),
)

CLARK = Law(
    "clark",
    "Clark et al., arXiv 2202.01169",
    ("base", "experts"),
    ("a", "b", "c", "d"),
    {"e_start": (1.0, 8.0), "e_max": (50.0, 5000.0)},
    _clark,
    {
        "s-base": {"a": -0.082, "b": -0.108, "c": 0.009, "d": 1.104, "e_start": 1.847, "e_max": 314.478},
        "rl-r": {"a": -0.083, "b": -0.126, "c": 0.012, "d": 1.111, "e_start": 1.880, "e_max": 469.982},
        "hash": {"a": -0.087, "b": -0.136, "c": 0.012, "d": 1.157, "e_start": 4.175, "e_max": 477.741},
    },
    decadic=True,
)

KRAJEWSKI = Law(
    "krajewski",
    "Krajewski et al., arXiv 2402.07871",
    ("total", "tokens", "granularity"),
    ("g", "a", "b", "c"),
    {"alpha": (0.02, 1.2), "beta": (0.02, 1.2), "gamma": (0.02, 3.0)},
    _krajewski,
    {
        "64 experts": {"a": 18.1, "alpha": 0.115, "b": 30.8, "beta": 0.147, "g": 2.1, "gamma": 0.58, "c": 0.47},
        "dense": {"a": 16.3, "alpha": 0.126, "b": 26.7, "beta": 0.127, "g": 0.0, "gamma": 0.58, "c": 0.47},
    },
)

ABNAR = Law(
    "abnar",
    "Abnar et al., arXiv 2501.12370",
    ("total", "tokens", "sparsity"),
    ("a", "b", "c", "d", "e"),
    {"alpha": (0.02, 1.2), "beta": (0.02, 1.2), "lambda": (-1.0, 1.0), "delta": (-1.0, 1.0), "gamma": (0.02, 1.2)},
    _abnar,
    {
        "paper": {
            "a": 16612.50, "b": 5455.67, "c": 0.4598, "d": 17.26, "e": 0.94,
            "alpha": 0.5962, "beta": 0.3954, "lambda": -0.1666, "delta": 0.1603, "gamma": 0.1595,
        },
    },
)  # fmt: skip

LUDZIEJEWSKI = Law(
    "ludziejewski",
    "Ludziejewski et al., arXiv 2502.05172",
    ("active", "tokens", "experts"),
    ("a", "b", "c"),
    {
        "alpha": (-1.0, -0.02), "delta": (-2.0, 2.0), "gamma": (-0.1, 0.1), "beta": (-1.0, -0.02), "omega": (-2.0, 2.0),
        "zeta": (-0.1, 0.1), "e_start": (1.0, 8.0), "e_max": (50.0, 5000.0),
    },
    _ludziejewski,
    {
        "paper": {
            "a": 35.91, "alpha": -0.1889, "delta": -0.2285, "gamma": 0.0098, "b": 35.98, "beta": -0.1775, "omega": 0.5529,
            "zeta": -0.0259, "e_start": 2.0732, "e_max": 290.4521, "c": 1.3637,
        },
    },
)  # fmt: skip
