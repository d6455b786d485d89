"""Whether experts help at fixed active FLOPs, from the runs alone: each mixture beside the dense model that costs as much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

from moe.scaling.compute_optimal import Choice
from moe.scaling.model_selection import Fits, cell_of, seeds_of
from moe.scaling.published_laws import short
from moe.scaling.results import Row
from moe.scaling.size_family import choice_of

_FLOPS, _TOKENS = 0.1, 0.05  # runs whose FLOPs and tokens differ by less cost the same
_CHANCE = 0.025  # that useless experts look useful, or harmless ones harmful, somewhere among the pairs that are looked at
_FREE = 4  # degrees of freedom, below which runs are not compared seed by seed
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


class Floor(NamedTuple):
    """What chance alone does to a run beside another."""

    relative: float  # standard deviation of one run's log loss; of paired runs, what is left when a seed has done the same to both
    freedom: int
    paired: bool
    runs: int
    places: int

    def error(self, loss: float, one: int, other: int) -> float:
        """Standard error of the difference of two means of so many runs."""
        return self.relative * loss * float(np.sqrt(1 / one + 1 / other))

    def bar(self, comparisons: int) -> float:
        """Standard errors that chance reaches in one of so many comparisons in one of forty studies."""
        return float(student.ppf(1 - _CHANCE / comparisons, self.freedom))

    def __str__(self) -> str:
        kind = "noise of a run beside another of its seed" if self.paired else "noise of one run"
        return f"{kind} {self.relative:.2%} of the loss, from {self.runs} runs of {self.places} place{'s' * (self.places > 1)}"


def floor_of(fits: Fits) -> Floor:
    """The noise by which pairs are judged: of runs of one seed, whose data and order are the same, where enough have several."""
    squares, freedom, runs, places = 0.0, 0, 0, 0
    rows = [*fits.rows, *fits.beside]
    losses, twins = seeds_of(rows), _twins(rows)
    for dense in dict.fromkeys(twins.values()):
        several = [losses[cell] for cell in (dense, *(cell for cell, twin in twins.items() if twin == dense)) if len(losses[cell]) > 1]
        seeds = sorted(set.intersection(*(set(cell) for cell in several))) if len(several) > 1 else []
        if len(seeds) < 2:
            continue
        table = np.log([[cell[seed] for seed in seeds] for cell in several])
        rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
        squares += float(np.square(rest).sum())
        freedom += (len(several) - 1) * (len(seeds) - 1)
        runs, places = runs + table.size, places + 1
    if freedom >= _FREE and squares > 0:
        return Floor(float(np.sqrt(squares / freedom)), freedom, True, runs, places)
    return Floor(fits.noise.relative, fits.noise.freedom, False, fits.noise.runs, fits.noise.cells)


def gains(fits: Fits, floor: Floor | None = None) -> list[Gain]:
    """Every mixture that has a dense run beside it, the largest runs last."""
    return sorted(_paired([*fits.rows, *fits.beside], floor or floor_of(fits)), key=lambda gain: gain.flops)


def _twins(rows: Sequence[Row]) -> dict[str, str]:
    """Of each mixture's cell the dense one of equal cost, if there is one."""
    first = {cell_of(row): row for row in reversed(rows)}
    found = {}
    for cell, row in first.items():
        alike = [other for other in first if first[other].experts == 1 and _cost_the_same(first[other], row)]
        if row.experts > 1 and alike:
            found[cell] = min(alike, key=lambda other: abs(first[other].flops / row.flops - 1))
    return found


def _paired(rows: Sequence[Row], floor: Floor) -> list[Gain]:
    first, losses, found = {cell_of(row): row for row in reversed(rows)}, seeds_of(rows), []
    for cell, twin in _twins(rows).items():
        row, dense, mixed = first[cell], losses[twin], losses[cell]
        if floor.paired and dense.keys() & mixed.keys():
            dense, mixed = ({seed: one[seed] for seed in dense.keys() & mixed.keys()} for one in (dense, mixed))
        before, after = (float(np.mean(list(one.values()))) for one in (dense, mixed))
        width = f"width {row.axes['d_model']}" if "d_model" in row.axes else f"{short(row.active)} active parameters"
        router, error = str(row.axes.get("router", "")), floor.error(before, len(dense), len(mixed))
        found.append(Gain(choice_of(row), router, width, row.tokens, row.flops, before - after, error))
    return found


