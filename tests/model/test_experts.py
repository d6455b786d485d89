"""Experts multiply by the backend they name, in the rows' dtype, and add to kept gradients when an engine asks for it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moe.errors import ConfigError
from moe.kernels import GROUPED_MLP
from moe.kernels.reference import ExpertWeights, Rows
from moe.model.experts import Experts
from tests.workers import run_ranks

IN_PLACE = [name for name in GROUPED_MLP if name != "reference"]


def experts(backend="auto", dtype=torch.float64, seed=0) -> Experts:
    module = Experts(16, 3, 8, backend=backend).to(dtype)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) / 4)
    return module


def batch(seed, dtype=torch.float64, counts=(4, 0, 5)) -> Rows:
    draw = torch.Generator().manual_seed(seed)
    n = sum(counts)
    x = torch.randn(n, 16, generator=draw, dtype=torch.float64).to(dtype)
    weight = torch.rand(n, generator=draw, dtype=torch.float64)
    return Rows(x, torch.randperm(n, generator=draw), weight if dtype == torch.float64 else weight.float(), torch.tensor(counts))


def loss(y):
    return (y * torch.arange(1.0, 1 + y.numel(), dtype=y.dtype).view_as(y).cos()).sum()


def test_a_misspelt_backend_is_refused_when_the_layer_is_built():
    with pytest.raises(ConfigError, match="unknown backend 'thread'; did you mean threads"):
        Experts(16, 3, 8, backend="thread")


@pytest.mark.parametrize("backend", GROUPED_MLP)
def test_float32_masters_serve_bfloat16_rows(backend):
    module, rows = experts(backend, torch.float32), batch(0, torch.bfloat16)
    y = module(rows)
    assert y.dtype == torch.bfloat16
    loss(y).backward()
    exact = experts("reference")
    loss(exact(batch(0)._replace(x=rows.x.double()))).backward()
    for p, q in zip(module.parameters(), exact.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        assert (p.grad.double() - q.grad).norm() < 2e-2 * q.grad.norm()


@pytest.mark.parametrize("backend", IN_PLACE)
def test_gradients_added_in_place_equal_those_that_autograd_adds(backend):
    plain, kept = experts(backend), experts(backend)
    kept.in_place = True
    for p in kept.parameters():
        p.grad = torch.zeros_like(p)
    storage = [p.grad.data_ptr() for p in kept.parameters()]
    for seed, counts in enumerate([(4, 0, 5), (0, 3, 2), (0, 0, 0)]):
        for module in (plain, kept):
            loss(module(batch(seed, counts=counts))).backward()
    for p, q in zip(kept.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-13, atol=1e-13)
    assert [p.grad.data_ptr() for p in kept.parameters()] == storage


@pytest.mark.parametrize("backend", IN_PLACE)
def test_bfloat16_experts_add_to_float32_gradients_in_place(backend):
    kept, exact = experts(backend, torch.bfloat16), experts("reference", torch.bfloat16).double()
    kept.in_place = True
    for p in kept.parameters():
        p.grad_dtype, p.grad = torch.float32, torch.zeros(p.shape)
    storage = [p.grad.data_ptr() for p in kept.parameters()]
    for seed in range(3):
        rows = batch(seed, torch.bfloat16)
        loss(kept(rows)).backward()
        loss(exact(rows._replace(x=rows.x.double(), weight=rows.weight.double()))).backward()
    assert [p.grad.data_ptr() for p in kept.parameters()] == storage
    for p, q in zip(kept.parameters(), exact.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        assert (p.grad - q.grad).norm() < 2e-2 * q.grad.norm()


@pytest.mark.parametrize("backend", IN_PLACE)
def test_where_no_gradient_is_kept_autograd_brings_it_and_calls_its_hooks(backend):
    module, heard = experts(backend), []
    module.in_place = True
    for p in module.parameters():
        p.register_post_accumulate_grad_hook(heard.append)
    loss(module(batch(0))).backward()
    assert {id(p) for p in heard} == {id(p) for p in module.parameters()}


@pytest.mark.filterwarnings("error")  # torch warns of a gradient asked from what has none
@pytest.mark.parametrize("backend", IN_PLACE)
def test_gradients_of_gathered_weights_flow_through_the_seam(backend):
    plain, gathered = experts(backend), experts(backend)
    gathered.gather = lambda weights: ExpertWeights(weights.up * 1, weights.down * 1)
    gathered.in_place = True
    for p in gathered.parameters():
        p.grad = torch.zeros_like(p)
    for module in (plain, gathered):
        loss(module(batch(0))).backward()
    for p, q in zip(gathered.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("backend", IN_PLACE)
def test_recomputation_adds_to_kept_gradients_bit_for_bit(backend):
    plain, recomputed = experts(backend), experts(backend)
    for module in (plain, recomputed):
        module.in_place = True
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
    for seed in range(3):
        rows = batch(seed)
        rows.x.requires_grad_()
        loss(plain(rows)).backward()
        loss(torch.utils.checkpoint.checkpoint(recomputed, rows, use_reentrant=False)).backward()
    for p, q in zip(recomputed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("backend", IN_PLACE)
def test_a_frozen_stack_keeps_its_gradient_as_it_was(backend):
    plain, frozen = experts(backend), experts(backend)
    frozen.in_place = True
    for p in frozen.parameters():
        p.grad = torch.zeros_like(p)
    frozen.up.requires_grad_(False)
    for module in (plain, frozen):
        loss(module(batch(0))).backward()
    assert frozen.up.grad.count_nonzero() == 0
    torch.testing.assert_close(frozen.down.grad, plain.down.grad)


def torch_ddp(rank, world):
    """Torch's own DistributedDataParallel, whose buckets are the kept gradients, over 3 micro-batches."""
    results = []
    for in_place in (False, True):
        module = experts()
        if in_place:
            module.in_place = True
        ddp = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
        for step in range(2):
            ddp.zero_grad(set_to_none=False)
            for micro in range(2):
                with ddp.no_sync():
                    loss(ddp(batch(10 * step + 3 * rank + micro))).backward()
            loss(ddp(batch(10 * step + 3 * rank + 2))).backward()
        results.append([p.grad.clone() for p in module.parameters()])
    return results


