"""The loop: from a recipe to a trained model, read from top to bottom."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moe import faults
from moe.checkpoint.store import Store
from moe.checkpoint.weights import save_weights
from moe.data.corpus import Corpus, open_corpus, prepare
from moe.data.loader import Loader
from moe.data.tokenizer import Tokenizer
from moe.engines import ENGINES
from moe.engines.base import StepResult
from moe.engines.schedule import learning_rate
from moe.errors import ConfigError, NonFinite, Preempted
from moe.kernels import auto, why
from moe.kernels.memory import keep_freed_memory
from moe.model.cost import cost, describe
from moe.model.stages import stage
from moe.model.transformer import Transformer
from moe.parallel.drift import check_replicas
from moe.parallel.fingerprint import check_agreement
from moe.parallel.launch import StopSignal
from moe.parallel.mesh import Mesh, start
from moe.recipe import Recipe
from moe.tables import entry
from moe.train.begin import begin
from moe.train.console import Console
from moe.train.deterministic import be_deterministic
from moe.train.evaluate import Evaluation
from moe.train.folder import flatten, open_folder, write_whole
from moe.train.memory import check_memory, explaining
from moe.train.metrics import Clock, Metrics, row_of
from moe.train.tune import share_table
from moe.train.watch import Watch


@dataclass
class Progress:
    """What crosses a step and belongs to neither engine nor loader."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0

    def advance(self, result: StepResult, limit: int) -> None:
        """Count a step; raise NonFinite after `limit` skipped ones in a row."""
        self.step += 1
        self.tokens += result.tokens
        self.skipped += not result.applied
        self.skipped_in_a_row = 0 if result.applied else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= limit:
            raise NonFinite(
                f"loss or gradient was not finite in {limit} steps in a row, the last being step {self.step}; "
                "lower optimizer.lr or raise schedule.warmup"
            )


def train(recipe: Recipe) -> None:
    """Run a recipe to its end, going on from its newest checkpoint if it has one."""
    mesh = join(recipe)
    console = Console(first=mesh.first)
    folder = Path(recipe.run.folder).expanduser()
    mesh.first_does(lambda: open_folder(recipe))

    corpus = read_corpus(recipe, mesh, folder / "tokens")
    console.say(corpus.describe())
    model = build_model(recipe, corpus.tokenizer)
    price = cost(model, recipe.data.sequence)
    console.say(describe(price))
    for line in describe_kernels(recipe, model, mesh.device):
        console.say(line)
    mesh.first_does(lambda: write_whole(folder / "model.json", json.dumps(price._asdict()) + "\n"))

    store = Store(folder / "checkpoints", mesh, keep=recipe.checkpoint.keep, durable_every=recipe.checkpoint.durable_every)
    engine = build_engine(recipe, model, mesh, first_weights=not store.steps() and recipe.origin is None)
    loader = build_loader(recipe, corpus, mesh)
    progress = restore(store, engine, loader, console, recipe)
    metrics = Metrics(folder, recipe.log, first=mesh.first, from_step=progress.step)
    evaluation = Evaluation(recipe, corpus, engine, mesh, folder)
    watch = Watch(recipe, engine, mesh, folder, console.say)
    clock = Clock(price.training_flops, recipe.train.dtype, mesh.world, mesh.device)

    steps = recipe.train.steps
    with StopSignal() as stop, console.progress(progress.step, steps):
        while progress.step < steps:
            lr = learning_rate(recipe.schedule, progress.step, steps, recipe.optimizer.lr)
            faults.point("loop/step", step=progress.step)
            logged = due(progress.step + 1, recipe.log.every, progress.step + 1 in (1, steps))
            with watch.step(progress.step + 1, logged):
                result = learn(engine, loader, progress.step, lr)
            progress.advance(result, recipe.train.skip_limit)
            clock.tokens += result.tokens
            store.poll()

            step, last = progress.step, progress.step == steps
            stopping = bool(mesh.agree(stop.asked)) and not last
            saving = due(step, recipe.checkpoint.every, last or stopping)
            console.advance(step)
            compare_replicas(recipe, mesh, engine, step, saving)
            if logged or not result.applied:
                row = row_of(result, step=step, lr=lr, model=model, **watch.figures()) | clock.read() | seen(progress, loader)
                metrics.write(row)
                console.step(row)
            if due(step, recipe.evaluate.every, last):
                validate(evaluation, step, clock, metrics, console)
            if saving:
                with clock.paused():
                    save(store, engine, loader, progress, background=recipe.checkpoint.mode == "background")
            if stopping:
                store.finish()
                raise Preempted(f"stopped at step {step} of {steps} with a checkpoint in {folder}; the same command goes on from there")

    store.finish()
    save_weights(folder / "weights", engine.canonical_state(), mesh)
    metrics.close()
    console.summary(folder, evaluation.sample(progress.step))


