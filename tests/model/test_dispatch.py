from __future__ import annotations

import pytest
import torch

from moe.model.dispatch import LocalDispatcher
from moe.routers.base import Routing

E = 5


def per_token(t: int, k: int, drops: bool = False) -> Routing:
    expert = torch.stack([torch.randperm(E)[:k] for _ in range(t)]) if t else torch.zeros(0, k, dtype=torch.int64)
    if drops:
        expert[torch.rand(t, k) < 0.4] = E
    return Routing.per_token(expert, torch.ones(t, k, dtype=torch.float64))


def per_expert(t: int, c: int) -> Routing:
    return Routing.per_expert(torch.stack([torch.randperm(t)[:c] for _ in range(E)]), torch.ones(E, c, dtype=torch.float64))


def dense(t: int) -> Routing:
    return Routing.dense((torch.rand(t, E) < 0.5).double())


ROUTINGS = {
    "per_token": lambda: per_token(13, 2),
    "one_each": lambda: per_token(13, 1),
    "dropped": lambda: per_token(13, 3, drops=True),
    "all_dropped": lambda: Routing.per_token(torch.full((4, 2), E), torch.ones(4, 2, dtype=torch.float64)),
    "no_tokens": lambda: per_token(0, 2),
    "per_expert": lambda: per_expert(13, 4),
    "dense": lambda: dense(13),
    "dense_no_tokens": lambda: dense(0),
}


def rows_of(routing: Routing, x: torch.Tensor):
    """What identity experts return: of each vector, the sum over its kept rows."""
    rows, ticket = LocalDispatcher(E).dispatch(x, routing)
    kept = int(rows.counts.sum())
    y = (rows.x[rows.index] * rows.weight[:, None])[:kept]
    return rows, ticket, torch.zeros_like(rows.x).index_add(0, rows.index[:kept], y)


def tokens_of(routing: Routing) -> int:
    return len(routing.token) // routing.fan_out if routing.fan_out else 13 if len(routing.token) else 0


@pytest.mark.parametrize("name", ROUTINGS)
def test_identity_experts_return_each_token_times_its_number_of_assignments(name):
    torch.manual_seed(0)
    routing = ROUTINGS[name]()
    x = torch.randn(tokens_of(routing), 7, dtype=torch.float64, requires_grad=True)
    _, ticket, y = rows_of(routing, x)
    out = LocalDispatcher(E).combine(y, ticket)
    times = torch.zeros(len(x), dtype=torch.float64).index_add(0, routing.token, (routing.expert < E).double())
    torch.testing.assert_close(out, x * times[:, None], rtol=1e-14, atol=1e-14)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, times[:, None].expand_as(x), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", ROUTINGS)
def test_rows_lie_in_expert_order_with_drops_last(name):
    torch.manual_seed(0)
    routing = ROUTINGS[name]()
    rows, _, _ = rows_of(routing, torch.randn(tokens_of(routing), 7, dtype=torch.float64))
    experts = torch.arange(E).repeat_interleave(rows.counts)
    assert rows.counts.sum() == (routing.expert < E).sum()
    for e in range(E):
        expected = routing.token[routing.expert == e]
        assert rows.index[: len(experts)][experts == e].tolist() == expected.tolist()  # equal experts keep token order
