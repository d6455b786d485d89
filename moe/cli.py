"""The door: one function a verb. Nothing here imports torch before a verb needs it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import moe
from moe.errors import ConfigError, MoeError
from moe.studies.cli import study
from moe.surgery.verbs import surgery

INTERRUPTED = 130


class Verbs(TyperGroup):
    """Turns what a verb raises into a line on stderr and an exit code; anything unexpected keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MoeError as error:
            for line in str(error).splitlines():
                typer.echo(typer.style("error: ", fg="red", bold=True) + line, err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(name="moe", cls=Verbs, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
config = typer.Typer(no_args_is_help=True, help="Look at recipes.")
app.add_typer(config, name="config")
app.add_typer(study, name="study")

Words = Annotated[
    list[str] | None, typer.Argument(help="YAML files, merged left to right, then key=value.", metavar="FILES... [KEY=VALUE]...")
]
Run = Annotated[Path, typer.Argument(help="Folder of a run.")]


def main() -> None:
    """Run the command line."""
    app(prog_name="moe")


def print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"moe {moe.__version__}")
        raise typer.Exit


@app.callback()
def verbs(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=print_version, help="Print the version.")] = False,
) -> None:
    """Train Mixture-of-Experts language models, from one CPU core to a cluster."""


@app.command()
def train(
    words: Words = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Start this many ranks on this machine, as torchrun would.")] = None,
) -> None:
    """Train what a recipe describes; the same command again goes on where it stopped."""
    from moe.parallel.launch import launch, run_rank

    files, overrides = split(words)
    if "RANK" in os.environ:
        if nproc is not None:
            raise ConfigError(f"--nproc {nproc} under torchrun would start ranks within a rank; leave it out")
        run_rank(lambda: run(load(files, overrides)))
    recipe = load(files, overrides)
    if nproc is None:
        run_rank(lambda: run(recipe))
    recipe.check_ranks(nproc)
    raise typer.Exit(launch([*files, *overrides], nproc, restarts=recipe.train.restarts))


@app.command()
def profile(
    words: Words = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Start this many ranks on this machine, as torchrun would.")] = None,
    warm_up: Annotated[int, typer.Option(min=1, help="Steps before the trace begins.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are traced.")] = 2,
) -> None:
    """Train a few steps of a recipe under torch's profiler: time by stage and operator, host waits, and a trace a rank."""
    from moe.parallel.launch import launch, run_rank

    files, overrides = split(words)
    recipe = load(files, overrides)
    if "RANK" in os.environ or nproc is None:
        from moe.train.profile import profile

        run_rank(lambda: profile(recipe, warm_up, steps))
    recipe.check_ranks(nproc)
    options = [f"--warm-up={warm_up}", f"--steps={steps}"]
    raise typer.Exit(launch([*files, *overrides, *options], nproc, program=("-m", "moe", "profile")))


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of a Hugging Face model.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "def ",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample among the likeliest tokens of this total probability.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Let a trained model write."""
    from moe.train.sample import generate

    typer.echo(generate(run, prompt, tokens, temperature=temperature, top_p=top_p, seed=seed))


@app.command()
def inspect(run: Run, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what was trained, how it went, and how the experts were used."""
    from moe.train.inspect import inspect, show

    facts = inspect(run)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        show(facts)


@app.command()
def verify(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="YAML files, each a recipe of its own (a.yaml+b.yaml: merged into one), then key=value.",
            metavar="RECIPE... [KEY=VALUE]...",
        ),
    ] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option("--layouts", help="Such as engine=fsdp2,ranks=4,expert_ranks=2; several in quotes or again. Default: all that fit."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 3,
    dtype: Annotated[list[str] | None, typer.Option(help="float64, float32 or bfloat16. Default: float64 and the recipe's.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write everything that was found to this file.")] = None,
) -> None:
    """Prove that layouts train the same as one process, on a small form of a recipe's model."""
    from moe.verify.prove import verify

    files, overrides = split(words, joined="+")
    recipes = {file: load(file.split("+"), overrides) for file in files}
    wanted = [text for option in layout or () for text in option.split()]
    raise typer.Exit(0 if verify(recipes, wanted, steps=steps, dtypes=dtype or (), out=out) else 1)


app.registered_commands += surgery.registered_commands