def learn(engine: Any, loader: Loader, step: int, lr: float) -> StepResult:
    """Learn from the next batch."""
    with stage("read batch"):
        batch = loader.take()
    faults.point("loop/learn", step=step)
    return engine.step(batch, step, lr)


def join(recipe: Recipe) -> Mesh:
    """Join the job's ranks, once they agree on what to do and their number allows it."""
    if recipe.train.deterministic:
        be_deterministic()
    mesh = start(recipe.parallel)
    backend = recipe.model.moe.backend if recipe.model.moe else "auto"
    if (reason := why(backend)) is not None:
        raise ConfigError(f"model.moe.backend={backend}: {reason}; use model.moe.backend=auto")
    if mesh.device.type == "cpu":
        keep_freed_memory()
    recipe.check_ranks(mesh.world)
    check_memory(recipe, mesh)
    facts = {key: repr(value) for key, value in flatten(recipe.model_dump()).items()}
    if recipe.parallel.copies.active:
        facts["parallel.machine_ranks"] = str(mesh.machine_ranks)  # as torchrun started this rank, if the recipe does not say
    check_agreement(mesh, facts)
    share_table(mesh)
    return mesh


def due(step: int, every: int, always: bool) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return always or step % every == 0


def compare_replicas(recipe: Recipe, mesh: Mesh, engine: Any, step: int, saving: bool) -> None:
    """Stop if copies of anything have come apart, every so many steps and before what is saved; by then nothing spoilt is."""
    every = recipe.train.check_replicas
    if every is not None and due(step, every, saving):
        check_replicas(mesh, engine.replicas(), step)


def validate(evaluation: Evaluation, step: int, clock: Clock, metrics: Metrics, console: Console) -> None:
    """Measure held-out loss, and record and show it."""
    with clock.paused():
        row = evaluation.run(step)
    metrics.write(row)
    console.validation(row)


def seen(progress: Progress, loader: Loader) -> dict[str, Any]:
    """What has been read so far: tokens, tokens by source, and how often the most-read source has been."""
    return {"tokens": progress.tokens, "tokens_by_source": loader.tokens_seen, "epochs": round(max(loader.epochs.values()), 4)}


def read_corpus(recipe: Recipe, mesh: Mesh, folder: Path) -> Corpus:
    """The recipe's corpus; the first rank tokenises it unless an earlier start of the run did."""
    data = recipe.data
    mesh.first_does(lambda: prepare(data.sources, data.tokenizer, folder, validation=data.validation))
    return open_corpus(folder)


def build_model(recipe: Recipe, tokenizer: Tokenizer) -> Transformer:
    """The recipe's model as a shape, on the meta device."""
    asked = recipe.model.vocab
    if asked is not None and asked < tokenizer.vocab:
        raise ConfigError(
            f"model.vocab={asked} is less than the {tokenizer.vocab} tokens of data.tokenizer={recipe.data.tokenizer}; "
            f"give data.tokenizer=PATH of the model's own tokenizer.json, or a new model model.vocab=null or at least {tokenizer.vocab}"
        )
    with torch.device("meta"):
        return Transformer(recipe.model, asked or tokenizer.vocab, seed=recipe.train.seed, document_mask=recipe.data.document_mask)


