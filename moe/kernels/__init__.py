"""ARITHMETIC: functions of tensors, nothing else. Reading this table imports no backend.

GROUPED_MLP: name → "module:function"; each computes what `reference.grouped_mlp` defines.
SORT: name → "module:function"; each sorts assignments as `sort.sort` does.
"""

from __future__ import annotations

import importlib

__all__ = ["GROUPED_MLP", "SORT", "why"]

GROUPED_MLP = {
    "auto": "moe.kernels.auto:grouped_mlp",
    "reference": "moe.kernels.reference:grouped_mlp",
    "torch": "moe.kernels.grouped:grouped_mlp",
    "threads": "moe.kernels.threads:grouped_mlp",
    "triton": "moe.kernels.triton_mlp:grouped_mlp",
}
SORT = {
    "auto": "moe.kernels.auto:sort",
    "torch": "moe.kernels.sort:sort",
    "triton": "moe.kernels.triton_sort:sort",
}

_NOT_HERE = {"megablocks": "megablocks 0.10 needs torch < 2.7.1 and this package torch >= 2.11, so the two cannot be installed together"}


def why(name: str) -> str | None:
    """Why the backend cannot run on this machine, in one sentence; None if it can."""
    reason = _NOT_HERE.get(name)
    if name == "triton":
        auto = importlib.import_module("moe.kernels.auto")
        reason = auto.no_triton(auto.here())
    if reason is None and name not in GROUPED_MLP:
        reason = f"choose from {', '.join(GROUPED_MLP)}"
    if reason is None:
        try:
            importlib.import_module(GROUPED_MLP[name].partition(":")[0])
        except ImportError as error:
            reason = str(error)
    return None if reason is None else f"backend {name!r} cannot run here: {reason}"
