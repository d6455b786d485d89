"""Compiled regions compute what eager ones do, in as many graphs for six layers as for one, and never anew for another step."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from moe.routers.base import DRAWS_NOISE
from moe.train.loop import describe_compiled
from tests.model.small import batch, gradients, model

ROUTER = {"name": "top_k", "k": 2, "balance_loss": 0.05, "z_loss": 1e-3, "bias_rate": 1e-2}
PLAIN = {"router": ROUTER}
SHARED = {"router": {"name": "avg_k", "k": 2}, "d_shared": 16, "shared_gate": True}
DEEPSEEK = {
    "router": ROUTER | {"score": "sigmoid", "groups": 2, "groups_kept": 1, "group_score": "best", "balance_scope": "sequence", "scale": 2.5}
}


@pytest.fixture
def without_inductor(monkeypatch):
    """Graphs are captured, differentiated and run by torch's own operations; the counters begin at zero."""
    torch.compile(len)  # takes the checks of shapes off, before methods are looked up
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def step(made, given, number):
    made.zero_grad()
    out = made(*given, step=number)
    (out.loss + sum(report.loss for report in out.reports)).backward()
    return out, gradients(made)


def compile_all(made):
    for block in made.layers:
        block.compile_regions()
    return made


def graphs() -> int:
    assert not counters["graph_break"], dict(counters["graph_break"])
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("moe", "shape", "wanted"),
    [
        pytest.param(PLAIN, {}, 2, id="router"),
        pytest.param(DEEPSEEK, {}, 2, id="groups"),
        pytest.param(SHARED, {"norm": "layer", "positions": "learned"}, 3, id="shared experts"),
        pytest.param({"router": ROUTER | {"jitter": 0.1}}, {}, 1, id="router that draws noise"),
        pytest.param({"dense_layers": [0, 2], "router": ROUTER}, {"qk_norm": "head"}, 4, id="dense layers"),
    ],
)
def test_equals_eager_in_as_many_graphs_whatever_the_number_of_layers(moe, shape, wanted, without_inductor):
    plain, compiled = (model(moe, layers=6, **shape) for _ in range(2))
    compile_all(compiled)
    for number in range(2):
        (ours, our_gradients), (theirs, their_gradients) = (step(one, batch(), number) for one in (compiled, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(our_gradients, their_gradients, rtol=1e-10, atol=1e-13)
    assert graphs() == wanted


@pytest.mark.slow
def test_is_compiled_anew_for_another_mode_or_shape_once(without_inductor):
    made = compile_all(model(PLAIN, layers=3))

    def all_there_is(number):
        for b in (3, 2, 5):
            step(made.train(), batch(b), number)
        for router in made.routers().values():
            router.window = torch.zeros(4, dtype=torch.int64)
        step(made, batch(3), number)
        with torch.no_grad():
            for b in (3, 2, 4):
                made.eval()(*batch(b), step=number)
        for router in made.routers().values():
            router.window = None

    all_there_is(0)
    # attention: one shape, any, without gradients; the router the same, and with a window. torch gives up at 8 of one function
    assert graphs() == 7
    with torch.compiler.set_stance("fail_on_recompile"):
        all_there_is(1)


@pytest.mark.slow
def test_of_inductor_too():
    """Float32, as it is trained; the code is C++ here and Triton on a GPU."""
    torch.compile(len)
    torch.compiler.reset()
    counters.clear()
    for moe in (PLAIN, SHARED):
        plain, compiled = (model(moe, layers=3).float() for _ in range(2))
        (ours, our_gradients), (theirs, their_gradients) = (step(one, batch(), 0) for one in (compile_all(compiled), plain))
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
        assert [report.load.tolist() for report in ours.reports] == [report.load.tolist() for report in theirs.reports]
        for name, gradient in their_gradients.items():
            torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())
    assert graphs() == 4  # attention is the same in both


def test_only_routers_without_a_reason_are_compiled(without_inductor):
    made = model({"router": ROUTER | {"jitter": 0.1}})
    before = [router.forward for router in made.routers().values()]
    compile_all(made)
    assert [router.forward for router in made.routers().values()] == before
    assert all(router.eager is DRAWS_NOISE for router in made.routers().values())
    words = "compiled: attention with rotary, feed-forward networks, norms, residuals"
    eager = "eager: dispatch, routed experts and their residual"
    assert describe_compiled(made) == f"{words}; {eager}, routers ({DRAWS_NOISE})"
    assert describe_compiled(model(PLAIN)) == f"{words}, routers; {eager}"
    assert describe_compiled(model(dense=True)) == words
