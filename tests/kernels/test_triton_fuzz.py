"""Random layers through Triton's experts against the definition row by row in float64, and the corners that randomness misses."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from moe.kernels import triton_mlp
from moe.kernels.autograd import Needs
from moe.kernels.reference import ACTIVATIONS
from moe.kernels.triton_configs import Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TILE = Config(64, 64, 32, warps=4, stages=2, group_m=2)


class Layer(NamedTuple):
    """Everything that chooses a path through the kernels."""

    d: int = 48
    f: int = 80
    experts: int = 5
    tokens: int = 13
    k: int | None = 2  # None: any number of assignments a token
    routing: str = "uniform"
    dropped: int = 0
    dtype: torch.dtype = torch.float32
    activation: str = "silu"
    gated: bool = True
    keep: bool = True
    scaled: bool = False
    needs: tuple[bool, ...] = (True, True, True, True)  # x, weight, up, down
    added: bool = False  # to float32 gradients of the weights
    tile: Config = TILE
    padded: int = 0  # elements behind each token's vector, each expert's matrices and each expert's gradients


CORNERS = {
    "37 experts of 48 x 80, 257 tokens": Layer(experts=37, tokens=257, k=8),
    "one expert": Layer(experts=1, k=1),
    "512 experts": Layer(d=32, f=32, experts=512, tokens=40, k=8, tile=TILE._replace(BLOCK_M=16, BLOCK_N=32)),
    "nothing routed": Layer(routing="nothing", dropped=9),
    "no rows at all": Layer(routing="nothing"),
    "all tokens to one expert": Layer(routing="one", dropped=3, tokens=80),
    "frozen experts": Layer(needs=(True, True, False, False)),
    "frozen up": Layer(needs=(True, True, False, True), added=True),
    "frozen down": Layer(needs=(False, True, True, False), added=True),
    "nothing but the router learns": Layer(needs=(False, True, False, False), dropped=4),
    "padded strides": Layer(padded=24, added=True, dropped=2),
    "padded strides by descriptor": Layer(padded=24, added=True, tile=TILE._replace(tma=True)),
    "bfloat16 added to float32": Layer(dtype=torch.bfloat16, added=True, dropped=5, scaled=True),
}
FAST = [name for name in CORNERS if name not in ("37 experts of 48 x 80, 257 tokens", "512 experts")]


def drawn(seed: int) -> Layer:
    draw = random.Random(seed)
    size = [16, 32, 48, 80, 112]
    tile = Config(
        *(draw.choice(sizes) for sizes in ([16, 32, 64], [16, 32, 64], [16, 32])),
        warps=4,
        stages=2,
        group_m=draw.choice([1, 2, 8]),
        tma=draw.random() < 0.5,
        persistent=draw.random() < 0.5,
    )
    return Layer(
        *(draw.choice(size), draw.choice(size), draw.choice([1, 2, 3, 7, 16]), draw.randint(1, 40), draw.choice([None, 1, 2, 3])),
        *(draw.choice(["uniform", "uniform", "zipf", "one", "nothing"]), draw.choice([0, 0, 1, 17]), draw.choice(list(TOLERANCE))),
        *(draw.choice(list(ACTIVATIONS)), draw.random() < 0.7, draw.random() < 0.7, draw.random() < 0.5),
        *(tuple(draw.random() < 0.8 for _ in range(4)), draw.random() < 0.4, tile, draw.choice([0, 0, 3, 24])),
    )


def counted(layer: Layer, n: int) -> torch.Tensor:
    """Rows of each expert, n in all, or none."""
    share = {
        "uniform": torch.rand(layer.experts),
        "zipf": 1 / torch.arange(1.0, layer.experts + 1)[torch.randperm(layer.experts)],
        "one": torch.nn.functional.one_hot(torch.randint(layer.experts, ()), layer.experts).float(),
        "nothing": torch.zeros(layer.experts),
    }[layer.routing]
    if n == 0 or not share.any():
        return torch.zeros(layer.experts, dtype=torch.int64)
    return torch.bincount(torch.multinomial(share, n, replacement=True), minlength=layer.experts)


def padded(t: torch.Tensor, gap: int) -> torch.Tensor:
    """A copy whose parts t[i] lie `gap` elements, of what must not be read, behind one another."""
    parts = t.new_full((len(t), t[0].numel() + gap), float("nan")) if len(t) else t.flatten(1)
    parts[:, : parts.shape[1] - gap] = t.flatten(1)
    return parts.as_strided(t.shape, (parts.shape[1], *t.stride()[1:]))


def defined(x, index, weight, scale, expert, up, down, activation, upstream):
    """Output and gradients by autograd in float64, each row with its own copy of its expert's matrices."""
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, up, down)]
    x, weight, up, down = leaves
    used = len(expert)
    hidden = torch.einsum("nd,ngfd->ngf", x[index[:used]], up[expert])
    value = ACTIVATIONS[activation](hidden[:, 0])
    value = value * hidden[:, 1] if up.shape[1] == 2 else value
    y = torch.einsum("nf,ndf->nd", value, down[expert]) * weight[:used, None]
    out = torch.zeros_like(x).index_add(0, index[:used], y)
    if scale is not None:
        factor = scale[:used, None].double()
        y = y * factor + (y * (1 - factor)).detach()
    through = torch.zeros_like(x).index_add(0, index[:used], y)
    gradients = torch.autograd.grad(through, leaves, upstream.double(), allow_unused=True)
    return out, [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True)]


