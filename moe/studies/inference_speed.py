"""How fast models are in use: tokens a second of one thread, reading, and writing several sequences at once."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moe.model.generate import generate
from moe.scaling.results import RUNS, shape
from moe.scaling.speeds import READ, SPEEDS, WRITE
from moe.studies.grid import Run
from moe.studies.run_process import held
from moe.studies.warm_start import has_weights
from moe.train.folder import processor, write_whole
from moe.train.sample import open_model

BATCHES = (1, 4, 16, 64)  # sequences that are written at once
TOKENS = 64  # written of each
_ROUNDS = 5
_READ, _SEQUENCE, _PROMPT = 8, 256, 8  # sequences read at once, their tokens at most, and those of a prompt


def timed(runs: Sequence[Run]) -> dict[str, str]:
    """Each shape of model that runs of the largest family begin with, and the folder among the study's runs that is timed for it."""
    begun = [run for run in runs if run.origin is not None]
    largest, found = max((run.base for run in begun), default=0), {}
    for run in begun:
        if run.base == largest and run.origin is not None:
            found.setdefault("dense", run.origin.twin.id)
            found.setdefault(shape(run.axes), run.origin.id)
    return found if len(found) > 1 else {}  # of one shape there is nothing to compare


def measure(study: Path, runs: Sequence[Run]) -> str | None:
    """Time what runs of the largest family begin with, once, into speeds.json; a sentence of it, None where there is nothing to do."""
    wanted = timed(runs)
    with held(study, "speeds"):  # several workers may end at once
        if not wanted or (study / SPEEDS).exists():
            return None
        there = {name: study / RUNS / folder for name, folder in wanted.items() if has_weights(study, folder)}
        if "dense" not in there or len(there) < 2:
            return f"how fast the models are in use was not measured: weights of {', '.join(sorted(wanted.keys() - there.keys()))} are gone"
        largest = max((run for run in runs if run.origin is not None), key=lambda run: run.base)
        found = speeds(there)
        facts: dict[str, Any] = {"machine": processor(), "threads": 1, "tokens": TOKENS}
        facts["family"] = {name: largest.axes[name] for name in ("d_model", "layers", "heads", "d_ff")}
        write_whole(study / SPEEDS, json.dumps({**facts, "speeds": found}, indent=1) + "\n")
    return f"how fast {len(there)} models are in use: {study / SPEEDS}"


def speeds(folders: Mapping[str, Path], tokens: int = TOKENS, rounds: int = _ROUNDS) -> dict[str, dict[str, list[float]]]:
    """Tokens a second of one thread of the processor, the models in turn: reading 8 sequences, and writing 1 to 64 at once."""
    models = {name: open_model(folder)[0].cpu() for name, folder in folders.items()}
    kinds = (READ, *(f"{WRITE}{batch}" for batch in BATCHES))
    found: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in kinds} for name in models}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in range(rounds + 1):
            for name, model in models.items():
                took = _round(model, number, tokens)
                for kind, rate in took.items() if number else ():  # the first round warms caches and the allocator
                    found[name][kind].append(rate)
    finally:
        torch.set_num_threads(before)
    return found


@torch.no_grad()
def _round(model: Any, number: int, tokens: int) -> dict[str, float]:
    """Tokens a second of each kind."""
    vocabulary, length = model.embed.weight.shape[0], min(_SEQUENCE, model.settings.context)
    ids = torch.randint(vocabulary, (max(*BATCHES, _READ), length), generator=torch.Generator().manual_seed(number))
    ids = ids.to(model.embed.weight.device)
    tokens = min(tokens, model.settings.context - _PROMPT) if model.positions is not None else tokens
    took = {READ: _READ * length / _time(lambda: model.predict(ids[:_READ]))}
    for batch in BATCHES:
        prompt = ids[:batch, :_PROMPT]
        took[f"{WRITE}{batch}"] = batch * tokens / _time(lambda prompt=prompt: generate(model, prompt, tokens, temperature=0))
    return took


def _time(call: Any) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start
