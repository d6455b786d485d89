"""The definition of the expert computation, as the shortest true code; every other backend is compared with it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.shapes import Float, Int


class Rows(NamedTuple):
    """The work of the experts at hand: n assignments in expert order.

    The first counts[0] rows belong to expert 0, and so on; rows past counts.sum() are dropped: nothing of them counts.
    """

    x: Float[Tensor, "m d"]  # the vectors: local tokens, or rows received from other ranks
    index: Int[Tensor, " n"]  # row i reads x[index[i]]: gathering is the backend's, so that it can be fused
    weight: Float[Tensor, " n"]  # combine weight of row i, float32 or better
    counts: Int[Tensor, " E"]
    slots: Int[Tensor, "m k"] | None = None  # where each vector's k rows lie, dropped ones included, if every vector has k
    gradient_scale: Float[Tensor, " n"] | None = None  # factor on the gradient that row i's output receives; None: 1


class ExpertWeights(NamedTuple):
    """Stacked weights of E experts; g is 2 with a gate (gate first, then up) and 1 without.

    The last dimension is contiguous; the stride over experts is free, so experts may be rows of a larger buffer.
    """

    up: Float[Tensor, "E g f d"]
    down: Float[Tensor, "E d f"]
    # Set by an engine that keeps gradients from step to step: where up.grad and down.grad exist, in the dtype of the weights or a
    # wider one (`grad_dtype`), a backend may add to them and return none, in torch.autograd.grad too. Whether autograd's hooks then
    # run is up to the version of torch; if they do (2.13), then after the last use of a parameter in the backward pass.
    in_place: bool = False


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def grouped_mlp(rows: Rows, weights: ExpertWeights, activation: str, keep: bool = True) -> Float[Tensor, "m d"]:
    """out[v] = sum of weight[i] * down_e(act(gate_e(x)) * up_e(x)) over the rows i that read x = rows.x[v], e being row i's expert.

    `keep` says whether a backend that writes its own gradients keeps pre-activations for them or computes them again.
    """
    act = ACTIVATIONS[activation]
    out, start = [], 0
    # unbind, because autograd writes a zero-filled gradient of the whole stack for each `weights.up[e]`
    for up, down, count in zip(weights.up.unbind(), weights.down.unbind(), rows.counts.tolist(), strict=True):
        x = rows.x[rows.index[start : start + count]]
        hidden = [x @ w.T for w in up.unbind()]
        hidden = act(hidden[0]) * hidden[1] if len(hidden) == 2 else act(hidden[0])
        out.append((hidden @ down.T) * rows.weight[start : start + count, None])
        start += count
    y = torch.cat(out)
    if rows.gradient_scale is not None:
        y = scale_gradient(y, rows.gradient_scale[:start])
    return y.new_zeros(rows.x.shape).index_add(0, rows.index[:start], y).to(rows.x.dtype)


def scale_gradient(y: Float[Tensor, "n d"], scale: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """`y`, whose rows pass on `scale` times the gradient that they receive."""
    return _ScaleGradient.apply(y, scale)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, scale):
        ctx.save_for_backward(scale)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        (scale,) = ctx.saved_tensors
        return grad * scale[:, None].to(grad.dtype), None
