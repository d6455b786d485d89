"""The loss of a chunk of logits and its gradient against autograd's in float64: torch's operations and the Triton kernel alike."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from moe.kernels import softmax, triton_softmax
from moe.kernels.softmax import IGNORE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = pytest.mark.parametrize("module", [softmax, triton_softmax], ids=["torch", "triton"])


def problem(t: int, v: int, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(v)
    logits, targets = scale * torch.randn(t, v, generator=generator), torch.randint(v, (t,), generator=generator)
    targets[1::3] = IGNORE
    return logits.to(DEVICE), targets.to(DEVICE)


def check(module, logits, targets, dtype=torch.float32):
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, ignore_index=IGNORE, reduction="none")
    expected.sum().backward()
    loss, grad = module.loss_and_gradient(logits.clone(), targets, dtype)
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-6, atol=2e-6)
    last_bit = 1.2e-7 * logits[logits.isfinite()].abs().max().item() if len(logits) else 0.0
    torch.testing.assert_close(grad.double(), exact.grad, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5 + last_bit, atol=1e-7)
    assert not grad[targets == IGNORE].any()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("t", "v"), [(0, 7), (5, 1), (6, 13), (4, 4096), (4, 5001)])
def test_equals_cross_entropy_in_float64(module, t, v, dtype):
    check(module, *problem(t, v), dtype)


@BOTH
def test_logits_far_apart_or_ruled_out_stay_exact(module):
    logits, targets = problem(9, 5000, scale=300.0)
    logits[:, ::2] = -torch.inf
    targets[targets >= 0] |= 1
    logits[:, 4097:4600] = -torch.inf  # a lane that sees nothing else at the start, or the end
    targets[targets > 4096] = 1
    check(module, logits, targets)


@BOTH
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_its_own_row_alone(module, value):
    logits, targets = problem(4, 5000)
    logits[2, 4500] = value
    loss, grad = module.loss_and_gradient(logits, targets, torch.bfloat16)
    assert not loss[2].isfinite()
    assert grad[2].isnan().any()
    assert loss[[0, 1, 3]].isfinite().all()
    assert grad[[0, 1, 3]].isfinite().all()


def test_a_target_that_no_logit_has_is_not_read():
    logits, targets = problem(3, 100)
    targets[:] = torch.tensor([100, -1, 5])
    loss, _ = triton_softmax.loss_and_gradient(logits, targets, torch.bfloat16)
    assert loss.isnan().tolist() == [True, True, False]