def test_torchs_data_parallel_sums_gradients_that_were_added_in_place():
    for plain, kept in run_ranks(2, torch_ddp):
        for a, b in zip(plain, kept, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    ranks = [kept for _, kept in run_ranks(2, torch_ddp)]
    assert all(torch.equal(a, b) for a, b in zip(*ranks, strict=True))


def fsdp2(rank, world, dtype):
    """Fully sharded experts, whose unsharded gradients wait for the last of 3 micro-batches."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    results = []
    for in_place in (False, True):
        inner = experts(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        inner.in_place = in_place
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=inner.up.dtype, cast_forward_inputs=False)
        module = fully_shard(copy.deepcopy(inner), mp_policy=policy)
        for step in range(2):
            for micro in range(3):
                module.set_requires_gradient_sync(micro == 2)
                module.set_is_last_backward(micro == 2)
                loss(module(batch(10 * step + 3 * rank + micro, dtype))).backward()
        results.append([p.grad.full_tensor() for p in module.parameters()])
    return results


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_fsdp2_reduces_gradients_that_were_added_in_place(dtype):
    for plain, kept in run_ranks(2, fsdp2, dtype):
        for a, b in zip(plain, kept, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-2 if dtype == torch.bfloat16 else 1e-13)


@pytest.mark.parametrize("backend", IN_PLACE)
def test_a_compiled_layer_is_one_graph_with_the_same_gradients(backend):
    whole = torch.compile(lambda rows: compiled(rows), backend="aot_eager", fullgraph=True)
    eager, compiled = experts(backend, torch.float32), experts(backend, torch.float32)  # after the checks of shapes are off
    a, b = eager(batch(0, torch.float32)), whole(batch(0, torch.float32))
    assert torch.equal(a, b)
    loss(a).backward()
    loss(b).backward()
    for p, q in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
