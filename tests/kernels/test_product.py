"""The router's product against float64: by three bfloat16 parts, as a GPU multiplies, no error may be larger than float32's."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from moe.kernels import product

T, D, E = 192, 512, 24


def wide(shape: tuple[int, int], generator: torch.Generator, power: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-power, power + 1, shape, generator=generator).float())


def problem(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, weights and the gradient of the logits."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (wide(shape, generator, 12 if kind == "wide range" else 0) for shape in ((T, D), (E, D), (T, E)))
    if kind == "cancelling":  # sums of a millionth of their terms
        x[:, D // 2 :] = x[:, : D // 2]
        weight[:, D // 2 :] = -weight[:, : D // 2] * (1 + 1e-6 * weight[:, D // 2 :])
        grad[:, E // 2 :] = -grad[:, : E // 2]
        weight[E // 2 :] = weight[: E // 2] * (1 + 1e-6 * weight[E // 2 :])
    return x.bfloat16(), weight, grad


def computed(by_parts: bool, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, monkeypatch) -> tuple[torch.Tensor, ...]:
    monkeypatch.setattr(product, "_by_parts", lambda _: by_parts)
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = product.linear(x, weight)
    logits.backward(grad)
    assert logits.dtype == torch.float32
    assert x.grad.dtype == x.dtype
    return logits.detach(), x.grad, weight.grad


@pytest.mark.parametrize("kind", ["normal", "wide range", "cancelling"])
def test_three_parts_are_at_least_as_exact_as_float32(kind, monkeypatch):
    x, weight, grad = problem(kind)
    parts, whole = (computed(by_parts, x, weight, grad, monkeypatch) for by_parts in (True, False))
    x64, w64, g64 = x.double(), weight.double(), grad.double()
    exact = (x64 @ w64.T, g64 @ w64, g64.T @ x64)
    size = (x64.abs() @ w64.abs().T, g64.abs() @ w64.abs(), g64.abs().T @ x64.abs())
    for name, ours, float32, expected, terms in zip(("logits", "of x", "of weight"), parts, whole, exact, size, strict=True):
        error, allowed = (((y.double() - expected) / terms).square().mean().sqrt() for y in (ours, float32))
        # of x is rounded to bfloat16, in which both are the same but for ties
        assert error <= allowed * (1 + 1e-3 * (name == "of x")), f"{name}: {error:.2e}, float32 {allowed:.2e}"
    assert not torch.equal(parts[0], whole[0]), "the parts were not used"


def test_of_tiny_weights_only_bits_below_the_smallest_bfloat16_are_lost(monkeypatch):
    x, weight, grad = problem("normal")
    weight *= 2.0**-118
    logits, _, _ = computed(True, x, weight, grad, monkeypatch)
    x64, w64 = x.double(), weight.double()
    lost, rounded = 2.0**-134 * x64.abs().sum(1, keepdim=True), 2.0**-22 * (x64.abs() @ w64.abs().T)
    assert ((logits.double() - x64 @ w64.T).abs() <= lost + rounded).all()


def test_parts_add_up_to_every_bit():
    x = wide((64, 96), torch.Generator().manual_seed(0), 60)
    x[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38])
    low, middle, high = product.stacked(x, (0, 1, 2), 0).chunk(3)
    assert low.dtype == torch.bfloat16
    assert torch.equal((low.double() + middle.double() + high.double())[1:], x[1:].double())
    assert not low[0, :3].any()
    assert not middle[0, :3].any()
    torch.testing.assert_close(high[0, :3].float(), x[0, :3], equal_nan=True)
    swapped = product.stacked(x, (2, 0, 2, 1), 1).chunk(4, 1)
    for found, part in zip(swapped, (high, low, high, middle), strict=True):
        torch.testing.assert_close(found, part, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy's, in Triton's interpreter
def test_triton_cuts_into_the_same_parts():
    triton_split = pytest.importorskip("moe.kernels.triton_split", reason="Triton runs on Linux only")
    x = wide((37, 53), torch.Generator().manual_seed(0), 40)
    x[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38])
    x[1, :3] = torch.tensor([1.00390625, 1.01171875, 0.0])  # halfway between two bfloat16 numbers
    for given in (x, x.T, x[:0]):
        for order in ((0, 1, 2), (0, 1, 2, 1, 2, 2)):
            for dim in (0, 1):
                found, parts = triton_split.stacked(given, order, dim), product.stacked(given, order, dim)
                torch.testing.assert_close(found, parts, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("by_parts", [False, True])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("place", range(3))
def test_what_is_not_finite_is_seen(by_parts, value, place, monkeypatch):
    given = problem("normal")
    given[place][3, 5] = value
    logits, dx, dweight = computed(by_parts, *given, monkeypatch)
    seen = ((logits[3], dweight[:, 5]), (logits[:, 3], dx[:, 5]), (dx[3], dweight[5]))[place]
    assert not any(row.isfinite().any() for row in seen)
    assert logits.isfinite().sum() == logits.numel() - (0 if place == 2 else seen[0].numel())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_again_in_the_backward_pass_changes_no_bit(dtype, monkeypatch):
    x, weight, grad = problem("normal")
    ours = computed(False, x.to(dtype), weight, grad, monkeypatch)
    x, weight = x.to(dtype).requires_grad_(), weight.requires_grad_()
    F.linear(x.float(), weight).backward(grad)
    assert torch.equal(ours[1], x.grad)
    assert torch.equal(ours[2], weight.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_lowers_nothing(dtype):
    x, weight = torch.randn(5, 7, dtype=dtype, requires_grad=True), torch.randn(3, 7, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = product.linear(x, weight)
        low = product.linear(x.bfloat16(), weight.float())
    assert logits.dtype == dtype
    assert torch.equal(logits, x @ weight.T)
    assert torch.equal(low, x.bfloat16().float() @ weight.float().T)


@pytest.mark.parametrize("by_parts", [False, True])
@pytest.mark.parametrize("of", ["x", "weight"])
def test_only_the_gradient_that_is_asked_for_is_computed(by_parts, of, monkeypatch):
    monkeypatch.setattr(product, "_by_parts", lambda _: by_parts)
    x, weight, grad = problem("normal")
    asked = {"x": x, "weight": weight}[of].requires_grad_()
    product.linear(x, weight).backward(grad)
    assert asked.grad is not None
    assert (x.grad is None) != (weight.grad is None)


@pytest.mark.parametrize("by_parts", [False, True])
def test_backward_keeps_no_float32_copy_of_x(by_parts, monkeypatch):
    monkeypatch.setattr(product, "_by_parts", lambda _: by_parts)
    x, weight, _ = problem("normal")
    x.requires_grad_()
    weight.requires_grad_()

    def kept(run) -> list[tuple[torch.dtype, int]]:
        found = []
        with saved_tensors_hooks(lambda t: found.append((t.dtype, t.numel())), lambda t: t):
            run()
        return sorted(found, key=str)

    assert kept(lambda: product.linear(x, weight)) == [(torch.bfloat16, T * D), (torch.float32, E * D)]
    assert (torch.float32, T * D) in kept(lambda: F.linear(x.float(), weight)), "the detector is blind"
