"""Triton's experts from routing to gradients against the definition in float64, and what is refused."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.utils.checkpoint

pytest.importorskip("triton")

from moe.errors import ConfigError
from moe.kernels import GROUPED_MLP, grouped, reference, triton_mlp
from moe.kernels.reference import ExpertWeights, Rows
from moe.kernels.triton_configs import Config, lookup
from moe.model.moe_layer import MoELayer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TILE = Config(16, 64, 32, warps=4, stages=2, group_m=2)  # programs are what the interpreter's time goes into
ROUTINGS = {
    "uniform": [6, 6, 6],
    "zipf": [24, 12, 8, 6, 4],
    "all to one": [0, 40, 0],
    "several empty": [0, 5, 0, 0, 7, 0],
    "around a block": [15, 16, 17],
    "no rows": [0, 0],
    "one row": [0, 1, 0],
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(triton_mlp, "lookup", lambda kernel, *_: TILE._replace(BLOCK_M=64) if kernel == "wgrad" else TILE)


def case(counts, *, k=None, dropped=0, dtype=torch.float32, d=48, f=48, halves=2, scaled=False):
    """Rows and weights as leaves that want gradients; with k, every vector has k rows."""
    n = sum(counts) + dropped
    slots, vectors = None, n // 2 + 1
    index = torch.randint(0, vectors, (n,))
    if k is not None:
        vectors = n // k
        slots = torch.randperm(n).view(vectors, k)
        index = torch.empty(n, dtype=torch.int64).scatter_(0, slots.view(-1), torch.arange(vectors).repeat_interleave(k))
        slots = slots.to(DEVICE)
    shapes = (vectors, d), (n,), (len(counts), halves, f, d), (len(counts), d, f)
    x, weight, up, down = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    leaves = [x.to(dtype), weight.float(), (up / d**0.5).to(dtype), (down / f**0.5).to(dtype)]
    x, weight, up, down = (t.to(DEVICE).requires_grad_() for t in leaves)
    scale = torch.rand(n, device=DEVICE) if scaled else None
    return Rows(x, index.to(DEVICE), weight, torch.tensor(counts, device=DEVICE), slots, scale), ExpertWeights(up, down)


def results(run, rows, weights, activation="silu", upstream=None, keep=True):
    y = run(rows, weights, activation, keep)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y) if upstream is None else upstream
    return [y, *torch.autograd.grad(y, (rows.x, rows.weight, weights.up, weights.down), upstream.to(y.dtype))]


def close(got, expected, tolerance):
    """Largest error relative to the largest entry, of the output and of each gradient."""
    for what, a, b in zip(("y", "x", "weight", "up", "down"), got, expected, strict=True):
        assert a.shape == b.shape, what
        bound = tolerance * b.abs().max().item() if b.numel() else 0.0
        error = (a.double() - b).abs().max().item() if b.numel() else 0.0
        assert error <= bound, f"{what}: {error:.2e} over {bound:.2e}"


def check(rows, weights, activation="silu", tolerance=None, keep=True):
    got = results(triton_mlp.grouped_mlp, rows, weights, activation, keep=keep)
    exact = [t.detach().double().requires_grad_() for t in (rows.x, rows.weight, weights.up, weights.down)]
    scale = None if rows.gradient_scale is None else rows.gradient_scale.double()
    definition = Rows(exact[0], rows.index, exact[1], rows.counts, None, scale), ExpertWeights(*exact[2:])
    upstream = torch.randn(got[0].shape, generator=torch.Generator().manual_seed(1)).to(got[0]).double()
    close(got, results(reference.grouped_mlp, *definition, activation, upstream), tolerance or TOLERANCE[rows.x.dtype])
    for leaf, gradient in zip((rows.x, rows.weight, weights.up, weights.down), got[1:], strict=True):
        assert leaf.dtype == gradient.dtype


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing_gives_the_defined_output_and_gradients(routing):
    check(*case(ROUTINGS[routing], dropped=3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_defined_output_and_gradients(dtype):
    check(*case([5, 0, 17], k=2, dtype=dtype, scaled=True), keep=False)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing_in_every_precision(routing, keep, dtype):
    check(*case(ROUTINGS[routing], dropped=2, dtype=dtype, scaled=True), keep=keep)
    if sum(ROUTINGS[routing]) % 2 == 0:
        check(*case(ROUTINGS[routing], k=2, dtype=dtype, halves=1), keep=keep)


@pytest.mark.parametrize(("counts", "k"), [([4, 3, 5], 1), ([4, 4], 2), ([5, 5, 5], 3), ([1, 0], 1)])
def test_rows_of_a_fixed_fan_out_come_home(counts, k):
    check(*case(counts, k=k, dropped=k))


@pytest.mark.slow
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_every_activation_gives_the_defined_output_and_gradients(activation, halves):
    check(*case([4, 0, 9], halves=halves, f=80), activation)


def test_a_scaled_gradient_changes_what_rows_receive_without_a_gate():
    check(*case([4, 0, 9], k=1, scaled=True, halves=1), "relu2")


def test_shipped_configurations_give_the_defined_output_and_gradients(monkeypatch):
    monkeypatch.setattr(triton_mlp, "lookup", lookup)
    check(*case([70, 0, 9], k=1))


@pytest.mark.slow
def test_tiles_through_descriptors_give_the_defined_output_and_gradients(monkeypatch):
    plain = triton_mlp.lookup
    monkeypatch.setattr(triton_mlp, "lookup", lambda *of: plain(*of)._replace(tma=True))
    check(*case([5, 0, 19], k=2, f=80))


def test_pre_activations_that_are_not_kept_are_computed_again():
    given = case([3, 0, 7], k=2)
    kept, again = (results(triton_mlp.grouped_mlp, *given, keep=keep) for keep in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_a_nan_in_one_experts_rows_never_leaves_that_expert():
    rows, weights = case([3, 4, 2], k=1)
    rows = rows._replace(index=torch.arange(9, device=DEVICE), slots=None)
    with torch.no_grad():
        rows.x[4] = torch.nan
    y, dx, dweight, dup, ddown = results(triton_mlp.grouped_mlp, rows, weights)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert y[4].isnan().all()
    assert all(t[others].isfinite().all() for t in (y, dx, dweight))
    assert dup[[0, 2]].isfinite().all()
    assert ddown[[0, 2]].isfinite().all()


@pytest.mark.parametrize("slots", ["slots", None])
def test_what_lies_in_dropped_rows_reaches_nothing(slots):
    rows, weights = case([3, 0, 4], k=1, dropped=5)
    order = torch.arange(12, device=DEVICE)
    rows = rows._replace(index=order, slots=order[:, None] if slots else None)
    upstream = torch.randn(12, 48, device=DEVICE)
    with torch.no_grad():
        rows.x[7:], rows.weight[7:], upstream[7:] = torch.nan, torch.inf, torch.nan
    y, dx, dweight, dup, ddown = results(triton_mlp.grouped_mlp, rows, weights, upstream=upstream)
    assert all((t[7:] == 0).all() for t in (y, dx, dweight))
    assert all(t.isfinite().all() for t in (y, dx, dweight, dup, ddown))


def test_no_row_at_all_keeps_the_graph_and_gives_zero_gradients():
    rows, weights = case([0, 0, 0], dropped=4)
    for given in (rows, Rows(rows.x, rows.index[:0], rows.weight[:0], rows.counts), case([0, 0, 0], k=1)[0]):
        y, *gradients = results(triton_mlp.grouped_mlp, given, weights)
        assert y.requires_grad
        assert all((t == 0).all() for t in (y, *gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_weights_are_added_to_float32_ones(dtype):
    rows, weights = case([5, 0, 17], k=2, dtype=dtype)
    y, hidden = triton_mlp.forward(rows.x, rows.index, rows.slots, rows.weight, rows.counts, *weights[:2], "silu", True)
    given = torch.randn_like(y), hidden, rows.x, rows.index, rows.slots, rows.weight, None, rows.counts, *weights[:2], "silu"
    with torch.no_grad():
        fresh = triton_mlp.backward(*given)
        up, down = (torch.randn_like(t, dtype=torch.float32) for t in weights[:2])
        before = up.clone(), down.clone()
        added = triton_mlp.backward(*given, up, down)
    assert added.up is up
    assert added.down is down
    for total, start, part in zip((up, down), before, fresh[2:], strict=True):
        torch.testing.assert_close(total - start, part.float(), rtol=0, atol=TOLERANCE[dtype] * part.abs().max().item() + 1e-6)
    assert torch.equal(added.x, fresh.x)


def test_gradients_are_added_in_place_where_an_engine_keeps_them():
    rows, weights = case([5, 0, 17], k=2)
    _, _, _, up, down = results(triton_mlp.grouped_mlp, rows, weights)
    weights.up.grad, weights.down.grad = torch.ones_like(up), torch.ones_like(down)
    keeper = weights.up.grad
    y = triton_mlp.grouped_mlp(rows, weights._replace(in_place=True), "silu")
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y))
    assert weights.up.grad is keeper
    torch.testing.assert_close(weights.up.grad - 1, up, rtol=0, atol=1e-5)
    torch.testing.assert_close(weights.down.grad - 1, down, rtol=0, atol=1e-5)


@pytest.mark.parametrize("keep", [True, False])
def test_a_second_pass_through_the_same_graph_gives_the_same_gradients(keep):
    """The first writes over the pre-activations that were kept."""
    rows, weights = case([5, 0, 17], k=2, scaled=True)
    leaves = rows.x, rows.weight, *weights[:2]
    y = triton_mlp.grouped_mlp(rows, weights, "silu", keep)
    upstream = torch.randn_like(y)
    first, second, third = (torch.autograd.grad(y, leaves, upstream, retain_graph=True) for _ in range(3))
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(first, second, third, strict=True))


def test_recomputed_layers_give_the_same_gradients_as_kept_ones():
    rows, weights = case([5, 0, 17], k=2)
    leaves, upstream = (rows.x, rows.weight, *weights[:2]), torch.randn_like(rows.x)

    def run(*leaves):
        return triton_mlp.grouped_mlp(rows._replace(x=leaves[0], weight=leaves[1]), ExpertWeights(*leaves[2:]), "silu")

    y = torch.utils.checkpoint.checkpoint(run, *leaves, use_reentrant=False)
    again = [torch.autograd.grad(y, leaves, upstream, retain_graph=True) for _ in range(2)]
    kept = torch.autograd.grad(run(*leaves), leaves, upstream)
    for found in again:
        assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


LAUNCHES = {  # of the backward pass, by what needs a gradient
    ("x", "weight", "up", "down"): ["down_dgrad", "wgrad left", "up_dgrad", "wgrad right"],
    ("x", "weight"): ["down_dgrad", "up_dgrad"],
    ("x", "down"): ["down_dgrad", "wgrad left", "up_dgrad"],
    ("up",): ["down_dgrad", "wgrad right"],
    ("weight",): ["down_dgrad"],
}


@pytest.mark.parametrize("wanted", LAUNCHES, ids="+".join)
def test_only_products_of_gradients_that_are_asked_for_are_launched(wanted, monkeypatch):
    rows, weights = case([5, 0, 17], k=2)
    leaves = dict(zip(("x", "weight", "up", "down"), (rows.x, rows.weight, *weights[:2]), strict=True))
    expected = dict(zip(leaves, results(triton_mlp.grouped_mlp, rows, weights)[1:], strict=True))
    launched = []
    for name in ("down_dgrad", "up_dgrad", "wgrad"):
        run = getattr(triton_mlp, name)
        side = (lambda of: f" {of[3]}") if name == "wgrad" else lambda of: ""
        monkeypatch.setattr(triton_mlp, name, lambda *of, n=name, s=side, r=run, **more: launched.append(n + s(of)) or r(*of, **more))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted)
    y = triton_mlp.grouped_mlp(rows, weights, "silu")
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    found = torch.autograd.grad(y, [leaves[name] for name in wanted], upstream)
    assert launched == LAUNCHES[wanted]
    assert all(torch.equal(gradient, expected[name]) for name, gradient in zip(wanted, found, strict=True))


def test_experts_may_be_rows_of_a_larger_buffer():
    rows, weights = case([3, 0, 6])
    sizes = weights.up[0].numel(), weights.down[0].numel()
    buffer = torch.full((3, sum(sizes) + 40), torch.nan, device=DEVICE)
    up, down = buffer[:, : sizes[0]].view(weights.up.shape), buffer[:, sizes[0] + 40 :].view(weights.down.shape)
    with torch.no_grad():
        up.copy_(weights.up)
        down.copy_(weights.down)
    strided = ExpertWeights(up.requires_grad_(), down.requires_grad_())
    pairs = zip(results(triton_mlp.grouped_mlp, rows, strided), results(triton_mlp.grouped_mlp, rows, weights), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_rows_may_be_views_with_strides_of_their_own():
    rows, weights = case([3, 0, 4], k=1, scaled=True)

    def spread(t):
        return None if t is None else torch.stack((t.detach(), t.detach()), -1)[..., 0].requires_grad_(t.requires_grad)

    views = Rows(*(spread(t) for t in rows))
    pairs = zip(results(triton_mlp.grouped_mlp, views, weights), results(triton_mlp.grouped_mlp, rows, weights), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("k", [None, 2])
def test_the_same_rows_give_the_same_bits(k):
    given = case([7, 0, 17], k=k)
    first, second = (results(triton_mlp.grouped_mlp, *given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("how", ["float64", "width", "weight", "device"])
def test_what_the_kernels_lack_is_computed_by_grouped_products(how, monkeypatch):
    rows, weights = case([3, 0, 4], d=24 if how == "width" else 32, f=16)
    if how == "float64":
        rows = rows._replace(x=rows.x.double())
        weights = ExpertWeights(*(t.detach().double().requires_grad_() for t in weights[:2]))
    if how == "weight":
        rows = rows._replace(weight=rows.weight.detach().double().requires_grad_())
    if how == "device":
        monkeypatch.setattr(triton_mlp, "INTERPRETED", False)
    if how == "device" and DEVICE == "cuda":
        pytest.skip("the kernels run here")
    monkeypatch.setattr(triton_mlp.triton_forward, "up", None)
    got, expected = (results(run, rows, weights) for run in (triton_mlp.grouped_mlp, grouped.grouped_mlp))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r, w: (r, ExpertWeights(w.up[:0], w.down[:0])), "there are 0 experts"),
        (lambda r, w: (r, ExpertWeights(w.up.half(), w.down)), r"x is torch\.float32, up torch\.float16 and down torch\.float32; convert"),
        (lambda r, w: (r, ExpertWeights(w.up.to("meta"), w.down)), "lie on .* and meta; move them to one device"),
        (lambda r, w: (r, ExpertWeights(w.up, w.down.mT.contiguous().mT)), r"down has strides \(.*\); make all of its dimensions but"),
        (lambda r, w: (r, ExpertWeights(w.up[:, :, :16], w.down)), r"up \[3, 2, 16, 48\], .* do not fit; give up"),
        (lambda r, w: (r, ExpertWeights(w.up, w.down[0])), r"down \[48, 48\], .* do not fit; give up"),
        (lambda r, w: (r._replace(counts=r.counts[:2]), w), r"counts \[2\] do not fit"),
        (lambda r, w: (r._replace(weight=r.weight[:5]), w), "5 weights do not fit 7 rows"),
        (lambda r, w: (r._replace(slots=r.index[None, :]), w), r"slots \[1, 7\] do not fit x \[4, 48\]; give slots \[m, k\]"),
        (lambda r, w: (r._replace(counts=r.counts - 1), w), "counts has -1; give each expert the number of its rows"),
        (lambda r, w: (r._replace(counts=r.counts + 1), w), "counts sum to 10, more than the 7 rows"),
    ],
)
def test_what_cannot_be_multiplied_is_refused_in_one_sentence(change, sentence):
    rows, weights = case([3, 0, 4])
    if ("counts sum" in sentence or "counts has" in sentence) and DEVICE == "cuda":
        pytest.skip("reading counts would wait for the GPU")
    with pytest.raises(ConfigError, match=sentence):
        triton_mlp.grouped_mlp(*change(rows, weights), "silu")


def test_a_gradient_scale_that_does_not_fit_the_rows_is_refused():
    rows, weights = case([3, 0, 4], scaled=True)
    with pytest.raises(ConfigError, match=r"gradient_scale \[5\] on .* does not fit 7 rows on"):
        results(triton_mlp.grouped_mlp, rows._replace(gradient_scale=rows.gradient_scale[:5]), weights)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ConfigError, match="activation 'tanh' is unknown; choose from silu, gelu, gelu_tanh, relu, relu2"):
        triton_mlp.grouped_mlp(*case([3, 0, 4]), "tanh")


def test_a_compiled_call_is_one_graph_with_the_same_gradients():
    rows, weights = case([3, 0, 5], k=2, dtype=torch.bfloat16)

    def run(x, weight, up, down):
        y = triton_mlp.grouped_mlp(rows._replace(x=x * 2, weight=weight), ExpertWeights(up, down), "silu")
        return y * 2

    leaves = rows.x, rows.weight, *weights[:2]
    whole = torch.compile(run, backend="aot_eager", fullgraph=True)
    eager, compiled = run(*leaves), whole(*leaves)
    assert torch.equal(eager, compiled)
    upstream = torch.randn_like(eager)
    pairs = zip(torch.autograd.grad(eager, leaves, upstream), torch.autograd.grad(compiled, leaves, upstream), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("k", [None, 2])
def test_the_custom_operators_do_what_they_declare(k):
    rows, weights = case([3, 0, 5], k=k)
    x, weight, up, down = (t.detach() for t in (rows.x, rows.weight, *weights[:2]))
    given = triton_mlp.__name__, x, rows.index, rows.slots, weight, rows.counts, up, down, "silu"
    torch.library.opcheck(torch.ops.moe.expert_mlp.default, (*given, True))
    turned = given[0], x.T.contiguous().T, *given[2:]
    torch.library.opcheck(torch.ops.moe.expert_mlp.default, (*turned, True), test_utils="test_faketensor")
    y, hidden = torch.ops.moe.expert_mlp(*given, True)
    back = triton_mlp.__name__, y, hidden, x, rows.index, rows.slots, weight, None, rows.counts, up, down, "silu"
    torch.library.opcheck(torch.ops.moe.expert_mlp_backward.default, back)


@pytest.mark.parametrize("router", ["top_k", {"name": "expert_choice", "leak": "allow"}], ids=["slots", "any fan-out"])
def test_a_whole_layer_trains_as_the_reference_does(router, monkeypatch):
    monkeypatch.setitem(GROUPED_MLP, "triton", "moe.kernels.triton_mlp:grouped_mlp")
    build = functools.partial(MoELayer, 32, experts=5, d_expert=48, router=router)
    layer, exact = build(backend="triton").to(DEVICE), build(backend="reference").to(DEVICE, torch.float64)
    exact.load_state_dict(layer.state_dict())
    x, upstream, outcomes = torch.randn(12, 32, device=DEVICE), torch.randn(12, 32, device=DEVICE), []
    for each in (layer, exact):
        given = x.to(each.experts.up.dtype, copy=True).requires_grad_()
        y, _ = each(given)
        y.backward(upstream.to(y.dtype))
        outcomes.append([y, given.grad, *(p.grad for p in each.parameters())])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=1e-5 * b.abs().max().item())


def test_an_expert_beyond_32_bit_places_is_left_to_grouped_products():
    x, weight = torch.empty(2, 16384, device="meta"), torch.empty(2, device="meta")
    for width, fits in ((65536, False), (65520, True)):  # the wider one's matrices have 2^31 elements
        up, down = (torch.empty(1, *shape, device="meta") for shape in ((2, width, 16384), (16384, width)))
        assert triton_mlp._fits(x, weight, up, down) == fits
