"""`train.deterministic`: every path computes with torch's deterministic algorithms, and what a GPU could not do is not among them.

The list of forbidden operations is that of `torch.use_deterministic_algorithms`: those that raise on a GPU.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe.checkpoint.weights import load_weights
from moe.config import load
from moe.errors import ConfigError
from moe.kernels.reference import ExpertWeights, Rows
from moe.kernels.threads import grouped_mlp
from moe.model.generate import sample
from moe.model.moe_layer import MoELayer
from moe.recipe import Recipe
from moe.routers.base import running_sum
from moe.train.deterministic import be_deterministic
from moe.verify.rank import work
from moe.verify.shrink import shrink
from tests.engines import tiny_job
from tests.routers.test_contract import D, every, make, make_tokens
from tests.workers import run_command, run_ranks

_POOLING = "avg_pool3d_backward|adaptive_avg_pool[23]d_backward|_adaptive_avg_pool[23]d_backward|adaptive_max_pool2d_backward"
_POOLING += "|fractional_max_pool[23]d_backward|max_unpool[23]d|max_pool3d_with_indices_backward"
RAISES = re.compile(
    f"({_POOLING}|reflection_pad[123]d_backward|replication_pad[123]d_backward|upsample_.*_backward|grid_sampler_[23]d_backward|nll_loss.*"
    "|_?ctc_loss.*|put_?|histc|median|nanmedian|kthvalue|resize_)"
)


class Forbid(TorchDispatchMode):
    """Raise at every operation that has no fixed order on a GPU and no other way to compute."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        floats = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
        wrong = bool(RAISES.fullmatch(name)) and not (name == "resize_" and not args[0].is_quantized)
        wrong |= name in ("cumsum", "cumsum_", "cumprod", "logcumsumexp") and bool(floats)
        wrong |= name == "bincount" and len(args) > 1 and args[1] is not None
        wrong |= name.startswith("scatter_reduce") and "prod" in args
        wrong |= name == "_embedding_bag_dense_backward" and 2 in args[6:7]  # mode max
        assert not wrong, f"{func} has no deterministic implementation on a GPU"
        return func(*args, **kwargs)


@contextmanager
def deterministic():
    """What `be_deterministic` sets, for the length of a test."""
    before = dict(os.environ)
    try:
        be_deterministic()
        with Forbid():
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.parametrize("name", ["cumsum", "put", "histc"])
def test_the_list_is_looked_at(name):
    x, index = torch.rand(4), torch.tensor([0, 0])
    calls = {"cumsum": lambda: x.cumsum(0), "put": lambda: x.put(index, x[:2]), "histc": lambda: x.histc(3)}
    with deterministic(), pytest.raises(AssertionError, match="no deterministic implementation"):
        calls[name]()
    with deterministic():
        assert index.cumsum(0).tolist() == [0, 0]  # integers add up to the same in any order


