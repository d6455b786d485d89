"""Routers that read experts: the summary is of whole experts wherever they live, and its gradient reaches all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.kernels.product import linear
from moe.model.generate import generate
from moe.routers.base import Router, Routing, Tokens, best, full_precision
from tests.engines.tiny_job import batch, difference, engine, model, train, whole
from tests.workers import run_ranks

AVG_K = {"name": "avg_k", "k": 2}


class Sparsest(Router):
    """Prefers experts few of whose units would be positive, and weighs them by that: experts learn from the decision too."""

    def summary(self, up: Tensor, down: Tensor) -> Tensor:
        keys = full_precision(up[:, 0])
        return torch.stack([keys.mean(1), keys.var(1, correction=0)], -1).flatten(1)

    def forward(self, x: Tensor, tokens: Tokens, summary: Tensor) -> Routing:
        mean, variance = summary.unflatten(1, (-1, 2)).unbind(-1)
        score = -torch.erf(linear(x, mean) / (2 * linear(x.square(), variance)).clamp(min=1e-6).sqrt())
        chosen, valid = best(score.detach(), 2), tokens.valid[:, None]
        weight = torch.where(valid, score.gather(1, chosen).softmax(-1), 0)
        return Routing.per_token(torch.where(valid, chosen, self.num_experts), weight)


class Deaf(Sparsest):
    """The same decision, whose gradient is lost on the way to the experts."""

    def summary(self, up: Tensor, down: Tensor) -> Tensor:
        return super().summary(up, down).detach()


def built(kind):
    if isinstance(kind, dict):
        return model(router=kind)
    made = model()
    for layer in made.layers:
        layer.moe.router = kind(16, 6)
    return made


def curves(rank, world, cases):
    runs = []
    for kind, name, options in cases:
        runs.append(train(engine(name, built=built(kind), optimizer="sgd", clip=None, **options), range(3), 5e-2))
    return runs


def test_two_and_four_ranks_train_the_model_of_one():
    # six experts are cut into three and three over two ranks, and along their width over four
    avg_k, sparsest, deaf = run_ranks(1, curves, [(kind, "ddp", {}) for kind in (AVG_K, Sparsest, Deaf)])[0]
    assert difference(sparsest, deaf) > 1e-3
    for world in (2, 4):
        cases = [(kind, name, options) for kind in (AVG_K, Sparsest) for name, options in (("ddp", {"accumulate": 2}), ("fsdp2", {}))]
        for (kind, name, _), run in zip(cases, run_ranks(world, curves, cases)[0], strict=True):
            assert difference(run, avg_k if kind is AVG_K else sparsest) < 1e-9, (world, kind, name)


def test_recomputation_changes_no_bit():
    for dtype in ("float64", "bfloat16"):
        cases = [
            (kind, name, {"accumulate": 2, "dtype": dtype, "recompute": recompute})
            for kind in (AVG_K, Sparsest)
            for name in ("ddp", "fsdp2")
            for recompute in ("none", "full")
        ]
        runs = run_ranks(2, curves, cases)[0]
        for kept, recomputed in zip(runs[::2], runs[1::2], strict=True):
            assert kept.figures == recomputed.figures
            assert all(torch.equal(kept.state[name], recomputed.state[name]) for name in kept.state)


def predicted(rank, world, name):
    job = engine(name, built=built(AVG_K))
    job.step(batch(0, rank, world), 0, 1e-2)
    tokens = generate(job.model, batch(5).ids[:1], 6, temperature=0)
    return tokens, float(job.evaluate(batch(7, rank, world), 0).loss), whole(job.canonical_state())


def test_a_sharded_model_generates_and_evaluates_like_a_whole_one():
    tokens, loss, state = run_ranks(1, predicted, "ddp")[0]
    assert not any(".router." in name for name in state)
    for other_tokens, other_loss, _ in run_ranks(2, predicted, "fsdp2"):
        assert torch.equal(other_tokens, tokens)
        assert abs(other_loss / loss - 1) < 1e-10
