"""SparseMixer by exact enumeration: no Monte Carlo, every outcome with its probability, against the gradient of the expectation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats

from moe.errors import ConfigError
from moe.kernels.reference import scale_gradient
from moe.model.moe_layer import MoELayer
from moe.model.settings import Model
from moe.model.transformer import Transformer
from moe.routers import Tokens, build
from moe.routers.sparse_mixer import ESTIMATORS, scaled

D, E = 8, 5
LOGITS = torch.tensor([0.3, -0.2, 0.9, 0.5, -0.6], dtype=torch.float64)
EXPERTS = torch.tensor([1.3, -0.7, 0.4, 2.1, -1.6], dtype=torch.float64)  # one number each
LOSSES = {  # of the output of the layer, by degree
    1: lambda y: 0.7 + 1.3 * y,
    2: lambda y: 0.7 + 1.3 * y - 0.9 * y**2,
    3: lambda y: 0.7 + 1.3 * y - 0.9 * y**2 + 0.6 * y**3,
    4: lambda y: 0.7 + 1.3 * y - 0.9 * y**2 + 0.6 * y**3 + 0.8 * y**4,
}


def make(experts: int = E, **options):
    router = build({"name": "sparse_mixer", **options}, D, experts).double()
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(router.weight, std=0.5, generator=generator)
    router.stream = 11
    return router


def make_tokens(t: int, step: int = 0) -> tuple[torch.Tensor, Tokens]:
    x = torch.randn(t, D, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
    return x, Tokens.of(x)._replace(step=step)


def truth(loss, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of E_i L(p_i f_i) by the logits: the selection term, and the term of backpropagation."""
    z = LOGITS.clone().requires_grad_()
    p = (z / temperature).softmax(-1)
    values = torch.stack([loss(p[i] * EXPERTS[i]) for i in range(E)])
    (selection,) = torch.autograd.grad((p * values.detach()).sum(), z, retain_graph=True)
    (backpropagation,) = torch.autograd.grad((p.detach() * values).sum(), z)
    return selection, backpropagation


def estimate(name: str, loss, temperature: float, winner: int | None) -> torch.Tensor:
    """Expectation of the estimator, over experts and scales; the winner is never scaled."""
    estimator, expectation = ESTIMATORS[name], torch.zeros(E, dtype=torch.float64)
    for i, full in itertools.product(range(E), (True, False)):
        z = LOGITS.clone().requires_grad_()
        p = (z / temperature).softmax(-1)
        scale = torch.tensor([[1.0 if full or i == winner else estimator.reduced]], dtype=torch.float64)
        y, gradient_scale = scaled(p[i].view(1, 1), scale, estimator)
        y = y * EXPERTS[i]
        assert y.item() == pytest.approx(scale.item() * p[i].item() * EXPERTS[i].item(), rel=1e-15)
        y = y if gradient_scale is None else scale_gradient(y, gradient_scale[0])
        (gradient,) = torch.autograd.grad(loss(y).sum(), z)
        expectation += p[i].item() * (estimator.full if full else 1 - estimator.full) * gradient
    return expectation


def is_exact(name: str, degree: int, temperature: float = 1.0, winner: int | None = None) -> bool:
    selection, backpropagation = truth(LOSSES[degree], temperature)
    wanted = selection if name in ("v2", "v2_code") else selection + backpropagation
    return torch.allclose(estimate(name, LOSSES[degree], temperature, winner), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("name", "order"), [("v1", 2), ("v2", 3), ("v2_code", 3), ("v2_star", 3)])
def test_estimators_are_exact_up_to_their_order_and_no_further(name, order, temperature):
    assert [is_exact(name, degree, temperature) for degree in LOSSES] == [degree <= order for degree in LOSSES]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_never_scaling_the_winner_leaves_them_exact_for_linear_losses_alone(name):
    assert [is_exact(name, degree, winner=int(LOGITS.argmax())) for degree in LOSSES] == [True, False, False, False]


