"""Whether experts help at fixed active FLOPs, from the runs alone: each mixture beside the dense model that costs as much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

from moe.studies.compare import Fits, Noise, cell_of, seeds_of
from moe.studies.family import choice_of
from moe.studies.optimum import Choice
from moe.studies.predict import short
from moe.studies.rows import Row

_FLOPS, _TOKENS = 0.1, 0.05  # runs whose FLOPs and tokens differ by less cost the same
_CHANCE = 0.025  # that useless experts look useful, or harmless ones harmful, somewhere among the pairs that are looked at
_IDLE = 0.1  # share of the experts
_FED = 1.0  # tokens a parameter


class Gain(NamedTuple):
    """A mixture beside the dense model of equal FLOPs and tokens, means over seeds."""

    choice: Choice
    router: str
    width: str
    tokens: int
    flops: float
    nats: float  # less than the dense model's
    error: float  # standard, from the noise of seeds

    def beyond(self, errors: float) -> int:
        """1 if the mixture is better, -1 if it is worse, by more than so many standard errors; else 0."""
        return int(self.nats > errors * self.error) - int(-self.nats > errors * self.error)


def gains(fits: Fits) -> list[Gain]:
    """Every mixture that has a dense run beside it, the largest runs last."""
    return sorted(_paired([*fits.rows, *fits.beside], fits.noise), key=lambda gain: gain.flops)


def _paired(rows: Sequence[Row], noise: Noise) -> list[Gain]:
    first = {cell_of(row): row for row in reversed(rows)}
    losses = seeds_of(rows)
    found = []
    for cell, row in first.items():
        alike = [other for other in first if first[other].experts == 1 and _cost_the_same(first[other], row)]
        if row.experts == 1 or not alike:
            continue
        twin = min(alike, key=lambda other: abs(first[other].flops / row.flops - 1))
        dense, mixed = losses[twin], losses[cell]
        error = noise.relative * float(dense.mean()) * float(np.sqrt(1 / len(dense) + 1 / len(mixed)))
        width = f"width {row.axes['d_model']}" if "d_model" in row.axes else f"{short(row.active)} active parameters"
        router = str(row.axes.get("router", ""))
        found.append(Gain(choice_of(row), router, width, row.tokens, row.flops, float(dense.mean() - mixed.mean()), error))
    return found


def _cost_the_same(a: Row, b: Row) -> bool:
    shape = all(a.axes.get(name) == b.axes.get(name) for name in ("d_model", "layers"))
    return shape and abs(a.flops / b.flops - 1) < _FLOPS and abs(a.tokens / b.tokens - 1) < _TOKENS


def bar(noise: Noise, pairs: int) -> float:
    """Standard errors that chance reaches in one of so many pairs in one of forty studies."""
    return float(student.ppf(1 - _CHANCE / pairs, noise.freedom))


def beyond(found: Sequence[Gain], noise: Noise) -> list[int]:
    """Of each pair whether it is better (1) or worse (-1) beyond the noise, all of them looked at (Holm, 1979)."""
    signs, left = [0] * len(found), len(found)
    for at in sorted(range(len(found)), key=lambda at: -abs(found[at].nats) / max(found[at].error, 1e-300)):
        signs[at] = found[at].beyond(bar(noise, 2 * left))
        if not signs[at]:
            break
        left -= 1
    return signs


def helps(fits: Fits) -> list[str]:
    """Whether experts help at fixed active FLOPs beyond the noise; or the reason why not."""
    found = gains(fits)
    if not found:
        return [
            "Whether experts help at fixed active FLOPs cannot be said: no mixture stands beside a dense run of equal FLOPs and tokens."
        ]
    largest = [gain for gain in found if gain.flops > (1 - _FLOPS) * found[-1].flops]
    best = max(largest, key=lambda gain: gain.nats)
    if not fits.noise.known:
        return [
            f"At equal active FLOPs {_told(best, found)} ends {abs(best.nats):.3f} nats {'below' if best.nats > 0 else 'above'} dense, "
            "but no two runs differ in their seed alone, so the noise is unknown; add seeds.",
            *_lost(fits),
        ]
    errors, noise = bar(fits.noise, len(largest)), fits.noise
    floor = f"noise of one run {noise.relative:.2%} of the loss, from {noise.runs} runs of {noise.cells} place{'s' * (noise.cells > 1)}"
    much = f"{_told(best, found)}: {_amount(best)}"
    rates = swept(fits)
    sure = rates is None or best._replace(nats=best.nats + min(0.0, rates.changes)).beyond(errors) > 0
    if best.beyond(errors) > 0 and sure:
        lines = [f"Experts help at fixed active FLOPs: {much}; {floor}."]
    elif best.beyond(errors) > 0:
        lines = [f"Whether experts help at fixed active FLOPs is open, as the learning rate may make the difference: {much}; {floor}."]
    elif best.beyond(errors) < 0:
        lines = [f"Experts cost at fixed active FLOPs, even the best of the largest ones: {much}; {floor}."]
    else:
        need = f"less than {errors * best.error:.3f} may be chance"
        lines = [f"Whether experts help at fixed active FLOPs is open: at best {much}, and {need}; {floor}."]
    lines.append(_of_rates(rates))
    signs = beyond(found, noise)
    better, worse = signs.count(1), signs.count(-1)
    lines.append(f"Of all {len(found)} pairs of equal active FLOPs and tokens {better} are better and {worse} worse beyond the noise.")
    if best.beyond(errors) < 1:
        lines += _reasons(fits)
    return lines + _lost(fits)


def _told(gain: Gain, every: Sequence[Gain]) -> str:
    router = f", router {gain.router}" if len({one.router for one in every}) > 1 else ""
    return f"{gain.choice}{router} ({gain.width}, {short(gain.tokens)} tokens)"


class Swept(NamedTuple):
    """A pair whose two models were both tried at several learning rates."""

    best: Gain  # each at the best of its rates
    rule: Gain  # both at the rule's

    @property
    def changes(self) -> float:
        return self.best.nats - self.rule.nats


def swept(fits: Fits) -> Swept | None:
    """The largest pair that was tried at several rates; None if there is none."""
    tried: dict[str, list[Row]] = {}
    for row in fits.every:
        if row.status == "done" and row.begin is None:
            level = row._replace(axes=row.axes | {"lr": None, "lr_factor": 1})
            tried.setdefault(f"{cell_of(level)} {row.axes.get('seed', 0)}", []).append(row)
    several = [cell for cell in tried.values() if len({row.axes.get("lr_factor") for row in cell}) > 1 and any(row.tuned for row in cell)]
    at_best = [min(cell, key=lambda row: row.loss or np.inf) for cell in several]
    at_rule = [next(row for row in cell if row.tuned) for cell in several]
    found = [
        _paired([row._replace(axes=row.axes | {"lr": None, "lr_factor": 1}) for row in rows], fits.noise) for rows in (at_best, at_rule)
    ]
    pairs = [Swept(best, rule) for best, rule in zip(*found, strict=True)]
    return max(pairs, key=lambda pair: (pair.rule.flops, -pair.changes), default=None)


def _of_rates(rates: Swept | None) -> str:
    if rates is None:
        return "Learning rates were not swept at both ends, so a rate that suits one of them better may make a difference."
    best, rule = rates
    return (
        f"Each at its best of the rates tried, {best.choice} ({best.width}, {short(best.tokens)} tokens) ends with {_amount(best)}; "
        f"at the rule's rate with {_amount(rule, error=False)}."
    )


def _amount(gain: Gain, *, error: bool = True) -> str:
    sign = "less" if gain.nats > 0 else "more"
    return f"{abs(gain.nats):.3f} nats {sign} than dense" + (f" (standard error {gain.error:.3f})" if error else "")


def _reasons(fits: Fits) -> list[str]:
    """What of the runs may explain that experts do not help."""
    sparse = [row for row in fits.rows if row.experts > 1]
    lines = []
    unused = max(row.health.get("unused_experts", 0) / row.experts / row.axes.get("layers", 1) for row in sparse)
    if unused > _IDLE:
        lines.append(f"Up to {unused:.0%} of a model's experts got no token: the routers did not learn to use them.")
    fed = max(row.tokens / row.total for row in sparse)
    if fed < _FED:
        lines.append(f"The mixtures saw at most {fed:.2g} tokens a parameter: too few to fill their experts.")
    return lines or [f"Idle experts (at most {unused:.0%}) and tokens (up to {fed:.2g} a parameter) do not explain it."]


def _lost(fits: Fits) -> list[str]:
    """What is not in the comparison, and may be missed."""
    lines = []
    if fits.beside:
        names = ", ".join(sorted({str(row.axes.get("router")) for row in fits.beside}))
        lines.append(f"The laws were fitted without the {len(fits.beside)} runs of other routers ({names}).")
    if bad := [row for row in fits.every if row.status != "done" and row.tuned and row.begin is None]:
        kinds = sorted({str(choice_of(row)) for row in bad})
        lines.append(f"{len(bad)} of the study's runs did not end well ({'; '.join(kinds)}) and are left out of all of this.")
    return lines
