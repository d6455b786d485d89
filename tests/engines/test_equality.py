"""The same global batches train the same model on any number of ranks, engine, sharding and accumulation."""

from __future__ import annotations

import itertools

import pytest
import torch

from moe.engines import ddp
from moe.model.generate import generate
from moe.model.settings import Moe
from tests.engines.tiny_job import ROUTER, batch, difference, engine, model, same, train, whole
from tests.workers import run_ranks

ADAMW = {"optimizer": "adamw", "clip": 0.5, "lr": 1e-2}
SGD = {"optimizer": "sgd", "clip": None, "lr": 5e-2}
STEPS = 8


def curves(rank, world, cases, steps=STEPS):
    runs = []
    for case in cases:
        options = dict(case)
        lr = options.pop("lr")
        runs.append(train(engine(**options), range(steps), lr))
    return runs if rank == 0 else None


def compare(worlds, cases, dtype, tolerance, steps=STEPS):
    alone = run_ranks(1, curves, [{**rule, "dtype": dtype} for rule in (ADAMW, SGD)], steps)[0]
    reference = dict(zip(("adamw", "sgd"), alone, strict=True))
    for world in worlds:
        wanted = [{**case, "dtype": dtype} for case in cases]
        for case, run in zip(wanted, run_ranks(world, curves, wanted, steps, timeout=240)[0], strict=True):
            assert difference(run, reference[case["optimizer"]]) < tolerance, (world, case)