def test_v2_leaves_out_the_term_of_backpropagation_and_v2_star_does_not():
    selection, backpropagation = truth(LOSSES[3], 1.0)
    missing = estimate("v2_star", LOSSES[3], 1.0, None) - estimate("v2", LOSSES[3], 1.0, None)
    assert backpropagation.norm() > 0.1 * selection.norm()
    torch.testing.assert_close(missing, backpropagation, rtol=1e-12, atol=1e-14)


def outcomes(router, layer, row: torch.Tensor, t: int = 3000) -> dict[tuple[int, bool], tuple[float, torch.Tensor, torch.Tensor]]:
    """Every (expert, full scale) of one token's vector with its share of t draws, and the gradients of its output's sum of squares.

    Gradients are of the router and of the experts' last matrices.
    """
    x = row.expand(t, D)
    tokens = Tokens.of(x)
    routing = router(x, tokens)
    best = int((row @ router.weight.T).argmax())
    q = torch.softmax(row @ router.weight.T, -1)
    found: dict[tuple[int, bool], list[int]] = {}
    for i in range(t):
        e = int(routing.expert[i])
        found.setdefault((e, bool(routing.weight[i] > 0.9 * q[e]) and e != best), []).append(i)
    out = {}
    for outcome, rows in found.items():
        y, _ = layer(row[None], Tokens(*(v[rows[0]][None] for v in tokens[:4]), 0))
        gradients = torch.autograd.grad(y.square().sum(), [router.weight, layer.experts.down])
        out[outcome] = (len(rows) / t, *gradients)
    return out


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_router_in_a_layer_draws_the_enumerated_outcomes_with_their_gradients(name):
    """Logits that no mask touches: each outcome's gradients are c, p and f put together by hand."""
    router = make(k=1, estimator=name, jitter=1e6, balance_loss=0.0)
    layer = MoELayer(D, experts=E, d_expert=6, router=router).double()
    row = make_tokens(1)[0][0]
    estimator, logits = ESTIMATORS[name], (row @ router.weight.T).detach()
    p, best = logits.softmax(-1), int(logits.argmax())
    found = outcomes(router, layer, row)
    assert set(found) == {(e, full) for e in range(E) for full in (True, False) if e != best} | {(best, False)}
    for (e, full), (share, of_router, of_experts) in found.items():
        chance = p[e] if e == best else p[e] * (estimator.full if full else 1 - estimator.full)
        assert abs(share - chance) < 5 * math.sqrt(chance / 3000)
        c = 1.0 if full or e == best else estimator.reduced
        gate, up = layer.experts.up[e]
        hidden = torch.nn.functional.silu(gate @ row) * (up @ row)
        f = layer.experts.down[e] @ hidden
        upstream = 2 * c * p[e] * f
        onto_probability = estimator.pull * (upstream @ f)
        onto_logits = onto_probability * p[e] * (torch.eye(E, dtype=torch.float64)[e] - p)
        torch.testing.assert_close(of_router, onto_logits[:, None] * row, rtol=1e-11, atol=1e-16)
        factor = estimator.pull if estimator.experts == "pull" else c
        torch.testing.assert_close(of_experts[e], factor * p[e] * upstream[:, None] * hidden, rtol=1e-11, atol=1e-16)


def test_the_paper_and_the_released_code_differ_in_the_experts_gradient_alone():
    row = make_tokens(1)[0][0]
    found = {}
    for name in ("v2", "v2_code"):
        router = make(k=1, estimator=name, jitter=1e6)
        torch.manual_seed(0)
        found[name] = outcomes(router, MoELayer(D, experts=E, d_expert=6, router=router).double(), row, 300)
    for outcome, (_, of_router, of_experts) in found["v2"].items():
        _, same, scaled_down = found["v2_code"][outcome]
        torch.testing.assert_close(same, of_router, rtol=1e-12, atol=1e-18)
        reduced = not outcome[1] and of_experts.norm() > 2 * scaled_down.norm()
        torch.testing.assert_close(scaled_down, of_experts / (3 if reduced else 1), rtol=1e-12, atol=1e-18)
    assert any(f[2].norm() > 2 * found["v2_code"][o][2].norm() for o, f in found["v2"].items())


