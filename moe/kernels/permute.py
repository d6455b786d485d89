"""Moving rows: what a vector sends to several experts comes home as one sum, and its gradient goes out again.

With a fixed fan-out the sum has a fixed order, so the same routing gives the same bits. Without one it has that on a CPU; on a
GPU additions are atomic, unless `train.deterministic` lets torch sort them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.shapes import Float, Int


def bring_home(y: Float[Tensor, "r d"], index: Int[Tensor, " n"], slots: Int[Tensor, "m k"] | None, vectors: int) -> Float[Tensor, "m d"]:
    """Sum of each vector's rows, without a gradient; `slots` says where its k rows lie, if every vector has k of them.

    With slots y may have more than the n rows of `index`, such as one of zeros for what was dropped.
    """
    if slots is None:
        return y.new_zeros(vectors, y.shape[1]).index_add_(0, index, y)
    # embedding_bag reads each row once: 4 to 8 times faster on a CPU than k selections and their sum
    return F.embedding_bag(slots, y, mode="sum")


def send_out(grad: Float[Tensor, "m d"], index: Int[Tensor, " n"], scale: Float[Tensor, " n"] | None, out: Tensor) -> Float[Tensor, "n d"]:
    """grad[index], times `scale` if given: what `bring_home` passes on to each row."""
    torch.index_select(grad, 0, index, out=out)
    return out if scale is None else out.mul_(scale[:, None])
