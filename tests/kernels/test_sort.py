"""Values in expert order, and their gradient in the order of assignments."""

from __future__ import annotations

import pytest
import torch

from moe.kernels.sort import permuted, sort
from moe.model.dispatch import LocalDispatcher
from moe.routers.base import Routing


@pytest.mark.parametrize("kept", [12, 9, 1, 0])
@pytest.mark.parametrize("columns", [(), (2,)])
def test_the_gradient_of_permuted_values_is_that_of_indexing(kept, columns):
    expert = torch.randint(0, 5, (12,))  # 4 is dropped
    order, position, _ = sort(expert, 4)
    values = torch.randn(12, *columns, dtype=torch.float64, requires_grad=True)
    assert torch.equal(permuted(values, order[:kept], position), values[order[:kept]])
    assert torch.autograd.gradcheck(lambda v: permuted(v, order[:kept], position), values)
    upstream = torch.randn(kept, *columns, dtype=torch.float64)
    (found,) = torch.autograd.grad(permuted(values, order[:kept], position), values, upstream)
    (expected,) = torch.autograd.grad(values[order[:kept]], values, upstream)
    assert torch.equal(found, expected)


def graph(tensor: torch.Tensor) -> set[str]:
    """Names of all functions that a gradient passes through."""
    names, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            names.add(type(node).__name__)
            todo += [following for following, _ in node.next_functions]
    return names


def test_dispatch_sorts_nothing_in_its_backward_pass():
    weight, scale = (torch.rand(8, requires_grad=True) for _ in range(2))
    routing = Routing.per_token(torch.randint(0, 4, (4, 2)), weight.view(4, 2))._replace(gradient_scale=scale)
    rows, _ = LocalDispatcher(3).dispatch(torch.randn(4, 16), routing)
    assert rows.gradient_scale is not None
    names = graph(rows.weight) | graph(rows.gradient_scale)
    assert not any(name.startswith("Index") for name in names), names
