"""ARITHMETIC: functions of tensors, nothing else. Reading this table imports no backend.

GROUPED_MLP: name → "module:function"; each computes what `reference.grouped_mlp` defines.
"""

from __future__ import annotations

__all__ = ["GROUPED_MLP"]

GROUPED_MLP = {
    "reference": "moe.kernels.reference:grouped_mlp",
    "torch": "moe.kernels.grouped:grouped_mlp",
}
