"""What kernels are measured and tested on: shapes of known models, routings, and the answer that every contestant must give.

Imports torch and nothing else, like the tests in tests/gpu that stand on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Shape(NamedTuple):
    """Experts of one layer."""

    d: int
    f: int
    experts: int
    k: int


SHAPES = {
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8),
    "mixtral-8x7b": Shape(4096, 14336, 8, 2),
    "olmoe": Shape(2048, 1024, 64, 8),
    "deepseek-v3 ep8": Shape(7168, 2048, 32, 8),  # the 32 of 256 experts that one of 8 ranks holds
    "qwen3-next": Shape(2048, 512, 512, 10),
}
TINY = {"tiny": Shape(32, 48, 6, 2), "tiny, one each": Shape(48, 16, 3, 1)}
ROUTINGS = ("natural", "balanced", "zipf", "quarter empty")
NAMES = ("output", "gradient of x", "gradient of the weights of routing", "gradient of up", "gradient of down")


class Case(NamedTuple):
    """Everything that goes into a layer, and the gradient that comes back to it."""

    x: Tensor  # [t, d]
    expert: Tensor  # [t, k], int64
    weight: Tensor  # [t, k], float32
    up: Tensor  # [E, 2, f, d], gate first
    down: Tensor  # [E, d, f]
    upstream: Tensor  # [t, d]


class Tolerance(NamedTuple):
    """|a - b| <= absolute * max |b| + relative * |b| for every element, and 1 - 2<a, b>/(<a, a> + <b, b>) < alike for all together."""

    output: tuple[float, float]
    gradient: tuple[float, float]
    alike: float


# 1e-5 is what a single product rounded to bfloat16 is held to; a layer rounds pre-activations, activations, rows and sums.
_HALF = Tolerance((1.4e-2, 2e-2), (2e-2, 2e-2), 2e-5)
TOLERANCES = {
    torch.bfloat16: _HALF,
    torch.float16: _HALF._replace(alike=1e-6),
    torch.float32: Tolerance((1e-5, 1e-5), (1e-5, 1e-5), 1e-11),
}


def make_case(shape: Shape, tokens: int, routing: str, dtype: torch.dtype, device: str, seed: int = 0) -> Case:
    """Random tensors of unit size, so that outputs are of unit size too."""
    draw = torch.Generator(device).manual_seed(seed)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=draw, device=device, dtype=torch.float32) * scale).to(dtype)

    d, f, experts, k = shape
    expert = route(shape, tokens, routing, draw)
    weight = torch.rand(tokens, k, generator=draw, device=device).softmax(-1)
    up = torch.stack([random(2, f, d, scale=d**-0.5) for _ in range(experts)])  # one by one: half the peak memory
    down = torch.stack([random(d, f, scale=f**-0.5) for _ in range(experts)])
    return Case(random(tokens, d), expert, weight, up, down, random(tokens, d))


def route(shape: Shape, tokens: int, routing: str, draw: torch.Generator) -> Tensor:
    """k different experts for every token.

    natural: k of E at random, as an untrained router chooses; balanced: the same number of assignments for every expert (to
    one); zipf: the expert of rank r is taken in proportion to 1/r; quarter empty: natural over three quarters of the experts.
    """
    device, (_, _, experts, k) = draw.device, shape
    names = torch.randperm(experts, generator=draw, device=device)
    if routing == "balanced":
        order = torch.randperm(tokens, generator=draw, device=device)
        return names[(torch.arange(tokens * k, device=device) % experts).view(tokens, k)][order]
    logits = torch.zeros(experts, device=device)
    if routing == "zipf":
        logits = -torch.arange(1, experts + 1, device=device).log()
    if routing == "quarter empty":
        logits[-max(experts // 4, 1) :] = -torch.inf
    gumbel = -torch.empty(tokens, experts, device=device).exponential_(generator=draw).log()
    return names[(logits + gumbel).topk(k).indices]


def expected(case: Case) -> list[Tensor]:
    """Output and gradients by a loop over experts, in float32 (float64 where the case is in float32)."""
    exact = torch.float64 if case.x.dtype == torch.float32 else torch.float32
    leaves = [t.detach().to(exact).requires_grad_() for t in (case.x, case.weight, case.up, case.down)]
    x, weight, up, down = leaves
    y = torch.zeros_like(x)
    for e, (gate_up, out) in enumerate(zip(up.unbind(), down.unbind(), strict=True)):
        token, slot = (case.expert == e).nonzero(as_tuple=True)
        gate, value = (x[token] @ gate_up.flatten(0, 1).T).chunk(2, -1)
        y = y.index_add(0, token, (F.silu(gate) * value) @ out.T * weight[token, slot, None])
    return [y.detach(), *torch.autograd.grad(y, leaves, case.upstream.to(exact))]


def difference(got: Sequence[Tensor], right: Sequence[Tensor], dtype: torch.dtype) -> str | None:
    """What is wrong with an output and its gradients, in words; None if nothing is."""
    tolerance = TOLERANCES[dtype]
    for name, a, b in zip(NAMES, got, right, strict=True):
        if a.shape != b.shape:
            return f"{name} has shape {tuple(a.shape)} instead of {tuple(b.shape)}"
        absolute, relative = tolerance.output if name == "output" else tolerance.gradient
        alike, worst = distance(a, b, absolute, relative)
        if not alike < tolerance.alike:
            return f"{name} is wrong: 1 - 2<a,b>/(<a,a> + <b,b>) is {alike:.1e}, allowed is {tolerance.alike:.0e}"
        if not worst <= 1:
            return f"{name} is wrong: an element is off by {worst:.1f} times of what is allowed"
    return None


def distance(a: Tensor, b: Tensor, absolute: float, relative: float) -> tuple[float, float]:
    """Both measures of `Tolerance`, the second as a fraction of what is allowed; each expert's weights have their own maximum."""
    apart = size = worst = 0.0
    pieces = zip(a.unbind(), b.unbind(), strict=True) if a.dim() > 2 else [(a, b)]
    for mine, right in ((mine.double(), right.double()) for mine, right in pieces):
        error, largest = (mine - right).abs(), right.abs().max()
        apart += error.square().sum().item()
        size += (mine.square().sum() + right.square().sum()).item()
        # where all is zero nothing but zero is allowed
        excess = (error / (absolute * largest + relative * right.abs()).clamp(min=1e-30)).max().item()
        worst = excess if not excess <= worst else worst
    return apart / max(size, 1e-300), worst


def results(run: Callable[[Tensor, Tensor, Tensor], Tensor], weights: Sequence[Tensor], case: Case) -> list[Tensor]:
    """Output, and gradients of x, of the routing's weights and of `weights`, of a layer that is called with (x, expert, weight)."""
    x, weight = case.x.detach().requires_grad_(), case.weight.detach().requires_grad_()
    y = run(x, case.expert, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight, *weights), case.upstream)]
