"""What one step does: skip, clip, count, learn once a global batch."""

from __future__ import annotations

import importlib.util
import math
from functools import partial

import pytest
import torch

from moe.errors import CheckpointError, ConfigError
from moe.model.experts import Experts
from tests.engines.tiny_job import ROUTER, batch, difference, engine, same, train, whole
from tests.workers import run_ranks

ENGINES = ["ddp", "fsdp2"]


def poisoned(rank, world, name):
    """A good step, one whose weights of rank 1's first micro-batch are NaN, and a good one again."""
    job = engine(name, accumulate=2)
    job.step(batch(0, rank, world), 0, 1e-2)
    before = whole(job.canonical_state())
    calls = []

    def poison(router, inputs, routing):
        calls.append(None)
        return routing._replace(weight=routing.weight * math.nan) if rank == 1 and len(calls) == 3 else routing

    hook = job.routers[0].register_forward_hook(poison)
    skipped = job.step(batch(1, rank, world), 1, 1e-2)
    hook.remove()
    after = whole(job.canonical_state())
    again = job.step(batch(1, rank, world), 1, 1e-2)
    return skipped.applied, again.applied, same(before, after), again.loss.item()


def poisoned_both(rank, world):
    return [poisoned(rank, world, name) for name in ENGINES]


def test_nan_on_one_rank_makes_every_rank_skip_and_nothing_learn():
    ranks = run_ranks(2, poisoned_both)
    for outcomes in ranks:
        for skipped, again, unchanged, _ in outcomes:
            assert not skipped
            assert again
            assert unchanged
    assert ranks[0] == ranks[1]


def recomputed(rank, world):
    pairs = []
    for name in ENGINES:
        for dtype in ("float64", "bfloat16"):
            for options in ({"accumulate": 2, "balance_window": "running"}, {}):
                runs = [train(engine(name, dtype=dtype, recompute=r, **options), range(3), 1e-2) for r in ("none", "experts", "full")]
                pairs.append(runs)
    return pairs


def test_recomputation_changes_no_bit():
    for kept, *others in run_ranks(2, recomputed)[0]:
        for again in others:
            assert kept.figures == again.figures
            assert same(kept.state, again.state)


def one_bias_step(rank, world):
    job = engine(accumulate=4, balance_window="running")
    job.step(batch(0, rank, world), 0, 1e-2)
    moved = [router.bias.clone() for router in job.routers]
    before = whole(job.canonical_state())
    first = job.evaluate(batch(1, rank, world), 1)
    second = job.evaluate(batch(1, rank, world), 2)  # jitter would draw other noise
    return moved, same(before, whole(job.canonical_state())), first, second


def test_the_bias_moves_once_a_global_batch_and_never_in_evaluation():
    for moved, unchanged, first, second in run_ranks(2, one_bias_step):
        for bias in moved:
            steps = (bias - bias.min()) / ROUTER["bias_rate"]  # signs of -1, 0 and 1 lie at most 2 apart
            assert 0 < steps.max() < 2.01
        assert unchanged
        assert first.loss == second.loss


def evaluated(rank, world):
    job = engine()
    sums = job.evaluate(batch(0, rank, world), 0)
    return sums.loss.item(), sums.targets, sums.reports[0].load, sums.reports[0].stats["tokens"].item()


def test_evaluation_sums_over_ranks():
    alone, (two, other) = run_ranks(1, evaluated)[0], run_ranks(2, evaluated)
    assert two[0] == pytest.approx(alone[0], rel=1e-12)
    assert two[1] == alone[1] == (batch(0).targets >= 0).sum()
    assert torch.equal(two[2], alone[2])
    assert two[3] == alone[3] == (batch(0).document >= 0).sum()
    assert two[0] == other[0]


