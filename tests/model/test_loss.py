from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moe.model import loss as loss_module
from moe.model.loss import IGNORE, cross_entropy

T, D, V = 37, 12, 29


def example(dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(T, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (T,))
    targets[::5] = IGNORE
    return hidden, weight, targets


@pytest.mark.parametrize("at_once", [1, 4 * V, 10 * V + 3, 10**6])
@pytest.mark.parametrize("biased", [False, True])
def test_loss_and_gradients_equal_the_whole_cross_entropy(at_once, biased):
    hidden, weight, targets = example()
    bias = torch.randn(V, dtype=hidden.dtype, requires_grad=True) if biased else None
    whole = F.cross_entropy(F.linear(hidden, weight, bias), targets, ignore_index=IGNORE, reduction="sum") / 7
    leaves = (hidden, weight, bias) if biased else (hidden, weight)
    expected = torch.autograd.grad(whole, leaves)
    loss = cross_entropy(hidden, weight, targets, at_once, bias) / 7
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=1e-12)
    for own, other in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(hidden, weight, targets, at_once, bias) / 7, whole, rtol=1e-12, atol=1e-12)


def test_only_the_gradient_that_is_asked_for_is_computed():
    hidden, weight, targets = example()
    cross_entropy(hidden.detach(), weight, targets, 4 * V).backward()
    assert hidden.grad is None
    whole = F.cross_entropy(hidden.detach() @ weight.T, targets, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(weight.grad, torch.autograd.grad(whole, weight)[0], rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_logits_never_exist_whole():
    tokens, vocab, d = 512, 1000, 4
    hidden, weight = torch.randn(tokens, d, requires_grad=True), torch.randn(vocab, d, requires_grad=True)
    with Largest() as largest:
        cross_entropy(hidden, weight, torch.randint(vocab, (tokens,)), 8 * vocab).backward()
    assert largest.elements <= 8 * vocab


def test_nothing_to_predict_costs_nothing_and_keeps_the_graph():
    hidden, weight, _ = example()
    loss = cross_entropy(hidden, weight, torch.full((T,), IGNORE))
    loss.backward()
    assert loss == 0
    assert hidden.grad.count_nonzero() == weight.grad.count_nonzero() == 0
    none = cross_entropy(hidden[:0], weight, torch.zeros(0, dtype=torch.int64))
    assert none == 0
    assert torch.autograd.grad(none, weight)[0].count_nonzero() == 0


def test_bfloat16_gradients_are_not_scaled_by_a_rounded_factor():
    scale = (1 + 2**-8) / 256  # bfloat16 would make it 1 / 256
    hidden, weight, targets = example(torch.bfloat16)
    cross_entropy(hidden, weight, targets).mul(scale).backward()
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.detach().double() @ exact.T, targets, ignore_index=IGNORE, reduction="sum").mul(scale).backward()
    ratio = (weight.grad.double() * exact.grad).sum() / exact.grad.square().sum()
    assert abs(ratio - 1) < 1.5e-3


@pytest.mark.parametrize("at_once", [4 * V, 10**6])
def test_bfloat16_gradients_are_no_worse_where_products_come_in_float32(at_once, monkeypatch):
    """What a GPU does, with its products done here by float32 ones: those of bfloat16 numbers are exact in it."""
    hidden, weight, targets = example(torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    whole = F.cross_entropy(exact[0] @ exact[1].T, targets, ignore_index=IGNORE, reduction="sum")
    expected = torch.autograd.grad(whole, exact)

    def errors() -> list[torch.Tensor]:
        loss = cross_entropy(hidden, weight, targets, at_once)
        found = torch.autograd.grad(loss, (hidden, weight))
        return [(loss - whole).abs(), *((a.double() - b).norm() / b.norm() for a, b in zip(found, expected, strict=True))]

    before, mm, addmm = errors(), torch.mm, torch.addmm
    widened = []

    def wide_mm(a, b, out_dtype=None, **given):
        widened.append(out_dtype)
        return mm(a, b, **given) if out_dtype is None else mm(a.to(out_dtype), b.to(out_dtype), **given)

    def wide_addmm(total, a, b, out_dtype, out):
        widened.append(out_dtype)
        return addmm(total, a.to(out_dtype), b.to(out_dtype), out=out)

    monkeypatch.setattr(loss_module, "_widens", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(torch, "addmm", wide_addmm)
    after = errors()
    assert widened.count(torch.float32) >= 2
    assert all(now <= then for now, then in zip(after, before, strict=True)), (after, before)
