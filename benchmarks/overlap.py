"""One expert-parallel layer, forward and backward, with its tokens in 1, 2 and 4 chunks (`parallel.overlap`):

    python -m benchmarks.overlap                 all GPUs of this machine (2 at least), a layer of DeepSeek-V3's shape, bfloat16
    python -m benchmarks.overlap --link 200      two emulated hosts of one CPU rank each, joined at 200 Mbit/s; needs root and iproute2

All numbers of chunks take turns, round by round, in the same processes; a ratio is the median over rounds of the time in one piece
over the time in chunks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed as dist

from benchmarks.cluster.hosts import Hosts
from benchmarks.report import write_report
from moe.kernels.memory import keep_freed_memory
from moe.model.moe_layer import MoELayer
from moe.parallel.apply import share_out
from moe.parallel.launch import launch, run_rank
from moe.parallel.layout import Layout
from moe.parallel.mesh import Mesh, start
from moe.parallel.overlap import Overlap

SHAPES = {
    "cuda": {"tokens": 32768, "d_model": 7168, "experts": 256, "d_expert": 2048, "k": 8},  # tokens of each rank
    "cpu": {"tokens": 2048, "d_model": 256, "experts": 16, "d_expert": 1024, "k": 2},
    "quick": {"tokens": 64, "d_model": 32, "experts": 4, "d_expert": 32, "k": 2},
}
CHUNKS = (1, 2, 4)


def build(mesh: Mesh, shape: dict[str, int], how: str) -> MoELayer:
    """The layer, whose experts are sharded over all ranks."""
    router = {"name": "top_k", "k": shape["k"]}
    with torch.device("meta"):
        layer = MoELayer(shape["d_model"], experts=shape["experts"], d_expert=shape["d_expert"], router=router)
    sharded = replace(mesh, expert_ranks=mesh.world, exchange=how)
    share_out(layer, 0, sharded.experts(), sharded)
    layer.to_empty(device=mesh.device)
    torch.manual_seed(mesh.rank)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.02)
    for buffer in layer.buffers():
        buffer.zero_()
    if mesh.device.type == "cuda":
        layer.experts.bfloat16()
    return layer


def measure(mesh: Mesh, shape: dict[str, int], how: str, rounds: int) -> dict[int, list[float]]:
    """Milliseconds of each round, of the slowest rank, by the number of chunks."""
    layer, in_turn = build(mesh, shape, how), MoELayer._in_turn
    dtype = next(layer.experts.parameters()).dtype
    x, upstream = (torch.randn(shape["tokens"], shape["d_model"], device=mesh.device, dtype=dtype) for _ in range(2))
    found: dict[int, list[float]] = {chunks: [] for chunks in CHUNKS}
    for number in range(rounds + 2):
        for chunks in CHUNKS:
            layer.pipeline = Overlap(chunks) if chunks > 1 else in_turn
            layer.zero_grad()
            dist.barrier()
            seconds = _timed(lambda: layer(x.detach().requires_grad_())[0].backward(upstream), mesh.device)
            slowest = mesh.agree(round(1e9 * seconds)) / 1e6
            if number >= 2:  # the first two warm caches, allocators and compilers
                found[chunks].append(slowest)
    return found


def _timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def rank(file: Path, shape: dict[str, int], rounds: int) -> None:
    """What each rank does; the first writes the figures."""
    keep_freed_memory()
    mesh = start(Layout(timeout=300))
    if mesh.device.type == "cpu":
        torch.set_num_threads(1)
    figures = {how: measure(mesh, shape, how, rounds) for how in ("rows", "tokens")}
    if mesh.first:
        file.write_text(json.dumps(figures))


def table(figures: dict[str, dict[str, list[float]]], world: int) -> list[dict]:
    """A line for each way to send tokens and each number of chunks."""
    lines = []
    for how, found in figures.items():
        for chunks, ms in found.items():
            ratio = round(statistics.median(one / mine for one, mine in zip(found["1"], ms, strict=True)), 3)
            each = round(statistics.median(ms), 2)
            lines.append({"ranks": world, "exchange": how, "overlap": int(chunks), "ms": each, "times as fast": ratio})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", type=float, help="Mbit/s between two emulated hosts; without it this machine's own GPUs")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the raw times to this file")
    parser.add_argument("--quick", action="store_true", help="two CPU ranks and a tiny layer, to see that it works")
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        file, shape = options.rank
        run_rank(lambda: rank(Path(file), SHAPES[shape], options.rounds))
    gpus = 0 if options.link is not None or options.quick else torch.cuda.device_count()
    if not options.quick and options.link is None and gpus < 2:
        parser.error(f"all-to-alls need 2 GPUs at least, and torch sees {gpus}; give --link 200 for two emulated hosts without one")
    world, name = (gpus, "cuda") if gpus else (2, "quick" if options.quick else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        arguments = ["--rank", str(file), name, "--rounds", str(2 if options.quick else options.rounds)]
        if code := _run(arguments, world, options.link):
            raise SystemExit(code)
        figures = json.loads(file.read_text())
    links = "this machine's own" if options.link is None else f"two emulated hosts at {options.link:g} Mbit/s, one CPU rank each"
    notes = (f"Layer: {SHAPES[name]}, tokens of each rank; forward and backward, router included.", f"Links: {links}.")
    write_report("overlap", table(figures, world), raw=figures, json_file=options.json, quick=options.quick, notes=notes)


def _run(arguments: list[str], world: int, link: float | None) -> int:
    program = ("-m", "benchmarks.overlap")
    if link is None:
        return launch(arguments, world, program=program)
    with Hosts(2, link=link) as hosts:
        return hosts.torchrun(1, (*program, *arguments), {"PYTHONPATH": os.getcwd(), "CUDA_VISIBLE_DEVICES": ""})


if __name__ == "__main__":
    main()
