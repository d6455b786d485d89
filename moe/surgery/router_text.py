"""Upcycling whose routers begin with what a text does in the dense model, in place of random rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from moe.checkpoint.weights import OPTIMIZER
from moe.data.tokenizer import Tokenizer, open_tokenizer
from moe.errors import ConfigError, DataError
from moe.surgery import branches as several
from moe.surgery import upcycle
from moe.surgery.check import load_ours
from moe.surgery.convert import ours_of
from moe.surgery.job import Job, Source, Target
from moe.surgery.routers import groups_of, hidden_states, mean_rows, text_rows
from moe.surgery.source import TOKENIZER, open_source, read_text

ROWS, POSITIONS = 32, 128  # of a text that is looked at: enough for hundreds of experts, seconds for a model of billions


def plan(
    source: str,
    *,
    text: str,
    parts: Literal["clusters", "prompts"],
    experts: int,
    spread: float = 1.0,
    branches: Sequence[str] = (),
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[Source, Job]:
    """Open a dense model and say what its upcycling writes, as `upcycle.plan` (with branches: `branches.plan`), but for routers.

    text: a file; parts: its hidden states in clusters of likes, one an expert ("clusters"), or one paragraph for each expert
        ("prompts"; in virtual groups for each group). spread: of the logits over experts, on that text.
    """
    settings = dict(settings or {})
    group = settings.get("granularity", 1) if options.get("variant") == "virtual_group" else 1
    options |= {"experts": experts, "seed": seed, "settings": settings}
    options["router_std"] = 0.02  # not what comes out: a family that is exact with equal logits alone is not
    opened, job = several.plan(source, branches=branches, **options) if branches else upcycle.plan(source, **options)
    words = _words(text, groups_of(experts, group) if parts == "prompts" else None)

    @cache
    def rows() -> dict[int, Tensor]:
        dense = ours_of(open_source(source))
        tokenizer = open_tokenizer(str(dense.folder / TOKENIZER) if TOKENIZER in dense.travels else dense.tokenizer or "bytes")
        return _rows(dense, tokenizer, words, parts, experts=experts, group=group, spread=spread, seed=seed)

    def of(target: Target) -> Target:
        found = re.search(r"\.(\d+)\.", target.name)
        if (
            target.sources
            or found is None
            or target.name.startswith(OPTIMIZER)
            or len(target.spec.shape) != 2
            or target.spec.shape[0] != experts
        ):
            return target
        layer = int(found[1])
        return target._replace(make=lambda _: rows()[layer].to(target.spec.dtype))

    return opened, job._replace(targets=[of(target) for target in job.targets])


def _words(path: str, prompts: int | None) -> list[str]:
    """The text, whole or as so many paragraphs."""
    text = read_text(path)
    if prompts is None:
        return [text]
    found = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    if len(found) != prompts:
        raise ConfigError(
            f"{path} has {len(found)} paragraphs for {prompts} rows of a router; write one for each, with an empty line between"
        )
    return found


def _rows(
    dense: Source, tokenizer: Tokenizer, words: list[str], parts: str, *, experts: int, group: int, spread: float, seed: int
) -> dict[int, Tensor]:
    model = load_ours(dense)
    seen = [hidden_states(model, ids) for ids in (_ids(tokenizer, text, dense.config["context"]) for text in words)]
    found = {}
    for layer in seen[0]:
        hidden = [states[layer] for states in seen]
        if parts == "prompts":
            found[layer] = mean_rows(hidden, spread=spread, group=group)
        else:
            found[layer] = text_rows(hidden[0], experts, seed=seed, layer=layer, spread=spread, group=group)
    return found


def _ids(tokenizer: Tokenizer, text: str, context: int) -> Tensor:
    """A text's tokens, in rows as far as they are full."""
    ids = torch.from_numpy(tokenizer.encode(text)[: ROWS * POSITIONS].astype("int64"))
    width = min(POSITIONS, context, len(ids))
    if not width:
        raise DataError("a text for a router is empty; give one with words")
    return ids[: len(ids) // width * width].view(-1, width)
