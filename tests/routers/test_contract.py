"""What every router promises; parametrised over the table, so a new row is tested the moment it exists."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moe.errors import ConfigError
from moe.routers import ROUTERS, Router, Routing, Tokens, build
from moe.routers.base import COUNTS_ROWS, DRAWS_NOISE

D = 16
# Options that a router's branches need to be seen with; a router without an entry is tested with its defaults.
EXAMPLES: dict[str, list[dict]] = {
    "expert_choice": [{"leak": "allow"}, {"leak": "allow", "capacity_factor": 1.5, "max_experts": 2}],
    "sinkhorn": [{}, {"k": 2}],
    "base": [{"tolerance": 1e-7}],
    "sparse_ot": [{}, {"side": "experts", "leak": "allow"}],
    "sigma": [{}, {"k": 3, "expert_dropout": 0.6, "entropy_loss": 0.1, "init": "model"}, {"expert_dropout": 0.0}],
    "avg_k": [{"k": 3}],
    "sparse_mixer": [
        {"estimator": "v2_code"},
        {"k": 1, "estimator": "v1", "jitter": 2.0, "balance_scope": "micro", "input_jitter": 2.0**-6},
        {"k": 3, "estimator": "v2_star", "jitter": 4.0, "mask": "paper"},
        {"estimator": "v2", "jitter": 1.0},
    ],
    "dense_to_sparse": [
        {"threshold": 0.06, "decay_steps": 4},
        {"top_1_step": 2},
        {"selection": "best", "weight": "softmax", "temperature_start": 2.0, "decay": "exponential", "decay_steps": 6},
        {"noise": "none", "activation": "sigmoid", "evaluation": "dense", "threshold": 0.08},
    ],
    "remoe": [{}, {"k": 3, "penalty": 0.5}],
    "top_k": [
        {},
        {"k": 1, "normalize": "none", "balance_scope": "micro", "z_loss": 0.01, "jitter": 2.0**-6},
        {"k": 3, "score": "sigmoid", "bias_rate": 0.01, "scale": 2.5, "groups": 2, "balance_scope": "sequence", "balance_loss": 1e-2},
        {"k": 2, "score": "sigmoid", "normalize": "none", "groups": 2, "groups_kept": 2, "group_score": "best", "z_loss": 0.1},
        {"second": "random", "balance_counts": "first", "capacity_factor": 0.75, "capacity_group": 3},
        {"k": 3, "capacity_factor": 0.5, "drop": "weight", "bias_rate": 0.01},
    ],
    "noisy_top_k": [
        {},
        {"k": 1, "noise": "fixed", "capacity_factor": 0.75, "drop": "priority"},
        {"k": 3, "balance_scope": "sequence"},
    ],
    "hash": [{"vocab": 11}, {"vocab": 11, "k": 2, "capacity_factor": 0.75}],
    "comet": [{"gamma": 8.0}, {"k": 3}],
    "dselect_k": [{"gamma": 8.0}, {"k": 3}, {"gating": "static", "gamma": 4.0}],
    "local_search": [
        {"router": {"name": "hash", "vocab": 11, "k": 2}, "steps": 9, "temperature_start": 2.0, "temperature_end": 0.5},
        {"router": {"name": "comet", "entropy_loss": 0.0}, "steps": 0, "entropy_loss": 0.0},
        {"router": {"name": "top_k", "balance_loss": 0.0}, "steps": 3, "entropy_loss": 0.0},
    ],
}
# Rows whose number of assignments is up to the tokens: they may wait for the device once, to learn it.
SPARSE: set[str] = {"dense_to_sparse", "remoe", "comet", "dselect_k", "local_search"}
# What switches a router's auxiliary losses off, and the coefficients to double.
COEFFICIENTS = {
    "sparse_mixer": ("balance_loss",),
    "dense_to_sparse": ("balance_loss",),
    "remoe": ("penalty",),
    "sigma": ("entropy_loss",),
    "top_k": ("balance_loss", "z_loss"),
    "noisy_top_k": ("importance_loss", "load_loss"),
    "comet": ("entropy_loss",),
    "dselect_k": ("entropy_loss", "validity_loss"),
    "local_search": ("entropy_loss",),
}
CASES = [pytest.param(name, options, id=f"{name}-{i}") for name in ROUTERS for i, options in enumerate(EXAMPLES.get(name, [{}]))]
every = pytest.mark.parametrize(("name", "options"), CASES)


def make(name: str, options: dict, experts: int = 6, dtype: torch.dtype = torch.float64) -> Router:
    """A router whose state is dyadic and away from zero, so that sums are exact in float64 in any order.

    Buffers of integers and single numbers (tables, temperatures) keep their first values.
    """
    router = build({"name": name, **options}, D, experts)
    hand_experts(router)
    router.to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in router.state_dict().values():
            if tensor.ndim and tensor.is_floating_point():
                tensor.copy_(torch.randint(-31, 32, tensor.shape, generator=generator) / 32)
    return router


def hand_experts(router: Router) -> None:
    """A router that reads experts gets some among its buffers, to be read where no layer hands it a summary."""
    up, down = torch.zeros(router.num_experts, 1, 4, D), torch.zeros(router.num_experts, D, 4)
    if router.summary(up, down) is None:
        return
    router.register_buffer("up", up)
    router.register_buffer("down", down)
    router.register_forward_pre_hook(lambda module, args: args if len(args) == 3 else (*args, module.summary(module.up, module.down)))


def blind(name: str, options: dict) -> bool:
    """Whether a router does not look at the vectors: a NaN among them is for the experts to show."""
    wrapped = options.get("router")
    return name == "hash" or options.get("gating") == "static" or (wrapped is not None and blind(wrapped["name"], wrapped))


def gradient(router: Router, loss: torch.Tensor) -> torch.Tensor:
    parameters = list(router.parameters())
    if not parameters or not loss.requires_grad:
        return torch.zeros(1, dtype=torch.float64)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, materialize_grads=True)])


def backward(loss: torch.Tensor) -> None:
    """What a router decides without a gradient (hash) has none to check."""
    if loss.requires_grad:
        loss.backward()


def make_tokens(t: int, dtype: torch.dtype = torch.float64, padded: int = 0) -> tuple[torch.Tensor, Tokens]:
    generator = torch.Generator().manual_seed(t)
    x = (torch.randint(-31, 32, (t, D), generator=generator) / 32).to(dtype)
    valid = torch.ones(t, dtype=torch.bool)
    valid[torch.randperm(t, generator=generator)[:padded]] = False
    return x, Tokens(torch.arange(t) % 11, torch.arange(t) // 5, torch.arange(t) + 40, valid, 3, None if t % 5 else 5)


def rows(tokens: Tokens, part) -> Tokens:
    return Tokens(tokens.id[part], tokens.sequence[part] - tokens.sequence[part][:1], tokens.index[part], tokens.valid[part], tokens.step)


def table(routing: Routing, tokens: int, experts: int) -> torch.Tensor:
    """Summed weight of each token and expert, drops in a last column: a routing without the order of its rows."""
    out = torch.zeros(tokens, experts + 1, dtype=routing.weight.dtype)
    return out.index_put((routing.token, routing.expert), routing.weight, accumulate=True)


@every
@pytest.mark.parametrize(("t", "experts"), [(0, 6), (1, 6), (13, 6), (13, 7), (13, 10)])
def test_assignments_are_valid_at_any_size(name, options, t, experts):
    try:
        router = make(name, options, experts)
    except ConfigError as refusal:
        pytest.skip(str(refusal))  # an example whose groups are of even numbers
    x, tokens = make_tokens(t)
    routing = router(x.requires_grad_(), tokens)
    assert routing.token.shape == routing.expert.shape == routing.weight.shape
    assert ((routing.token >= 0) & (routing.token < max(t, 1))).all()
    assert ((routing.expert >= 0) & (routing.expert <= experts)).all()
    assert routing.weight.isfinite().all()
    assert routing.loss.shape == ()
    assert routing.loss.isfinite()
    assert routing.fan_out is not None or router.fan_out_varies
    assert routing.fan_out is None or not router.fan_out_varies or name in ("dense_to_sparse", "local_search")  # whose steps differ
    if routing.fan_out is not None:
        assert torch.equal(routing.token, torch.arange(t).repeat_interleave(routing.fan_out))
    pairs = (routing.token * experts + routing.expert)[routing.expert < experts]
    assert len(pairs.unique()) == len(pairs), "a token has an expert twice"
    assert routing.load(experts).sum() == (routing.expert < experts).sum()
    for value in routing.stats.values():
        assert value.isfinite().all()
        assert not value.requires_grad
    backward(routing.weight.sum() + routing.loss)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in router.parameters())


@every
def test_extreme_logits_stay_finite(name, options):
    router = make(name, options, dtype=torch.float32)
    x, tokens = make_tokens(13, torch.float32)
    for scale in (1e4, -1e4):
        router.zero_grad()
        routing = router(x * scale, tokens)
        backward(routing.weight.sum() + routing.loss)
        assert routing.weight.isfinite().all()
        assert routing.loss.isfinite()
        assert all(value.isfinite().all() for value in routing.stats.values())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in router.parameters())


@every
def test_a_nan_is_never_routed_silently(name, options):
    router = make(name, options)
    x, tokens = make_tokens(13)
    x[4, 2] = torch.nan
    routing = router(x, tokens)
    assert ((routing.expert >= 0) & (routing.expert <= 6)).all()
    assert routing.weight[routing.token == 4].isnan().any() == (not blind(name, options))
    assert routing.weight[routing.token != 4].isfinite().all()


@every
def test_decisions_are_float32_under_bfloat16_and_autocast(name, options):
    router = make(name, options, dtype=torch.bfloat16)
    x, tokens = make_tokens(13, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x, tokens)
    exact = make(name, options, dtype=torch.float32)
    exact.load_state_dict(router.state_dict())
    expected = exact(x.float(), tokens)
    assert routing.weight.dtype == routing.loss.dtype == torch.float32
    assert torch.equal(routing.expert, expected.expert)
    assert torch.equal(routing.weight, expected.weight)
    assert torch.equal(routing.loss, expected.loss)


@every
def test_permuted_tokens_get_permuted_routing(name, options):
    router = make(name, options)
    x, tokens = make_tokens(20, padded=4)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    straight, permuted = router(x, tokens), router(x[order], Tokens(*(a[order] for a in tokens[:4]), tokens.step))
    assert torch.equal(table(straight, 20, 6)[order], table(permuted, 20, 6))
    torch.testing.assert_close(straight.loss, permuted.loss, rtol=1e-12, atol=0)


@every
@pytest.mark.parametrize("cut", [5, 15, 25])
def test_any_split_into_calls_gives_the_same_routing_bitwise(name, options, cut):
    router = make(name, options)
    x, tokens = make_tokens(30, padded=3)
    whole = table(router(x, tokens), 30, 6)
    parts = [slice(0, cut), slice(cut, 30)]
    split = [table(router(x[p], rows(tokens, p)), len(x[p]), 6) for p in parts]
    assert torch.equal(whole, torch.cat(split))


@every
def test_padding_has_no_part_in_anything(name, options):
    router = make(name, options)
    x, tokens = make_tokens(20, padded=6)
    other = torch.where(tokens.valid[:, None], x, 100.0)
    a, b = router(x, tokens), router(other, tokens)
    assert tokens.valid[a.token[a.expert < 6]].all()
    assert (a.weight[~tokens.valid[a.token]] == 0).all()
    assert torch.equal(a.expert, b.expert)
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.loss, b.loss)
    assert all(torch.equal(a.stats[key], b.stats[key]) for key in a.stats)
    alone = router(x[tokens.valid], Tokens(*(v[tokens.valid] for v in tokens[:4]), tokens.step))
    assert torch.equal(a.load(6), alone.load(6))
    torch.testing.assert_close(a.loss, alone.loss, rtol=1e-12, atol=0)
    for key in a.stats:
        torch.testing.assert_close(a.stats[key], alone.stats[key], rtol=1e-12, atol=1e-14)


@every
def test_a_call_of_nothing_but_padding_costs_nothing(name, options):
    router = make(name, options)
    x, tokens = make_tokens(8, padded=8)
    routing = router(x, tokens)
    backward(routing.weight.sum() + routing.loss)
    assert routing.load(6).sum() == 0
    assert routing.loss == 0
    assert all((p.grad == 0).all() for p in router.parameters())


@every
def test_state_survives_a_round_trip(name, options):
    router, fresh = make(name, options), make(name, options)
    for tensor in fresh.state_dict().values():
        tensor.zero_()
    router.update(torch.arange(6), 15)
    fresh.load_state_dict(router.state_dict(), strict=True)
    x, tokens = make_tokens(20)
    a, b = router(x, tokens), fresh(x, tokens)
    assert torch.equal(a.expert, b.expert)
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.loss, b.loss)


@every
def test_only_update_learns_and_recomputation_repeats_the_decision(name, options):
    router = make(name, options)
    before = {key: value.clone() for key, value in router.state_dict().items()}
    x, tokens = make_tokens(20)
    x.requires_grad_()

    def run(x):
        routing = router(x, tokens)
        return table(routing, 20, 6).square().sum() + routing.loss + x.square().sum()

    plain = torch.autograd.grad(run(x), [x, *router.parameters()])
    for reentrant in (False, True):
        router.zero_grad()
        x.grad = None
        checkpoint(run, x, use_reentrant=reentrant).backward()
        recomputed = [x.grad, *(p.grad for p in router.parameters())]
        assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    router.eval()(x, tokens)
    assert all(torch.equal(value, before[key]) for key, value in router.state_dict().items())


@every
def test_evaluation_has_no_auxiliary_loss_and_sums_over_no_ranks(name, options):
    router = make(name, options).eval()
    router.total = lambda x: pytest.fail("a rank that generates alone would wait for the others for ever")
    assert router(*make_tokens(20)).loss == 0


@every
def test_coefficients_scale_the_auxiliary_gradient(name, options):
    coefficients = {key: options.get(key, 0.01) for key in COEFFICIENTS.get(name, ()) if options.get(key) != 0}
    gradients = []
    for factor in (0, 1, 2):
        router = make(name, {**options, **{key: factor * value for key, value in coefficients.items()}})
        gradients.append(gradient(router, router(*make_tokens(20)).loss))
    none, once, twice = gradients
    assert (none == 0).all()
    if coefficients:
        assert once.norm() > 1e-6
    torch.testing.assert_close(twice, 2 * once, rtol=1e-12, atol=0)


class Synchronisations(TorchDispatchMode):
    """Collects the operators that would make the host wait for a device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique", "unique_", "equal.default", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        masked = name.startswith(("index.", "index_put")) and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masked or name.startswith(self.WAITING):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@every
