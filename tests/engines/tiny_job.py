"""A model of a few thousand parameters, its batches and its engines, for tests that run on several ranks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe.engines import ENGINES
from moe.engines.settings import Engine, Optimizer
from moe.model.settings import Model, Moe
from moe.model.transformer import Transformer
from moe.parallel.layout import Copies, Hardware, Layout
from moe.parallel.mesh import Mesh, start
from moe.tables import entry

ROWS, POSITIONS, VOCAB = 16, 8, 32
# everything that looks across tokens, draws noise or learns outside of gradients
ROUTER = {"name": "top_k", "k": 2, "balance_loss": 0.05, "z_loss": 1e-3, "bias_rate": 1e-2, "jitter": 0.1}


class Rows(NamedTuple):
    ids: Tensor
    targets: Tensor
    document: Tensor
    position: Tensor
    index: Tensor


@cache
def mesh() -> Mesh:
    """This rank's place; once a process, because joining makes groups."""
    return start(Layout(device="cpu", timeout=30))


def batch(step: int, rank: int = 0, world: int = 1) -> Rows:
    """This rank's rows of global batch number `step`; targets are spread unevenly over the rows."""
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(VOCAB, (ROWS, POSITIONS + 1), generator=generator)
    targets = text[:, 1:].clone()
    for row in range(ROWS):
        targets[row, : row % 5] = -100
    index = torch.arange(ROWS * POSITIONS).view(ROWS, POSITIONS)
    position = torch.arange(POSITIONS).expand(ROWS, POSITIONS)
    document = torch.zeros_like(index)
    for row in range(0, ROWS, 3):  # padding at the end of some rows
        targets[row, 6:], document[row, 6:] = -100, -1
    whole = (text[:, :-1], targets, document, position, index)
    return Rows(*(tensor.chunk(world)[rank].contiguous() for tensor in whole))


def model(
    router: dict[str, Any] = ROUTER,
    *,
    experts: int = 6,
    width: int = 16,
    backend: str = "auto",
    init_std: float = 0.3,
    **shape: Any,
) -> Transformer:
    """The default spread is far from the flat start at which a wrong gradient is small."""
    moe = Moe(experts=experts, d_expert=width, router=router, backend=backend)
    settings = {"layers": 2, "d_model": 16, "heads": 2, "context": POSITIONS, "init_std": init_std, "moe": moe}
    with torch.device("meta"):
        return Transformer(Model(**{**settings, **shape}), VOCAB, seed=0)


def engine(
    name: str = "ddp",
    *,
    optimizer: str = "adamw",
    momentum: float = 0.9,
    dtype: str = "float64",
    accumulate: int = 1,
    clip: float | None = 1.0,
    balance_window: str = "exact",
    recompute: str = "none",
    compile: bool = False,
    zero: int = 1,
    replicas: int = 1,
    expert_ranks: int = 1,
    exchange: str = "rows",
    room: float = 2.0,
    overlap: int = 1,
    copies: dict[str, Any] | None = None,
    machine_ranks: int = 2,
    first_weights: bool = True,
    built: Transformer | None = None,
    **shape: Any,
) -> Any:
    return entry(ENGINES, name, "engine")(
        built or model(**shape),
        replace(
            mesh(),
            replicas=replicas,
            expert_ranks=expert_ranks,
            exchange=exchange,
            exchange_room=room,
            overlap=overlap,
            copies=Copies(**copies or {}),
            hardware=Hardware(),
            machine_ranks=machine_ranks,
        ),
        optimizer=Optimizer(name=optimizer, **({} if optimizer == "adamw" else {"momentum": momentum})),
        engine=Engine(name=name, recompute=recompute, compile=compile, **({"zero": zero} if name == "deepspeed" else {})),
        dtype=dtype,
        accumulate=accumulate,
        clip=clip,
        balance_window=balance_window,
        seed=0,
        first_weights=first_weights,
    )


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of a canonical state with nothing cut over ranks."""
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in state.items()}


class Run(NamedTuple):
    """What a run of some steps came to."""

    figures: list[tuple[float, float, float]]  # loss, auxiliary loss and gradient norm of each step
    state: dict[str, Tensor]


def train(job: Any, steps: range, lr: float) -> Run:
    figures = []
    for step in steps:
        result = job.step(batch(step, job.mesh.rank, job.mesh.world), step, lr)
        figures.append((result.loss.item(), result.auxiliary.item(), result.grad_norm.item()))
    return Run(figures, whole(job.canonical_state()))


def difference(a: Run, b: Run) -> float:
    """Largest relative difference of any figure of any step, and of any tensor at the end, by its largest element."""
    ours, theirs = (torch.tensor(run.figures, dtype=torch.float64) for run in (a, b))
    figures = ((ours - theirs).abs() / theirs.abs().clamp(min=1e-30)).max().item()
    assert a.state.keys() == b.state.keys()
    tensors = max(apart(a.state[name], b.state[name]) for name in a.state)
    return max(figures, tensors)


def apart(a: Tensor, b: Tensor) -> float:
    scale = b.abs().max().item()
    return (a - b).abs().max().item() / scale if scale else a.abs().max().item()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
