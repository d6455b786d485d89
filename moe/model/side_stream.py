"""One side stream: shared experts compute on it while tokens are in the all-to-all and at the routed experts.

The rule: whoever starts work on the side stream first makes it wait for the main stream, and later makes the main stream wait for
it. Forward, the layer does both. Backward, autograd runs every operation on the stream of its forward operation and orders an
operation after those whose gradients it reads, but not after gradients of *parameters*, which nobody reads until the end:

    main   ──out+shared──┬─ combine, experts, dispatch ─┬─ wait ── router, norm, attention … ── hooks, reduction of a block
                         │                              │
    side                 └─ down, up, gate: dx ─────────┘ ↑
                              └ weight gradients, hooks ──┘ (without the wait they could still be running here)

So the branch begins with a `Join`, on the main stream, whose backward makes the main stream wait. Autograd runs it after every
hook of a parameter of the branch: it takes the operation that was recorded last first, and gradients of parameters before all.
What is recomputed is recomputed on the main stream, since the routed branch, recorded last, asks for it first.
After `backward()` (norms, the optimizer, zeroed gradients, the next micro-batch) nothing can be early: before it returns, torch
lets the caller's stream wait for every stream on which gradients of parameters were accumulated.

For hooks that run on the side stream themselves, `ddp` waits for all streams that wrote into a bucket; `deepspeed`, whose hooks
are its own, has no side stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moe.shapes import Float


class SideStream:
    """A CUDA stream beside the main one; one for all layers, because memory freed on one stream is not reused on another."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    @contextmanager
    def run(self) -> Iterator[None]:
        """What is started within runs on the side stream, after everything that was started on the main stream before."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        """Let the main stream wait for everything that was started on the side stream."""
        torch.cuda.current_stream().wait_stream(self.stream)

    def lend(self, x: Tensor) -> None:
        """Keep the memory of `x`, of the main stream, until the side stream has read it."""
        x.record_stream(self.stream)

    def hand_back(self, x: Tensor) -> None:
        """Keep the memory of `x`, of the side stream, until the main stream has read it."""
        x.record_stream(torch.cuda.current_stream())


class Join(torch.autograd.Function):
    """x, and in the backward pass a main stream that waits for the side stream."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "t d"], side: SideStream) -> Float[Tensor, "t d"]:
        ctx.side = side
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.side.join()
        return grads[0], None


def current_stream(device: torch.device) -> Any:
    """The stream on which work on `device` starts now; None on a CPU, where everything is over when it returns."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None
