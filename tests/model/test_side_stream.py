"""Shared experts on a side stream: what waits for what, recorded on a CPU, where the recorder's streams compute at once."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from moe.model.settings import Model
from moe.model.side_stream import SideStream
from moe.model.transformer import Transformer

SHAPE = {"layers": 3, "d_model": 16, "heads": 2, "d_ff": 32, "context": 8, "mlp_bias": True}


class Recorder(SideStream):
    """A side stream that writes down, in one list for all layers, when it starts, and when the main stream waits for it."""

    def __init__(self, log: list) -> None:
        self.log = log

    @contextmanager
    def run(self):
        self.log.append("start")
        yield
        self.log.append("started")

    def join(self) -> None:
        self.log.append("join")

    def lend(self, x: torch.Tensor) -> None:
        pass

    hand_back = lend


def trained(recompute: bool, beside: bool) -> tuple[Transformer, list, torch.Tensor]:
    """A model after a backward pass, and the order of everything that the side stream and the gradients did in it."""
    moe = {"experts": 4, "d_expert": 8, "d_shared": 24, "shared_gate": True, "router": {"name": "top_k", "k": 2}}
    model, log = Transformer(Model.model_validate(SHAPE | {"moe": moe}), 32), []
    for block in model.layers:
        block.recompute = recompute
        block.moe.beside = Recorder(log) if beside else None
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: log.append(name))
    ids = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(1))
    position = torch.arange(8).expand(2, 8)
    out = model(ids, ids.roll(-1, 1), torch.zeros_like(ids), position, torch.arange(16).view(2, 8))
    log.append("backward")
    (out.loss / 16 + sum(report.loss for report in out.reports)).backward()
    return model, log, out.loss.detach()


@pytest.mark.parametrize("recompute", [False, True])
def test_the_main_stream_waits_once_all_gradients_of_shared_experts_have_arrived_and_before_those_of_earlier_operations(recompute):
    log = trained(recompute, beside=True)[1]
    back = log[log.index("backward") + 1 :]
    of_shared = ("shared.gate", "shared.up", "shared.down", "shared_gate")
    for layer in (2, 1, 0):
        mine = {name: at for at, name in enumerate(back) if name.startswith(f"layers.{layer}.")}
        shared = [at for name, at in mine.items() if name.startswith(tuple(f"layers.{layer}.moe.{part}" for part in of_shared))]
        before = [at for name, at in mine.items() if any(part in name for part in (".attention", ".mlp_norm", ".router"))]
        assert len(shared) == 7  # three weights and their biases, and the gate's
        assert before
        waits = [at for at, name in enumerate(back) if name == "join" and max(shared) < at < min(before)]
        assert len(waits) == 1, back
        assert not [name for name in back[min(shared) : waits[0]] if name.startswith("layers") and "shared" not in name]


def test_forward_each_start_is_joined_before_the_next():
    log = trained(False, beside=True)[1]
    assert log[: log.index("backward")] == ["start", "started", "join"] * 3


def test_recomputation_starts_on_the_main_stream():
    """The routed branch asks for it: before any gradient of shared experts has been computed."""
    log = trained(True, beside=True)[1]
    back = log[log.index("backward") + 1 :]
    for layer in (2, 1, 0):
        first = next(at for at, name in enumerate(back) if name.startswith(f"layers.{layer}.moe.shared"))
        assert back[:first].count("start") == 3 - layer


@pytest.mark.parametrize("recompute", [False, True])
def test_the_side_stream_changes_no_bit(recompute):
    (a, _, with_it), (b, _, without) = trained(recompute, beside=True), trained(recompute, beside=False)
    assert torch.equal(with_it, without)
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