def largest(found: Sequence[Gain]) -> list[Gain]:
    """Of each kind of mixture its largest pair of every width, taken together."""
    kinds: dict[tuple[Choice, str], dict[str, Gain]] = {}
    for gain in sorted(found, key=lambda gain: gain.flops):
        kinds.setdefault((gain.choice, gain.router), {})[gain.width] = gain
    return [together(list(each.values())) for each in kinds.values()]


def together(found: Sequence[Gain]) -> Gain:
    """The mean of gains of one choice."""
    n, last = len(found), found[-1]
    error = float(np.sqrt(sum(gain.error**2 for gain in found))) / n
    width = last.width if n == 1 else f"mean of {n} widths"
    return last._replace(width=width, nats=sum(gain.nats for gain in found) / n, error=error)


def _cost_the_same(a: Row, b: Row) -> bool:
    shape = all(a.axes.get(name) == b.axes.get(name) for name in ("d_model", "layers"))
    return shape and abs(a.flops / b.flops - 1) < _FLOPS and abs(a.tokens / b.tokens - 1) < _TOKENS


def beyond(found: Sequence[Gain], floor: Floor) -> list[int]:
    """Of each pair whether it is better (1) or worse (-1) beyond the noise, all of them looked at (Holm, 1979)."""
    signs, left = [0] * len(found), len(found)
    for at in sorted(range(len(found)), key=lambda at: -abs(found[at].nats) / max(found[at].error, 1e-300)):
        signs[at] = found[at].beyond(floor.bar(2 * left))
        if not signs[at]:
            break
        left -= 1
    return signs


def helps(fits: Fits) -> list[str]:
    """Whether experts help at fixed active FLOPs beyond the noise; or the reason why not."""
    floor = floor_of(fits)
    found = gains(fits, floor)
    if not found:
        return [
            "Whether experts help at fixed active FLOPs cannot be said: no mixture stands beside a dense run of equal FLOPs and tokens."
        ]
    at_last = largest(found)
    best = max(at_last, key=lambda gain: gain.nats)
    if not fits.noise.known:
        return [
            f"At equal active FLOPs {_told(best, found)} ends {abs(best.nats):.3f} nats {'below' if best.nats > 0 else 'above'} dense, "
            "but no two runs differ in their seed alone, so the noise is unknown; add seeds.",
            *_lost(fits),
        ]
    errors = floor.bar(len(at_last))
    much = f"{_told(best, found)}: {_amount(best)}"
    rates = swept(fits, floor)
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
    signs = beyond(found, floor)
    better, worse = signs.count(1), signs.count(-1)
    lines.append(
        f"Taken one by one, {better} of {len(found)} pairs of equal FLOPs and tokens are better and {worse} worse beyond the noise."
    )
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


def swept(fits: Fits, floor: Floor) -> Swept | None:
    """The largest pair that was tried at several rates; None if there is none."""
    tried: dict[str, list[Row]] = {}
    for row in fits.every:
        if row.status == "done" and row.begin is None:
            level = row._replace(axes=row.axes | {"lr": None, "lr_factor": 1})
            tried.setdefault(f"{cell_of(level)} {row.axes.get('seed', 0)}", []).append(row)
    several = [cell for cell in tried.values() if len({row.axes.get("lr_factor") for row in cell}) > 1 and any(row.tuned for row in cell)]
    at_best = [min(cell, key=lambda row: row.loss or np.inf) for cell in several]
    at_rule = [next(row for row in cell if row.tuned) for cell in several]
    found = [_paired([row._replace(axes=row.axes | {"lr": None, "lr_factor": 1}) for row in rows], floor) for rows in (at_best, at_rule)]
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