def test_nothing_waits_for_the_device(name, options):
    router = make(name, options)
    x, tokens = make_tokens(20, padded=3)
    with Synchronisations() as seen:
        routing = router(x, tokens)
        backward(routing.weight.sum() + routing.loss)
        router.update(routing.load(6), 17)
    assert len(seen.found) <= (name in SPARSE), seen.found
    with Synchronisations() as seen:
        x[tokens.valid].sum().item()
    assert len(seen.found) == 2, "the detector is blind"


@every
def test_no_float32_copy_of_the_tokens_is_kept_for_backward(name, options):
    router = make(name, options, dtype=torch.float32)
    x, tokens = make_tokens(20, torch.bfloat16)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append((tuple(t.shape), t.dtype)), lambda t: t):
        router(x.requires_grad_(), tokens)
    # input noise multiplies in float32, and its factors are kept too
    assert ((20, D), torch.float32) not in kept or "jitter" in options or "input_jitter" in options


@pytest.mark.slow  # the compiler takes half a minute
@every
def test_compiles_whole(name, options):
    router = make(name, options, dtype=torch.float32)
    x, tokens = make_tokens(20, torch.float32, padded=3)
    expected, compiled = router(x, tokens), torch.compile(router, fullgraph=True)(x, tokens)
    assert torch.equal(compiled.expert, expected.expert)
    torch.testing.assert_close(compiled.weight, expected.weight)
    torch.testing.assert_close(compiled.loss, expected.loss)


