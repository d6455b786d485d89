"""Which rule moves which parameter, and the batched Muon against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe.engines.muon import StackedMuon, orthogonalise
from moe.engines.optimizer import Optimizers
from moe.engines.settings import Optimizer

SHAPES = {
    "embed.weight": (8, 4),
    "blocks.0.norm.weight": (4,),
    "blocks.0.q.weight": (4, 4),
    "blocks.0.router.weight": (3, 4),
    "blocks.0.up": (3, 2, 6, 4),
}


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    made = {name: nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for name, shape in SHAPES.items()}
    for p in made.values():
        p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
    return made


def optimizers(made, **options):
    return Optimizers(Optimizer(**options), made, hidden=[n for n in made if n.startswith("blocks")], routers=["blocks.0.router.weight"])


def moved_without_gradient(**options):
    """Names of the parameters that weight decay alone moves."""
    made = parameters()
    before = {name: p.detach().clone() for name, p in made.items()}
    for p in made.values():
        p.grad.zero_()
    optimizers(made, **options).step(0.1)
    return {name for name, p in made.items() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_decay_spares_vectors_and_by_choice_the_router(name):
    matrices = {n for n, shape in SHAPES.items() if len(shape) > 1}
    assert moved_without_gradient(name=name, weight_decay=0.1) == matrices
    assert moved_without_gradient(name=name, weight_decay=0.1, decay_router=False) == matrices - {"blocks.0.router.weight"}


def test_moments_that_exist_from_the_start_change_nothing():
    ours, theirs = parameters(), parameters()
    mine = optimizers(ours, name="adamw", weight_decay=0.0)
    reference = torch.optim.AdamW(theirs.values(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        mine.step(0.1)
        reference.step()
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=1e-12, atol=0)


def test_state_names_moments_and_resuming_restores_the_count():
    made = parameters()
    first = optimizers(made, name="adamw")
    assert set(first.state()) == {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in SHAPES}
    first.step(0.1)
    first.step(0.1)
    again = {name: nn.Parameter(p.detach().clone()) for name, p in made.items()}
    for name, p in again.items():
        p.grad = made[name].grad.clone()
    second = optimizers(again, name="adamw")
    for name, tensor in second.state().items():
        tensor.copy_(first.state()[name])
    second.resume(first.steps)
    first.step(0.1)
    second.step(0.1)
    assert second.steps == 3
    assert all(torch.equal(p, again[name]) for name, p in made.items())


def test_sgd_without_momentum_keeps_nothing():
    assert optimizers(parameters(), name="sgd", momentum=0.0).state() == {}


def test_muon_takes_matrices_inside_blocks_and_adamw_the_rest():
    state = optimizers(parameters(), name="muon").state()
    assert {name for name in state if name.startswith("momentum_buffer")} == {
        "momentum_buffer.blocks.0.q.weight",
        "momentum_buffer.blocks.0.up",
    }
    assert {name for name in state if name.startswith("exp_avg.")} == {
        f"exp_avg.{name}" for name in ("embed.weight", "blocks.0.norm.weight", "blocks.0.router.weight")
    }


@pytest.mark.parametrize("shape", [(3, 2, 6, 4), (5, 4, 6), (2, 8, 8)])
def test_stacked_muon_is_torchs_muon_on_every_matrix(shape):
    generator = torch.Generator().manual_seed(1)
    stack = nn.Parameter(torch.randn(shape, generator=generator))
    matrices = [nn.Parameter(matrix.detach().clone()) for matrix in stack.flatten(0, -3)]
    ours = StackedMuon([stack], lr=0.1, momentum=0.9, weight_decay=0.1)
    theirs = torch.optim.Muon(matrices, lr=0.1, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        stack.grad = torch.randn(shape, generator=generator)
        for matrix, gradient in zip(matrices, stack.grad.flatten(0, -3), strict=True):
            matrix.grad = gradient.clone()
        ours.step()
        theirs.step()
    # bfloat16 products of a batch and of one matrix may round differently
    torch.testing.assert_close(stack.detach().flatten(0, -3), torch.stack(list(matrices)).detach(), rtol=0, atol=2e-2)


def test_orthogonalising_brings_singular_values_near_one_and_keeps_directions():
    x = torch.randn(4, 12, 20, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonalise(x).float())
    assert values.min() > 0.6
    assert values.max() < 1.3
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    assert ((orthogonalise(x).float() * (u @ vh)).sum((-2, -1)) / 12).min() > 0.8
