"""Forward and backward of one MoE layer beside a dense SwiGLU of equal active FLOPs and beside other libraries' layers.

All contestants of a cell take turns, round by round, in one process with the same allocator settings; a ratio is the median
over rounds of a contestant's time over the dense layer's in the same round, so that a busy machine disturbs both alike.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.report import write_report
from moe.kernels.memory import keep_freed_memory
from moe.model.moe_layer import MoELayer

D_MODEL, D_EXPERT, K = 512, 1024, 2
TESTS = ("tests/kernels/test_grouped_mlp.py", "tests/kernels/test_permute.py")
NOTES = (
    f"d_model {D_MODEL}, experts of width {D_EXPERT}, top-{K}, random tokens; forward + backward, gradients freed before every step.",
    "ratio: median over rounds of the time over the dense layer's in the same round; best: fastest over fastest.",
    "added in place: a later micro-batch of an accumulation, whose weight gradients the layer adds to kept ones itself.",
    "DeepSpeed: one process, dropless (drop_tokens=False) and with capacity factor 1.25, which drops tokens.",
)


class Cell(NamedTuple):
    """One table of contestants."""

    tokens: int
    experts: int
    dtype: torch.dtype
    threads: int


class Contestant(NamedTuple):
    """Something to time: forward, and whether its gradients are kept from round to round."""

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    kept: bool = False


class Dense(nn.Module):
    """SwiGLU as wide as the k experts that a token passes."""

    def __init__(self, width: int, d_model: int = D_MODEL) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d_model, 2 * width, bias=False), nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


def ours(cell: Cell, backend: str = "auto", in_place: bool = False) -> Contestant:
    with torch.device("meta"):
        layer = MoELayer(D_MODEL, experts=cell.experts, d_expert=D_EXPERT, router={"name": "top_k", "k": K}, backend=backend)
    layer.to(cell.dtype).to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(-0.05, 0.05)
    if in_place:
        layer.experts.in_place = True
    return Contestant(layer, lambda x: layer(x)[0], in_place)


def hugging_face(cell: Cell, implementation: str) -> Contestant:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=D_MODEL, intermediate_size=D_EXPERT, num_local_experts=cell.experts, num_experts_per_tok=K)
    config._experts_implementation = implementation
    block, layer = MixtralSparseMoeBlock(config).to(cell.dtype), ours(cell).module
    assert isinstance(layer, MoELayer)
    with torch.no_grad():
        block.gate.weight.copy_(layer.router.weight)
        block.experts.gate_up_proj.copy_(layer.experts.up.flatten(1, 2))
        block.experts.down_proj.copy_(layer.experts.down)
    return Contestant(block, lambda x: block(x[None])[0])


def deepspeed(cell: Cell, **options: Any) -> Contestant:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.comm
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    if not torch.distributed.is_initialized():
        store = torch.distributed.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        deepspeed.comm.init_distributed("gloo", verbose=False)
    layer = MoE(D_MODEL, Dense(D_EXPERT), cell.experts, k=K, use_rts=False, top2_2nd_expert_sampling=False, **options)
    layer.set_deepspeed_parallelism()
    layer.to(cell.dtype)
    return Contestant(layer, lambda x: layer(x[None])[0][0])


def contestants(cell: Cell) -> dict[str, Contestant | str]:
    """Everything that can run here, by name; a library that is absent is a word in its place."""
    makers: dict[str, Callable[[], Contestant]] = {
        "dense": lambda: (lambda dense: Contestant(dense, dense))(Dense(K * D_EXPERT).to(cell.dtype)),
        "moe": lambda: ours(cell),
        "moe, added in place": lambda: ours(cell, in_place=True),
        "moe, grouped_mm": lambda: ours(cell, "torch"),
        "transformers, grouped_mm": lambda: hugging_face(cell, "grouped_mm"),
        "deepspeed, dropless": lambda: deepspeed(cell, drop_tokens=False),
        "deepspeed, capacity 1.25": lambda: deepspeed(cell, capacity_factor=1.25),
    }
    if cell.experts <= 8:  # its backward writes a gradient of the whole stack for every expert: 20 to 47 times slower at 64
        makers["transformers, eager"] = lambda: hugging_face(cell, "eager")
    made: dict[str, Contestant | str] = {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except ImportError as error:
            made[name] = "not installed" if (error.name or "") in name else f"cannot be imported: {error}"
    return made


def prove(cell: Cell, made: dict[str, Contestant | str], x: Tensor, upstream: Tensor) -> None:
    """Leave unless our layer's output and gradients are the reference's on this very input."""
    expected = _results(ours(cell, "reference"), x, upstream)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[cell.dtype]
    for name, contestant in made.items():
        if not isinstance(contestant, Contestant) or not (
            name.startswith("moe") or (name.startswith("trans") and cell.dtype == torch.float32)
        ):
            continue
        for got, right in zip(_results(contestant, x, upstream), expected, strict=True):
            error = (got.double() - right.double()).norm() / right.double().norm()
            if not error < tolerance:
                raise SystemExit(f"{name} differs from the reference by {error:.1e} on {cell}; no time is reported of a wrong result")


def _results(contestant: Contestant, x: Tensor, upstream: Tensor) -> list[Tensor]:
    contestant.module.zero_grad()
    x = x.detach().requires_grad_()
    y = contestant.forward(x)
    y.backward(upstream)
    assert x.grad is not None
    weights = [p.grad for p in contestant.module.parameters() if p.grad is not None and p.dim() > 2]
    return [y.detach(), x.grad, *(grad.flatten() for grad in weights)]


def seconds(contestant: Contestant, x: Tensor, upstream: Tensor) -> float:
    """One forward and backward pass."""
    if not contestant.kept:
        contestant.module.zero_grad()
    x = x.detach().requires_grad_()
    start = time.perf_counter()
    contestant.forward(x).backward(upstream)
    return time.perf_counter() - start


def measure(cell: Cell, rounds: int) -> list[dict]:
    """A row for each contestant."""
    torch.set_num_threads(cell.threads)
    torch.manual_seed(1)
    x, upstream = torch.randn(cell.tokens, D_MODEL).to(cell.dtype), torch.randn(cell.tokens, D_MODEL).to(cell.dtype)
    made = contestants(cell)
    prove(cell, made, x, upstream)
    runners = {name: c for name, c in made.items() if isinstance(c, Contestant)}
    times: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(rounds + 2):
        for name, contestant in runners.items():
            taken = seconds(contestant, x, upstream)
            if number >= 2:  # the first two warm caches, threads and the allocator
                times[name].append(taken)
    return [_row(cell, name, made[name], times.get(name, []), times["dense"]) for name in made]


def _row(cell: Cell, name: str, contestant: Contestant | str, times: list[float], dense: list[float]) -> dict:
    row = {"threads": cell.threads, "dtype": str(cell.dtype).removeprefix("torch."), "experts": cell.experts, "layer": name}
    if isinstance(contestant, str):
        return row | {"tokens/s": contestant, "ms": "", "ratio": "", "best": "", "times": []}
    ratio = statistics.median(mine / base for mine, base in zip(times, dense, strict=True))
    median = statistics.median(times)
    return row | {
        "tokens/s": round(cell.tokens / median),
        "ms": round(median * 1e3, 1),
        "ratio": round(ratio, 2),
        "best": round(min(times) / min(dense), 2),
        "times": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the raw times to this file")
    parser.add_argument("--quick", action="store_true", help="a small case, to see that it works")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--threads", type=int, nargs="+", default=[4, 1])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    options = parser.parse_args()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *TESTS], env=environment, cwd=Path(__file__).parents[1], check=False
    ).returncode:
        raise SystemExit("the tests of the kernels fail; no time is reported of a wrong result")
    keep_freed_memory()
    tokens, rounds = (512, 2) if options.quick else (4096, options.rounds)
    rows = []
    for threads, dtype, experts in itertools.product(options.threads[: 1 if options.quick else None], options.dtypes, options.experts):
        rows += measure(Cell(tokens, experts, getattr(torch, dtype), threads), rounds)
        print(f"{threads} threads, {dtype}, {experts} experts: measured", file=sys.stderr, flush=True)
    table = [{key: value for key, value in row.items() if key != "times"} for row in rows]
    write_report("step", table, raw=rows, json_file=options.json, quick=options.quick, notes=(f"{tokens} tokens, {rounds} rounds.", *NOTES))


if __name__ == "__main__":
    main()
