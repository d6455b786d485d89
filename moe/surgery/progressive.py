"""Fine-tuning on a task while experts that it does not use go for good, as Chen et al. (2022) do; what is left is written as a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moe.checkpoint.weights import MODEL, save_weights
from moe.config import load
from moe.engines.schedule import learning_rate
from moe.errors import ConfigError
from moe.recipe import Recipe
from moe.surgery.experts import sized
from moe.surgery.job import Job
from moe.surgery.prune import Pruning, Score, Watch, dense_settings
from moe.surgery.resize import keep as keeping
from moe.surgery.resize import layer_of, remapped
from moe.surgery.settings import settings_of
from moe.train.begin import begin
from moe.train.console import Console
from moe.train.folder import open_folder
from moe.train.loop import Progress, build_engine, build_loader, build_model, join, read_corpus


def read(words: Sequence[str], source: Path, data: Path, folder: Path, keep: int) -> Recipe:
    """The recipe of fine-tuning: files and key=value, with what to begin from and what to read filled in."""
    files = [word for word in words if "=" not in word or Path(word).is_file()]
    given = [word for word in words if word not in files]
    paragraphs = [{"name": "text", "paths": [str(data.expanduser().resolve())], "document": "paragraph"}]
    recipe = load(files, [*given, f"init.from={source}", f"run.folder={folder}", f"data.sources={json.dumps(paragraphs)}"])
    if recipe.model.moe is None:
        raise ConfigError(f"{source} is a dense model, which has no experts; give a mixture")
    if recipe.engine.name != "ddp" or recipe.parallel.expert_ranks > 1:
        raise ConfigError(
            f"experts go while one process trains, not with engine.name={recipe.engine.name} and "
            f"parallel.expert_ranks={recipe.parallel.expert_ranks}; choose engine.name=ddp and parallel.expert_ranks=1"
        )
    if keep == 1:
        dense_settings(sized(recipe.model, 1, 1))  # refused before the training, not after it
    return recipe


def fine_tune(recipe: Recipe, *, keep: int, window: int | None, beta: float, score: Score, out: Path) -> None:
    """Train as the recipe says until `keep` experts of each layer are left, which they are at its last step; write them to `out`.

    window: steps between two looks at the scores; None: a tenth of all. out: becomes a model of ours, with its moments.
    """
    steps = recipe.train.steps
    mesh, console = join(recipe), Console(first=True)
    corpus = read_corpus(recipe, mesh, open_folder(recipe) / "tokens")
    model = build_model(recipe, corpus.tokenizer)
    engine, loader = build_engine(recipe, model, mesh, first_weights=False), build_loader(recipe, corpus, mesh)
    assert recipe.origin is not None
    console.say(begin(recipe.origin, engine, mesh))
    experts = {layer: router.num_experts for layer, router in model.routers().items()}
    watch = Watch(model.train(), Pruning(experts, window or max(1, steps // 10), beta, steps, keep), score=score)
    own, engine.routers = engine.routers, [*watch.routers.values()]
    progress = Progress()
    while progress.step < steps:
        result = engine.step(loader.take(), progress.step, learning_rate(recipe.schedule, progress.step, steps, recipe.optimizer.lr))
        progress.advance(result, recipe.train.skip_limit)
        if watch.end_step(progress.step):
            left = ", ".join(str(len(active)) for active in watch.pruning.active.values())
            console.say(f"step {progress.step} of {steps}: loss {result.loss:.4f}; experts left in each sparse layer: {left}")
    watch.close()
    engine.routers = own
    _write(out, recipe, corpus.tokenizer.vocab, engine.canonical_state(), watch.pruning.active)


def _write(out: Path, recipe: Recipe, vocab: int, state: Mapping[str, Tensor], active: Mapping[int, list[int]]) -> None:
    moe = recipe.model.moe
    assert moe is not None
    count = len(next(iter(active.values())))
    mappings = {layer: keeping(kept, moe.experts) for layer, kept in active.items()}
    few: dict[str, Any] = {}
    for name, tensor in state.items():
        layer = layer_of(name)
        few[MODEL + name.removeprefix(MODEL)] = (
            tensor if layer is None else remapped(name, tensor.detach(), mappings[layer], moe.router["name"])
        )
    model = sized(recipe.model, count, min(moe.router.get("k", 1), count))
    said = settings_of(Job(model.model_dump(mode="json") | {"vocab": recipe.model.vocab or vocab}, [], {}, "moe"), recipe.data.tokenizer)
    out.mkdir(parents=True)
    (out / said.name).write_text(said.text)
    save_weights(out / "weights", few)
