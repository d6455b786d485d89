"""The choice of a backend is a rule that says why, and every backend that cannot run here says so in a sentence."""

from __future__ import annotations

import pytest
import torch

from moe.kernels import GROUPED_MLP, auto, why
from moe.kernels.auto import Machine, choose, describe, no_triton
from moe.kernels.reference import ExpertWeights, Rows

H100 = Machine("cuda", (9, 0), (3, 6))
BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("machine", "dtype", "d", "f", "name", "reason"),
    [
        (H100, BF16, 2048, 768, "triton", "bfloat16 on a GPU with Triton"),
        (H100, torch.float16, 16, 16, "triton", "float16 on a GPU with Triton"),
        (H100, torch.float32, 2048, 768, "triton", "float32 on a GPU with Triton"),
        (H100, torch.float64, 2048, 768, "torch", "not float64"),
        (H100, BF16, 2048, 760, "torch", "multiples of 16, not 2048 and 760"),
        (H100, BF16, 2040, 768, "torch", "multiples of 16, not 2040 and 768"),
        (H100._replace(triton=None), BF16, 2048, 768, "torch", "Triton is not installed"),
        (H100._replace(triton=(3, 5)), BF16, 2048, 768, "torch", "Triton 3.5 is too old"),
        (H100._replace(triton=(4, 0)), BF16, 2048, 768, "triton", "on a GPU"),
        (H100._replace(capability=(7, 5)), BF16, 2048, 768, "torch", "compute capability 7.5"),
        (Machine("cpu"), BF16, 2048, 768, "threads", "the rows are on a CPU"),
        (Machine("cpu", triton=(3, 9), interpreted=True), BF16, 2048, 768, "threads", "the rows are on a CPU"),
        (Machine("mps"), BF16, 2048, 768, "torch", "there is no CUDA GPU"),
    ],
)
def test_the_machine_the_dtype_and_the_widths_decide(machine, dtype, d, f, name, reason):
    choice = choose(machine, dtype, d, f)
    assert choice.name == name
    assert reason in choice.reason


def test_the_interpreter_runs_triton_without_a_gpu():
    assert no_triton(Machine("cpu", triton=(3, 9), interpreted=True)) is None
    assert no_triton(Machine("cpu", triton=(3, 9))) == "there is no CUDA GPU"


def test_auto_computes_with_what_the_rule_names(monkeypatch):
    taken = []
    monkeypatch.setattr(auto.autograd, "grouped_mlp", lambda module, rows, *_: taken.append(module) or rows.x)
    monkeypatch.setattr(auto, "machine", lambda device, _: Machine(device))
    for device in ("cpu", "meta"):
        x, index, weight = torch.zeros(2, 16, device=device), torch.zeros(2, dtype=torch.int64), torch.zeros(2)
        weights = ExpertWeights(torch.zeros(1, 2, 16, 16), torch.zeros(1, 16, 16))
        auto.grouped_mlp(Rows(x, index, weight, torch.tensor([2])), weights, "silu")
    assert taken == ["moe.kernels.threads", "moe.kernels.grouped"]


def test_the_line_of_a_run_names_backend_shapes_and_reason():
    line = describe("auto", H100, BF16, 2048, 1024, 64, 8)
    assert line == "experts by backend triton: 64 of 2048 x 1024, 8 a token, bfloat16; bfloat16 on a GPU with Triton"
    line = describe("triton", H100, BF16, 24, 16, 4, None)
    assert line.endswith("widths that are not multiples of 16: torch's grouped products stand in")
    line = describe("reference", Machine("cpu"), torch.float32, 32, 16, 4, None)
    assert line == "experts by backend reference: 4 of 32 x 16, float32; the recipe asks for it"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_every_backend_runs_here_or_says_why_not(monkeypatch):
    monkeypatch.setattr(auto, "here", lambda: Machine("cpu"))
    assert {name for name in GROUPED_MLP if why(name) is not None} <= {"triton"}
    assert why("triton") == "backend 'triton' cannot run here: there is no CUDA GPU"
    assert "megablocks 0.10 needs torch < 2.7.1" in str(why("megablocks"))
