"""DECISIONS: which token goes to which expert. One file a router; the table is the list of them.

To add one: a file with a `Router` subclass, a line here, and a test of its own mathematics.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from typing import Any

from moe.errors import ConfigError
from moe.routers.base import Router, Routing, Tokens

__all__ = ["ROUTERS", "Router", "Routing", "Tokens", "build"]

ROUTERS = {
    "top_k": "moe.routers.top_k:TopK",
}


def build(router: str | dict[str, Any], d_model: int, num_experts: int) -> Router:
    """The router that a name, or a dictionary {name, options…} as in a recipe, describes."""
    options = {"name": router} if isinstance(router, str) else dict(router)
    name = options.pop("name", None)
    if name not in ROUTERS:
        raise ConfigError(f"there is no router {name!r}{_nearest(str(name), ROUTERS)}; choose from {', '.join(ROUTERS)}")
    module, cls = ROUTERS[name].split(":")
    make = getattr(importlib.import_module(module), cls)
    allowed = {p.name: p.default for p in inspect.signature(make).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for option in options:
        if option not in allowed:
            raise ConfigError(f"router {name} has no option {option!r}{_nearest(option, allowed)}; choose from {', '.join(allowed)}")
    missing = [option for option, default in allowed.items() if default is inspect.Parameter.empty and option not in options]
    if missing:
        raise ConfigError(f"router {name} needs {', '.join(missing)}; add router.{missing[0]}=…")
    return make(d_model, num_experts, **options)


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
