"""Measure configurations of the Triton kernels on the GPU at hand, and write the best as the user's own table.

A search from the shipped configurations and from `STARTS`: each is measured, then the fastest one's neighbours, until none is
faster.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moe.errors import ConfigError
from moe.kernels import triton_configs
from moe.kernels.sort import sort
from moe.kernels.triton_backward import down_dgrad, up_dgrad, wgrad
from moe.kernels.triton_configs import Config, Entry, Shape, architecture, bucket, lookup, read, row
from moe.kernels.triton_forward import combine, down, up
from moe.kernels.triton_tiles import Tiles, tiles

MEASURED = 25  # times each configuration runs, one after the other so that clocks and heat are shared
FLUSH = 256 << 20  # bytes written between runs, more than the L2 cache of any GPU
WORTH = 0.98  # a neighbour must take at most this share of the time: less is noise

# Where the search begins on Hopper and newer, beside the shipped configurations: steps of one thing at a time do not reach these,
# because what lies between is slower. A smaller tile pays off when a second block fits on a multiprocessor beside it, which takes
# fewer warps or stages too; a persistent kernel, when its tiles are large; more stages, when two of them buy a buffer more.
_WIDE, _SQUARE = Config(128, 256, 64, 8, 3, tma=True), Config(128, 128, 64, 8, 3, tma=True)
STARTS = {
    "up": [_SQUARE, _SQUARE._replace(BLOCK_N=64), _SQUARE._replace(BLOCK_N=64, warps=4), _SQUARE._replace(BLOCK_M=256, BLOCK_N=64)],
    "down": [_WIDE, _WIDE._replace(persistent=True), _WIDE._replace(stages=4, persistent=True), _SQUARE, _SQUARE._replace(warps=4)],
    "down_dgrad": [_SQUARE, _SQUARE._replace(BLOCK_N=64, warps=4, stages=4), _SQUARE._replace(BLOCK_M=64, warps=4)],
    "wgrad": [c._replace(tma=False) for c in (_WIDE, _WIDE._replace(stages=4), _SQUARE, _SQUARE._replace(warps=4))],
}
STARTS["up_dgrad"] = STARTS["down"]

Run = Callable[[], object]
Timer = Callable[[Sequence[Run]], list[float]]  # seconds of each


class Problem(NamedTuple):
    """A launch to be measured: `prepare` returns what a configuration runs."""

    name: str
    kernel: str
    n: int
    k: int
    prepare: Callable[[Config], Run]


def tune(shape: Shape, device: torch.device, timer: Timer, say: Callable[[str], None]) -> list[Entry]:
    """The fastest configuration found of every kernel for a shape."""
    arch, itemsize = triton_configs.arch_of(device), shape.dtype.itemsize
    rows = bucket(shape.tokens * shape.k / shape.experts)
    entries = []
    for problem in problems(shape, device):
        first = lookup(problem.kernel, arch, problem.n, problem.k, rows, itemsize)
        tried = search(problem, starts(problem.kernel, arch, itemsize, first), timer)
        best = min(tried, key=lambda config: tried[config])
        say(f"{problem.name}: {1e6 * tried[first]:.1f} → {1e6 * tried[best]:.1f} µs, {len(tried)} tried; {_words(best)}")
        entries.append(Entry(problem.kernel, architecture(arch), itemsize, problem.n, problem.k, rows, best))
    return entries


def starts(kernel: str, arch: int, itemsize: int, first: Config) -> list[Config]:
    """Where the search for a kernel's configuration begins: `first`, the shipped ones, and STARTS where they are meant for."""
    wide = STARTS.get(kernel, []) if architecture(arch) >= 90 and itemsize == 2 else []
    return list(dict.fromkeys([first, *triton_configs.shipped(kernel, arch, itemsize), *wide]))


def search(problem: Problem, first: list[Config], timer: Timer) -> dict[Config, float]:
    """Seconds of every configuration tried, the given ones and those on the way to one without a faster neighbour."""
    tried: dict[Config, float] = {}
    _measure(problem, first, tried, timer)
    if tried[first[0]] == math.inf:
        raise ConfigError(f"{problem.name} does not run here as {_words(first[0])}; use backend torch")
    while True:
        best = min(tried, key=lambda config: tried[config])
        _measure(problem, neighbours(problem.kernel, best), tried, timer)
        if min(tried.values()) > WORTH * tried[best]:
            return tried


