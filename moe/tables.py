"""Tables of names: a literal dictionary from a name to "module:object", loaded when the name is asked for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from moe.errors import ConfigError


def entry(table: Mapping[str, str], name: str, what: str) -> Any:
    """The object that `table` names; `what` is the word for it in the error, as in "router"."""
    if name not in table:
        raise ConfigError(f"unknown {what} {name!r}; {nearest(name, table)}")
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def nearest(word: str, known: Iterable[str]) -> str:
    """What to type instead of a misspelt word: the closest known ones, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=2)
    return f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(known)}"
