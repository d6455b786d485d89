"""Whether a study can identify the law that it is for, by simulation before anything runs."""

from __future__ import annotations

from rich.table import Table

from moe.errors import ConfigError, DataError
from moe.studies import LAWS
from moe.studies.fit import Identified, identify
from moe.studies.form import Aim
from moe.studies.grid import Run
from moe.studies.laws import Law
from moe.studies.rows import columns
from moe.tables import entry

_DRAWS = 12


def judge(aim: Aim, runs: list[Run]) -> tuple[Identified | None, str | None]:
    """What these runs would teach of the law of a study's aim, and, if that is too little, why the study should not start."""
    law: Law = entry(LAWS, aim.law, "law")
    values = _values(aim, law)
    design = columns([run.facts() for run in runs if run.axes["lr_factor"] == 1])
    wanted = dict(design)
    for name in ("total", "active", "base", "average", "tokens"):
        wanted[name] = wanted[name] * aim.further
    most = (design["tokens"] == design["tokens"].max()) & (design["base"] == design["base"].max())
    wanted = {name: column[most] for name, column in wanted.items()}
    try:
        found = identify(law, values, design, wanted, noise=aim.noise, draws=_DRAWS)
    except DataError as error:
        return None, str(error)
    return found, found.says(aim.error)


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
    lines.add_row("verdict", "the design identifies the law" if sentence is None else sentence)
    return lines