def clipped(rank, world, name, clip):
    job = engine(name, optimizer="sgd", momentum=0.0, clip=clip)
    before = whole(job.canonical_state())
    norm = job.step(batch(0, rank, world), 0, 1e-3).grad_norm.item()
    after = whole(job.canonical_state())
    decayed = {n: 1 - 1e-3 * 0.1 * (t.ndim > 1) for n, t in before.items()}
    moved = sum((after[n] - decayed[n] * before[n]).square().sum() for n in before if n.startswith("model.") and "bias" not in n)
    return norm, moved.sqrt().item() / 1e-3


def clipped_all(rank, world):
    return [clipped(rank, world, name, clip) for name in ENGINES for clip in (None, 0.25)]


def test_the_norm_is_that_of_the_whole_gradient_and_clipping_cuts_to_it():
    for world in (1, 2):
        for (free_norm, free_moved), (norm, moved) in zip(*[iter(run_ranks(world, clipped_all)[0])] * 2, strict=True):
            assert free_moved == pytest.approx(free_norm, rel=1e-8)
            assert norm == pytest.approx(free_norm, rel=1e-12)
            assert norm > 0.25
            assert moved == pytest.approx(0.25, rel=1e-8)


def low_precision(rank, world):
    runs, smooth = {}, {"init_std": 0.1}  # few near-ties, which bfloat16 would decide otherwise
    for name in ENGINES:
        for accumulate in (1, 4):
            job = engine(name, dtype="bfloat16", accumulate=accumulate, **smooth)
            runs[name, accumulate] = train(job, range(8), 3e-3)
    runs["float32"] = train(engine(dtype="float32", **smooth), range(8), 3e-3)
    return runs


def test_bfloat16_stays_close_to_float32_with_float32_masters():
    runs = run_ranks(2, low_precision)[0]
    exact = runs.pop("float32")
    for run in runs.values():
        assert all(t.dtype == torch.float32 for n, t in run.state.items() if n != "optimizer.step")
        for (loss, _, norm), (true_loss, _, true_norm) in zip(run.figures, exact.figures, strict=True):
            assert loss == pytest.approx(true_loss, rel=2e-3)
            assert norm == pytest.approx(true_norm, rel=2e-2)
    for accumulate in (1, 4):  # the same arithmetic, wherever parameters live
        for a, b in zip(runs["ddp", accumulate].figures, runs["fsdp2", accumulate].figures, strict=True):
            assert a == pytest.approx(b, rel=2e-3)


def float32_sums(rank, world):
    """Of each expert weight: is its gradient the bucket's own memory, and is any of it more exact than bfloat16?"""
    job = engine(dtype="bfloat16", backend="triton")
    modules = [module for module in job.model.modules() if isinstance(module, Experts)]
    with job.accumulating(last=False):
        job.model(*batch(0, rank, world)).loss.backward()
    buckets = [bucket.sum.untyped_storage().data_ptr() for bucket in job.buckets]
    gradients = [p.grad for module in modules for p in module.parameters()]
    own = all(grad.untyped_storage().data_ptr() in buckets for grad in gradients)
    return own, [not torch.equal(grad, grad.bfloat16().float()) for grad in gradients]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton runs on Linux only")
def test_under_bfloat16_gradients_of_experts_are_added_to_the_float32_ones_without_rounding():
    for own, exact in run_ranks(1, float32_sums):
        assert own
        assert exact == [True] * 4


def small_steps(rank, world):
    moves = []
    for name in ENGINES:
        job = engine(name, dtype="bfloat16")
        before = whole(job.canonical_state())["model.embed.weight"]
        job.step(batch(0, rank, world), 0, 1e-5)
        moves.append((whole(job.canonical_state())["model.embed.weight"] - before).abs())
    return moves


def test_a_step_too_small_for_bfloat16_is_not_lost():
    for moved in run_ranks(2, small_steps)[0]:
        assert moved.median() == pytest.approx(1e-5, rel=0.1)


def router_dtypes(rank, world):
    seen = set()
    for name in ENGINES:
        job = engine(name, dtype="bfloat16")
        for module in [*job.routers, job.model.layers[0]]:
            module.register_forward_pre_hook(lambda m, args: seen.add((type(m).__name__[-5:], next(m.parameters()).dtype)))
        job.step(batch(0, rank, world), 0, 1e-3)
    return {dtype for kind, dtype in seen if kind.endswith("TopK")}


