"""`moe profile`: a few steps of a recipe under torch's profiler."""

from __future__ import annotations

import time
from pathlib import Path

from moe.recipe import Recipe
from moe.train.begin import begin
from moe.train.console import Console
from moe.train.loop import build_engine, build_loader, build_model, join, learn, read_corpus
from moe.train.profiler import Profiler, tables

VIEWER = "https://ui.perfetto.dev"


def profile(recipe: Recipe, warm_up: int, steps: int) -> None:
    """Train `warm_up` steps of a recipe and then `steps` under the profiler, print where the time goes, and save nothing else.

    Traces lie beside the run's folder, in one that ends with -profile; a run that is there already is left alone.
    """
    mesh = join(recipe)
    console, folder = Console(first=mesh.first), Path(f"{recipe.run.folder.rstrip('/')}-profile").expanduser()
    corpus = read_corpus(recipe, mesh, folder / "tokens")
    model = build_model(recipe, corpus.tokenizer)
    engine, loader = build_engine(recipe, model, mesh), build_loader(recipe, corpus, mesh)
    if recipe.origin is not None:
        console.say(begin(recipe.origin, engine, mesh))
    traced = range(warm_up + 1, warm_up + steps + 1)
    profiler, seconds, tokens = Profiler(traced, folder, mesh, console.say), [], 0
    for number in range(1, traced.stop):
        before = time.perf_counter()
        with profiler.step(number):
            tokens = learn(engine, loader, number - 1, recipe.optimizer.lr).tokens  # known once the device has done the step
        seconds.append(time.perf_counter() - before)
    steady = sorted(seconds[1 : warm_up - 1] or seconds[: warm_up - 1] or seconds)  # the profiler warms up in the last one
    steady_ms = 1000 * steady[len(steady) // 2]
    console.terminal.print(tables(profiler.found[0]))
    console.say(f"\nwithout the profiler a step took {steady_ms:,.1f} ms, {1000 * tokens / steady_ms:,.0f} tokens/s over all ranks")
    console.say(f"one trace a rank: {folder.resolve()}/rank*-step*.json.gz; drag one into {VIEWER} (it stays in your browser)")