def problems(shape: Shape, device: torch.device) -> list[Problem]:
    """Every launch of a layer's forward and backward pass, on random rows."""
    d, f, experts, k, tokens, dtype = shape[:6]
    halves, rows, add = 1 + shape.gated, tokens * k, shape.main_grad is not None

    def random(*size: int) -> Tensor:
        return (torch.randn(size, device=device, dtype=torch.float32) * 0.02).to(dtype)

    def kept(*size: int) -> Tensor:
        return torch.zeros(size, device=device, dtype=shape.main_grad or dtype)

    x, hidden, activated, y = random(tokens, d), random(rows, halves * f), random(rows, f), random(rows, d)
    grad_hidden = torch.empty_like(hidden)
    up_weights, down_weights, weight = random(experts, halves, f, d), random(experts, d, f), torch.rand(rows, device=device)
    order, position, counts = sort(torch.rand(tokens, experts, device=device).topk(k).indices.flatten(), experts)
    index, ends = order // k, counts.cumsum(0, dtype=torch.int32)
    slots, scale = position.view(tokens, k) if shape.fixed else None, weight if shape.scaled else None
    grad_up, grad_down = kept(experts, halves * f, d), kept(experts, d, f)

    def cut(launch: Callable[[Tiles, Config], object]) -> Callable[[Config], Run]:
        def prepare(config: Config) -> Run:
            cut = tiles(counts, rows, config.BLOCK_M)
            return lambda: launch(cut, config)

        return prepare

    return [
        Problem("up", "up", f, d, cut(lambda t, c: up(x, index, t, up_weights, "silu", c, shape.keep))),
        Problem("down", "down", d, f, cut(lambda t, c: down(activated, weight, t, down_weights, c))),
        Problem("combine", "combine", d, d, cut(lambda t, c: combine(y, index, slots, t, tokens, c))),
        Problem(
            "down_dgrad",
            "down_dgrad",
            f,
            d,
            cut(lambda t, c: down_dgrad(x, hidden, index, weight, scale, down_weights, "silu", t, c, grad_hidden)),
        ),
        Problem("up_dgrad", "up_dgrad", d, halves * f, cut(lambda t, c: up_dgrad(hidden, up_weights, t, c))),
        Problem(
            "wgrad of up", "wgrad", d, halves * f, lambda c: lambda: wgrad(hidden, x, index, "right", ends, grad_up, c, accumulate=add)
        ),
        Problem("wgrad of down", "wgrad", f, d, lambda c: lambda: wgrad(x, activated, index, "left", ends, grad_down, c, accumulate=add)),
    ]


def neighbours(kernel: str, config: Config) -> list[Config]:
    """Configurations one step away in what the kernel uses, of sizes worth compiling."""
    doubled = ("BLOCK_N", "warps") if kernel == "combine" else ("BLOCK_M", "BLOCK_N", "BLOCK_K", "warps", "group_m")
    steps = [{name: size} for name in doubled for size in (2 * getattr(config, name), getattr(config, name) // 2)]
    if kernel != "combine":
        steps += [{"stages": config.stages + step} for step in (1, -1, 2, -2)]
    if kernel in ("down", "up_dgrad"):
        steps += [{"persistent": not config.persistent}]
    near = [config._replace(**step) for step in steps]
    largest = 4096 if kernel == "combine" else 256
    return [
        c for c in near if min(c[:3]) >= 16 and max(c[:3]) <= largest and c.warps in (4, 8) and 1 <= c.stages <= 6 and 1 <= c.group_m <= 32
    ]


def write(entries: list[Entry], path: Path, device: torch.device) -> None:
    """Put entries into the table at `path`, which keeps those of other shapes."""
    old = read(path.read_bytes(), str(path)) if path.exists() else ()
    new = {entry[:-1] for entry in entries}
    rows = [json.dumps(row(entry)) for entry in [*(e for e in old if e[:-1] not in new), *entries]]
    head = {"triton": triton.__version__, "device": torch.cuda.get_device_name(device), "date": time.strftime("%Y-%m-%d")}
    text = f'{json.dumps(head)[:-1]}, "entries": [\n  ' + ",\n  ".join(rows) + "\n]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(path.name + ".new")
    whole.write_text(text)
    whole.replace(path)


def seconds(runs: Sequence[Run]) -> list[float]:
    """Median time of each on the current GPU, taken in turns, with nothing of the run before in the L2 cache."""
    flush = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    taken = torch.empty(MEASURED, len(runs))
    for i in range(MEASURED):
        events = []
        for run in runs:
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        taken[i] = torch.tensor([start.elapsed_time(end) / 1e3 for start, end in events])
    return taken.median(0).values.tolist()


def _measure(problem: Problem, configs: Sequence[Config], tried: dict[Config, float], timer: Timer) -> None:
    """Add the time of each configuration not tried yet; one that does not fit the GPU takes for ever."""
    runs: dict[Config, Run] = {}
    for config in configs:
        if config in tried:
            continue
        tried[config] = math.inf
        try:
            run = problem.prepare(config)
            run()
        except (torch.AcceleratorError, torch.OutOfMemoryError):
            raise
        except (triton.OutOfResources, triton.CompilationError, RuntimeError):  # too large, or a pass of the compiler failed
            continue
        runs[config] = run
    if runs:
        tried.update(zip(runs, timer(list(runs.values())), strict=True))


def _words(config: Config) -> str:
    return ", ".join(f"{key} {value}" for key, value in config._asdict().items())
