"""DECISIONS: which token goes to which expert. One file a router; the table is the list of them.

To add one: a file with a `Router` subclass, a line here, and a test of its own mathematics.
"""

from __future__ import annotations

import inspect
from typing import Any

from moe.errors import ConfigError
from moe.routers.base import Router, Routing, Tokens
from moe.tables import entry, nearest

__all__ = ["ROUTERS", "Router", "Routing", "Tokens", "build"]

ROUTERS = {
    "top_k": "moe.routers.top_k:TopK",
    "noisy_top_k": "moe.routers.noisy_top_k:NoisyTopK",
    "hash": "moe.routers.hash:Hash",
    "expert_choice": "moe.routers.expert_choice:ExpertChoice",
    "sinkhorn": "moe.routers.sinkhorn:Sinkhorn",
    "base": "moe.routers.assignment:BalancedAssignment",
    "sparse_ot": "moe.routers.sparse_ot:SparseOT",
    "sigma": "moe.routers.sigma:Sigma",
    "comet": "moe.routers.comet:Comet",
    "dselect_k": "moe.routers.dselect_k:DSelectK",
    "local_search": "moe.routers.local_search:LocalSearch",
    "avg_k": "moe.routers.avg_k:AvgK",
    "sparse_mixer": "moe.routers.sparse_mixer:SparseMixer",
    "dense_to_sparse": "moe.routers.dense_to_sparse:DenseToSparse",
    "remoe": "moe.routers.remoe:ReMoE",
}


def build(router: str | dict[str, Any], d_model: int, num_experts: int) -> Router:
    """The router that a name, or a dictionary {name, options…} as in a recipe, describes."""
    options = {"name": router} if isinstance(router, str) else dict(router)
    make = entry(ROUTERS, str(options.pop("name", "")), "router")
    allowed = {p.name: p.default for p in inspect.signature(make).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for option in options:
        if option not in allowed:
            raise ConfigError(f"{make.__name__} has no option {option!r}; {nearest(option, allowed)}")
    missing = [option for option, default in allowed.items() if default is inspect.Parameter.empty and option not in options]
    if missing:
        raise ConfigError(f"{make.__name__} needs {', '.join(missing)}; add router.{missing[0]}=…")
    return make(d_model, num_experts, **options)
