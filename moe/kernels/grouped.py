"""torch's grouped matrix product: all experts in one call, without the host knowing how many rows each has."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from moe.kernels import autograd, threads
from moe.kernels.activations import activate, activate_backward
from moe.kernels.permute import bring_home, send_out
from moe.kernels.reference import ExpertWeights, Rows
from moe.shapes import Bool, Float

_ALIGN = 16  # bytes that every stride must be a multiple of
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_mlp(rows: Rows, weights: ExpertWeights, activation: str, keep: bool = True) -> Float[Tensor, "m d"]:
    """`reference.grouped_mlp` by grouped products, or by the loop where those refuse the dtype or the alignment."""
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
    if not _fits(index, up, down):
        return threads.forward(x, index, slots, weight, counts, up, down, activation, keep)
    ends = counts.cumsum(0, dtype=torch.int32)
    hidden = _hidden(x, index, ends, up)
    activated = x.new_empty(len(index), down.shape[2])
    activate(hidden, activation, up.shape[1] == 2, activated)
    y = grouped_mm(activated, down.mT, offs=ends).mul_(weight[:, None]).masked_fill_(_dropped(ends, len(index))[:, None], 0)
    return bring_home(y, index, slots, len(x)), hidden if keep else hidden.new_empty(0, hidden.shape[1])


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
    """The gradients that are needed; those of the weights are added to `grad_up` and `grad_down` if given."""
    if not _fits(index, up, down):
        return threads.backward(grad, hidden, x, index, slots, weight, scale, counts, up, down, activation, grad_up, grad_down, needs)
    ends = counts.cumsum(0, dtype=torch.int32)
    dropped = _dropped(ends, len(index))
    hidden = hidden if len(hidden) else _hidden(x, index, ends, up)
    grad = send_out(grad, index, scale, grad.new_empty(len(index), x.shape[1]))
    activated, grad_weight = x.new_empty(len(index), down.shape[2]), torch.empty_like(weight)
    grad_hidden = torch.empty_like(hidden)
    activate_backward(grouped_mm(grad, down, offs=ends), hidden, weight, activation, up.shape[1] == 2, activated, grad_weight, grad_hidden)
    grad_weight.masked_fill_(dropped, 0)
    new_up = new_down = grad_x = None
    if needs.down:
        new_down = grouped_mm(grad.mul_(weight[:, None]).T, activated, offs=ends)
        new_down = new_down if grad_down is None else grad_down.add_(new_down)
    if needs.up:
        new_up = grouped_mm(grad_hidden.T, x.index_select(0, index), offs=ends).view(up.shape)
        new_up = new_up if grad_up is None else grad_up.add_(new_up)
    if needs.x:
        grad_x = grouped_mm(grad_hidden, up.flatten(1, 2), offs=ends).masked_fill_(dropped[:, None], 0)
        grad_x = bring_home(grad_x, index, slots, len(x))
    return autograd.Gradients(grad_x, grad_weight, new_up, new_down)


def _hidden(x: Tensor, index: Tensor, ends: Tensor, up: Tensor) -> Float[Tensor, "n h"]:
    return grouped_mm(x.index_select(0, index), up.flatten(1, 2).mT, offs=ends)


def _fits(index: Tensor, up: Tensor, down: Tensor) -> bool:
    aligned = all(t.data_ptr() % _ALIGN == 0 and all(s * t.element_size() % _ALIGN == 0 for s in t.stride()[:-1]) for t in (up, down))
    return aligned and up.dtype in _DTYPES and len(index) > 0


def _dropped(ends: Tensor, n: int) -> Bool[Tensor, " n"]:
    """Rows past the last expert's, which a grouped product leaves uninitialised."""
    return torch.arange(n, device=ends.device) >= ends[-1]
