"""DeepSpeed's ZeRO takes the same steps as one process: every stage, sharding of experts and accumulation."""

from __future__ import annotations

import importlib.util
import math
import sys

import pytest
import torch

from moe.checkpoint.store import Store
from moe.config import load
from moe.engines.deepspeed import DeepSpeed
from moe.errors import ConfigError, RankMismatch
from moe.model.generate import generate
from moe.model.settings import Moe
from moe.parallel.drift import check_replicas
from tests.engines.test_expert_parallel import SGD_HERE, for_the_model, splittable
from tests.engines.test_fssdp import HECATE
from tests.engines.test_reading_routers import AVG_K, Sparsest, built
from tests.engines.tiny_job import batch, difference, engine, mesh, same, train, whole
from tests.workers import run_ranks

installed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: bash launch/deepspeed.sh DIR, then PYTHONPATH=DIR"
)
ADAMW = {"optimizer": "adamw", "clip": 0.5, "lr": 1e-2}
SGD = {"optimizer": "sgd", "clip": None, "lr": 5e-2}
EVERY_STAGE = [{"zero": zero, "expert_ranks": ranks} for zero in range(4) for ranks in (1, 2) if zero < 3 or ranks == 1]


def job(name="deepspeed", **options):
    return engine(name, **{"dtype": "float32", **options})


def curves(rank, world, cases, steps):
    runs = []
    for case in cases:
        options = dict(case)
        lr = options.pop("lr")
        runs.append(train(job(**options), range(steps), lr))
    return runs if rank == 0 else None


def agrees(run, one):
    """Figures and parameters to 1e-5; moments to 1e-4, since what they average nearly cancels."""
    learned = (each._replace(state={name: t for name, t in each.state.items() if name.startswith("model.")}) for each in (run, one))
    return difference(*learned) < 1e-5 and difference(run, one) < 1e-4


def compare(world, cases, steps):
    alone = run_ranks(1, curves, [{**rule, "name": "ddp"} for rule in (ADAMW, SGD)], steps)[0]
    reference = dict(zip(("adamw", "sgd"), alone, strict=True))
    for case, run in zip(cases, run_ranks(world, curves, cases, steps, timeout=240)[0], strict=True):
        assert agrees(run, reference[case["optimizer"]]), case