@every
def test_each_router_trains_a_layer_with_the_same_bits(name, options):
    router = make(name, options, dtype=torch.float32)
    layer = MoELayer(D, experts=6, d_expert=8, router=router, d_shared=8, shared_gate=True, backend="reference")
    x, tokens = make_tokens(60, torch.float32, padded=7)

    def step() -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        out, report = layer(leaf, tokens)
        (out.square().sum() + report.loss).backward()
        grads = [leaf.grad, *(p.grad for p in layer.parameters())]
        layer.zero_grad()
        return [out.detach(), *(g for g in grads if g is not None)]

    with deterministic():
        first, second = step(), step()
    assert len(first) == len(second) > 3
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("fan_out", [True, False])
def test_a_backend_that_writes_its_own_gradients_does_too(fan_out):
    x, weight = torch.randn(12, 8, requires_grad=True), torch.rand(24, requires_grad=True)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    slots = torch.empty_like(order).scatter_(0, order, torch.arange(24)).view(12, 2) if fan_out else None
    rows = Rows(x, order // 2, weight, torch.tensor([9, 0, 15]), slots, None)
    with deterministic():
        grouped_mlp(rows, ExpertWeights(torch.randn(3, 2, 4, 8), torch.randn(3, 8, 4)), "silu", True).sum().backward()
    assert x.grad is not None


def test_a_sample_too():
    scores = torch.randn(5, 40)
    with deterministic():
        chosen = sample(scores, temperature=1.0, top_p=0.5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(chosen, sample(scores, temperature=1.0, top_p=0.5, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 64, 100])
def test_running_sums_are_those_of_cumsum_gradients_included(n):
    x = torch.randn(3, n, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, n, dtype=torch.float64)
    right, of_right = x.cumsum(-1), torch.autograd.grad((x.cumsum(-1) * weight).sum(), x)[0]
    with deterministic():
        found = running_sum(x)
        (gradient,) = torch.autograd.grad((found * weight).sum(), x)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(gradient, of_right)


LAYOUTS = {
    "ddp": {},
    "fsdp2": {"name": "fsdp2"},
    "rows": {"expert_ranks": 2},
    "tokens": {"expert_ranks": 2, "exchange": "tokens"},
    "fixed": {"expert_ranks": 2, "exchange": "fixed", "room": 1.0},
    "copies": {"expert_ranks": 2, "copies": {"policy": "cost", "copies": 1, "owners": "hecate", "owners_every": 1}},
}


def steps(rank: int, world: int) -> dict[str, bool]:
    """Of each layout, whether two runs of two steps in bfloat16 end with the same bits."""
    same = {}
    for name, layout in LAYOUTS.items():
        ends = []
        for _ in range(2):
            engine = tiny_job.engine(**{"dtype": "bfloat16", "accumulate": 2, "recompute": "full", **layout})
            with deterministic():
                figures = [engine.step(tiny_job.batch(n, rank, world), n, 1e-2).loss.item() for n in range(2)]
            ends.append((figures, tiny_job.whole(engine.canonical_state())))
        (a, of_a), (b, of_b) = ends
        same[name] = a == b and all(torch.equal(of_a[key], of_b[key]) for key in of_a)
    return same


def test_each_engine_and_exchange_takes_its_steps_so_with_the_same_bits():
    assert run_ranks(2, steps) == [dict.fromkeys(LAYOUTS, True)] * 2


def test_no_kernel_adds_atomically():
    kernels = (Path(__file__).parents[2] / "moe" / "kernels").glob("*.py")
    assert not [path.name for path in kernels if "atomic_" in path.read_text()]


def test_the_environment_is_completed_and_what_keeps_no_order_is_refused(monkeypatch):
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_ALGO"]) == (":16:8", "Ring")
    monkeypatch.setenv("NCCL_ALGO", "Ring,NVLS")
    with pytest.raises(ConfigError, match=r"train.deterministic=true, but NCCL_ALGO=Ring,NVLS keeps no fixed order; unset it"):
        be_deterministic()
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_engine_that_promises_no_order_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("train: {deterministic: true}\nengine: {name: deepspeed}\n")
    with pytest.raises(ConfigError, match=r"train\.deterministic=true cannot be kept by engine\.name=deepspeed.*choose engine\.name=ddp"):
        load([path], [])
    assert not Recipe().train.deterministic


def verified(rank: int, world: int, folder: str) -> bool:
    words = shrink(Recipe.model_validate({"train": {"deterministic": True}}), dtype="float64", rule="sgd", rows=4)
    case = {"words": [*words, "parallel.device=cpu"], "steps": 1, "ranks": 1, "name": "one"}
    Path(folder, "cases.json").write_text(json.dumps([case]))
    work(Path(folder))
    return torch.are_deterministic_algorithms_enabled()


def test_a_verification_computes_as_the_recipe_says(tmp_path):
    assert run_ranks(1, verified, str(tmp_path)) == [True]
    assert (tmp_path / "0.safetensors").exists()


RECIPE = """
model: {layers: 1, d_model: 16, heads: 2, moe: {experts: 4, d_expert: 16, router: {name: expert_choice, leak: allow}}}
data: {sequence: 16, sources: [{name: text, paths: ["%s"]}], validation: 0.3}
train: {steps: 6, batch: 4, deterministic: true}
evaluate: {every: 100, sequences: 4, sample_tokens: 4}
checkpoint: {every: 2}
log: {every: 1}
"""


@pytest.mark.slow
def test_a_run_again_and_a_run_stopped_and_resumed_end_with_the_same_bits(tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"def f{number}(x):\n    return x * {number}\n" * 40)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE % (tmp_path / "*.txt"))
    for run in ("whole", "again"):
        done = run_command("train", recipe, f"run.folder={tmp_path / run}")
        assert done.returncode == 0, done.stderr
    stopped = run_command("train", recipe, f"run.folder={tmp_path / 'resumed'}", MOE_FAULTS="term@step=2,point=loop/step")
    assert stopped.returncode == 75, stopped.stderr
    assert run_command("train", recipe, f"run.folder={tmp_path / 'resumed'}").returncode == 0
    ends = [load_weights(tmp_path / run / "weights") for run in ("whole", "again", "resumed")]
    rows = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("whole", "again", "resumed")]
    losses = [[row["loss"] for row in map(json.loads, lines) if "loss" in row] for lines in rows]
    assert losses[0] == losses[1] == losses[2]
    for other in ends[1:]:
        assert all(torch.equal(ends[0][name], other[name]) for name in ends[0])