@every
def test_is_eager_for_a_reason(name, options):
    """Noise differs from layer to layer; numbers of assignments are read by the host."""
    router, (x, tokens) = make(name, options), make_tokens(40)
    first = router(x, tokens)
    for part in router.modules():
        part.stream = getattr(part, "stream", 0) + 12345
    second = router(x, tokens)
    noisy = first.weight.shape != second.weight.shape or not (
        torch.equal(first.expert, second.expert) and torch.equal(first.weight, second.weight)
    )
    assert router.eager == (COUNTS_ROWS if name in SPARSE else DRAWS_NOISE if noisy else None)


@pytest.mark.slow
@every
def test_one_without_a_reason_compiles_whole(name, options):
    torch.compile(len)  # takes the checks of shapes off, before methods are looked up
    torch.compiler.reset()
    router = make(name, options)
    if router.eager is not None:
        pytest.skip(router.eager)
    compiled = torch.compile(lambda *given: tuple(router(*given)), backend="aot_eager", fullgraph=True)
    x, tokens = make_tokens(20)
    results = []
    for call in (compiled, router):
        x = x.detach().requires_grad_()
        routing = Routing._make(call(x, tokens))
        loss = (routing.weight * torch.linspace(-1, 1, len(routing.weight))).sum() + routing.loss
        results.append((routing.expert, routing.weight.detach(), gradient(router, loss)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)
