"""Every backend computes the definition: forward, all four gradients, and nothing that it should not touch."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moe.kernels import GROUPED_MLP, grouped, threads, why
from moe.kernels.reference import ExpertWeights, Rows
from moe.tables import entry

BACKENDS = [pytest.param(name, marks=[pytest.mark.skipif(why(name) is not None, reason=str(why(name)))]) for name in GROUPED_MLP]
every_backend = pytest.mark.parametrize("name", BACKENDS)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}
DERIVABLE = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: x * x * (x > 0),
}


def backend(name):
    return entry(GROUPED_MLP, name, "backend")


def dense(x, index, weight, counts, up, down, activation):
    """The definition once more, by one-hot sums over all experts: shares no code or idea with any backend."""
    ends = counts.cumsum(0)
    expert = (torch.arange(len(index))[:, None] >= ends[None, :]).sum(1)  # E for dropped rows
    member = (expert[:, None] == torch.arange(len(counts))).to(x.dtype)
    rows = torch.where((expert < len(counts))[:, None], x[index], 0)
    hidden = torch.einsum("nd,egfd->negf", rows, up)
    act = DERIVABLE[activation](hidden[:, :, 0])
    hidden = act * hidden[:, :, 1] if up.shape[1] == 2 else act
    home = (torch.arange(len(x))[:, None] == index).to(x.dtype)
    return torch.einsum("mn,nd->md", home, torch.einsum("ne,n,nef,edf->nd", member, weight, hidden, down))


def case(counts, *, d=32, f=16, gated=True, dropped=0, tokens=None, k=None, dtype=torch.float32, seed=0):
    """Random rows and weights on a grid of `dtype`, as leaves that want gradients."""
    draw = torch.Generator().manual_seed(seed)
    counts = torch.tensor(counts)
    n = int(counts.sum()) + dropped
    slots = None
    if k is None:
        tokens = max(n // 2, 1) if tokens is None else tokens
        index = torch.randint(0, tokens, (n,), generator=draw)
    else:
        tokens = n // k
        slots = torch.randperm(n, generator=draw).view(tokens, k)
        index = torch.empty(n, dtype=torch.int64).scatter_(0, slots.view(-1), torch.arange(tokens).repeat_interleave(k))

    def random(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    weight = random(n).to(torch.float64 if dtype == torch.float64 else torch.float32)
    up = random(len(counts), 2 if gated else 1, f, d) / d**0.5
    leaves = [
        t.requires_grad_() for t in (random(tokens, d).to(dtype), weight, up.to(dtype), (random(len(counts), d, f) / f**0.5).to(dtype))
    ]
    return leaves, (index, counts, slots)


def compare(name, leaves, integers, activation="silu", tolerance=None):
    """Output and gradients of a backend against those of the definition, relative to the largest entry of each."""
    (x, weight, up, down), (index, counts, slots) = leaves, integers
    y = backend(name)(Rows(x, index, weight, counts, slots), ExpertWeights(up, down), activation)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    got = [y, *torch.autograd.grad(y, leaves, upstream)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    expected = dense(exact[0], index, exact[1], counts, exact[2], exact[3], activation)
    expected = [expected, *torch.autograd.grad(expected, exact, upstream.double())]
    for what, a, b, leaf in zip(("y", "x", "weight", "up", "down"), got, expected, (x, *leaves), strict=True):
        assert a.shape == b.shape, what
        assert a.dtype == leaf.dtype, what
        scale = b.abs().max().item() if b.numel() else 0.0
        error = (a.double() - b).abs().max().item() if b.numel() else 0.0
        assert error <= (TOLERANCE[x.dtype] if tolerance is None else tolerance) * scale, f"{what}: {error:.2e} of {scale:.2e}"


ROUTINGS = {
    "uniform": [6, 6, 6, 6],
    "zipf": [24, 12, 8, 6, 5, 4, 3, 2],
    "all to one": [0, 24, 0],
    "one expert": [10],
    "empty first": [0, 5, 7],
    "empty middle": [5, 0, 7],
    "empty last": [5, 7, 0],
    "no rows": [0, 0, 0],
    "one row": [0, 1],
}


@every_backend
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing_gives_the_defined_output_and_gradients(name, routing, dtype):
    compare(name, *case(ROUTINGS[routing], dtype=dtype))


@every_backend
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", DERIVABLE)
def test_every_activation_gives_the_defined_output_and_gradients(name, activation, gated):
    compare(name, *case([4, 0, 9], gated=gated, dtype=torch.float64), activation)
    compare(name, *case([4, 0, 9], gated=gated), activation)


@every_backend
@pytest.mark.parametrize(("d", "f"), [(30, 7), (1, 1), (33, 16), (32, 3)])
def test_widths_that_no_vector_instruction_likes_are_computed_too(name, d, f):
    compare(name, *case([3, 0, 5], d=d, f=f))
    compare(name, *case([3, 0, 5], d=d, f=f, dtype=torch.bfloat16))


@every_backend
@pytest.mark.parametrize(("counts", "k"), [([4, 3, 5], 1), ([4, 4], 2), ([5, 4, 3], 3), ([1, 0], 1), ([0, 0], 2)])
def test_gradients_of_tokens_with_a_fixed_fan_out_are_summed_over_their_slots(name, counts, k):
    compare(name, *case(counts, k=k, dtype=torch.float64))
    compare(name, *case(counts, k=k))


@every_backend
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropped_rows_count_nothing_and_have_no_gradient(name, k, dtype):
    compare(name, *case([3, 0, 4], dropped=5, k=k, dtype=dtype))
    compare(name, *case([0, 0], dropped=4, k=k, dtype=dtype))


@every_backend
@pytest.mark.parametrize("k", [None, 2])
def test_a_scaled_gradient_changes_what_rows_receive_and_not_what_they_give(name, k):
    leaves, (index, counts, slots) = case([3, 0, 7], dropped=2, k=k, dtype=torch.float64)
    scale = torch.rand(len(index), dtype=torch.float64)
    rows = Rows(leaves[0], index, leaves[1], counts, slots)
    y, scaled = (backend(name)(r, ExpertWeights(*leaves[2:]), "silu") for r in (rows, rows._replace(gradient_scale=scale)))
    torch.testing.assert_close(scaled, y, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(y.shape, dtype=torch.float64)
    # by linearity: the gradient of the weights' sum of rows, each row weighed by its scale
    x, weight, up, down = (t.detach().requires_grad_() for t in leaves)
    expected = dense(x, index, weight * scale, counts, up, down, "silu")
    expected = list(torch.autograd.grad(expected, (x, weight, up, down), upstream))
    for a, b in zip(torch.autograd.grad(scaled, leaves, upstream), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pre_activations_that_are_not_kept_are_computed_again(name, dtype):
    leaves, (index, counts, slots) = case([3, 0, 7], dropped=2, k=2, dtype=dtype)
    results = []
    for keep in (True, False):
        y = backend(name)(Rows(leaves[0], index, leaves[1], counts, slots), ExpertWeights(*leaves[2:]), "silu", keep)
        results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", [name for name in GROUPED_MLP if name != "reference"])
def test_only_kept_pre_activations_take_memory(name):
    leaves, (index, counts, slots) = case([30, 20], d=8, f=64, k=2)
    for keep in (True, False):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            backend(name)(Rows(leaves[0], index, leaves[1], counts, slots), ExpertWeights(*leaves[2:]), "silu", keep)
        assert (50 * 2 * 64 in saved) == keep


@every_backend
def test_what_lies_in_dropped_rows_reaches_nothing(name):
    leaves, (index, counts, _) = case([3, 0, 4], dropped=5, tokens=12)
    x, weight, up, down = leaves
    index = torch.arange(12)
    with torch.no_grad():
        x[7:], weight[7:] = float("nan"), float("inf")
    poison = [torch.full((size,), float("nan")) for size in (12 * 32, 12 * 16, 3 * 2 * 16 * 32, 3 * 32 * 16) for _ in range(4)]
    del poison  # freed memory full of NaN is what an uninitialised output would be made of
    y = backend(name)(Rows(x, index, weight, counts), ExpertWeights(up, down), "silu")
    y.backward(torch.ones(12, 32).index_fill_(0, torch.arange(7, 12), float("nan")))
    assert (y[7:] == 0).all()
    assert (x.grad[7:] == 0).all()
    assert (weight.grad[7:] == 0).all()
    assert all(t.grad.isfinite().all() for t in leaves)


@every_backend
def test_a_nan_in_one_experts_rows_never_leaves_that_expert(name):
    leaves, (index, counts, _) = case([3, 4, 2], tokens=9)
    x, weight, up, down = leaves
    index = torch.arange(9)
    with torch.no_grad():
        x[4] = float("nan")
    y = backend(name)(Rows(x, index, weight, counts), ExpertWeights(up, down), "silu")
    y.backward(torch.randn(y.shape))
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert y[4].isnan().all()
    assert y[others].isfinite().all()
    assert x.grad[others].isfinite().all()
    for weights in (up, down):
        assert weights.grad[[0, 2]].isfinite().all()
        assert weights.grad[1].isnan().any()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_experts_may_be_rows_of_a_larger_buffer(name, dtype):
    (x, weight, up, down), integers = case([3, 0, 6], dtype=dtype)
    gap = 40
    buffer = torch.full((3, up[0].numel() + down[0].numel() + gap), float("nan"), dtype=dtype)
    strided_up = buffer[:, : up[0].numel()].view(up.shape)
    strided_down = buffer[:, up[0].numel() + gap :].view(down.shape)
    with torch.no_grad():
        strided_up.copy_(up)
        strided_down.copy_(down)
    compare(name, [x, weight, strided_up.requires_grad_(), strided_down.requires_grad_()], integers)


@every_backend
def test_no_row_at_all_keeps_the_graph_and_gives_zero_gradients(name):
    leaves, (index, counts, _) = case([0, 0, 0], tokens=4)
    x, weight, up, down = leaves
    y = backend(name)(Rows(x, index, weight, counts), ExpertWeights(up, down), "silu")
    assert y.requires_grad
    y.sum().backward()  # a gradient of stride 0, as a sum makes it
    for t in leaves:
        assert t.grad is not None
        assert (t.grad == 0).all()


@every_backend
def test_the_expanded_gradient_of_a_sum_is_taken(name):
    leaves, (index, counts, slots) = case([3, 0, 5], dtype=torch.float32)
    results = []
    for reduce in (torch.Tensor.sum, lambda y: (y * torch.ones_like(y)).sum()):
        y = backend(name)(Rows(leaves[0], index, leaves[1], counts, slots), ExpertWeights(*leaves[2:]), "silu")
        results.append(torch.autograd.grad(reduce(y), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_grouped_products_are_left_to_aligned_weights():
    buffer, index = torch.zeros(2 * 4 * 8 + 1), torch.zeros(3, dtype=torch.int64)
    aligned, shifted = buffer[:-1].view(2, 4, 8), buffer[1:].view(2, 4, 8)
    assert grouped._fits(index, aligned, aligned)
    assert not grouped._fits(index, aligned, shifted)
    assert not grouped._fits(index, aligned.double(), aligned.double())


@every_backend
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_gives_the_bits_of_training(name, context):
    (x, weight, up, down), (index, counts, slots) = case([7, 0, 6], k=1)
    run = functools.partial(backend(name), activation="silu")
    y = run(Rows(x, index, weight, counts, slots), ExpertWeights(up, down))
    with context():
        assert torch.equal(run(Rows(x, index, weight, counts, slots), ExpertWeights(up, down)), y)


@every_backend
def test_the_same_rows_give_the_same_bits(name):
    leaves, (index, counts, slots) = case([40, 0, 30, 50], k=2)
    results = []
    for _ in range(2):
        y = backend(name)(Rows(leaves[0], index, leaves[1], counts, slots), ExpertWeights(*leaves[2:]), "silu")
        results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.fixture
def three_threads(monkeypatch):
    monkeypatch.setattr(threads, "_WORTH_SHARING", 0)
    monkeypatch.setattr(threads, "_BLOCK", 4)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("routing", ROUTINGS)
def test_experts_shared_out_over_threads_give_the_defined_output_and_gradients(routing):
    compare("threads", *case(ROUTINGS[routing]))
    compare("threads", *case(ROUTINGS[routing], dropped=3, dtype=torch.float64))
    assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(1) as later:
        assert later.submit(lambda: (torch.ones(2).sum(), torch.get_num_threads())).result()[1] == 3


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_experts_shared_out_over_threads_evaluate_without_gradients(context):
    (x, weight, up, down), (index, counts, _) = case([7, 5, 6, 3, 2, 9])
    with context():
        y = threads.grouped_mlp(Rows(x, index, weight, counts), ExpertWeights(up, down), "silu")
        expected = dense(x.double(), index, weight.double(), counts, up.double(), down.double(), "silu")
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("three_threads")
def test_threads_that_share_experts_multiply_on_one_thread_each():
    in_parallel = torch.ones(1 << 17)  # a thread's first such operation is where torch would give it all of the process's threads
    seen = list(threads._pool(3).map(lambda _: (in_parallel.sum(), torch.get_num_threads())[1], range(3)))
    assert seen == [1, 1, 1]


@pytest.mark.usefixtures("three_threads")
def test_a_failure_in_a_thread_is_raised():
    (x, weight, up, down), (index, counts, _) = case([7, 5, 6, 3, 2, 9])
    with pytest.raises((IndexError, RuntimeError), match="index out of range"):
        threads.grouped_mlp(Rows(x, index + 1000, weight, counts), ExpertWeights(up, down), "silu")


@pytest.mark.parametrize(
    ("rows", "together"),
    [
        ([100], 1),
        ([100, 100], 2),
        ([100] * 4, 0),
        ([100] * 6, 2),
        ([100] * 8, 0),
        ([100] * 64, 0),
        ([1000] + [10] * 64, 1),
        ([90, 80, 9, 1], 4),
        ([], 0),
    ],
)
def test_experts_too_long_for_one_thread_are_multiplied_by_all_four(rows, together):
    assert threads._together(rows, 4) == together


@pytest.mark.parametrize("name", [n for n in GROUPED_MLP if n != "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_call_is_one_graph_with_the_same_gradients(name, dtype):
    # the reference reads counts on the host, which a whole graph cannot; the others are opaque to the compiler
    (x, weight, up, down), (index, counts, slots) = case([3, 0, 6, 3], k=2, dtype=dtype)
    leaves = (x, weight, up, down)

    def run(x, weight, up, down):
        return grouped_mlp(Rows(x * 2, index, weight, counts, slots), ExpertWeights(up, down), "silu") * 2

    whole = torch.compile(run, backend="aot_eager", fullgraph=True)
    grouped_mlp = backend(name)  # after the call that takes the shape checks off
    eager, compiled = run(*leaves), whole(*leaves)
    upstream = torch.randn(eager.shape).to(dtype)
    assert torch.equal(eager, compiled)
    for a, b in zip(torch.autograd.grad(eager, leaves, upstream), torch.autograd.grad(compiled, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b)


@every_backend
@pytest.mark.parametrize("wanted", [("x", "weight"), ("up",), ("down",), ("x", "up"), ("weight", "down")], ids="+".join)
def test_each_gradient_is_the_same_whatever_else_is_asked_for(name, wanted):
    leaves, (index, counts, slots) = case([5, 0, 7], k=2, dropped=2)
    names, gradients = ("x", "weight", "up", "down"), {}
    for asked in (names, wanted):
        given = {each: leaf.detach().requires_grad_(each in asked) for each, leaf in zip(names, leaves, strict=True)}
        y = backend(name)(Rows(given["x"], index, given["weight"], counts, slots), ExpertWeights(given["up"], given["down"]), "silu")
        y.backward(torch.ones_like(y))
        gradients[asked] = {each: leaf.grad for each, leaf in given.items()}
    assert [each for each, gradient in gradients[wanted].items() if gradient is not None] == list(wanted)
    assert all(torch.equal(gradients[wanted][each], gradients[names][each]) for each in wanted)
