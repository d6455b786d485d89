"""Triton's kernels on a GPU: right on the shapes of known models, the same bits every time, captured, compiled, never waiting."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernel_cases import ROUTINGS, SHAPES, TOLERANCES, Shape, difference, distance, expected, make_case, results
from benchmarks.kernel_peers import ours
from moe.kernels.reference import ACTIVATIONS, ExpertWeights
from tests.gpu.problems import DEVICE, NO_TRITON, backend, chosen, dirty, leaves, output_and_gradients, rows_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))]
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _exact_and_dirty():
    assert not torch.backends.cuda.matmul.allow_tf32  # the reference is in float32
    dirty(1)
    yield
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_known_models_get_the_defined_output_and_gradients(shape, routing):
    case = make_case(SHAPES[shape], 1000, routing, torch.bfloat16, DEVICE)
    dirty(4)
    triton = ours(case, "triton")
    assert difference(results(triton.run, triton.weights, case), expected(case), torch.bfloat16) is None


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("shape", [Shape(256, 128, 8, 2), Shape(2048, 768, 4, 2), Shape(80, 48, 5, 5), Shape(512, 16, 3, 1)])
def test_every_dtype_gets_the_defined_output_and_gradients(shape, dtype):
    case = make_case(shape, 777, "zipf", dtype, DEVICE)
    triton = ours(case, "triton")
    assert difference(results(triton.run, triton.weights, case), expected(case), dtype) is None


@pytest.mark.parametrize("shape", ["qwen3-30b-a3b", "olmoe"])
def test_errors_are_no_larger_than_those_of_grouped_mm(shape):
    case = make_case(SHAPES[shape], 4096, "natural", torch.bfloat16, DEVICE)
    right, apart = expected(case), {}
    for name in ("triton", "torch"):
        contestant = ours(case, name)
        got = results(contestant.run, contestant.weights, case)
        apart[name] = [distance(a, b, *TOLERANCES[torch.bfloat16].output)[0] for a, b in zip(got, right, strict=True)]
    assert all(mine <= 1.1 * theirs for mine, theirs in zip(apart["triton"], apart["torch"], strict=True)), apart


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_gets_the_defined_output_and_gradients(activation, gated):
    tensors, expert = leaves(6, 256, 192, 500, gated=gated), chosen(6, 500)
    upstream = torch.randn_like(tensors[0])
    got = output_and_gradients("triton", expert, tensors, upstream, activation)
    exact = tuple(t.detach().float().requires_grad_() for t in tensors)
    right = output_and_gradients("reference", expert, exact, upstream.float(), activation)
    assert difference(got, right, torch.bfloat16) is None


@pytest.mark.parametrize("fixed", [True, False])
def test_dropped_rows_free_fan_out_and_scaled_gradients(fixed):
    tensors, expert = leaves(7, 256, 128, 600, k=3), chosen(7, 600, k=3, dropped=0.2)
    upstream, scale = torch.randn_like(tensors[0]), torch.rand(1800, device=DEVICE)
    got = output_and_gradients("triton", expert, tensors, upstream, fixed=fixed, gradient_scale=scale)
    exact = tuple(t.detach().float().requires_grad_() for t in tensors)
    right = output_and_gradients("reference", expert, exact, upstream.float(), fixed=fixed, gradient_scale=scale)
    assert difference(got, right, torch.bfloat16) is None


@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 129])
def test_few_tokens_and_none(tokens):
    tensors, expert = leaves(8, 128, 64, tokens), chosen(8, tokens)
    upstream = torch.randn_like(tensors[0])
    got = output_and_gradients("triton", expert, tensors, upstream)
    if not tokens:
        assert all(t.shape == u.shape and not t.any() for t, u in zip(got[1:], tensors, strict=True))
        return
    exact = tuple(t.detach().float().requires_grad_() for t in tensors)
    assert difference(got, output_and_gradients("reference", expert, exact, upstream.float()), torch.bfloat16) is None


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_same_rows_give_the_same_bits(dtype, fixed):
    tensors, expert = leaves(64, 1024, 512, 4096, k=8, dtype=dtype), chosen(64, 4096, k=8)
    upstream = torch.randn_like(tensors[0])
    first = output_and_gradients("triton", expert, tensors, upstream, fixed=fixed)
    for _ in range(5):
        dirty(0.5)
        again = output_and_gradients("triton", expert, tensors, upstream, fixed=fixed)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_nan_in_one_experts_rows_never_leaves_that_expert():
    (x, weight, up, down), expert = leaves(8, 256, 128, 1000), chosen(8, 1000)
    with torch.no_grad():
        x[17] = torch.nan
    touched = expert[17]
    y, dx, dweight, dup, ddown = output_and_gradients("triton", expert, (x, weight, up, down), torch.randn_like(x))
    others = torch.arange(1000, device=DEVICE) != 17
    assert y[~others].isnan().all()
    assert all(t[others].isfinite().all() for t in (y, dx, dweight))
    rest = [e for e in range(8) if e not in touched.tolist()]
    assert all(t[rest].isfinite().all() for t in (dup, ddown))


def test_nothing_waits_for_the_device():
    tensors, expert = leaves(16, 512, 256, 2048), chosen(16, 2048)
    upstream = torch.randn_like(tensors[0])
    output_and_gradients("triton", expert, tensors, upstream)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        output_and_gradients("triton", expert, tensors, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_step_replays_with_another_routing():
    tensors, expert = leaves(16, 512, 256, 2048), chosen(16, 2048)
    upstream, held = torch.randn_like(tensors[0]), expert.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            output_and_gradients("triton", held, tensors, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = output_and_gradients("triton", held, tensors, upstream)
    for seed in (1, 2):
        other = chosen(16, 2048, seed=seed)
        if seed == 2:
            other = other % 4  # the same expert twice and most without a row
        held.copy_(other)
        graph.replay()
        eager = output_and_gradients("triton", other, tensors, upstream)
        assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


def test_a_compiled_layer_is_one_graph_for_any_number_of_tokens():
    (_, _, up, down), grouped_mlp = leaves(8, 256, 128, 1), backend("triton")

    def run(x, weight, expert, up, down):
        return grouped_mlp(rows_of(expert, x * 2, weight, 8), ExpertWeights(up, down), "silu") * 2

    whole = torch.compile(run, fullgraph=True, dynamic=True)
    for tokens in (300, 517):
        (x, weight, _, _), expert = leaves(8, 256, 128, tokens, seed=tokens), chosen(8, tokens)
        eager, compiled = run(x, weight, expert, up, down), whole(x, weight, expert, up, down)
        upstream = torch.randn_like(eager)
        torch.testing.assert_close(compiled, eager)
        for a, b in zip(*(torch.autograd.grad(y, (x, weight, up, down), upstream) for y in (compiled, eager)), strict=True):
            torch.testing.assert_close(a, b)


def test_weight_gradients_are_added_to_float32_ones():
    from moe.kernels import triton_mlp

    (x, weight, up, down), expert = leaves(8, 256, 128, 1000), chosen(8, 1000)
    rows = rows_of(expert, x, weight.detach(), 8)
    given, counts = (rows.index, rows.slots, rows.weight), rows.counts
    grad = torch.randn_like(x)
    with torch.no_grad():
        _, hidden = triton_mlp.forward(x, *given, counts, up, down, "silu", True)
        before = [torch.randn(t.shape, device=DEVICE) for t in (up, down)]
        kept = [t.clone() for t in before]
        plain = triton_mlp.backward(grad, hidden, x, *given, None, counts, up, down, "silu")
        added = triton_mlp.backward(grad, hidden, x, *given, None, counts, up, down, "silu", *kept)
    for mine, into, start, alone in zip(added[2:], kept, before, plain[2:], strict=True):
        assert mine.data_ptr() == into.data_ptr()
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine - start, alone.float(), rtol=1e-2, atol=1e-2)


def test_rows_beyond_the_reach_of_32_bits():
    """Pre-activations of 2.4e9 elements: by the slices of the tokens, whose offsets are small."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    tokens, k = 75_000, 8
    tensors, expert = leaves(16, 256, 2048, tokens, k=k), chosen(16, tokens, k=k)
    assert tokens * k * 2 * 2048 > 2**31
    upstream = torch.randn_like(tensors[0])
    y, dx, dweight, dup, ddown = output_and_gradients("triton", expert, tensors, upstream)
    total_up, total_down = torch.zeros_like(dup, dtype=torch.float32), torch.zeros_like(ddown, dtype=torch.float32)
    x, weight, up, down = tensors
    for part in torch.arange(tokens, device=DEVICE).split(5000):
        some = (x[part].detach().requires_grad_(), weight[part].detach().requires_grad_(), up, down)
        right = output_and_gradients("triton", expert[part], some, upstream[part])
        for a, b in zip((y[part], dx[part], dweight[part]), right, strict=False):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
        total_up += right[3]
        total_down += right[4]
    for a, b in ((dup, total_up), (ddown, total_down)):
        assert distance(a, b, 1, 1)[0] < 2e-5


def test_weights_beyond_the_reach_of_32_bits():
    """A stack of 2.2e9 elements, of which only the last three experts are chosen."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    (x, weight, up, down), expert = leaves(520, 2048, 1024, 700), chosen(3, 700)
    assert up.numel() > 2**31
    upstream = torch.randn_like(x)
    y, dx, dweight, dup, ddown = output_and_gradients("triton", expert + 517, (x, weight, up, down), upstream)
    last = tuple(t.detach().float().requires_grad_() for t in (x, weight, up[-3:], down[-3:]))
    right = output_and_gradients("reference", expert, last, upstream.float())
    assert difference([y, dx, dweight, dup[-3:], ddown[-3:]], right, torch.bfloat16) is None
    assert not dup[:-3].any()
    assert not ddown[:-3].any()


SMALL = """
import torch
from tests.gpu.problems import chosen, leaves, output_and_gradients
tensors, expert = leaves(5, 80, 48, 300), chosen(5, 300, dropped=0.1)
for fixed in (True, False):
    output_and_gradients("triton", expert, tensors, torch.randn_like(tensors[0]), fixed=fixed)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "86", sys.executable, "-c", SMALL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[2])
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} took more than 4 minutes")
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, done.stdout[-3000:]
