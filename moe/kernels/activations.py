"""Activations with given outputs, forward and backward: what the backends that write their own gradients need."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_aten = torch.ops.aten


class Activation(NamedTuple):
    """value(x, out) writes act(x); gradient(grad, x, out) writes grad * act'(x), and out may be grad."""

    value: Callable[[Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor]


def activate(hidden: Tensor, activation: str, gated: bool, out: Tensor) -> Tensor:
    """act(gate) * up of [gate | up] rows, or act(hidden) without a gate."""
    value = ACTIVATIONS[activation].value
    if not gated:
        return value(hidden, out)
    gate, up = hidden.chunk(2, dim=1)
    return value(gate, out).mul_(up)


def activate_backward(grad: Tensor, hidden: Tensor, activation: str, gated: bool, out: Tensor) -> Tensor:
    """The gradient of `hidden`, given that of the activated rows, which is overwritten."""
    value, gradient = ACTIVATIONS[activation]
    if not gated:
        return gradient(grad, hidden, out)
    gate, up = hidden.chunk(2, dim=1)
    grad_gate, grad_up = out.chunk(2, dim=1)
    value(gate, grad_up).mul_(grad)
    gradient(grad.mul_(up), gate, grad_gate)
    return out


def _relu2(x: Tensor, out: Tensor) -> Tensor:
    return torch.clamp_min(x, 0, out=out).square_()


def _relu2_gradient(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return torch.mul(grad, x.clamp_min(0), out=out).mul_(2)


ACTIVATIONS = {
    "silu": Activation(
        lambda x, out: _aten.silu.out(x, out=out),
        lambda grad, x, out: _aten.silu_backward.grad_input(grad, x, grad_input=out),
    ),
    "gelu": Activation(
        lambda x, out: _aten.gelu.out(x, out=out),
        lambda grad, x, out: _aten.gelu_backward.grad_input(grad, x, grad_input=out),
    ),
    "relu": Activation(
        lambda x, out: torch.clamp_min(x, 0, out=out),
        lambda grad, x, out: _aten.threshold_backward.grad_input(grad, x, 0, grad_input=out),
    ),
    "relu2": Activation(_relu2, _relu2_gradient),
}
