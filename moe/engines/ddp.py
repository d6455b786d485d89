"""Every rank holds the whole model; gradients are summed in buckets while backward still runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from moe.engines.base import Engine
from moe.model.experts import Experts
from moe.model.side_stream import current_stream
from moe.model.stages import stage

_BUCKET_BYTES = 25 * 2**20
_ALIGN = 16  # elements: a gradient begins where vector instructions and grouped products like it


class DDP(Engine):
    """Data parallel with buckets of its own instead of torch's DistributedDataParallel.

    That one averages and sums in the parameters' dtype; here gradients are summed, in float32 under bfloat16, and the sum
    over ranks of a bucket starts when its last gradient of the window is ready.
    """

    def place(self) -> dict[str, Tensor]:
        model = self.model.to(self.master).to_empty(device=self.mesh.device)
        for router in self.routers:
            router.reset_buffers()
        masters: dict[str, Tensor] = {}
        for name, p in model.named_parameters():
            owned = self.planner is not None and name in self.shared_out  # what is used are copies, made in the dtype of the arithmetic
            if self.compute == self.master or name in self.of_routers or owned:
                masters[name] = p
            else:
                masters[name] = p.data
                p.data = torch.empty_like(p.data, dtype=self.compute)
                self.copies.append((p, masters[name]))
        pairs = [(name in self.shared_out, (p, masters[name])) for name, p in reversed(list(model.named_parameters()))]
        self.lanes = [Lane([pair for out, pair in pairs if not out], None)]
        self.of_experts: list[tuple[Tensor, Tensor]] = [pair for out, pair in pairs if out]
        if self.grid is not None:
            self.lanes.append(self._lane_of_experts())
        self.last = False
        self._listen()
        return masters

    def resized(self) -> None:
        self.lanes[-1] = self._lane_of_experts()
        self._enlist()

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self.last = last
        for lane in self.lanes:
            lane.expect()
        yield
        self.last = False
        if last:
            for lane in self.lanes:
                lane.finish()

    def gradients(self) -> list[Tensor]:
        return [bucket.sum for bucket in self.buckets]

    def counted(self, gradients: list[Tensor]) -> list[Tensor]:
        mine = {id(bucket.sum) for lane in self.lanes for bucket in lane.buckets[lane.rank :: lane.ranks]}
        return [gradient for gradient in gradients if id(gradient) in mine]

    def clear(self) -> None:
        for bucket in self.buckets:
            bucket.sum.zero_()

    def _lane_of_experts(self) -> Lane:
        assert self.grid is not None
        # gradients of copies come home when the backward pass is over
        return Lane(self.of_experts, self.grid.get_group("shard"), late=self.planner is not None)

    def _listen(self) -> None:
        """Hear from autograd of every gradient; backends of experts may add to the kept ones by themselves.

        Their word would come too early for weights that two layers share. Where autograd is silent about gradients that it did
        not add, their buckets travel after the backward pass.
        """
        self._enlist()
        for p in self.goes_to:
            p.register_post_accumulate_grad_hook(self._arrived)
        for module in self._experts():
            module.in_place = True

    def _enlist(self) -> None:
        """Where the gradient of what the model uses goes, and to what it has to be added if it does not lie there already."""
        self.buckets = [bucket for lane in self.lanes for bucket in lane.buckets]
        self.goes_to: dict[Tensor, tuple[Lane, Bucket, Tensor | None]] = {
            p: (lane, bucket, total if p is not master else None)
            for lane in self.lanes
            for bucket in lane.buckets
            for (p, master), total in zip(bucket.pairs, bucket.pieces, strict=True)
        }
        for module in self._experts():  # their kernels add in float32: 8 bytes a weight and micro-batch instead of 12, and no rounding
            for p in module.parameters():
                lane, bucket, total = self.goes_to[p]
                if total is not None:
                    p.grad_dtype, p.grad, self.goes_to[p] = total.dtype, total, (lane, bucket, None)

    def _experts(self) -> list[Experts]:
        return [module for module in self.model.modules() if isinstance(module, Experts)]

    def _arrived(self, p: Tensor) -> None:
        """A gradient is ready."""
        lane, bucket, total = self.goes_to[p]
        if total is not None and p.grad is not None:
            total += p.grad
            p.grad = None
        if self.last:
            bucket.arrived(p)
            lane.start()


class Bucket:
    """A stretch of memory in which the gradients of some parameters lie one after the other."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.pairs = pairs
        room = [-(-master.numel() // _ALIGN) * _ALIGN for _, master in pairs]
        self.sum = torch.zeros(sum(room), dtype=pairs[0][1].dtype, device=pairs[0][1].device)
        self.pieces = [piece[: master.numel()].view_as(master) for (_, master), piece in zip(pairs, self.sum.split(room), strict=True)]
        for (_, master), piece in zip(pairs, self.pieces, strict=True):
            master.grad = piece
        self.missing: set[Tensor] = set()
        self.writers: set[Any] = set()  # streams on which gradients of the window's last backward pass were written
        self.work: Any = None

    def arrived(self, p: Tensor) -> None:
        """The gradient of `p` is ready, once the stream of now has come so far."""
        self.missing.remove(p)
        self.writers.add(current_stream(self.sum.device))

    def wait(self) -> None:
        """Let the stream of now, from which the all-reduce starts, wait for every stream that wrote into this bucket.

        main   ─ gradient of attention ──┐
        side   ─ gradient of shared experts (the last to arrive; its hook runs here) ─ wait ─ all-reduce
        """
        now = current_stream(self.sum.device)
        for stream in self.writers - {now}:
            now.wait_stream(stream)
        self.writers.clear()


class Lane:
    """The buckets whose gradients are summed over the same ranks."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]], group: Any, *, late: bool = False) -> None:
        self.buckets, self.group, self.late, self.started = _buckets(pairs), group, late, 0
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def expect(self) -> None:
        """Wait for every gradient anew."""
        self.started = 0
        for bucket in self.buckets:
            bucket.missing = {p for p, _ in bucket.pairs}
            bucket.writers.clear()

    def start(self, everything: bool = False) -> None:
        """Send the buckets that are full, in their order, whatever that of their gradients: it must be the same on all ranks."""
        for bucket in self.buckets[self.started :] if self.ranks > 1 else ():
            if (bucket.missing or self.late) and not everything:
                return
            bucket.wait()
            with stage("all-reduce"):
                bucket.work = dist.all_reduce(bucket.sum, group=self.group, async_op=True)
            self.started += 1

    def finish(self) -> None:
        """Wait until every bucket holds its sum over ranks."""
        self.start(everything=True)
        with stage("all-reduce"):
            for bucket in self.buckets[: self.started]:
                bucket.work.wait()


def _buckets(pairs: list[tuple[Tensor, Tensor]]) -> list[Bucket]:
    """Buckets of about `_BUCKET_BYTES` over pairs of (what the model uses, what the optimizer moves)."""
    buckets, open_pairs, size = [], [], 0
    for pair in pairs:
        open_pairs.append(pair)
        size += pair[1].numel() * pair[1].element_size()
        if size >= _BUCKET_BYTES:
            buckets.append(Bucket(open_pairs))
            open_pairs, size = [], 0
    return buckets + ([Bucket(open_pairs)] if open_pairs else [])
