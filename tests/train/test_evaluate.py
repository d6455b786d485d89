"""What an evaluation says beside the loss."""

from __future__ import annotations

import torch

from moe.routers import build
from moe.routers.base import Tokens
from moe.train.evaluate import PROBE_TOKENS, Recorder, changes


class Model:
    """Two routed layers, one of which gives every token as many experts as it likes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.fixed, self.varying = build({"name": "top_k", "k": 2}, 8, 4).eval(), build({"name": "comet", "k": 2}, 8, 4).eval()
        with torch.no_grad():
            self.varying.node.mul_(100)  # trees that have decided

    def routers(self):
        return {1: self.fixed, 3: self.varying}


def test_churn_counts_the_assignments_that_are_new():
    before = torch.tensor([[1, 1, 0], [0, 1, 1]], dtype=torch.bool)
    now = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.bool)
    assert changes(before, now).tolist() == [1, 4]
    assert changes(now, now).tolist() == [0, 4]


def test_what_each_layer_chose_is_kept_whatever_the_number_of_experts_a_token():
    model, x = Model(), torch.randn(20, 8)
    with Recorder(model) as recorder:
        routings = [router(x, Tokens.of(x)) for router in model.routers().values()]
    model.fixed(x, Tokens.of(x))  # after the recorder was left
    assert list(recorder.chosen) == [1, 3]
    assert recorder.chosen[1].shape == (PROBE_TOKENS, 4)
    assert recorder.chosen[1].sum(1)[:20].eq(2).all()
    for chosen, routing in zip(recorder.chosen.values(), routings, strict=True):
        assert chosen.sum() == len(routing.expert)
        assert chosen[routing.token, routing.expert].all()
