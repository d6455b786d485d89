"""ARITHMETIC: functions of tensors, nothing else. Reading this table imports no backend.

GROUPED_MLP: name → "module:function"; each computes what `reference.grouped_mlp` defines.
"""

from __future__ import annotations

import importlib

__all__ = ["GROUPED_MLP", "why"]

GROUPED_MLP = {
    "auto": "moe.kernels.auto:grouped_mlp",
    "reference": "moe.kernels.reference:grouped_mlp",
    "torch": "moe.kernels.grouped:grouped_mlp",
    "threads": "moe.kernels.threads:grouped_mlp",
}


def why(name: str) -> str | None:
    """Why the backend cannot run on this machine, in one sentence; None if it can."""
    try:
        importlib.import_module(GROUPED_MLP[name].partition(":")[0])
    except ImportError as error:
        return f"backend {name!r} cannot run here: {error}"
    return None
