"""What a profiler's trace says: time by stage and by operator, launches, and where the host waited for the device.

Works on the trace's own events (Chrome's trace format), so a trace that is read again from disk gives the same tables.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe.model.stages import LAYER, OTHERS, STEP

HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")  # categories of what runs on a host's thread
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize")
READS = ("aten::_local_scalar_dense", "aten::nonzero")  # on a CPU they cost nothing; on a GPU each waits for the device
ORDER = ("read batch", "forward", "attention", "feed-forward", "route", "dispatch", "experts", "combine", "loss", "backward")
ORDER += ("all-reduce", "wait for figures", "optimizer", "other")
GAP = 1000.0  # microseconds: nodes of one stage that are no further apart are one bar
_BACKWARD = "autograd::engine::evaluate_function: "
_NAMES = {*STEP, *LAYER, *OTHERS}


@dataclass
class Span:
    """One event of a host's thread, microseconds, with what ran inside it."""

    name: str
    category: str
    thread: Any
    start: float
    end: float
    correlation: int | None = None  # links a launch to what it launched
    parent: Span | None = None
    inside: float = 0.0  # microseconds of spans within, so that the rest is its own
    stage: str | None = None  # of a backward node: the stage of the forward operation whose gradient it computes

    @property
    def own(self) -> float:
        return self.end - self.start - self.inside

    def place(self) -> tuple[str, bool]:
        """The innermost stage around this span, and whether it runs in the backward pass."""
        stage, backward = None, False
        span: Span | None = self
        while span is not None:
            if stage is None and (span.stage is not None or span.name in _NAMES):
                stage = span.stage or span.name
            backward = backward or span.name == "backward" or span.name.startswith(_BACKWARD)
            span = span.parent
        return stage or ("backward" if backward else "other"), backward


@dataclass
class Cost:
    """Microseconds, launches and waits of one stage in one direction, or of one operator."""

    host: float = 0.0
    device: float = 0.0
    launches: int = 0
    calls: int = 0
    waits: int = 0
    waited: float = 0.0


@dataclass
class Summary:
    """What a trace of `steps` steps holds; costs are of all steps together."""

    steps: int
    gpu: bool
    span: float  # microseconds from the first to the last event
    busy: float  # microseconds in which a kernel ran
    stages: dict[tuple[str, bool], Cost] = field(default_factory=lambda: defaultdict(Cost))
    operators: dict[str, Cost] = field(default_factory=lambda: defaultdict(Cost))
    waits: dict[tuple[str, str], Cost] = field(default_factory=lambda: defaultdict(Cost))  # (what waited, the stage)


def summarise(events: Sequence[dict[str, Any]], steps: int) -> Summary:
    """The costs of a trace's events."""
    spans = host_spans(events)
    link_backward(spans, events)
    device = [event for event in events if event.get("cat") in DEVICE and event["ph"] == "X"]
    ends = [span.end for span in spans] + [event["ts"] + event["dur"] for event in device]
    length = max(ends, default=0.0) - min((span.start for span in spans), default=0.0)
    found = Summary(steps, bool(device), length, _covered((event["ts"], event["ts"] + event["dur"]) for event in device))
    launched = {span.correlation: span for span in spans if span.correlation is not None}
    for span in spans:
        cost = found.stages[span.place()]
        cost.host += span.own
        if span.category == "cpu_op" and not span.name.startswith(_BACKWARD):
            operator = found.operators[span.name]
            operator.host, operator.calls = operator.host + span.own, operator.calls + 1
        if span.name in (WAITS if found.gpu else READS):
            _waited(found, span, cost)
    for event in device:
        launch = launched.get(event.get("args", {}).get("correlation"))
        cost = found.stages[launch.place() if launch is not None else ("other", False)]
        operator = found.operators[event["name"]]
        for each in (cost, operator):
            each.device, each.launches = each.device + event["dur"], each.launches + 1
        operator.calls += 1
    return found


def _waited(found: Summary, span: Span, cost: Cost) -> None:
    above = span.parent
    while above is not None and above.category != "cpu_op":
        above = above.parent
    outermost = above
    while outermost is not None and outermost.parent is not None and outermost.parent.category == "cpu_op":
        outermost = outermost.parent
    name = span.name if outermost is None else f"{outermost.name} ({span.name})" if outermost is not span else span.name
    for each in (cost, found.waits[name, span.place()[0]]):
        each.waits, each.waited = each.waits + 1, each.waited + span.end - span.start


def host_spans(events: Iterable[dict[str, Any]]) -> list[Span]:
    """Events of the host's threads, each with the one that it lies in."""
    spans = [
        Span(e["name"], e["cat"], (e["pid"], e["tid"]), e["ts"], e["ts"] + e["dur"], e.get("args", {}).get("correlation"))
        for e in events
        if e["ph"] == "X" and e.get("cat") in HOST
    ]
    spans.sort(key=lambda span: (str(span.thread), span.start, -span.end))
    open_spans: list[Span] = []
    for span in spans:
        while open_spans and (open_spans[-1].thread != span.thread or open_spans[-1].end <= span.start):
            open_spans.pop()
        if open_spans:
            span.parent = open_spans[-1]
            span.parent.inside += span.end - span.start
        open_spans.append(span)
    return spans


def link_backward(spans: Sequence[Span], events: Iterable[dict[str, Any]]) -> None:
    """Give each backward node the stage of its forward operation, by the profiler's own arrows between both."""
    at = {(span.thread, span.start): span for span in spans}
    begun: dict[Any, Span] = {}
    arrived: list[tuple[Any, Span]] = []
    for event in events:
        if event.get("cat") == "fwdbwd" and (span := at.get(((event["pid"], event["tid"]), event["ts"]))):
            if event["ph"] == "s":
                begun[event["id"]] = span
            else:
                arrived.append((event["id"], span))
    for number, span in arrived:
        node: Span | None = span
        while node is not None and not node.name.startswith(_BACKWARD):
            node = node.parent
        if node is not None and number in begun:
            node.stage = begun[number].place()[0]


def backward_track(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events that name the backward pass: one track a thread, with each run of nodes of one stage as a bar."""
    spans = host_spans(events)
    link_backward(spans, events)
    bars: list[dict[str, Any]] = []
    tracks: dict[Any, dict[str, Any]] = {}
    for span in spans:
        if not span.name.startswith(_BACKWARD) or (span.parent is not None and span.parent.name.startswith(_BACKWARD)):
            continue
        stage, (pid, tid) = span.place()[0], span.thread
        if stage not in (*LAYER, "loss"):
            continue
        track = f"{tid} backward"
        last = bars[-1] if bars else None
        if (
            last is not None
            and last["name"] == f"{stage} backward"
            and last["tid"] == track
            and span.start - last["ts"] - last["dur"] < GAP
        ):
            last["dur"] = span.end - last["ts"]
            continue
        bar = {"ph": "X", "cat": "backward stage", "name": f"{stage} backward", "pid": pid, "tid": track}
        bars.append(bar | {"ts": span.start, "dur": span.end - span.start})
        tracks[track] = {"ph": "M", "name": "thread_name", "pid": pid, "tid": track, "args": {"name": f"backward stages of {tid}"}}
    return [*tracks.values(), *bars]


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of a union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