def test_routers_stay_in_float32_under_bfloat16():
    assert run_ranks(2, router_dtypes)[0] == {torch.float32}


def unlucky(rank, world):
    """Rank 1 has nothing to predict."""
    rows = batch(0, rank, world)
    if rank == 1:
        rows = rows._replace(targets=torch.full_like(rows.targets, -100))
    return [engine(name).step(rows, 0, 1e-2)._replace(reports=[]) for name in ENGINES]


def test_a_rank_without_targets_takes_part():
    for ddp, fsdp2 in run_ranks(2, unlucky):
        assert ddp.applied
        assert ddp.loss.item() == pytest.approx(fsdp2.loss.item(), rel=1e-12)


def refusals(rank, world):
    messages = []
    for options in ({"name": "fsdp2", "optimizer": "muon"}, {"name": "fsdp2", "experts": 5, "width": 7}):
        with pytest.raises(ConfigError) as error:
            engine(**options)
        messages.append(str(error.value))
    with pytest.raises(ConfigError) as error:
        engine(accumulate=3).step(batch(0, rank, world), 0, 1e-2)
    messages.append(str(error.value))
    job = engine()
    state = whole(job.canonical_state())
    name = next(iter(state))
    for wrong in ({k: v for k, v in state.items() if k != name}, state | {"model.of_mars": state[name]}, state | {name: state[name][:1]}):
        with pytest.raises(CheckpointError) as refused:
            job.load_canonical(wrong)
        messages.append(str(refused.value))
    return messages


def test_refusals_say_what_to_type():
    muon, width, rows, missing, extra, shape = run_ranks(2, refusals)[0]
    assert "choose engine.name=ddp or optimizer.name=adamw" in muon
    assert "5 experts of width 7 cannot be cut over 2 ranks" in width
    assert "model.moe.d_expert=8" in width
    assert "choose train.accumulate=1" in rows
    assert "model." in missing
    assert "model.of_mars" in extra
    assert "shape" in shape


def muon_run(rank, world):
    return train(engine(optimizer="muon", dtype="float32"), range(5), 1e-2)


def test_muon_trains_dense_matrices_and_experts_alike_on_one_rank_and_two():
    alone, two = run_ranks(1, muon_run)[0], run_ranks(2, muon_run)[0]
    for a, b in zip(alone.figures, two.figures, strict=True):
        assert a == pytest.approx(b, rel=2e-2)  # orthogonalisation is in bfloat16
    assert {name.split(".")[1] for name in alone.state if "experts" in name and "optimizer" in name} == {"momentum_buffer"}


@pytest.mark.slow
def test_compiled_parts_train_the_same_model():
    plain, compiled, breaks = run_ranks(1, with_compile, "inductor", timeout=300)[0]
    assert difference(compiled, plain) < 1e-3
    assert not breaks


def test_compiled_parts_train_the_same_model_on_two_ranks_whatever_is_recomputed_or_accumulated():
    """The all-reduce of the balance loss is part of the router's graph."""
    for plain, compiled, breaks in run_ranks(2, with_compile, "aot_eager"):
        assert difference(compiled, plain) < 1e-12
        assert not breaks


def with_compile(rank, world, backend):
    from torch._dynamo.utils import counters

    compiler, runs = torch.compile, []
    torch.compile = partial(compiler, backend=backend)
    router = {name: value for name, value in ROUTER.items() if name != "jitter"}
    options = {"dtype": "float32"} if backend == "inductor" else {"accumulate": 2, "recompute": "full", "balance_window": "running"}
    for compiled in (False, True):
        runs.append(train(engine("fsdp2" if world > 1 else "ddp", compile=compiled, router=router, **options), range(3), 1e-2))
    torch.compile = compiler
    assert counters["stats"]["unique_graphs"] >= 2
    return *runs, dict(counters["graph_break"])
