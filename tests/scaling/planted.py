"""A study's folder whose losses come from a known law."""

from __future__ import annotations

from itertools import product

import numpy as np

from moe.scaling.laws import LUDZIEJEWSKI
from moe.scaling.results import Row, append

VOCABULARY = 512
WIDTHS, EXPERTS, TOKENS = (64, 96, 128, 192), (1, 2, 4, 8, 16), (2e6, 8e6, 32e6)
# The best dense model of 1e14 FLOPs lies amid the runs, and experts help.
TRUTH = {"a": 36.0, "alpha": -0.30, "delta": -0.25, "gamma": 0.004, "b": 63.0, "beta": -0.30, "omega": 0.16, "zeta": -0.011,
         "e_start": 2.07, "e_max": 290.0, "c": 1.0}  # fmt: skip


def loss_of(active, tokens, experts, values=TRUTH):
    x = {"active": active, "tokens": tokens, "experts": experts}
    return float(LUDZIEJEWSKI.loss(values, {name: np.array([float(value)]) for name, value in x.items()})[0])


def row(width, experts, tokens, seed=0, *, chance=None, noise=0.003, values=TRUTH, factor=1.0, **changed):
    """One run; `chance` draws its noise."""
    layers = width // 16
    replaced = 9 * layers * width**2
    base = 2 * VOCABULARY * width + 4 * layers * width**2 + replaced
    total, price = base + (experts - 1) * replaced, 6.0 * base * 1.1
    loss = loss_of(base, tokens, experts, values) * (1.0 + 0.02 * np.log(factor) ** 2)
    loss *= float(np.exp(chance.normal(0, noise))) if chance is not None else 1.0
    health = {"load_max_over_mean": 1.2 + 0.05 * experts + 4 / width, "unused_experts": float(experts * 16 // width),
              "entropy": 0.8 * np.log(experts) - 2 / width, "cv": 0.1}  # fmt: skip
    milliseconds = base / 1e4 * (1 + 0.15 * np.log2(experts))
    facts = Row(
        f"{width:04x}{experts:04x}{int(tokens):08x}{seed:x}{round(100 * factor):03x}", "done", None,
        {"d_model": width, "layers": layers, "heads": 4, "d_ff": 3 * width, "experts": experts, "top_k": 1, "granularity": 1,
         "router": "top_k" if experts > 1 else "dense", "tokens": int(tokens), "seed": seed, "lr": 3e-3 * factor, "lr_factor": factor},
        total, base, base, float(base), experts, 1.0, 1 - 1 / experts, int(tokens), price * tokens, 4 * total, loss, loss / np.log(2) / 3.0,
        milliseconds, 2048 / milliseconds * 1e3, health if experts > 1 else {}, None,
        int(tokens // 2048), int(tokens // 10240), "0123abc", "a machine, 4 cores",
        "c0ffee" * 10, "bytes", 60.0,
    )  # fmt: skip
    return facts._replace(**changed)


def rows(*, widths=WIDTHS, experts=EXPERTS, tokens=TOKENS, noise=0.003, values=TRUTH, seeds=3, seed=0):
    """The grid, further seeds of two of its places, and a sweep of learning rates at both ends."""
    chance = np.random.default_rng(seed)
    made = [row(*place, chance=chance, noise=noise, values=values) for place in product(widths, experts, tokens)]
    ends = product((experts[0], experts[-1]), range(1, seeds))
    made += [row(widths[-1], e, tokens[-1], s, chance=chance, noise=noise, values=values) for e, s in ends]
    swept = product((experts[0], experts[-1]), (0.5, 2.0))
    return made + [row(widths[0], e, tokens[0], factor=f, chance=chance, noise=noise, values=values) for e, f in swept]


def study(folder, **how):
    """Write the rows, and two that did not end well."""
    folder.mkdir(parents=True, exist_ok=True)
    for one in rows(**how):
        append(folder, one)
    lost = {"loss": None, "bits_per_byte": None, "step_ms": None, "tokens_per_s": None}
    append(folder, row(256, 16, 32e6, status="out of memory", why="the process was killed at 15.2 GB", **lost))
    append(folder, row(64, 16, 2e6, factor=8.0, status="diverged", why="the loss was not finite at step 212", **lost))
    return folder