def check(layer: Layer, seed: int, monkeypatch) -> None:
    torch.manual_seed(seed)
    monkeypatch.setattr(triton_mlp, "lookup", lambda *_: layer.tile)
    n = layer.tokens * (layer.k or 2)
    dropped = min(layer.dropped, n)
    counts = counted(layer, n - dropped)
    if layer.routing == "nothing" and not layer.dropped:
        n = 0
    used, slots = int(counts.sum()), None
    if layer.k is not None and n:
        slots = torch.randperm(n).view(layer.tokens, layer.k)
        index = torch.empty(n, dtype=torch.int64).scatter_(0, slots.view(-1), torch.arange(layer.tokens).repeat_interleave(layer.k))
    else:
        index = torch.randint(0, layer.tokens, (n,))
    d, f, halves = layer.d, layer.f, 1 + layer.gated
    x, upstream = torch.randn(layer.tokens, d), torch.randn(layer.tokens, d)
    up, down = torch.randn(layer.experts, halves, f, d) / d**0.5, torch.randn(layer.experts, d, f) / f**0.5
    x, upstream, up, down = (padded(t.to(DEVICE, layer.dtype), layer.padded) for t in (x, upstream, up, down))
    weight, scale = torch.randn(n, device=DEVICE), torch.rand(n, device=DEVICE) if layer.scaled else None
    index, slots, counts = index.to(DEVICE), None if slots is None else slots.to(DEVICE), counts.to(DEVICE)
    expert = torch.arange(layer.experts, device=DEVICE).repeat_interleave(counts)
    y, hidden = triton_mlp.forward(x, index, slots, weight, counts, up, down, layer.activation, layer.keep)
    needs = Needs(*layer.needs, hidden=False)
    start = [torch.randn(t.shape, device=DEVICE) if layer.added and need else None for t, need in ((up, needs.up), (down, needs.down))]
    targets = [None if t is None else padded(t, layer.padded) for t in start]
    given = upstream, hidden, x, index, slots, weight, scale, counts, up, down, layer.activation, *targets, needs
    got = triton_mlp.backward(*given)
    out, gradients = defined(x, index, weight, scale, expert, up, down, layer.activation, upstream)
    assert used == len(expert)
    found = dict(zip(("x", "weight", "up", "down"), got, strict=True))
    for name, need, expected in zip(found, layer.needs, gradients, strict=True):
        if name == "weight" or need:
            base = start[name == "down"] if name in ("up", "down") else None
            close(name, found[name] if base is None else found[name].double() - base.double(), expected, layer.dtype)
            assert base is None or found[name].dtype == torch.float32
        else:
            assert found[name] is None, name
    close("y", y, out, layer.dtype)


def close(name, got, expected, dtype):
    """Largest error relative to the largest entry; gradients that were added to lose the digits that their sum does not hold."""
    bound = TOLERANCE[dtype] * expected.abs().max().item() + 3e-7 * 5 if expected.numel() else 0.0
    error = (got.double() - expected).abs().max().item() if expected.numel() else 0.0
    assert error <= bound, f"{name}: {error:.2e} over {bound:.2e}"


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CORNERS])
def test_corners_give_the_defined_output_and_gradients(name, monkeypatch):
    check(CORNERS[name], 0, monkeypatch)


@pytest.mark.parametrize("seed", [0, 2, 5])  # which take under half a second
def test_a_random_layer_gives_the_defined_output_and_gradients(seed, monkeypatch):
    check(drawn(seed), seed, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_many_random_layers_give_the_defined_output_and_gradients(part, monkeypatch):
    for seed in range(100 + 25 * part, 125 + 25 * part):
        check(drawn(seed), seed, monkeypatch)
