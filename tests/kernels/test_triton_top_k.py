"""The fused router kernel is TopK's own definition in float64: choices, weights, sums and every gradient, ties and NaN included."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from moe.kernels import triton_top_k
from moe.routers import Tokens, build, top_k
from moe.routers.base import best

# numpy, in Triton's interpreter, warns of what IEEE arithmetic defines
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D = 16


def router(experts: int, **options):
    torch.manual_seed(experts)
    made = build({"name": "top_k", **options}, D, experts)
    made.reset_parameters(std=0.5)
    if made.bias is not None:
        made.bias.normal_(std=0.1)
    return made.to(DEVICE)


def tokens(t: int, padded: int) -> Tokens:
    x = torch.zeros(t, D, device=DEVICE)
    valid = torch.ones(t, dtype=torch.bool, device=DEVICE)
    valid[torch.randperm(t)[:padded]] = False
    return Tokens.of(x)._replace(valid=valid)


def both(made, logits, given):
    """What the kernel and the definition make of the same logits; the latter in float64."""
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    fused = triton_top_k.top_k(ours, given.valid, made.bias, made.k, made.normalize == "selected", made.scale)
    return ours, fused, exact, made._decide(exact, given)


OPTIONS = [
    {"normalize": "none"},
    {"normalize": "selected", "scale": 2.5},
    {"normalize": "none", "bias_rate": 1e-3},
    {"normalize": "selected", "bias_rate": 1e-3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(map(str, o.values())))
@pytest.mark.parametrize(
    ("t", "experts", "k"), [(0, 6, 2), (1, 6, 6), (37, 6, 2), (70, 64, 8), (33, 37, 8), (19, 100, 3), (9, 512, 16), (3, 1, 1)]
)
def test_equals_the_definition(t, experts, k, options):
    made, given = router(experts, k=k, **options), tokens(t, t // 5)
    logits = 3 * torch.randn(t, experts, device=DEVICE)
    ours, fused, exact, decision = both(made, logits, given)
    assert torch.equal(fused.expert, decision.expert)
    close = {"rtol": 2e-5, "atol": 1e-6}
    torch.testing.assert_close(fused.weight.double(), decision.weight, **close)
    torch.testing.assert_close(fused.probability.double(), decision.mass, **close)
    for name in ("z", "entropy", "confidence"):
        torch.testing.assert_close(getattr(fused, name).double(), decision.stats[name], **close)
    pull = [torch.randn(shape, device=DEVICE) for shape in ((t, k), (experts,), ())]
    wanted = (decision.weight, decision.mass, decision.z)
    found = (fused.weight, fused.probability, fused.z)
    for taken in ((0,), (1,), (2,), (0, 1, 2)):  # each alone, and together
        (expected,) = torch.autograd.grad([wanted[i] for i in taken], exact, [pull[i].double() for i in taken], retain_graph=True)
        (gradient,) = torch.autograd.grad([found[i] for i in taken], ours, [pull[i] for i in taken], retain_graph=True)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=2e-5)
        assert not gradient[~given.valid].any()


@pytest.mark.parametrize("biased", [False, True])
def test_ties_go_to_the_lowest_index_nan_is_the_largest_and_all_are_distinct(biased):
    values = torch.tensor([-torch.inf, -torch.inf, -1.5, -0.0, 0.0, 2.0, torch.inf, torch.nan])
    for experts, k in ((1, 1), (5, 5), (16, 4), (23, 7)):
        # few distinct logits: probabilities differ by far, or not at all; infinity and NaN make all of a row NaN
        logits = values[torch.randint(5 if biased else 8, (200, experts))]
        logits = torch.cat([logits, values[:, None].expand(-1, experts)]).to(DEVICE)
        bias = torch.zeros(experts, device=DEVICE) if biased else None
        ranking = logits.softmax(-1) if biased else logits
        fused = triton_top_k.top_k(logits, torch.ones(len(logits), dtype=torch.bool, device=DEVICE), bias, k, True, 1.0)
        assert torch.equal(fused.expert, torch.sort(ranking, dim=-1, descending=True, stable=True).indices[:, :k])
        assert torch.equal(fused.expert, best(ranking, k))


def test_a_nan_shows_in_its_own_weights_and_gradients_and_padding_hides_it():
    logits = torch.randn(12, 6, device=DEVICE)
    logits[3, 2] = logits[7, 0] = torch.nan
    given = tokens(12, 0)
    given.valid[7] = False
    ours, fused, _, decision = both(router(6), logits, given)
    assert torch.equal(fused.expert, decision.expert)
    assert torch.equal(fused.weight.isnan(), decision.weight.isnan())
    assert fused.weight[3].isnan().all()
    assert fused.z.isnan()
    (gradient,) = torch.autograd.grad(fused.weight.sum(), ours)
    assert gradient.isnan().any(1).nonzero().flatten().tolist() == [3]


def test_logits_far_apart_are_still_normalised():
    logits = torch.tensor([[300.0, -300.0, -301.0, -500.0]], device=DEVICE).repeat(3, 1)
    bias = torch.tensor([-2.0, 0.0, 0.0, 0.0], device=DEVICE)  # keeps the best away: the chosen probabilities underflow
    made = router(4, k=2, bias_rate=0.0)
    made.bias.copy_(bias)
    _, fused, _, decision = both(made, logits, tokens(3, 0))
    assert fused.expert.tolist() == [[1, 2]] * 3
    torch.testing.assert_close(fused.weight.double(), decision.weight, rtol=1e-5, atol=0)


def fuse(monkeypatch) -> list[int]:
    """Let routers take the fused way without a GPU; the list grows with each call."""
    calls = []

    def taken(logits, k):
        calls.append(k)
        return triton_top_k.top_k

    monkeypatch.setattr(top_k, "fused_top_k", taken)
    return calls


@pytest.mark.parametrize(
    "options",
    [
        {"k": 2},
        {"k": 3, "normalize": "none", "balance_scope": "micro", "z_loss": 1e-2, "balance_loss": 0.1},
        {"k": 2, "capacity_factor": 0.5, "drop": "weight", "balance_counts": "first", "balance_loss": 0.1},
    ],
)
def test_a_router_is_the_same_fused(options, monkeypatch):
    made, given = router(7, **options), tokens(30, 4)
    x = torch.randn(30, D, device=DEVICE).bfloat16()

    def run():
        a = x.clone().requires_grad_()
        routing = made(a, given)
        pull = torch.linspace(-1, 1, len(routing.weight), device=DEVICE)
        return routing, torch.autograd.grad((routing.weight * pull).sum() + routing.loss, [a, made.weight])

    plain, plain_gradients = run()
    calls = fuse(monkeypatch)
    fused, gradients = run()
    assert calls
    assert torch.equal(fused.expert, plain.expert)
    assert fused.stats.keys() == plain.stats.keys()
    torch.testing.assert_close(fused.weight, plain.weight)
    torch.testing.assert_close(fused.loss, plain.loss)
    torch.testing.assert_close(fused.stats, plain.stats)
    torch.testing.assert_close(gradients[0], plain_gradients[0], rtol=2**-7, atol=1e-4)
    torch.testing.assert_close(gradients[1], plain_gradients[1], rtol=1e-4, atol=1e-5)


def test_options_that_the_kernel_lacks_are_left_to_the_definition(monkeypatch):
    calls = fuse(monkeypatch)
    for options in ({"score": "sigmoid"}, {"groups": 2}, {"second": "random"}, {"balance_scope": "sequence"}):
        router(8, **options)(torch.randn(10, D, device=DEVICE), tokens(10, 0))
    assert not calls
    router(8, balance_scope="sequence").eval()(torch.randn(10, D, device=DEVICE), tokens(10, 0))
    assert calls == [2], "without a loss the scope does not matter"


def test_compiles_whole(monkeypatch):
    fuse(monkeypatch)

    def run(x):
        routing = made(x, given)
        return routing.expert, routing.weight, routing.loss

    whole = torch.compile(run, backend="aot_eager", fullgraph=True)
    # after the checks of shapes are off
    made, given, x = router(7, z_loss=1e-2), tokens(30, 4), torch.randn(30, D, device=DEVICE).bfloat16()
    results = []
    for call in (whole, run):
        expert, weight, loss = call(x)
        results.append((expert, loss, torch.autograd.grad(weight.square().sum() + loss, made.weight)[0]))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1:], results[1][1:])
