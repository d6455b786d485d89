"""moe: train Mixture-of-Experts language models, from one CPU core to a cluster, with the same code.

Shape letters used everywhere (see `moe.shapes`): t tokens, n assignments, d model width, E experts, k experts per
token, f expert width, b sequences, s positions, h heads, v vocabulary.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_PUBLIC = {  # loaded on first use: importing `moe` imports no torch
    "MoELayer": "moe.model.moe_layer",
    "Recipe": "moe.recipe",
    "Router": "moe.routers.base",
    "Routing": "moe.routers.base",
    "Tokens": "moe.routers.base",
    "Transformer": "moe.model.transformer",
}
__all__ = ["__version__", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'moe' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