def test_two_and_four_ranks_train_the_model_of_one():
    # six experts are cut into three and three over two ranks, and along their width over four
    compare([2], [{**ADAMW, "name": "fsdp2", "accumulate": 4}, {**SGD, "name": "ddp", "accumulate": 4}], "float64", 1e-9)
    compare([4], [{**ADAMW, "name": "ddp"}, {**SGD, "name": "fsdp2"}], "float64", 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
def test_every_engine_on_every_number_of_ranks(dtype, tolerance):
    cases = [{**rule, "name": name, "accumulate": n} for rule, name, n in itertools.product((ADAMW, SGD), ("ddp", "fsdp2"), (1, 4))]
    compare([1, 2, 4], cases, dtype, tolerance, steps=20)


def scaled(rank, world):
    """The mistake that averaging hides: every gradient too large by the number of ranks."""
    runs = []
    for rule in (SGD, ADAMW | {"clip": None}):
        job = engine(optimizer=rule["optimizer"], clip=None)
        step = job.optimizers.step

        def wrong(lr, job=job, step=step):
            torch._foreach_mul_(job.gradients(), float(world))
            step(lr)

        job.optimizers.step = wrong
        runs.append(train(job, range(STEPS), rule["lr"]))
    return runs


def test_a_gradient_scaled_by_the_ranks_would_show_under_sgd():
    sgd, adamw = run_ranks(2, scaled)[0]
    good_sgd, good_adamw = run_ranks(1, curves, [SGD, ADAMW | {"clip": None}])[0]
    assert difference(sgd, good_sgd) > 1e-2
    assert adamw.figures[1][0] == pytest.approx(good_adamw.figures[1][0], rel=1e-5)  # which is why AdamW alone proves nothing


def by_scope(rank, world):
    runs = {}
    for scope in ("sequence", "global", "micro"):
        router = ROUTER | {"balance_scope": scope, "balance_loss": 1.0}
        runs[scope] = train(engine(router=router, **{k: v for k, v in SGD.items() if k != "lr"}), range(3), 5e-2)
    return runs


def test_balance_over_sequences_and_the_global_batch_does_not_depend_on_ranks():
    alone, two = run_ranks(1, by_scope)[0], run_ranks(2, by_scope)[0]
    assert difference(two["sequence"], alone["sequence"]) < 1e-12
    assert difference(two["global"], alone["global"]) < 1e-12
    assert difference(two["micro"], alone["micro"]) > 1e-4  # a micro-batch is what a rank holds: it must differ


def other_shapes(rank, world):
    """A dense model with tied embeddings, one of dense and sparse layers, and gradients that travel in many buckets."""
    dense = {"moe": None, "d_ff": 16, "tied_embeddings": True}
    mixed = {"moe": Moe(experts=4, d_expert=16, every=2, d_shared=16, shared_gate=True), "d_ff": 16, "qk_norm": "head"}
    runs = [train(engine(name, **shape), range(3), 1e-2) for name in ("ddp", "fsdp2") for shape in (dense, mixed)]
    ddp._BUCKET_BYTES = 4000
    job = engine("ddp", accumulate=2)
    assert len(job.buckets) > 5
    return [*runs, train(job, range(3), 1e-2)]


def test_dense_tied_and_mixed_models_and_many_buckets_do_not_depend_on_ranks():
    for two, alone in zip(run_ranks(2, other_shapes)[0], run_ranks(1, other_shapes)[0], strict=True):
        assert difference(two, alone) < 1e-12


def backends(rank, world):
    return [train(engine("ddp", accumulate=2, backend=backend), range(3), 1e-2) for backend in ("reference", "torch", "auto")]


def test_a_backend_that_adds_to_kept_gradients_counts_every_one_of_them_once():
    reference, *others = run_ranks(2, backends)[0]
    for run in others:
        assert difference(run, reference) < 1e-12


def shared_experts(rank, world, backend):
    """Two layers with the same experts, whose gradients are whole only when both have added theirs."""
    ddp._BUCKET_BYTES = 2000
    runs = []
    for accumulate in (1, 2):
        shape = model()
        shape.layers[1].moe.experts = shape.layers[0].moe.experts
        runs.append(train(engine("ddp", accumulate=accumulate, backend=backend, built=shape), range(3), 1e-2))
    return runs


@pytest.mark.parametrize("backend", ["torch", "threads"])
def test_weights_that_layers_share_travel_when_the_last_layer_has_added_its_gradient(backend):
    for two, alone in zip(run_ranks(2, shared_experts, backend)[0], run_ranks(1, shared_experts, "reference")[0], strict=True):
        assert difference(two, alone) < 1e-12


def predicted(rank, world, name):
    job = engine(name)
    job.step(batch(0, rank, world), 0, 1e-2)
    with torch.no_grad():
        return generate(job.model, batch(5).ids[:1], 6, temperature=0), job.model.predict(batch(5).ids)


def test_a_sharded_model_predicts_like_a_whole_one():
    tokens, scores = run_ranks(1, predicted, "ddp")[0]
    for other_tokens, other_scores in run_ranks(2, predicted, "fsdp2"):
        assert torch.equal(other_tokens, tokens)
        torch.testing.assert_close(other_scores, scores, rtol=1e-10, atol=1e-12)


def replicated(rank, world):
    return train(engine("fsdp2", replicas=2, accumulate=2), range(4), 1e-2)


def test_copies_of_a_sharded_model_train_the_model_of_one():
    reference = run_ranks(1, first_steps, 4)[0]
    assert difference(run_ranks(4, replicated)[0], reference) < 1e-12


def first_steps(rank, world, steps):
    return train(engine(), range(steps), 1e-2)


def sharded_half(rank, world):
    job = engine("fsdp2")
    return train(job, range(5), 1e-2)


def other_half(rank, world, state):
    job = engine("ddp")
    job.evaluate(batch(99, rank, world), 0)
    job.load_canonical(state)
    assert same(whole(job.canonical_state()), state)
    return train(job, range(5, 10), 1e-2)


def back_to_shards(rank, world, state):
    job = engine("fsdp2")
    job.evaluate(batch(99, rank, world), 0)  # leaves gathered weights behind
    job.load_canonical(state)
    return train(job, range(10, 12), 1e-2)


def test_a_sharded_run_goes_on_in_another_engine_on_another_number_of_ranks():
    half = run_ranks(2, sharded_half)[0]
    rest = run_ranks(1, other_half, half.state)[0]
    more = run_ranks(2, back_to_shards, rest.state)[0]
    uninterrupted = run_ranks(1, first_steps, 12)[0]
    assert difference(more._replace(figures=half.figures + rest.figures + more.figures), uninterrupted) < 1e-12