@app.command()
def plan(
    words: Words = None,
    devices: Annotated[int, typer.Option(min=1, help="Ranks of the cluster, which need not exist.")] = 64,
    sigma: Annotated[float, typer.Option(min=0, help="Spread of the logarithms of experts' loads; 2 to 2.5 without a balance loss.")] = 2.0,
    trace: Annotated[Path | None, typer.Option(help="Recorded loads in place of synthetic ones.")] = None,
) -> None:
    """Project a recipe's step on a cluster that need not exist: time, memory and traffic of every policy of copies."""
    from rich.console import Console

    from moe.planner.show import plan, show

    Console().print(show(plan(load(*split(words)), devices, sigma=sigma, trace=trace)))


@app.command()
def tokenize(
    sources: Annotated[list[str], typer.Argument(help="stdlib, paths or globs of text or .jsonl, or '{name: huggingface, dataset: …}'.")],
    out: Annotated[Path, typer.Option(help="New folder for the tokens.")],
    tokenizer: Annotated[str, typer.Option(help="bytes, or the path of a tokenizer.json.")] = "bytes",
) -> None:
    """Turn text into token files that a run reads through the source `tokens`."""
    from moe.data.prepare import tokenize

    tokens = tokenize([source(word) for word in sources], out, tokenizer)
    typer.echo(f"{tokens.offsets[-1]:,} tokens of {len(tokens.offsets) - 1:,} documents in {out}")


@app.command()
def tune(
    words: Words = None,
    shape: Annotated[
        str | None, typer.Option(help="In place of a recipe: d=…,f=…,experts=…,k=…,tokens=…; experts and tokens of one rank.")
    ] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Ranks that the recipe is to run on.")] = None,
    out: Annotated[Path | None, typer.Option(help="Table to write, if not the one that runs read.")] = None,
) -> None:
    """Measure the Triton kernels for a recipe on this machine's GPU; runs then use the fastest configurations."""
    from moe.train.tune import read_shape, shape_of, tune

    if (shape is None) == (not words):
        raise ConfigError("moe tune takes a recipe or --shape, one of them; give configs/debug.yaml, say")
    tune(shape_of(load(*split(words)), nproc) if shape is None else read_shape(shape), out, typer.echo)


@config.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from moe.config import schema
    from moe.recipe import Recipe

    typer.echo(json.dumps(schema(Recipe), indent=2))


@config.command()
def show(words: Words = None) -> None:
    """Print the recipe that files and overrides make, with every default."""
    from moe.config import dump

    typer.echo(dump(load(*split(words))), nl=False)


@app.command()
def doctor() -> None:
    """Show what this machine has, and which backends run on it."""
    from rich.console import Console

    from moe.train.doctor import doctor

    Console(highlight=False).print(doctor())


def split(words: list[str] | None, joined: str | None = None) -> tuple[list[str], list[str]]:
    """Files and key=value overrides; a word is an override if a = comes before anything that only a path has.

    joined: what stands between files where several are one word.
    """
    words = words or []
    overrides = [word for word in words if "=" in word and not set("/\\") & set(word.partition("=")[0])]
    files = [word for word in words if word not in overrides]
    for word in [part for file in files for part in (file.split(joined) if joined else [file])]:
        if not Path(word).exists() and Path(word).suffix not in (".yaml", ".yml") and "/" not in word:
            raise ConfigError(f"{word} is neither a file nor key=value; write {word}=VALUE, or the path of a YAML file")
    if not files:
        raise ConfigError("no recipe is named; give at least one file, such as configs/debug.yaml")
    return files, overrides


def load(files: list[str], overrides: list[str]) -> Any:
    from moe.config import load

    return load(files, overrides)


def source(word: str) -> str | dict[str, Any]:
    """A source of `moe tokenize`: a mapping in YAML, the name of a source, or the path of a file."""
    from moe.data.sources import SOURCES
    from moe.yaml_reader import read_text

    if word.startswith("{"):
        return read_text(word, "command line", lines=False)[0]
    if word in SOURCES:
        return word
    return {"name": "jsonl" if word.endswith((".jsonl", ".ndjson")) else "text", "paths": [word]}


def run(recipe: Any) -> None:
    from moe.train.loop import train

    train(recipe)