def describe_kernels(recipe: Recipe, model: Transformer, device: torch.device) -> list[str]:
    """What computes experts, if there are any, and what is compiled, if anything is."""
    lines = [] if recipe.model.moe is None else [describe_experts(recipe, model, device)]
    return lines + [describe_compiled(model)] * recipe.engine.compile


def describe_experts(recipe: Recipe, model: Transformer, device: torch.device) -> str:
    """Which backend multiplies the experts, of which shapes, and why."""
    moe = recipe.model.moe
    assert moe is not None
    k = getattr(next(iter(model.routers().values())), "k", None)
    dtype = getattr(torch, recipe.train.dtype)
    return auto.describe(moe.backend, auto.machine(device.type, device.index), dtype, recipe.model.d_model, moe.d_expert, moe.experts, k)


def describe_compiled(model: Transformer) -> str:
    """What torch.compile takes, and what it leaves and why."""
    taken, left = (
        ["attention with rotary", "feed-forward networks", "norms", "residuals"],
        ["dispatch", "routed experts and their residual"],
    )
    routers = list(model.routers().values())
    if not routers:
        return f"compiled: {', '.join(taken)}"
    reason = routers[0].eager
    (left if reason else taken).append("routers" + (f" ({reason})" if reason else ""))
    return f"compiled: {', '.join(taken)}; eager: {', '.join(left)}"


def build_engine(recipe: Recipe, model: Transformer, mesh: Mesh, *, first_weights: bool = True) -> Any:
    """The recipe's engine around a model on the meta device; without `first_weights` it waits for those that it is given."""
    with explaining(recipe, mesh):
        return entry(ENGINES, recipe.engine.name, "engine")(
            model,
            mesh,
            optimizer=recipe.optimizer,
            engine=recipe.engine,
            dtype=recipe.train.dtype,
            accumulate=recipe.train.accumulate,
            clip=recipe.train.clip,
            balance_window=recipe.train.balance_window,
            seed=recipe.train.seed,
            first_weights=first_weights,
        )


def build_loader(recipe: Recipe, corpus: Corpus, mesh: Mesh) -> Loader:
    """The recipe's training batches, this rank's rows of them."""
    return Loader(
        corpus,
        sequence=recipe.data.sequence,
        batch=recipe.train.batch,
        seed=recipe.train.seed,
        rank=mesh.rank,
        world=mesh.world,
        document_mask=recipe.data.document_mask,
    )


def restore(store: Store, engine: Any, loader: Loader, console: Console, recipe: Recipe) -> Progress:
    """Progress of the newest checkpoint, with engine and loader brought to it; of step 0 if there is none.

    Then the engine takes the weights that `init.from` names, or keeps the first ones that it has drawn.
    """
    if not store.steps():
        if recipe.origin is not None:
            console.say(begin(recipe.origin, engine, store.mesh))
        return Progress()
    state = engine.canonical_state()
    scalars = store.load(state)
    engine.load_canonical(state)
    loader.restore(scalars["loader"])
    engine.foresee(scalars.get("foresight", []))
    progress = Progress(**scalars["progress"])
    steps = recipe.train.steps
    if progress.step < steps:
        console.say(f"going on from step {progress.step}")
    else:
        console.say(f"step {progress.step} was reached before, and train.steps={steps} asks for no more; raise train.steps to train on")
    return progress


def save(store: Store, engine: Any, loader: Loader, progress: Progress, *, background: bool) -> None:
    """Write a checkpoint of everything that the next step depends on."""
    scalars = {"progress": asdict(progress), "loader": loader.state(), "foresight": engine.foresight()}
    store.save(progress.step, engine.canonical_state(), scalars, background=background)
