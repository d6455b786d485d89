"""Gradients that arrive on the side stream, late on purpose, are in their bucket before it is summed over ranks."""

from __future__ import annotations

import pytest
import torch

from moe.engines import ddp
from moe.model.settings import Model
from moe.model.side_stream import SideStream
from moe.model.transformer import Transformer
from tests.gpu.problems import DEVICE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")]
SHAPE = {"layers": 3, "d_model": 256, "heads": 4, "d_ff": 512, "context": 128, "mlp_bias": True}
MOE = {"experts": 8, "d_expert": 128, "d_shared": 512, "shared_gate": True, "router": {"name": "top_k", "k": 2}, "backend": "reference"}
SLEEP = 200_000_000  # cycles: a tenth of a second


class Doubled:
    """In place of an all-reduce over two equal ranks: twice the bucket, on a stream of its own."""

    def __init__(self, stream) -> None:
        self.stream = stream

    def start(self, x, group, async_op):
        if self.stream is None:
            x.mul_(2)
            return self
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            x.mul_(2)
        return self

    def wait(self):
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)


def gradients(monkeypatch, recompute: bool, beside: bool) -> list[torch.Tensor]:
    """Buckets of a model after two micro-batches, summed over two ranks that are alike."""
    cuda = DEVICE == "cuda"
    model = Transformer(Model.model_validate(SHAPE | {"moe": MOE}), 64).to(DEVICE)
    doubled, side = Doubled(torch.cuda.Stream() if cuda else None), SideStream() if beside else None
    for name, value in {"get_rank": 0, "get_world_size": 2}.items():
        monkeypatch.setattr(ddp.dist, name, lambda group, value=value: value)
    monkeypatch.setattr(ddp.dist, "all_reduce", doubled.start)
    monkeypatch.setattr(ddp, "_BUCKET_BYTES", 2**19)
    lane = ddp.Lane([(p, p) for p in reversed(list(model.parameters()))], None)
    of = {p: bucket for bucket in lane.buckets for p, _ in bucket.pairs}
    last = False

    def arrived(p: torch.Tensor) -> None:
        if last:
            of[p].arrived(p)
            lane.start()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(arrived)
    for block in model.layers:
        block.recompute, block.moe.beside = recompute, side
        if beside:  # runs on the side stream, before the branch's gradients
            block.moe.shared.register_full_backward_pre_hook(lambda *_: torch.cuda._sleep(SLEEP))
    for seed in (1, 2):
        last = seed == 2
        lane.expect()
        ids = torch.randint(64, (2, 128), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        position, index = torch.arange(128, device=DEVICE).expand(2, 128), torch.arange(256, device=DEVICE).view(2, 128)
        out = model(ids, ids.roll(-1, 1), torch.zeros_like(ids), position, index)
        (out.loss / 256).backward()
    lane.finish()
    return [bucket.sum for bucket in lane.buckets]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_late_side_stream_changes_no_sum(monkeypatch, recompute):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        serial = gradients(monkeypatch, recompute, beside=False)
        assert len(serial) > 4
        for _ in range(3):
            for mine, right in zip(gradients(monkeypatch, recompute, beside=True), serial, strict=True):
                torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-7)
    finally:
        torch.use_deterministic_algorithms(False)
