"""SparseOT: the projection against brute force, the semi-dual against its definition, the plan against linear programs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, minimize

from moe.routers import Tokens, build
from moe.routers.sparse_ot import project, semi_dual_gradient

D, E = 12, 6


def simplex_projection(v: np.ndarray) -> np.ndarray:
    """By bisection of sum(max(v - tau, 0)) = 1."""
    low, high = v.max() - 1, v.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(v - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(v - high, 0)


def brute_force(x: np.ndarray, k: int) -> np.ndarray:
    """The nearest point of the simplex with at most k entries, over all supports."""
    best = None
    for support in itertools.combinations(range(len(x)), k):
        p = np.zeros(len(x))
        p[list(support)] = simplex_projection(x[list(support)])
        if best is None or ((p - x) ** 2).sum() < ((best - x) ** 2).sum():
            best = p
    assert best is not None
    return best


def dense(index: torch.Tensor, plan: torch.Tensor, m: int) -> torch.Tensor:
    return torch.zeros(*plan.shape[:-1], m, dtype=plan.dtype).scatter(-1, index, plan)


@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_the_sparse_projection_is_the_best_over_all_supports(k, spread):
    torch.manual_seed(k)
    x = spread * torch.randn(2, 5, 6, dtype=torch.float64)
    p = dense(*project(x, torch.full((2, 5), k), k), 6)
    expected = np.stack([[brute_force(row, k) for row in group] for group in x.numpy()])
    torch.testing.assert_close(p, torch.from_numpy(expected), rtol=0, atol=1e-12)
    assert ((p > 0).sum(-1) <= k).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 5, dtype=torch.float64), rtol=1e-12, atol=0)


def test_columns_may_have_numbers_of_entries_of_their_own():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 6, dtype=torch.float64)
    p = dense(*project(x, torch.tensor([[1, 3, 4]]), 4), 6)
    for row, k, got in zip(x[0], (1, 3, 4), p[0], strict=True):
        torch.testing.assert_close(got, torch.from_numpy(brute_force(row.numpy(), k)), rtol=0, atol=1e-12)


def test_equal_entries_are_kept_from_the_first():
    index, plan = project(torch.zeros(1, 1, 6), torch.tensor([[2]]), 2)
    assert index.tolist() == [[[0, 1]]]
    assert plan.tolist() == [[[0.5, 0.5]]]


class Problem:
    """cost [m, n], row sums a, column sums b, at most k entries a column; the semi-dual written out."""

    def __init__(self, cost: np.ndarray, a: np.ndarray, b: np.ndarray, k: int, gamma: float) -> None:
        self.cost, self.a, self.b, self.k, self.gamma = cost, a, b, k, gamma

    def value(self, alpha: np.ndarray) -> float:
        total = -(alpha @ self.a)
        for c, b in zip(self.cost.T, self.b, strict=True):
            t = b * brute_force((alpha - c) / (self.gamma * b), self.k)
            total += t @ (alpha - c) - self.gamma / 2 * t @ t
        return float(total)

    def gradient(self, alpha: np.ndarray) -> np.ndarray:
        return semi_dual_gradient(
            torch.from_numpy(alpha)[None],
            torch.from_numpy(self.cost.T.copy())[None],
            torch.from_numpy(self.a)[None],
            torch.from_numpy(self.b)[None],
            torch.full((1, len(self.b)), self.k),
            self.k,
            self.gamma,
        )[0].numpy()

    def plan(self, alpha: np.ndarray) -> np.ndarray:
        x = torch.from_numpy((alpha[:, None] - self.cost).T / (self.gamma * self.b[:, None]))[None]
        p = dense(*project(x, torch.full((1, len(self.b)), self.k), self.k), len(alpha))[0]
        return (p.numpy() * self.b[:, None]).T

    def quick_value(self, alpha: np.ndarray) -> float:
        t = self.plan(alpha)
        return float((t * (alpha[:, None] - self.cost)).sum() - self.gamma / 2 * (t**2).sum() - alpha @ self.a)

    def solve(self) -> np.ndarray:
        found = minimize(
            self.quick_value,
            np.zeros(len(self.a)),
            jac=self.gradient,
            method="L-BFGS-B",
            options={"maxiter": 2000, "ftol": 0, "gtol": 1e-10},
        )
        return found.x


def random_problem(m: int, n: int, k: int, gamma: float = 1.0, seed: int = 0) -> Problem:
    return Problem(np.random.default_rng(seed).random((m, n)), np.ones(m), np.full(n, m / n), k, gamma)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_gradient_is_that_of_the_semi_dual_and_the_semi_dual_is_convex(k):
    problem = random_problem(5, 3, k, gamma=0.3)
    rng = np.random.default_rng(1)
    for _ in range(3):
        alpha, beta = rng.normal(size=5), rng.normal(size=5)
        assert problem.value(alpha) == pytest.approx(problem.quick_value(alpha), abs=1e-10)
        steps = [np.eye(5)[i] * 1e-6 for i in range(5)]
        numeric = [(problem.value(alpha + h) - problem.value(alpha - h)) / 2e-6 for h in steps]
        np.testing.assert_allclose(problem.gradient(alpha), numeric, atol=1e-6)
        assert problem.value((alpha + beta) / 2) <= (problem.value(alpha) + problem.value(beta)) / 2 + 1e-12


def test_columns_are_exact_anywhere_and_have_at_most_k_entries():
    problem = random_problem(16, 4, 5)
    plan = problem.plan(np.random.default_rng(2).normal(size=16))
    np.testing.assert_allclose(plan.sum(0), problem.b, rtol=1e-12)
    assert ((plan > 0).sum(0) <= 5).all()


@pytest.mark.parametrize("gamma", [0.1, 1.0])
def test_without_sparsity_rows_converge_too(gamma):
    problem = random_problem(16, 4, 16, gamma)
    np.testing.assert_allclose(problem.plan(problem.solve()).sum(1), 1, atol=1e-6)


def test_a_plan_of_fewer_entries_than_rows_cannot_fill_them():
    problem = random_problem(16, 4, 1)
    plan = problem.plan(problem.solve())
    assert np.abs(plan.sum(1) - 1).max() == pytest.approx(3.0)


def test_the_balanced_integer_problem_is_a_linear_assignment():
    """k = m / n: a subgradient method, because the semi-dual has corners there."""
    for seed in range(2):
        problem = random_problem(8, 2, 4, gamma=0.05, seed=seed)
        alpha = problem.solve()
        for step in range(1, 2000):
            alpha = alpha - 0.3 / step * problem.gradient(alpha)
        columns = np.repeat(problem.cost, 4, axis=1)
        rows, chosen = linear_sum_assignment(columns)
        expected = np.zeros((8, 2))
        expected[rows, chosen // 4] = 1
        np.testing.assert_allclose(problem.plan(alpha), expected, atol=0.05)


def test_a_large_gamma_spreads_evenly():
    problem = random_problem(8, 4, 8, gamma=1e4)
    np.testing.assert_allclose(problem.plan(problem.solve()), 0.25, atol=1e-3)


def test_constants_added_to_columns_change_nothing_anywhere():
    problem = random_problem(8, 4, 3)
    shifted = Problem(problem.cost + np.arange(4.0), problem.a, problem.b, 3, 1.0)
    alpha = np.random.default_rng(3).normal(size=8)
    np.testing.assert_allclose(shifted.plan(alpha), problem.plan(alpha), atol=1e-12)


def make(std: float = 0.5, **options):
    torch.manual_seed(0)
    router = build({"name": "sparse_ot", **options}, D, E).double()
    router.reset_parameters(std=std)
    return router


def make_tokens(t: int, sequences: int = 1) -> tuple[torch.Tensor, Tokens]:
    torch.manual_seed(t)
    position = torch.arange(t)
    valid = position % 7 != 3
    return torch.randn(t, D, dtype=torch.float64), Tokens(position % 5, position // (t // sequences), position, valid, 0, t // sequences)


def adam(problem: Problem, iterations: int, learning_rate: float) -> np.ndarray:
    """Kingma & Ba, as torch has it."""
    alpha = torch.zeros(len(problem.a), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([alpha], lr=learning_rate)
    for _ in range(iterations):
        alpha.grad = torch.from_numpy(problem.gradient(alpha.detach().numpy()))
        optimizer.step()
    return alpha.detach().numpy()


@pytest.mark.parametrize("side", ["tokens", "experts"])
@pytest.mark.parametrize(("k", "iterations", "std"), [(1, 20, 0.5), (2, 20, 0.5), (3, 200, 3.0), (6, 200, 3.0)])
def test_the_router_dispatches_where_the_plan_has_entries_and_weighs_by_the_softmax(side, k, iterations, std):
    router = make(std, side=side, k=k, iterations=iterations, leak="allow", gamma=0.2)
    x, tokens = make_tokens(42, sequences=2)
    routing = router(x, tokens)
    probability = (x @ router.weight.T).softmax(-1).detach()
    expected = torch.zeros(42, E, dtype=torch.float64)
    for s in range(2):
        members = torch.arange(21 * s, 21 * s + 21)
        members = members[tokens.valid[members]]
        n = len(members)
        cost = -probability[members].numpy()
        if side == "experts":
            problem = Problem(cost, np.ones(n), np.full(E, n / E), -(-n * k // E), 0.2)
            plan = problem.plan(adam(problem, iterations, 0.01))
        else:
            problem = Problem(cost.T, np.full(E, n / E), np.ones(n), k, 0.2)
            plan = problem.plan(adam(problem, iterations, 0.01)).T
        expected[members] = torch.from_numpy(plan > 0).double() * probability[members]
    got = torch.zeros(42, E + 1, dtype=torch.float64).index_put((routing.token, routing.expert), routing.weight, accumulate=True)[:, :E]
    torch.testing.assert_close(got.detach(), expected, rtol=1e-12, atol=1e-15)
    assert routing.loss == 0


@pytest.mark.parametrize("side", ["tokens", "experts"])
def test_no_column_has_more_entries_than_it_may(side):
    router = make(side=side, k=2, leak="allow", std=2.0)
    x, tokens = make_tokens(60, sequences=3)
    routing = router(x, tokens)
    kept = routing.expert < E
    if side == "tokens":
        assert torch.bincount(routing.token[kept]).max() <= 2
    for s in range(3):
        inside = kept & (tokens.sequence[routing.token] == s)
        room = -(-int(tokens.valid[tokens.sequence == s].sum()) * 2 // E)
        if side == "experts":
            assert torch.bincount(routing.expert[inside], minlength=E).max() <= room


def test_the_plan_balances_what_raw_probabilities_do_not():
    router = make(k=1, std=0.1, iterations=100, gamma=0.1)
    router.weight.data[0] *= 4
    x, tokens = make_tokens(280)
    trained, evaluated = router(x, tokens).load(E), router.eval()(x, tokens).load(E)
    assert evaluated.max() > 2 * evaluated.double().mean()
    assert trained.max() < 1.4 * trained.double().mean()


def test_tokens_that_no_expert_takes_are_counted():
    router = make(side="experts", k=1, leak="allow", std=2.0)
    x, tokens = make_tokens(60, sequences=3)
    routing = router(x, tokens)
    served = set(routing.token[routing.expert < E].tolist())
    assert routing.stats["unrouted"] == sum(i not in served for i in range(60) if tokens.valid[i]) > 0


def test_evaluation_takes_each_tokens_own_best_and_looks_at_no_other():
    router = make().eval()
    x, tokens = make_tokens(20)
    routing = router(x, tokens)
    wanted = torch.where(tokens.valid[:, None], (x @ router.weight.T).topk(2).indices, E)
    assert torch.equal(routing.expert.view(20, 2), wanted)
    later = torch.cat([x[:10], torch.randn(10, D, dtype=torch.float64)])
    assert torch.equal(router(later, tokens).expert[:20], routing.expert[:20])


@pytest.mark.parametrize("options", [{"k": 1}, {"side": "experts", "leak": "allow"}])
def test_in_training_a_later_token_changes_what_an_earlier_one_gets(options):
    """It looks across the sequence: a leak, which side=tokens does not have in evaluation."""
    router = make(**options)
    x, tokens = make_tokens(40)
    later = torch.cat([x[:20], 5 * router.weight[0].detach().expand(20, D)])
    first = [router(v, tokens) for v in (x, later)]
    pairs = [
        set(zip(r.token[(r.expert < E) & (r.token < 20)].tolist(), r.expert[(r.expert < E) & (r.token < 20)].tolist(), strict=True))
        for r in first
    ]
    assert pairs[0] != pairs[1]
