"""Triton's experts: which kernels run on which tiles, and what is refused before one does.

Nothing here waits for the device, so a step can be captured as a CUDA graph. Hence the values of index, slots and counts are
trusted on a GPU: counts that sum to more rows than there are read memory that is not theirs. On a CPU counts are checked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from moe.errors import ConfigError
from moe.kernels import autograd, grouped, triton_forward
from moe.kernels.reference import ACTIVATIONS, ExpertWeights, Rows
from moe.kernels.triton_backward import down_dgrad, up_dgrad, wgrad
from moe.kernels.triton_configs import Config, arch_of, lookup
from moe.kernels.triton_tiles import INTERPRETED, Tiles, tiles
from moe.shapes import Float

_STEP = 16  # widths that are multiples of it let the compiler prove that loads are aligned, without which none is asynchronous
_ADDRESSABLE = 2**31  # elements of one expert's matrices: places inside an expert are 32-bit, experts and rows begin at 64-bit ones
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def grouped_mlp(rows: Rows, weights: ExpertWeights, activation: str, keep: bool = True) -> Float[Tensor, "m d"]:
    """`reference.grouped_mlp` by Triton's kernels, or by grouped products for dtypes, widths and devices that those lack."""
    return autograd.grouped_mlp(__name__, rows, weights, activation, keep)


