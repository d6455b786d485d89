"""One expert after the other on a CPU, whole experts shared out over threads.

A small matrix product on all threads waits at a barrier longer than it computes; here every thread takes whole experts from
gathering to the last gradient, with one thread inside each product. Works for any dtype and size, and on one thread or
another device it is the plain loop.
"""

from __future__ import annotations

import functools
import heapq
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from moe.kernels import autograd
from moe.kernels.activations import activate, activate_backward
from moe.kernels.permute import bring_home, send_out
from moe.kernels.reference import ExpertWeights, Rows
from moe.shapes import Float

_WORTH_SHARING = 30_000_000  # multiplications: under about a millisecond of them, waking threads costs more than it saves
_BLOCK = 256  # rows that a chain of element-wise operations takes at once, so that they stay in the L2 cache
_TOGETHER = 1.1  # what a product on all threads takes, against its share of a thread's time


class Span(NamedTuple):
    """The rows of one expert."""

    expert: int
    start: int
    stop: int


def grouped_mlp(rows: Rows, weights: ExpertWeights, activation: str, keep: bool = True) -> Float[Tensor, "m d"]:
    """`reference.grouped_mlp`, an expert a thread."""
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
    spans, used = _spans(counts)
    gated, (_, width, d) = up.shape[1] == 2, up.flatten(1, 2).shape
    d_expert = down.shape[2]
    up, scale = up.flatten(1, 2), weight[:, None]
    y, hidden = x.new_empty(len(index), d), x.new_empty(len(index) if keep else 0, width)
    y[used:].zero_()

    def expert(buffers: Sequence[Tensor], e: int, start: int, stop: int) -> None:
        vectors, activated = buffers[:2]
        h = hidden[start:stop] if keep else buffers[2]
        torch.index_select(x, 0, index[start:stop], out=vectors)
        torch.mm(vectors, up[e].T, out=h)
        for b in _blocks(stop - start):
            activate(h[b], activation, gated, activated[b])
        torch.mm(activated, down[e].T, out=y[start:stop]).mul_(scale[start:stop])

    widths = [d, d_expert] if keep else [d, d_expert, width]
    _each(expert, [span for span in spans if span.stop > span.start], x, widths, used * width * d)
    return bring_home(y, index, slots, len(x)), hidden


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
    spans, used = _spans(counts)
    gated, width, d, d_expert, kept = up.shape[1] == 2, hidden.shape[1], x.shape[1], down.shape[2], len(hidden) > 0
    into_up = up.new_empty(up.shape) if grad_up is None and needs.up else grad_up
    into_down = down.new_empty(down.shape) if grad_down is None and needs.down else grad_down
    grad_x, grad_weight = x.new_empty(len(index), d) if needs.x else None, torch.empty_like(weight)
    grad_weight[used:].zero_()
    if grad_x is not None:
        grad_x[used:].zero_()
    up, flat_up = up.flatten(1, 2), None if into_up is None else into_up.view(len(up), width, d)

    def expert(buffers: Sequence[Tensor], e: int, start: int, stop: int) -> None:
        vectors, activated, grad_activated, grad_hidden = buffers[:4]
        rows = slice(start, stop)
        w, dw = weight[rows], grad_weight[rows]
        h = hidden[rows] if kept else torch.mm(torch.index_select(x, 0, index[rows], out=vectors), up[e].T, out=buffers[4])
        send_out(grad, index[rows], None if scale is None else scale[rows], vectors)
        torch.mm(vectors, down[e], out=grad_activated)
        for b in _blocks(stop - start):
            activate_backward(grad_activated[b], h[b], w[b], activation, gated, activated[b], dw[b], grad_hidden[b])
        if into_down is not None:
            _product(vectors.mul_(w[:, None]).T, activated, into_down[e], add=grad_down is not None)
        if flat_up is not None:
            torch.index_select(x, 0, index[rows], out=vectors)
            _product(grad_hidden.T, vectors, flat_up[e], add=grad_up is not None)
        if grad_x is not None:
            torch.mm(grad_hidden, up[e], out=grad_x[rows])

    _each(expert, spans, x, [d, d_expert, d_expert, width] + [width] * (not kept), 3 * used * width * d)
    grad_x = None if grad_x is None else bring_home(grad_x, index, slots, len(x))
    return autograd.Gradients(grad_x, grad_weight, into_up, into_down)


def _product(left: Tensor, right: Tensor, into: Tensor, *, add: bool) -> None:
    """left @ right into a matrix of their dtype, or added to one that may be wider."""
    if into.dtype == left.dtype:
        into.addmm_(left, right, beta=add)
    else:
        into.add_(torch.mm(left, right))


def _spans(counts: Tensor) -> tuple[list[Span], int]:
    """Each expert's rows, and how many there are in all."""
    spans, start = [], 0
    for expert, count in enumerate(counts.tolist()):
        spans.append(Span(expert, start, start + count))
        start += count
    return spans, start


def _blocks(rows: int) -> list[slice]:
    return [slice(start, start + _BLOCK) for start in range(0, rows, _BLOCK)]


def _each(task: Callable[..., None], spans: list[Span], like: Tensor, widths: list[int], multiplications: int) -> None:
    """task(buffers, *span) for every span, the buffers holding as many rows as the span and `widths` columns."""
    spans = sorted(spans, key=lambda span: span.start - span.stop)
    rows = [span.stop - span.start for span in spans]
    threads = torch.get_num_threads() if like.device.type == "cpu" and multiplications > _WORTH_SHARING else 1
    alone = len(spans) if threads == 1 else _together(rows, threads)

    def work(todo, room: int, inference: bool) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            buffers = [like.new_empty(room, width) for width in widths]
            for span in todo:
                task([buffer[: span.stop - span.start] for buffer in buffers], *span)

    inference = torch.is_inference_mode_enabled()
    if alone:
        work(spans[:alone], rows[0], inference)
    if alone < len(spans):
        todo = iter(spans[alone:])  # one iterator for all: each thread takes the longest that is left
        list(_pool(threads).map(lambda _: work(todo, rows[alone], inference), range(threads)))


def _together(rows: list[int], threads: int) -> int:
    """How many of the longest experts all threads should multiply together, before each takes whole ones of the rest."""

    def finish(together: int) -> float:
        loads = [0] * threads
        for count in rows[together:]:
            heapq.heapreplace(loads, loads[0] + count)
        return _TOGETHER * sum(rows[:together]) / threads + max(loads)

    return min(range(min(len(rows), threads) + 1), key=finish)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which torch uses one thread."""
    started = threading.Barrier(threads)

    def start(_: int) -> None:
        torch.get_num_threads()  # a thread adopts the process's default when first asked, even over a number set before
        torch.set_num_threads(1)
        started.wait()  # so that no thread starts twice and none not at all

    pool = ThreadPoolExecutor(threads, "moe-experts")
    list(pool.map(start, range(threads)))
    torch.set_num_threads(threads)  # theirs was also the default for threads to come
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)
