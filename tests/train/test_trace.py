"""What tables say of a trace that was made by hand: nesting, the two passes, launches by correlation, waits, busy time."""

from __future__ import annotations

import pytest

from moe.train.profiler import WIDTH, text, together
from moe.train.trace import backward_track, summarise

NODE = "autograd::engine::evaluate_function: "


def span(name, start, duration, category="cpu_op", thread=1, **args):
    return {"ph": "X", "cat": category, "name": name, "pid": 7, "tid": thread, "ts": start, "dur": duration, "args": args}


def note(name, start, duration):
    return span(name, start, duration, "user_annotation")


def arrow(number, start, end, thread):
    ends = ({"ph": "s", "ts": start, "tid": 1}, {"ph": "f", "ts": end, "tid": thread})
    return [end | {"cat": "fwdbwd", "id": number, "pid": 7, "name": "fwdbwd"} for end in ends]


# thread 1: forward with route and experts, then backward, whose nodes run on thread 2, as on a GPU
HOST = [
    note("step 1", 0, 1000),
    note("forward", 0, 400),
    note("route", 10, 100),
    span("aten::mm", 20, 50),
    span("cudaLaunchKernel", 30, 10, "cuda_runtime", correlation=1),
    span("aten::item", 80, 20),
    span("cudaStreamSynchronize", 85, 10, "cuda_runtime", correlation=2),
    note("experts", 200, 100),
    span("_ExpertMLP", 210, 80),
    span("cuLaunchKernelEx", 220, 10, "cuda_driver", correlation=3),
    note("backward", 500, 300),
    span(NODE + "_ExpertMLPBackward", 510, 100, thread=2),
    span("_ExpertMLPBackward", 515, 90, thread=2),
    span("cuLaunchKernelEx", 520, 10, "cuda_driver", thread=2, correlation=4),
    span(NODE + "MmBackward0", 620, 20, thread=2),
    span("MmBackward0", 621, 18, thread=2),
    span(NODE + "torch::autograd::AccumulateGrad", 650, 10, thread=2),
    *arrow(1, 210, 515, 2),
    *arrow(2, 20, 621, 2),
]
DEVICE = [
    span("gemm", 100, 100, "kernel", thread=99, correlation=1),
    span("up", 250, 200, "kernel", thread=99, correlation=3),
    span("wgrad", 400, 300, "kernel", thread=98, correlation=4),  # 50 of it beside `up`
]


def test_time_launches_and_waits_go_to_the_stage_that_caused_them():
    found = summarise(HOST + DEVICE, 1)
    stages = found.stages
    assert stages["route", False].host == 100
    assert stages["forward", False].host == 200  # what is neither route nor experts
    assert (stages["route", False].device, stages["route", False].launches) == (100, 1)
    assert (stages["experts", False].device, stages["experts", True].device) == (200, 300)
    assert (stages["experts", True].host, stages["route", True].host) == (100, 20)
    assert stages["backward", True].host == 300 + 10  # the main thread, and gradients that belong to no stage
    assert (stages["route", False].waits, stages["route", False].waited) == (1, 10)
    assert {key: (cost.waits, cost.waited) for key, cost in found.waits.items()} == {
        ("aten::item (cudaStreamSynchronize)", "route"): (1, 10)
    }
    assert found.operators["wgrad"].device == 300
    assert found.operators["aten::mm"].host == 40
    assert found.busy == 100 + 200 + 300 - 50
    assert found.span == 1000


def test_without_a_device_reads_of_values_are_what_would_wait():
    events = [note("route", 0, 100), span("aten::item", 10, 20), span("aten::_local_scalar_dense", 12, 15), span("aten::nonzero", 40, 5)]
    found = summarise(events, 1)
    assert not found.gpu
    assert {key: cost.waits for key, cost in found.waits.items()} == {
        ("aten::item (aten::_local_scalar_dense)", "route"): 1,
        ("aten::nonzero", "route"): 1,
    }
    assert found.stages["route", False].waits == 2


def test_the_backward_pass_has_a_track_with_the_stages_of_its_forward_operations():
    bars = [event for event in backward_track(HOST) if event["ph"] == "X"]
    assert [(bar["name"], bar["ts"], bar["dur"]) for bar in bars] == [("experts backward", 510, 100), ("route backward", 620, 20)]
    assert all(bar["tid"] == "2 backward" for bar in bars)


def test_the_tables_fit_their_width_and_say_what_is_there():
    lines = text(summarise(HOST + DEVICE, 1), "rank0-step1").splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert any("the GPU is busy for 55% of it; 3 launches a step" in line for line in lines)
    (experts,) = (line for line in lines if line.startswith("experts"))
    assert experts.split() == ["experts", "0.20", "0.30", "0.10", "0.10", "83.3%", "2"]


@pytest.mark.parametrize(
    ("steps", "groups"), [([], []), ([5], [[5]]), ([10, 11, 12], [[10, 11, 12]]), ([12, 3, 10, 11, 3], [[3], [10, 11, 12]])]
)
def test_consecutive_steps_share_a_trace(steps, groups):
    assert together(steps) == groups