@installed
def test_every_stage_trains_the_model_of_one_process():
    compare(2, [{**(ADAMW, SGD)[i % 2], **stage, "accumulate": 1 + i // 2 % 2} for i, stage in enumerate(EVERY_STAGE)], 6)


@installed
@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_stage_on_every_number_of_ranks_for_twenty_steps(world):
    stages = [stage for stage in EVERY_STAGE if world % stage["expert_ranks"] == 0]
    compare(world, [{**rule, **stage} for stage in stages for rule in (ADAMW, {**SGD, "accumulate": 4})], 20)


def other_shapes(rank, world, name, stages):
    """Tied and dense, mixed, recomputed, with experts that routers read, and with buffers too small for the tokens."""
    dense = {"moe": None, "d_ff": 16, "tied_embeddings": True}
    mixed = {"moe": Moe(experts=4, d_expert=16, every=2, d_shared=16, shared_gate=True), "d_ff": 16, "qk_norm": "head"}
    runs = []
    for stage in stages:
        rule = {"name": name, "optimizer": "sgd", "clip": None, **stage}
        shapes = [mixed, {"recompute": "full", "overlap": 2}, {"recompute": "experts", "exchange": "fixed", "room": 0.5}]
        jobs = [job(**rule, accumulate=2, **shape) for shape in shapes] + [job(**rule, built=built(kind)) for kind in (AVG_K, Sparsest)]
        if stage.get("expert_ranks", 1) == 1:
            jobs.append(job(**rule, **dense))
        runs.append([train(each, range(3), 5e-2) for each in jobs])
    return runs


@installed
def test_other_models_do_not_depend_on_the_stage():
    stages = [{"zero": 1, "expert_ranks": 2}, {"zero": 3}]
    (alone,) = run_ranks(1, other_shapes, "ddp", [{}])[0]
    for stage, runs in zip(stages, run_ranks(2, other_shapes, "deepspeed", stages, timeout=200)[0], strict=True):
        for number, (run, one) in enumerate(zip(runs, alone, strict=False)):
            assert agrees(run, one), (stage, number)


def routed(rank, world, routers, options):
    return [train(job(**SGD_HERE, **router, **options), range(3), 5e-2) for router in routers]


@installed
@pytest.mark.slow
def test_every_router_trains_the_same_model_under_every_stage():
    routers = [{"router": {"name": c.values[0], **for_the_model(c.values[1])}} for c in splittable if c.id.endswith("-0")]
    alone = run_ranks(1, routed, routers, {"name": "ddp"}, timeout=200)[0]
    for options in EVERY_STAGE:
        for router, one, run in zip(routers, alone, run_ranks(2, routed, routers, options, timeout=200)[0], strict=True):
            assert agrees(run, one), (router, options)


def copied(rank, world, cases):
    return [train(job(**SGD_HERE, **case), range(6), 5e-2) for case in cases]


@installed
def test_experts_whose_copies_travel_train_the_same_model():
    cases = [{"zero": zero, "expert_ranks": 2, "copies": HECATE, "machine_ranks": 1} for zero in range(3)]
    alone = run_ranks(1, copied, [{"name": "ddp"}])[0][0]
    for case, run in zip(cases, run_ranks(2, copied, cases)[0], strict=True):
        assert agrees(run, alone), case


def without_the_factor(rank, world):
    honest, DeepSpeed.backward = DeepSpeed.backward, lambda self, loss: self.wrapped.backward(loss)
    try:
        return train(job(**{k: v for k, v in SGD.items() if k != "lr"}), range(6), SGD["lr"])
    finally:
        DeepSpeed.backward = honest


@installed
def test_gradients_averaged_instead_of_summed_would_show():
    (alone,) = run_ranks(1, curves, [{**SGD, "name": "ddp"}], 6)[0]
    averaged = run_ranks(2, without_the_factor)[0]
    assert averaged.figures[0][2] == pytest.approx(alone.figures[0][2] / 2, rel=1e-5)
    assert difference(averaged, alone) > 1e-2


def poisoned(rank, world):
    """A good step, one whose weights of rank 1's first micro-batch are NaN, and a good one again."""
    outcomes = []
    for stage in EVERY_STAGE:
        tried = job(**stage, accumulate=2)
        tried.step(batch(0, rank, world), 0, 1e-2)
        before = whole(tried.canonical_state())
        calls = []

        def poison(router, inputs, routing, calls=calls):
            calls.append(None)
            return routing._replace(weight=routing.weight * math.nan) if rank == 1 and len(calls) == 3 else routing

        hook = tried.routers[0].register_forward_hook(poison)
        skipped = tried.step(batch(1, rank, world), 1, 1e-2)
        hook.remove()
        after = whole(tried.canonical_state())
        again = tried.step(batch(1, rank, world), 1, 1e-2)
        outcomes.append((skipped.applied, same(before, after), again.applied, again.loss.item(), again.grad_norm.item()))
    return outcomes


def two_steps(rank, world):
    tried = job("ddp", accumulate=2)
    return [tried.step(batch(step, rank, world), step, 1e-2) for step in range(2)][1]


@installed
def test_nan_on_one_rank_makes_every_rank_skip_and_leaves_nothing_behind():
    ranks, expected = run_ranks(2, poisoned, timeout=120), run_ranks(1, two_steps)[0]
    assert ranks[0] == ranks[1]
    for skipped, unchanged, again, loss, norm in ranks[0]:
        assert not skipped
        assert unchanged
        assert again
        assert (loss, norm) == (pytest.approx(expected.loss.item(), rel=1e-5), pytest.approx(expected.grad_norm.item(), rel=1e-5))


def without_tokens(rank, world, cases):
    """Rank 1 has nothing but padding; then no rank has anything else."""
    results = []
    for case in cases:
        tried = job(**case)
        for empty in (rank == 1, True):
            rows = batch(0, rank, world)
            if empty:
                rows = rows._replace(targets=torch.full_like(rows.targets, -100), document=torch.full_like(rows.document, -1))
            step = tried.step(rows, 0, 1e-2)
            results.append((step.loss.item(), step.grad_norm.item()))
    return results


@installed
def test_ranks_without_a_token_take_part():
    expected = run_ranks(2, without_tokens, [{"name": "ddp"}])[0]
    for results in run_ranks(2, without_tokens, EVERY_STAGE, timeout=120):
        assert results == [pytest.approx(figures, rel=1e-5) for figures in expected] * len(EVERY_STAGE)


def save(rank, world, folder, options):
    tried = job(**options)
    train(tried, range(2), 1e-2)
    Store(folder, mesh()).save(2, tried.canonical_state(), {})
    return train(tried, range(2, 4), 1e-2)


def resume(rank, world, folder, cases):
    runs = []
    for options in cases:
        tried = job(**options)
        train(tried, range(20, 22), 1e-2)
        tried.evaluate(batch(99, rank, world), 0)  # may leave gathered weights behind
        state = tried.canonical_state()
        Store(folder, mesh()).load(state)
        tried.load_canonical(state)
        runs.append(train(tried, range(2, 4), 1e-2))
    return runs


@installed
@pytest.mark.parametrize(
    "options",
    [
        {"zero": 2, "expert_ranks": 2},
        pytest.param({"name": "ddp"}, marks=pytest.mark.slow),
        pytest.param({"zero": 3, "expert_ranks": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_checkpoint_goes_on_under_every_stage_and_other_engines(tmp_path, options):
    uninterrupted = run_ranks(2, save, tmp_path, options)[0]
    cases = [*EVERY_STAGE, {"name": "ddp"}, {"name": "fsdp2", "expert_ranks": 2}]
    for case, run in zip(cases, run_ranks(2, resume, tmp_path, cases, timeout=120)[0], strict=True):
        assert agrees(run, uninterrupted), case
        assert difference(run, uninterrupted) == 0 or case != options


def predicted(rank, world, options):
    tried = job(**options)
    train(tried, range(2), 1e-2)
    with torch.no_grad():
        text = generate(tried.model, batch(5).ids[:1], 6, temperature=0), tried.model.predict(batch(5).ids)
    return *text, tried.evaluate(batch(7, rank, world), 2).loss, train(tried, range(2, 4), 1e-2)


@installed
def test_a_model_whose_parameters_are_cut_predicts_like_a_whole_one():
    tokens, scores, loss, run = run_ranks(1, predicted, {"name": "ddp"})[0]
    for other_tokens, other_scores, other_loss, other_run in run_ranks(2, predicted, {"zero": 3}):
        assert torch.equal(other_tokens, tokens)
        torch.testing.assert_close(other_scores, scores, rtol=1e-4, atol=1e-5)
        assert other_loss.item() == pytest.approx(loss.item(), rel=1e-6)
        assert agrees(other_run, run)


def gone_apart(rank, world):
    said = []
    for stage in EVERY_STAGE:
        tried = job(**stage)
        tried.step(batch(0, rank, world), 0, 1e-2)
        check_replicas(mesh(), tried.replicas(), 1)
        if rank == 1 and stage["zero"] < 3:
            tried.parameters["layers.1.attention.o.weight"].data.view(-1)[3] += 1e-6
        elif rank == 1:
            tried.routers[1].bias[2] += 1e-6
        with pytest.raises(RankMismatch) as error:
            check_replicas(mesh(), tried.replicas(), 2)
        said.append(str(error.value))
    return said


@installed
def test_copies_that_come_apart_are_seen():
    for stage, sentence in zip(EVERY_STAGE, run_ranks(2, gone_apart, timeout=120)[0], strict=True):
        assert ("layers.1.attention.o.weight" if stage["zero"] < 3 else "layers.1.moe.router.bias") in sentence


def kept(rank, world):
    """Elements of moments, and of parameters outside of a step, that a rank keeps."""
    counts = []
    for stage in [{"zero": 1}, {"zero": 1, "expert_ranks": 2}, {"zero": 3}]:
        tried = job(**stage)
        moments = sum(state["exp_avg"].numel() for state in tried.optimizers.rule.state.values())
        counts.append((moments, sum(p.numel() for p in tried.parameters.values())))
    return counts, sum(shape.numel() for shape in tried.shapes.values())


@installed
def test_a_rank_keeps_its_share_of_moments_and_under_stage_three_of_parameters():
    for (one, shared_out, three), everything in run_ranks(4, kept):
        for moments, _ in (one, shared_out, three):
            assert everything / 4 <= moments < everything / 4 * 1.1
        assert one[1] == everything
        assert shared_out[1] < everything
        assert three[1] == 0


def refused(rank, world):
    messages = []
    for options in ({"zero": 3, "expert_ranks": 2}, {"zero": 3, "compile": True}, {"optimizer": "muon"}, {"dtype": "bfloat16"}):
        with pytest.raises(ConfigError) as error:
            job(**options)
        messages.append(str(error.value))
    return messages


def test_what_deepspeed_cannot_do_is_refused_with_what_to_type():
    experts, compiled, muon, dtype = run_ranks(2, refused)[0]
    assert "choose engine.zero from 0, 1, 2, or parallel.expert_ranks=1" in experts
    assert "choose engine.zero from 0, 1, 2" in compiled
    assert "choose engine.name=ddp or optimizer.name=adamw" in muon
    assert "choose train.dtype=float32" in dtype


def test_recipes_refuse_it_too():
    words = ["engine.name=deepspeed", "model.moe.experts=8"]
    assert load([], [*words, "engine.zero=2", "parallel.expert_ranks=2"]).engine.zero == 2
    copied = ["parallel.expert_ranks=2", "parallel.copies.policy=hecate"]
    for wrong in (["engine.zero=3", "parallel.expert_ranks=2"], ["engine.zero=3", "engine.compile=true"], ["optimizer.name=muon"], copied):
        with pytest.raises(ConfigError, match="choose"):
            load([], [*words, *wrong])
    with pytest.raises(ConfigError, match=r"has no effect with engine\.name=ddp"):
        load([], ["engine.zero=2"])


def without_deepspeed(rank, world):
    sys.modules["deepspeed"] = None  # type: ignore[assignment]
    with pytest.raises(ConfigError) as error:
        job()
    return str(error.value)


def test_a_missing_package_names_the_extra():
    assert "pip install 'moe[deepspeed]'" in run_ranks(1, without_deepspeed)[0]
