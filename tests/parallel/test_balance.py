"""What routers see of an accumulation window, and what they learn from."""

from __future__ import annotations

import pytest
import torch

from moe.model.moe_layer import Report
from moe.parallel import balance
from moe.routers.top_k import TopK
from tests.engines.tiny_job import ROUTER, batch, difference, engine, train
from tests.workers import run_ranks

EXPERTS = 6


def report(*, seed):
    generator = torch.Generator().manual_seed(seed)
    load = torch.randint(100, (4,), generator=generator)
    stats = {"tokens": load.sum(), "entropy": torch.rand((), generator=generator), "probability": torch.rand(4, generator=generator)}
    return Report(torch.rand((), generator=generator), load, stats)


def test_packed_reports_come_back_with_their_figures_beside():
    reports = [report(seed=0), report(seed=1)]
    vector = balance.pack(torch.tensor([7.0, 2.0**52 + 1], dtype=torch.float64), reports)
    assert vector[:2].tolist() == [7.0, 2.0**52 + 1]
    for got, wanted in zip(balance.unpack(vector[2:], reports), reports, strict=True):
        assert torch.equal(got.load, wanted.load)
        assert got.load.dtype == got.stats["tokens"].dtype == torch.int64
        assert got.loss == wanted.loss
        assert got.stats.keys() == wanted.stats.keys()
        assert all(torch.equal(got.stats[key], wanted.stats[key].to(got.stats[key])) for key in wanted.stats)


def test_reports_add_up():
    a, b = report(seed=0), report(seed=1)
    (total,) = balance.add_reports(balance.add_reports(None, [a]), [b])
    assert torch.equal(total.load, a.load + b.load)
    assert total.loss == a.loss.double() + b.loss.double()
    assert torch.equal(total.stats["probability"], a.stats["probability"] + b.stats["probability"])


def seen(rank, world, balance_window):
    """What the first router is shown at each call of a step of three micro-batches, and the loads of each call."""
    job = engine(accumulate=2, balance_window=balance_window, router=ROUTER | {"bias_rate": None})
    shown, loads = [], []

    def look(router, inputs, routing):
        shown.append((None if router.window is None else router.window.clone(), router.window_complete))
        loads.append(routing.load(EXPERTS))

    job.routers[0].register_forward_hook(look)
    result = job.step(batch(0, rank, world), 0, 1e-2)
    assert job.routers[0].window is None
    assert not job.routers[0].window_complete
    return shown, loads, result.reports[0].load


def test_a_running_window_holds_the_micro_batches_before_over_all_ranks():
    (shown, loads, total), (other, other_loads, _) = run_ranks(2, seen, "running")
    assert [complete for _, complete in shown] == [False, False]
    assert shown[0][0] is None
    assert torch.equal(shown[1][0], loads[0] + other_loads[0])
    assert torch.equal(other[1][0], shown[1][0])
    assert torch.equal(total, sum(loads) + sum(other_loads))


def test_an_exact_window_holds_the_whole_global_batch_and_routing_is_replayed():
    (shown, loads, total), (_, other_loads, _) = run_ranks(2, seen, "exact")
    assert [complete for _, complete in shown] == [False, False, True, True]
    assert torch.equal(loads[0], loads[2])
    assert torch.equal(loads[1], loads[3])
    assert torch.equal(shown[2][0], loads[0] + loads[1] + other_loads[0] + other_loads[1])
    assert torch.equal(shown[3][0], shown[2][0])
    assert torch.equal(total, shown[2][0])


SIGMA = {"name": "sigma", "entropy_loss": 1.0, "expert_dropout": 0.3}  # a loss that is not linear in the batch's mean


NOISY = {"name": "noisy_top_k", "importance_loss": 1.0, "load_loss": 1.0, "capacity_factor": 0.75}  # so is this, and tokens are dropped
GSHARD = {"balance_counts": "first", "second": "random", "balance_loss": 1.0, "bias_rate": 0.01, "capacity_factor": 0.75}


def trained(rank, world, cases, router):
    return [train(engine(name, router=router, **options), range(3), 1e-2) for name, options in cases]


@pytest.mark.parametrize("router", [SIGMA, NOISY, {"name": "top_k", **GSHARD}], ids=["sigma", "noisy_top_k", "top_k"])
def test_the_stats_of_an_exact_window_make_any_loss_that_of_the_global_batch(router):
    (alone,) = run_ranks(1, trained, [("ddp", {})], router)[0]
    cases = [("ddp", {"accumulate": 4}), ("fsdp2", {"accumulate": 2}), ("ddp", {"accumulate": 4, "balance_window": "running"})]
    exact, sharded, running = run_ranks(2, trained, cases, router)[0]
    assert difference(exact, alone) < 1e-11
    assert difference(sharded, alone) < 1e-11
    assert difference(running, alone) > 1e-4


def losses(rank, world, accumulate, balance_window):
    """Mean auxiliary loss of a step, and the first layer's load and probability mass of each micro-batch."""
    job = engine(accumulate=accumulate, balance_window=balance_window, router=ROUTER | {"z_loss": 0.0, "balance_loss": 1.0})
    parts = []
    job.routers[0].register_forward_hook(lambda router, x, routing: parts.append((routing.load(EXPERTS), routing.stats["probability"])))
    return job.step(batch(0, rank, world), 0, 1e-2).reports[0].loss.item(), parts[-accumulate:]


def by_hand(parts, seen):
    """E * sum f P a micro-batch, with the loads that each one saw."""
    tokens = (batch(0).document >= 0).sum()
    total = sum(EXPERTS * (load.double() / load.sum() * probability).sum() for load, (_, probability) in zip(seen, parts, strict=True))
    return (total / tokens).item()


def test_the_loss_of_each_window_is_its_definition():
    exact, parts = run_ranks(1, losses, 4, "exact")[0]
    whole = sum(load for load, _ in parts)
    assert exact == pytest.approx(by_hand(parts, [whole] * 4), rel=1e-12)
    at_once, _ = run_ranks(1, losses, 1, "running")[0]
    assert exact == pytest.approx(at_once, rel=1e-12)
    running, parts = run_ranks(1, losses, 4, "running")[0]
    so_far = torch.stack([load for load, _ in parts]).cumsum(0)
    assert running == pytest.approx(by_hand(parts, so_far), rel=1e-12)
    assert abs(running - exact) > 1e-6


def test_updating_gives_each_router_its_totals():
    routers = [TopK(3, 4, bias_rate=1.0) for _ in range(2)]
    reports = [report(seed=0), report(seed=1)]
    balance.update(routers, reports, torch.device("cpu"))
    for router, made in zip(routers, reports, strict=True):
        other = TopK(3, 4, bias_rate=1.0)
        with torch.no_grad():
            other.update(made.load, int(made.stats["tokens"]))
        assert torch.equal(router.bias, other.bias)
        assert router.bias.abs().sum() > 0


def test_a_router_with_a_capacity_learns_from_what_was_asked_for():
    router = TopK(3, 4, bias_rate=1.0, capacity_factor=1.0)
    made = Report(torch.zeros(()), torch.tensor([2, 2, 2, 1]), {"demand": torch.tensor([9, 2, 4, 1]), "tokens": torch.tensor(8)})
    balance.update([router], [made], torch.device("cpu"))
    assert router.bias.tolist() == [-1.25, 0.75, -0.25, 0.75]  # signs of 4 - demand, around zero
