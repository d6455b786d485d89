"""Whether a study can identify the law that it is for, by simulation before anything runs."""

from __future__ import annotations

import numpy as np
from rich.table import Table

from moe.data.tokenizer import open_tokenizer
from moe.errors import ConfigError, DataError
from moe.recipe import Recipe
from moe.scaling import LAWS
from moe.scaling.fit import Identified, check, identify
from moe.scaling.laws import Law, Points
from moe.scaling.results import columns
from moe.studies.grid import Run
from moe.studies.spec import Aim
from moe.tables import entry

_DRAWS = 12
_GUESSING = 0.95  # share of the loss of one who knows nothing


def judge(aim: Aim, runs: list[Run]) -> tuple[Identified | None, str | None]:
    """What these runs would teach of the law of a study's aim, and, if that is too little, why the study should not start."""
    law: Law = entry(LAWS, aim.law, "law")
    values = _values(aim, law)
    design = columns([run.facts() for run in runs if run.axes["lr_factor"] == 1])
    try:
        check(law, design, design["tokens"])
        _believable(law, values, design, runs)
        found = identify(law, values, design, further(design, aim.further), noise=aim.noise, draws=_DRAWS)
    except DataError as error:
        return None, str(error)
    return found, found.says(aim.error)


def further(design: Points, times: float) -> Points:
    """Of each choice the run of the most FLOPs, with so many times its parameters and tokens."""
    place = np.stack([design["experts"], design["granularity"]], 1)
    _, choice = np.unique(place, axis=0, return_inverse=True)
    most = [max(np.flatnonzero(choice.ravel() == number), key=lambda at: design["flops"][at]) for number in range(choice.max() + 1)]
    grown = ("total", "active", "base", "average", "tokens")
    return {name: column[most] * (times if name in grown else 1) for name, column in design.items()}


def _believable(law: Law, values: dict[str, float], design: Points, runs: list[Run]) -> None:
    """DataError if the law's values say that runs learn nothing."""
    losses, guess = law.loss(values, design), float(np.log(_vocabulary(runs[0].recipe)))
    if losses.max() > _GUESSING * guess:
        raise DataError(
            f"by the values of the law {law.name} that were taken for true a run would end at {losses.max():.2f} nats a token, where "
            f"guessing takes {guess:.2f}; give aim.values for models of this size"
        )


def _vocabulary(recipe: Recipe) -> int:
    return recipe.model.vocab or open_tokenizer(recipe.data.tokenizer).vocab


def _values(aim: Aim, law: Law) -> dict[str, float]:
    names = {*law.coefficients, *law.exponents}
    if not aim.values and not law.published:
        raise ConfigError(f"nobody has published values of the law {law.name}; give aim.values for {', '.join(sorted(names))}")
    values = dict(aim.values) or dict(next(iter(law.published.values())))
    if wrong := names ^ values.keys():
        raise ConfigError(f"aim.values does not suit the law {law.name}: {min(wrong)} is {'missing' if min(wrong) in names else 'unknown'}")
    return values


def table(aim: Aim, found: Identified | None, sentence: str | None) -> Table:
    """The judgement, to be read."""
    lines = Table.grid(padding=(0, 2))
    lines.add_row("law", f"{aim.law}, if runs scatter by {aim.noise:.2%}")
    if found is not None:
        far = f"at {aim.further:g} times the largest size and tokens"
        lines.add_row("foreseen", f"to {found.error:.2%} {far} (at most {aim.error:.1%} asked)")
        lines.add_row("exponents", ", ".join(f"{name} ±{share:.0%}" for name, share in found.deviation.items()))
    lines.add_row("verdict", "the design foresees the loss well enough" if sentence is None else sentence)
    return lines