def defined_mask(z: list[float], taken: set[int], jitter: float, mask: str) -> list[int]:
    top = max(v for i, v in enumerate(z) if i not in taken)
    if mask == "paper":
        return [i for i, v in enumerate(z) if i not in taken and top - v <= jitter * (abs(v) + abs(top))]
    return [i for i, v in enumerate(z) if i not in taken and (top == v or (top - v) / max(abs(v), top) <= 2 * jitter)]


@pytest.mark.parametrize("mask", ["code", "paper"])
@pytest.mark.parametrize("jitter", [0.0, 0.1, 0.4, 1e6])
def test_evaluation_takes_the_best_experts_with_the_softmax_over_their_rivals(mask, jitter):
    router = make(k=3, jitter=jitter, mask=mask).eval()
    x, tokens = make_tokens(40)
    routing = router(x, tokens)
    logits = (x @ router.weight.T).tolist()
    for t, z in enumerate(logits):
        taken: set[int] = set()
        for j in range(3):
            candidates = defined_mask(z, taken, jitter, mask)
            best = max(candidates, key=lambda i: z[i])
            weight = math.exp(z[best]) / sum(math.exp(z[i]) for i in candidates)
            assert routing.expert[3 * t + j] == best
            assert routing.weight[3 * t + j].item() == pytest.approx(weight, rel=1e-12)
            taken.add(best)
    assert routing.gradient_scale is None
    assert torch.equal(router(x, tokens._replace(step=9)).weight, routing.weight)


def test_masks_of_code_and_paper_disagree_where_they_should():
    for z, code, paper in [(0.5, False, False), (0.81, True, False), (0.83, True, True)]:
        for mask, kept in (("code", code), ("paper", paper)):
            logits = torch.tensor([[1.0, z]])
            assert make(2, mask=mask)._candidate(logits, logits).tolist() == [[True, kept]]


def test_the_best_is_a_candidate_where_the_ratio_is_zero_by_zero():
    for mask in ("code", "paper"):
        for z in ([0.0, 0.0, -1.0], [0.0, -1.0, -2.0], [-3.0, -4.0, -9.0]):
            logits = torch.tensor([z])
            kept = make(3, jitter=0.0, mask=mask)._candidate(logits, logits)
            assert kept.tolist() == [[v == max(z) for v in z]]


def test_samples_follow_the_masked_softmax_and_each_round_leaves_out_the_last():
    router = make(k=2, jitter=0.6)
    row = make_tokens(1)[0][0]
    x = row.expand(20000, D)
    chosen = router(x, Tokens.of(x)).expert.view(-1, 2)
    z = (row @ router.weight.T).tolist()
    counts = torch.zeros(E, E).index_put_((chosen[:, 0], chosen[:, 1]), torch.ones(20000), accumulate=True)
    expected = torch.zeros(E, E, dtype=torch.float64)
    first = defined_mask(z, set(), 0.6, "code")
    for i in first:
        second = defined_mask(z, {i}, 0.6, "code")
        for j in second:
            first_chance = math.exp(z[i]) / sum(math.exp(z[e]) for e in first)
            expected[i, j] = 20000 * first_chance * math.exp(z[j]) / sum(math.exp(z[e]) for e in second)
    assert 1 < len(first) < E, "the mask has nothing to do, or everything"
    assert (counts[expected == 0] == 0).all(), "a masked expert was drawn"
    seen = expected > 0
    assert stats.chisquare(counts[seen].numpy(), expected[seen].numpy()).pvalue > 1e-4


