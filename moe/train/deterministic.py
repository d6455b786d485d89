"""`train.deterministic`: the same recipe on the same ranks, device and versions gives the same bits, started again or resumed.

What adds floating-point numbers in no fixed order on a GPU (on a CPU of several threads: index_put alone), and what happens to it:

| where | under train.deterministic |
|---|---|
| flash and memory-efficient attention, backward | torch adds in a fixed order; cuDNN's attention is not chosen |
| index_add (permute, for routers without a fan-out; noisy_top_k), scatter_add (sparse_ot), index_put (local_search) | torch sorts first |
| backward of gather, index_select and of an index | torch sorts first |
| cumsum of floats (sparse_ot, top_p of a sample) | `routers.base.running_sum`: doubling steps |
| cuBLAS on several streams | a workspace of fixed size: CUBLAS_WORKSPACE_CONFIG |
| NCCL's sums inside a switch (NVLS) | a ring, whose order follows from the topology: NCCL_ALGO |
| configurations chosen by a clock (compiled code) | torch chooses without one; those of `moe tune` are in a file that all ranks share |
| counts (scatter_add of integers) | nothing: integers add up to the same in any order |
| our own Triton kernels; a sum over a fixed fan-out (embedding_bag) | nothing: no atomic addition of floats in them |
| engine.name=deepspeed | refused: its kernels and hooks promise no order |

Anything else that torch knows to have no fixed order raises an error. What all this costs has not been measured on a GPU.
"""

from __future__ import annotations

import os

import torch

from moe.errors import ConfigError

# variable: the value that is set if none is, and those that are known to keep an order
_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", {":4096:8", ":16:8"}),
    "NCCL_ALGO": ("Ring", {"Ring", "CollnetDirect", "CollnetChain", "^NVLS"}),
}


def be_deterministic() -> None:
    """Let this process compute in a fixed order or raise; before its first operation on a GPU."""
    for name, (value, fixed) in _ENVIRONMENT.items():
        given = os.environ.setdefault(name, value)
        if not {part.strip() for part in given.split(",")} <= fixed:
            choices = " or ".join(f"{name}={choice}" for choice in (value, *sorted(fixed - {value})))
            raise ConfigError(f"train.deterministic=true, but {name}={given} keeps no fixed order; unset it, or set {choices}")
    # filling costs a write of every new buffer, and no result depends on what was in one
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