def forward(
    x: Tensor,
    index: Tensor,
    slots: Tensor | None,
    weight: Tensor,
    counts: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Each vector's sum of weighted outputs, and the pre-activations in expert order if they are to be kept."""
    _check(x, index, slots, weight, counts, up, down, activation)
    if not _fits(x, weight, up, down):
        return grouped.forward(x, index, slots, weight, counts, up, down, activation, keep)
    x, index, weight, counts = (t.contiguous() for t in (x, index, weight, counts))
    cut, config = _tiles(counts, len(index)), _configs(x, index, down)
    d, f = down.shape[1:]
    sizes = config("up", f, d)
    hidden, activated = triton_forward.up(x, index, cut(sizes.BLOCK_M), up, activation, sizes, keep)
    sizes = config("down", d, f)
    y = triton_forward.down(activated, weight, cut(sizes.BLOCK_M), down, sizes)
    return triton_forward.combine(y, index, slots, cut(sizes.BLOCK_M), len(x), config("combine", d, d)), hidden


def backward(
    grad: Tensor,
    hidden: Tensor,
    x: Tensor,
    index: Tensor,
    slots: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    counts: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    grad_up: Tensor | None = None,
    grad_down: Tensor | None = None,
    needs: autograd.Needs = autograd.ALL,
) -> autograd.Gradients:
    """The gradients that are needed; those of the weights are added to `grad_up` and `grad_down` if given, in their dtype.

    Unless `hidden` is needed, the gradient of the pre-activations is written over it. Elements held beside the arguments and the
    gradients, for n rows and pre-activations of width h = 2 f (f without a gate); what a product reads last is freed with it:

                             over hidden         beside it
        down_dgrad           n f                 n f + n h
        wgrad of down        n f                 n f + n h
        up_dgrad, combine    n d                 n d + n h
        wgrad of up          0                   n h
    """
    _check_scale(scale, x, index)
    if not _fits(x, weight, up, down):
        return grouped.backward(grad, hidden, x, index, slots, weight, scale, counts, up, down, activation, grad_up, grad_down, needs)
    grad, x, index, weight, counts = (t.contiguous() for t in (grad, x, index, weight, counts))
    scale = None if scale is None else scale.contiguous()
    cut, config = _tiles(counts, len(index)), _configs(x, index, down)
    (d, f), width = down.shape[1:], hidden.shape[1]
    if len(hidden) < len(index):
        sizes = config("up", f, d)
        hidden = triton_forward.up(x, index, cut(sizes.BLOCK_M), up, activation, sizes, True)[0]
        needs = needs._replace(hidden=False)  # nobody else has this one
    sizes = config("down_dgrad", f, d)
    into = torch.empty_like(hidden) if needs.hidden else hidden
    grad_weight, weighted = down_dgrad(
        *(grad, hidden, index, weight, scale, down, activation, cut(sizes.BLOCK_M), sizes),
        into if needs.x or needs.up else None,
        weighted=needs.down,
    )
    ends = cut(sizes.BLOCK_M).ends
    into_up = into_down = grad_x = None
    if weighted is not None:
        into_down = down.new_empty(down.shape) if grad_down is None else grad_down
        wgrad(grad, weighted, index, "left", ends, into_down, config("wgrad", f, d), accumulate=grad_down is not None)
        del weighted
    if needs.x:
        sizes = config("up_dgrad", d, width)
        last = cut(sizes.BLOCK_M)
        grad_x = triton_forward.combine(up_dgrad(into, up, last, sizes), index, slots, last, len(x), config("combine", d, d))
    if needs.up:
        into_up = up.new_empty(up.shape) if grad_up is None else grad_up
        flat = into_up.view(len(up), width, d)
        wgrad(into, x, index, "right", ends, flat, config("wgrad", d, width), accumulate=grad_up is not None)
    return autograd.Gradients(grad_x, grad_weight, into_up, into_down)


def _check_scale(scale: Tensor | None, x: Tensor, index: Tensor) -> None:
    if scale is not None and (scale.shape != index.shape or scale.device != x.device):
        given = f"gradient_scale {list(scale.shape)} on {scale.device} does not fit {len(index)} rows on {x.device}"
        raise ConfigError(f"{given}; give one factor for each row, on their device")


def _fits(x: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> bool:
    runs = x.device.type == "cuda" or INTERPRETED
    uneven = any(size % _STEP for size in down.shape[1:])
    small = up.shape[1:].numel() < _ADDRESSABLE
    return runs and x.dtype in _DTYPES and weight.dtype == torch.float32 and not uneven and small


def _tiles(counts: Tensor, rows: int) -> Callable[[int], Tiles]:
    """The rows cut into tiles of a height, made once for each height."""
    return functools.cache(lambda block_m: tiles(counts, rows, block_m))


def _configs(x: Tensor, index: Tensor, down: Tensor) -> Callable[[str, int, int], Config]:
    """The configuration of a kernel for a product with N columns over K, at hand for these rows."""
    return lambda kernel, n, k: lookup(kernel, arch_of(x.device), n, k, len(index) / len(down), x.element_size())


def _check(
    x: Tensor, index: Tensor, slots: Tensor | None, weight: Tensor, counts: Tensor, up: Tensor, down: Tensor, activation: str
) -> None:
    """Refuse what a kernel would compute nonsense from."""
    if len(up) == 0:
        raise ConfigError("there are 0 experts; give weights of at least one")
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation {activation!r} is unknown; choose from {', '.join(ACTIVATIONS)}")
    experts, d, f = down.shape if down.dim() == 3 else (-1, -1, -1)
    if up.shape not in ((experts, 1, f, d), (experts, 2, f, d)) or x.shape[1:] != (d,) or counts.shape != (experts,):
        shapes = f"up {list(up.shape)}, down {list(down.shape)}, x {list(x.shape)} and counts {list(counts.shape)}"
        raise ConfigError(f"{shapes} do not fit; give up [E, 1 or 2, f, d], down [E, d, f], x [m, d] and counts [E]")
    if weight.shape != index.shape:
        raise ConfigError(f"{len(weight)} weights do not fit {len(index)} rows; give one weight for each row")
    if not x.dtype == up.dtype == down.dtype:
        raise ConfigError(f"x is {x.dtype}, up {up.dtype} and down {down.dtype}; convert them to one dtype")
    if slots is not None and (slots.dim() != 2 or len(slots) != len(x)):
        raise ConfigError(f"slots {list(slots.shape)} do not fit x {list(x.shape)}; give slots [m, k], a row for each vector")
    devices = {str(t.device) for t in (x, index, slots, weight, counts, up, down) if t is not None}
    if len(devices) > 1:
        raise ConfigError(f"the rows and weights lie on {' and '.join(sorted(devices))}; move them to one device")
    for name, stack in (("up", up), ("down", down)):
        if not stack[0].is_contiguous():
            raise ConfigError(f"{name} has strides {stack.stride()}; make all of its dimensions but the first contiguous")
    if counts.device.type == "cpu" and (counts < 0).any():
        raise ConfigError(f"counts has {int(counts.min())}; give each expert the number of its rows, at least 0")
    if counts.device.type == "cpu" and int(counts.sum()) > len(index):
        raise ConfigError(f"counts sum to {int(counts.sum())}, more than the {len(index)} rows; give each expert the rows that it has")
