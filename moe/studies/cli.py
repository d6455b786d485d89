"""`moe study …`: one thin function a verb. Nothing here imports torch before a verb needs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

study = typer.Typer(no_args_is_help=True, help="Find out which model a budget deserves.")

Words = Annotated[
    list[str], typer.Argument(help="YAML files of a study, merged left to right, then key=value.", metavar="STUDY... [KEY=VALUE]...")
]
Folder = Annotated[Path, typer.Argument(help="A study's folder, or its YAML file.", metavar="STUDY")]
WeightBytes = Annotated[float, typer.Option(min=0.1, help="Of a parameter: 2 in bfloat16; about 16 to train with AdamW.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Runs at once. Default: as many as the study's cores allow.")]


@study.command("run")
def run(
    words: Words,
    yes: Annotated[bool, typer.Option("--yes", help="Start without asking.")] = False,
    workers: Workers = None,
    share: Annotated[str, typer.Option(help="0/4 … 3/4: which quarter to take first, beside three others at the same folder.")] = "0/1",
) -> None:
    """Run what is missing of a study, once it is told what that costs; the same command again goes on."""
    from moe.studies.runner import run

    raise typer.Exit(run(words, yes=yes, workers=workers, share=share))


@study.command()
def status(study: Folder) -> None:
    """Show what of a study is done, running and failed, and how long the rest takes."""
    from moe.studies.status import status

    status(study)


@study.command()
def retry(
    study: Folder,
    failed: Annotated[bool, typer.Option("--failed", help="Try everything again that did not end well.")] = False,
    workers: Workers = None,
) -> None:
    """Run again what diverged, ran out of memory or time, or failed."""
    from moe.studies.runner import retry

    raise typer.Exit(retry(study, failed=failed, workers=workers))


@study.command()
def fit(
    study: Folder,
    draws: Annotated[int, typer.Option(min=20, help="Bootstraps, from which intervals come.")] = 200,
) -> None:
    """Fit every law that a study's runs can carry, and say how far each is to be trusted."""
    from moe.scaling.report import fit
    from moe.studies.status import folder_of

    fit(folder_of(study), draws=draws)


@study.command()
def report(
    study: Folder,
    flops: Annotated[str | None, typer.Option(help="The budget to decide on, such as 3e18. Default: the largest run's.")] = None,
    memory: Annotated[str | None, typer.Option(help="That the weights may take, such as 2GB.")] = None,
    weight_bytes: WeightBytes = 2.0,
    draws: Annotated[int, typer.Option(min=20, help="Bootstraps, where the study is not fitted yet.")] = 200,
) -> None:
    """Write a study's page, with a verdict in plain words; of upcycled models, what is gained and what each token then costs."""
    from moe.scaling.report import report
    from moe.studies.status import folder_of

    report(folder_of(study), flops, memory, weight_bytes=weight_bytes, draws=draws)


@study.command()
def predict(
    flops: Annotated[str, typer.Option(help="Of training, such as 1e21.")],
    law: Annotated[str, typer.Option(help="chinchilla, krajewski, abnar, ludziejewski, or all.")] = "all",
    memory: Annotated[str | None, typer.Option(help="That the weights may take, such as 80GB or 24GiB.")] = None,
    weight_bytes: WeightBytes = 2.0,
    active: Annotated[str | None, typer.Option(help="Parameters that a token may meet, such as 7B: 2 FLOPs each.")] = None,
    served: Annotated[str, typer.Option(help="Tokens that the model will read and write in use, paid out of the same FLOPs.")] = "0",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what the literature's laws make of a budget, without any run."""
    from moe.scaling.published_laws import predict

    found = predict(law, flops, memory, weight_bytes=weight_bytes, active=active, served=served, as_json=as_json)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
