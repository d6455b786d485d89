"""After a step: total the reports over ranks and the accumulation window, and let the routers learn from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from moe.model.moe_layer import Report
from moe.parallel.collectives import sum_ranks
from moe.parallel.host_copy import to_device
from moe.routers.base import Router


class Window:
    """The loads and stats of one global batch that its routers have seen so far, over all ranks.

    Entered for a step of several micro-batches; outside it every call is a window of its own.
    """

    def __init__(self, routers: Sequence[Router], group: dist.ProcessGroup | None = None) -> None:
        self.routers, self.group = routers, group
        self.sums: list[Report] | None = None

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *_: object) -> None:
        for router in self.routers:
            router.window, router.window_stats, router.window_complete = None, None, False

    def add(self, reports: Sequence[Report]) -> None:
        """Count a micro-batch that was run, and show the sum to the routers."""
        if not reports:
            return
        none = torch.empty(0, device=reports[0].load.device)
        self.sums = add_reports(self.sums, unpack(sum_ranks(pack(none, reports), self.group), reports))
        for router, sums in zip(self.routers, self.sums, strict=True):
            router.window, router.window_stats = sums.load, sums.stats

    def complete(self) -> None:
        """Say that the window was run ahead: what the routers see is the whole of it."""
        for router in self.routers:
            router.window_complete = True


def add_reports(sums: Sequence[Report] | None, reports: Sequence[Report]) -> list[Report]:
    """The figures of a micro-batch added to those of the ones before it, layer by layer."""
    plain = [Report(r.loss.detach().double(), r.load, {key: value.detach() for key, value in r.stats.items()}) for r in reports]
    if sums is None:
        return plain
    return [
        Report(a.loss + b.loss, a.load + b.load, {key: a.stats[key] + b.stats[key] for key in a.stats})
        for a, b in zip(sums, plain, strict=True)
    ]


def pack(figures: Tensor, reports: Sequence[Report]) -> Tensor:
    """Some figures and everything in some reports as one float64 vector, which holds counts exactly up to 2^53."""
    values = [figures, *(value for report in reports for value in _values(report))]
    return torch.cat([value.detach().double().reshape(-1) for value in values])


def unpack(vector: Tensor, like: Sequence[Report]) -> list[Report]:
    """The reports that `pack` made a vector of; counts become integers again, everything else is float64."""
    reports, start = [], 0
    for report in like:
        values = []
        for value in _values(report):
            piece = vector[start : start + value.numel()].reshape(value.shape)
            values.append(piece if value.is_floating_point() else piece.round().to(torch.int64))
            start += value.numel()
        reports.append(Report(values[0], values[1], dict(zip(sorted(report.stats), values[2:], strict=True))))
    return reports


@torch.no_grad()
def update(routers: Sequence[Router], reports: Sequence[Report], device: torch.device) -> None:
    """Let each router learn from a global batch that was applied; `reports` are totals over ranks and the window, on the host."""
    learning = [(router, report) for router, report in zip(routers, reports, strict=True) if type(router).update is not Router.update]
    loads = [report.stats.get("demand", report.load) for _, report in learning]  # what was asked for, dropped or not
    there = to_device(torch.cat(loads), device).split([len(load) for load in loads]) if loads else ()
    for (router, report), load in zip(learning, there, strict=True):
        router.update(load, int(report.stats["tokens"]))


def _values(report: Report) -> list[Tensor]:
    return [report.loss, report.load, *(report.stats[key] for key in sorted(report.stats))]
