"""Choice of a backend: a pure rule of the machine, the dtype and the widths, and the words that a run says about it."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.kernels import GROUPED_MLP, SORT, autograd, softmax
from moe.kernels.reference import ExpertWeights, Rows
from moe.kernels.sort import Sorted
from moe.kernels.sort import sort as by_torch
from moe.shapes import Float, Int
from moe.tables import entry

OLDEST_TRITON = (3, 6)
OLDEST_GPU = (8, 0)  # asynchronous copies and bfloat16 products begin there
MOST_EXPERTS, MOST_CHOSEN = 1024, 32  # of the fused top-k, which holds a token's logits in registers
STEP = 16  # the kernels' loads need widths that are multiples of it


class Machine(NamedTuple):
    """What decides which backends can run."""

    device: str  # type, as in "cuda"
    capability: tuple[int, int] | None = None  # of a CUDA GPU
    triton: tuple[int, int] | None = None  # version; None: not installed
    interpreted: bool = False  # TRITON_INTERPRET=1: kernels run on a CPU, slowly, to be tested


class Choice(NamedTuple):
    name: str
    reason: str


def grouped_mlp(rows: Rows, weights: ExpertWeights, activation: str, keep: bool = True) -> Float[Tensor, "m d"]:
    """`reference.grouped_mlp` by the backend that `choose` names."""
    d, f = weights.down.shape[1:]
    name = choose(machine(rows.x.device.type, rows.x.device.index), rows.x.dtype, d, f).name
    return autograd.grouped_mlp(GROUPED_MLP[name].partition(":")[0], rows, weights, activation, keep)


def sort(expert: Int[Tensor, " n"], num_experts: int) -> Sorted:
    """A stable sort by expert: counted by Triton on a GPU that has it, by torch elsewhere."""
    if expert.device.type == "cuda" and no_triton(machine("cuda", expert.device.index)) is None:
        return entry(SORT, "triton", "sort")(expert, num_experts)
    return by_torch(expert, num_experts)


def loss_and_gradient(
    logits: Float[Tensor, "t v"], targets: Int[Tensor, " t"], dtype: torch.dtype
) -> tuple[Float[Tensor, " t"], Float[Tensor, "t v"]]:
    """`softmax.loss_and_gradient`: in one launch by Triton on a GPU that has it, by torch elsewhere."""
    device = logits.device
    if device.type == "cuda" and logits.dtype == torch.float32 and no_triton(machine("cuda", device.index)) is None:
        return importlib.import_module("moe.kernels.triton_softmax").loss_and_gradient(logits, targets, dtype)
    return softmax.loss_and_gradient(logits, targets, dtype)


def fused_top_k(logits: Float[Tensor, "t E"], k: int) -> Callable[..., Any] | None:
    """`triton_top_k.top_k` where it can run; None: the router's own operations have to do."""
    device, (_, experts) = logits.device, logits.shape
    fits = logits.dtype == torch.float32 and experts <= MOST_EXPERTS and k <= MOST_CHOSEN
    if device.type != "cuda" or not fits or no_triton(machine("cuda", device.index)) is not None:
        return None
    return importlib.import_module("moe.kernels.triton_top_k").top_k


def choose(machine: Machine, dtype: torch.dtype, d: int, f: int) -> Choice:
    """The backend for experts of width f in a model of width d, and why."""
    if machine.device == "cpu":
        return Choice("threads", "the rows are on a CPU")
    # not measured on a GPU yet: that Triton wins wherever it can run is what the kernels are built for
    missing = no_triton(machine)
    if missing is not None:
        return Choice("torch", missing)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):  # torch's grouped products of float32 wait for the GPU, group by group
        return Choice("torch", f"the Triton kernels are for bfloat16, float16 and float32, not {_word(dtype)}")
    if d % STEP or f % STEP:
        return Choice("torch", f"the Triton kernels need widths that are multiples of {STEP}, not {d} and {f}")
    return Choice("triton", f"{_word(dtype)} on a GPU with Triton")


def no_triton(machine: Machine) -> str | None:
    """Why no Triton kernel can run, in words; None if one can."""
    if machine.capability is None and not machine.interpreted:
        return "there is no CUDA GPU"
    if machine.capability is not None and machine.capability < OLDEST_GPU:
        return f"the GPU is of compute capability {_version(machine.capability)}; the Triton kernels need {_version(OLDEST_GPU)}"
    if machine.triton is None:
        return "Triton is not installed (pip install 'moe[gpu]')"
    if machine.triton < OLDEST_TRITON:
        return f"Triton {_version(machine.triton)} is too old; the kernels need {_version(OLDEST_TRITON)}"
    return None


def describe(backend: str, machine: Machine, dtype: torch.dtype, d: int, f: int, experts: int, k: int | None) -> str:
    """The line with which a run says what multiplies its experts, of which shapes, and why."""
    name, reason = choose(machine, dtype, d, f) if backend == "auto" else Choice(backend, "the recipe asks for it")
    if backend == "triton" and (dtype == torch.float64 or d % STEP or f % STEP):
        reason += f", but its kernels lack float64 and widths that are not multiples of {STEP}: torch's grouped products stand in"
    taken = "" if k is None else f", {k} a token"
    return f"experts by backend {name}: {experts} of {d} x {f}{taken}, {_word(dtype)}; {reason}"


@torch.compiler.assume_constant_result
def machine(device: str, index: int | None = None) -> Machine:
    """This machine as seen from a device."""
    return _machine(device, index)


@functools.cache
def _machine(device: str, index: int | None) -> Machine:
    capability = torch.cuda.get_device_capability(index) if device == "cuda" and torch.cuda.is_available() else None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return Machine(device, capability, _triton() if capability or interpreted else None, interpreted)


def here() -> Machine:
    """This machine as seen from its GPU, if it has one."""
    return machine("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def _triton() -> tuple[int, int] | None:
    try:
        import triton
    except ImportError:
        return None
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def _version(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