def test_each_round_draws_its_scale_anew():
    router = make(k=2, jitter=1e6, estimator="v2")
    row = make_tokens(1)[0][0]
    x = row.expand(8000, D)
    routing = router(x, Tokens.of(x))
    order = (row @ router.weight.T).argsort(descending=True)
    first, second = routing.expert.view(-1, 2).T
    scaled_at_random = (first != order[0]) & (second != order[0])  # the best of the first round, while it lasts, is that of the second
    full = routing.gradient_scale.view(-1, 2)[scaled_at_random] == 1
    assert len(full) > 1000
    for a, b in itertools.product((True, False), repeat=2):
        chance = (0.25 if a else 0.75) * (0.25 if b else 0.75)
        share = ((full[:, 0] == a) & (full[:, 1] == b)).double().mean().item()
        assert abs(share - chance) < 5 * math.sqrt(chance / len(full))


def test_masked_logits_have_exactly_no_gradient():
    router = make(k=2, jitter=0.2, balance_loss=0.0)
    x, tokens = make_tokens(30)
    for t in range(30):
        routing = router(x[t : t + 1], Tokens(*(v[t : t + 1] for v in tokens[:4]), 0))
        (gradient,) = torch.autograd.grad(routing.weight.sum(), router.weight)
        z = (x[t] @ router.weight.T).tolist()
        first = int(routing.expert[0])
        candidates = set(defined_mask(z, set(), 0.2, "code")) | set(defined_mask(z, {first}, 0.2, "code"))
        assert gradient.isfinite().all()
        assert all((gradient[e] == 0).all() for e in range(E) if e not in candidates)


def test_a_learned_output_scale_multiplies_the_experts_output_and_learns():
    router = make(k=2, output_scale="learned")
    layer = MoELayer(D, experts=E, d_expert=6, router=router, d_shared=4).double().eval()
    x, tokens = make_tokens(9)
    with torch.no_grad():
        plain = layer(x, tokens)[0] - layer.shared(x)
        router.omega.copy_(torch.linspace(0.5, 2, D))
    out, _ = layer(x, tokens)
    torch.testing.assert_close(out - layer.shared(x), plain * router.omega, rtol=1e-12, atol=1e-14)
    upstream = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, router.omega, upstream)[0], (plain * upstream).sum(0), rtol=1e-11, atol=1e-14)


def test_a_model_starts_with_output_scales_of_one():
    moe = {"experts": E, "d_expert": 4, "router": {"name": "sparse_mixer", "output_scale": "learned"}}
    model = Transformer(Model(layers=1, d_model=D, heads=2, moe=moe), vocab=7)
    router = model.routers()[0]
    assert torch.equal(router.omega, torch.ones(D))
    assert router.weight.std() > 0


@pytest.mark.parametrize(("name", "masked"), [("v1", True), ("v2", False)])
def test_balance_loss_counts_samples_against_the_probabilities_of_the_paper(name, masked):
    router = make(k=1, estimator=name, jitter=0.2, balance_loss=0.3)
    x, tokens = make_tokens(40)
    routing = router(x, tokens)
    z = x @ router.weight.T
    if masked:
        kept = torch.zeros_like(z, dtype=torch.bool)
        for t, row in enumerate(z.tolist()):
            kept[t, defined_mask(row, set(), 0.2, "code")] = True
        z = z.masked_fill(~kept, -torch.inf)
    share = torch.bincount(routing.expert, minlength=E).double() / 40
    expected = 0.3 * E * (share * z.softmax(-1).mean(0)).sum() * 40
    torch.testing.assert_close(routing.loss, expected, rtol=1e-12, atol=0)


def test_input_jitter_moves_the_decision_in_training_alone():
    x, tokens = make_tokens(30)
    plain, jittered = make(k=1, jitter=0.0), make(k=1, jitter=0.0, input_jitter=0.5)
    assert not torch.equal(plain(x, tokens).expert, jittered(x, tokens).expert)
    assert torch.equal(plain.eval()(x, tokens).weight, jittered.eval()(x, tokens).weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 6}, "k=6 of 5 experts"),
        ({"jitter": -0.1}, "jitter=-0.1"),
        ({"input_jitter": 1.0}, "input_jitter=1.0"),
        ({"balance_loss": -1.0}, "balance_loss=-1.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)
