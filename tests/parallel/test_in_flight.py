"""Nothing is read before it has arrived: here every all-to-all arrives late on purpose, on a GPU on a stream of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe.model.moe_layer import MoELayer
from moe.parallel import expert_parallel, in_flight
from moe.parallel.overlap import Overlap

D, EXPERTS, TOKENS = 32, 6, 48
SLEEP = 20_000_000  # cycles: a hundredth of a second


class OnCpu:
    """An all-to-all of one rank, which sends when it is waited for what is then to be sent."""

    def __init__(self, out: torch.Tensor, x: torch.Tensor, *_: Any) -> None:
        self.out, self.x = out, x
        out.fill_(torch.nan if out.is_floating_point() else 10**9)

    def wait(self) -> None:
        self.out.copy_(self.x)


class OnGpu:
    """One on another stream, that keeps no tensor: whoever starts it has to."""

    def __init__(self, out: torch.Tensor, x: torch.Tensor, *_: Any) -> None:
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(SLEEP)
            out.copy_(x)

    def wait(self) -> None:
        torch.cuda.current_stream().wait_stream(self.stream)


def through(layer: MoELayer, overlap: int, recompute: bool, device: str) -> list[Any]:
    """Output, and gradients of x and of all parameters."""
    layer.zero_grad()
    layer.pipeline = Overlap(overlap) if overlap > 1 else MoELayer._in_turn
    x, upstream = (torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(seed)).to(device) for seed in (1, 2))
    x.requires_grad_()
    out = checkpoint(lambda x: layer(x)[0], x, use_reentrant=False) if recompute else layer(x)[0]
    out.backward(upstream)
    return [out.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("how", ["rows", "tokens", "fixed"])
def test_late_all_to_alls_change_nothing(monkeypatch, how, device):
    for name, value in {"get_rank": 0, "get_world_size": 1}.items():
        monkeypatch.setattr(expert_parallel.dist, name, lambda group, value=value: value)
    monkeypatch.setattr(expert_parallel, "exchange", lambda x, *_: x.clone())
    for module in (expert_parallel, in_flight):
        monkeypatch.setattr(module, "exchange_into", OnCpu if device == "cpu" else OnGpu)
    layer = MoELayer(D, experts=EXPERTS, d_expert=16, d_shared=8, backend="reference").to(device)
    right = through(layer, 1, False, device)
    layer.dispatcher = expert_parallel.AllToAll(0, EXPERTS, None, how=how, device=device)
    for overlap, recompute in ((1, False), (2, False), (3, False), (2, True)):
        for mine, one in zip(through(layer, overlap, recompute, device), right, strict=True):
            torch.testing.assert_close(mine, one, rtol=1e-4, atol=1e-4 * one.abs().max().item())
