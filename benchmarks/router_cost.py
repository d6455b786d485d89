"""What deciding costs: every router with its auxiliary losses as a share of its MoE layer's time, forward and backward.

A layer's time is its router's and that of everything after the decision (dispatch, experts, combine) for two experts a token;
the latter is measured once for all routers, so that one which starts out with many experts a token is charged for its own work.
All routers and the rest take turns, round by round, in one process; a share is the median over rounds.
"""

from __future__ import annotations

import argparse
import inspect
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.report import write_report
from moe.errors import ConfigError
from moe.kernels.memory import keep_freed_memory
from moe.model.moe_layer import MoELayer
from moe.routers import ROUTERS, Tokens, build
from moe.tables import entry

K, VOCAB = 2, 32768
TESTS = ("tests/routers/test_contract.py", "tests/routers/test_contract_layer.py")
# What a row needs to be built, and settings whose cost differs from the default's; each becomes a line.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "top_k": [
        {},
        {"k": 8},
        {"z_loss": 1e-3, "balance_scope": "sequence"},
        {"score": "sigmoid", "bias_rate": 1e-3, "groups": 8, "groups_kept": 4},
    ],
    "hash": [{"vocab": VOCAB}],
    "expert_choice": [{"leak": "allow"}],
    "sparse_ot": [{}, {"side": "experts", "leak": "allow"}],
    "local_search": [{"router": {"name": "top_k", "k": K}}],
}


class Shape(NamedTuple):
    """One layer and its batch."""

    sequences: int
    length: int
    d_model: int
    experts: int
    d_expert: int


class Batch(NamedTuple):
    x: Tensor
    upstream: Tensor
    tokens: Tokens


def batch(shape: Shape) -> Batch:
    torch.manual_seed(0)
    t = shape.sequences * shape.length
    index = torch.arange(t)
    tokens = Tokens(torch.randint(VOCAB, (t,)), index // shape.length, index, torch.ones(t, dtype=torch.bool), 0, shape.length)
    return Batch(torch.randn(t, shape.d_model), torch.randn(t, shape.d_model), tokens)


def layer(shape: Shape, router: dict[str, Any]) -> MoELayer:
    """A layer with a router and without memory for its experts."""
    with torch.device("meta"):
        made = MoELayer(shape.d_model, experts=shape.experts, d_expert=shape.d_expert)
    made.router = build(router, shape.d_model, shape.experts)
    return made


def layers(shape: Shape) -> dict[str, MoELayer | str]:
    """A layer for each line, by its words, all with the same experts; a router that cannot be built is a sentence in its place."""
    up = torch.nn.Parameter(torch.empty(shape.experts, 2, shape.d_expert, shape.d_model).uniform_(-0.05, 0.05))
    down = torch.nn.Parameter(torch.empty(shape.experts, shape.d_model, shape.d_expert).uniform_(-0.05, 0.05))
    made: dict[str, MoELayer | str] = {}
    for name in ROUTERS:
        for given in SETTINGS.get(name, [{}]):
            words = " ".join([name, *(f"{key}={value}" for key, value in given.items())])
            takes_k = "k" in inspect.signature(entry(ROUTERS, name, "router")).parameters
            try:
                made[words] = one = layer(shape, {"name": name, **({"k": K} if takes_k else {}), **given})
            except (ConfigError, ImportError) as error:
                made[words] = str(error)
                continue
            one.experts.up, one.experts.down = up, down
    return made


def seconds(work: Callable[[Tensor], Tensor], x: Tensor, parameters: list[torch.nn.Parameter]) -> tuple[float, float]:
    """Forward, and forward and backward, of a scalar."""
    for p in parameters:
        p.grad = None
    x = x.detach().requires_grad_()
    start = time.perf_counter()
    out = work(x)
    middle = time.perf_counter()
    if out.requires_grad:
        out.backward()
    return middle - start, time.perf_counter() - start


def decide(one: MoELayer, given: Batch) -> Callable[[Tensor], Tensor]:
    """Route, and hand a gradient to every weight and to the auxiliary loss."""

    def work(x: Tensor) -> Tensor:
        routing = one.route(x, given.tokens)
        return routing.weight.sum() + routing.loss

    return work


def rest(one: MoELayer, given: Batch) -> Callable[[Tensor], Tensor]:
    """Everything after a decision for K experts a token."""
    routing = one.route(given.x, given.tokens)
    routing = routing._replace(weight=routing.weight.detach().requires_grad_())
    return lambda x: (one.compute(x, routing) * given.upstream).sum()


def measure(shape: Shape, threads: int, rounds: int) -> list[dict]:
    """A row for each router."""
    torch.set_num_threads(threads)
    given, made = batch(shape), layers(shape)
    routers = {words: one for words, one in made.items() if isinstance(one, MoELayer)}
    work = {words: (decide(one, given), list(one.router.parameters())) for words, one in routers.items()}
    work[""] = rest(routers["top_k"], given), list(routers["top_k"].experts.parameters())
    times: dict[str, list[tuple[float, float]]] = {words: [] for words in work}
    for number in range(rounds + 1):
        for words, (run, parameters) in work.items():
            taken = seconds(run, given.x, parameters)
            if number:  # the first round warms caches, threads and the allocator
                times[words].append(taken)
    return [_row(threads, words, one, times.get(words, []), times[""]) for words, one in made.items()]


def _row(threads: int, words: str, one: MoELayer | str, times: list[tuple[float, float]], others: list[tuple[float, float]]) -> dict:
    row = {"threads": threads, "router": words}
    if isinstance(one, str):
        return row | {"forward ms": one, "ms": "", "share %": "", "times": []}
    return row | {
        "forward ms": round(1e3 * statistics.median(forward for forward, _ in times), 1),
        "ms": round(1e3 * statistics.median(both for _, both in times), 1),
        "share %": round(100 * statistics.median(a / (a + b) for (_, a), (_, b) in zip(times, others, strict=True)), 1),
        "times": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the raw times to this file")
    parser.add_argument("--quick", action="store_true", help="a small case, to see that it works")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[4, 1])
    options = parser.parse_args()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", *TESTS]
    if subprocess.run(tests, env=environment, cwd=Path(__file__).parents[1], check=False).returncode:
        raise SystemExit("the routers' contract is broken; no time is reported of a wrong result")
    keep_freed_memory()
    shape = Shape(2, 64, 64, 16, 64) if options.quick else Shape(4, 2048, 1024, 64, 1024)
    rows = []
    for threads in options.threads[: 1 if options.quick else None]:
        rows += measure(shape, threads, 2 if options.quick else options.rounds)
        print(f"{threads} threads: measured", file=sys.stderr, flush=True)
    table = [{key: value for key, value in row.items() if key != "times"} for row in rows]
    notes = (
        f"{shape.sequences} sequences of {shape.length}, d_model {shape.d_model}, {shape.experts} experts of width {shape.d_expert}.",
        f"float32, in training, k={K} unless a line says otherwise; forward + backward with every auxiliary loss that is on.",
        __doc__.split("\n\n")[1].replace("\n", " ").strip(),
    )
    write_report("router_cost", table, raw=rows, json_file=options.json, quick=options.quick, notes=notes)


if __name__ == "__main__":
    main()
