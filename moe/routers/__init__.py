"""DECISIONS: which token goes to which expert. One file a router; the table is the list of them.

To add one: a file with a `Router` subclass, a line here, and a test of its own mathematics.
"""

from __future__ import annotations

from moe.routers.base import Router, Routing, Tokens

__all__ = ["ROUTERS", "Router", "Routing", "Tokens"]

ROUTERS = {
    "top_k": "moe.routers.top_k:TopK",
}
