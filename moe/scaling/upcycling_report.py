"""The page of a study whose runs begin with dense models: what is gained by making them sparse, and what each token then costs.

After "Inference Inefficient Finetuning" of upcycled models: at equal training compute a mixture may be better, and slower to use.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from scipy.stats import t as student

from moe.pages.figure import Figure, Series
from moe.pages.page import Page, Section, Table
from moe.pages.scale import told
from moe.scaling import tables
from moe.scaling.fit import fit
from moe.scaling.laws import CHINCHILLA, JOURNEY
from moe.scaling.model_selection import why_not
from moe.scaling.published_laws import short
from moe.scaling.report_files import again
from moe.scaling.results import CONTINUED, Row, points, shape
from moe.scaling.speeds import READ, WRITE, Speeds

SCRATCH = "from scratch"
_CHANCE = 0.025  # that chance gains or loses somewhere among the comparisons that are looked at
_ALIKE = 0.1  # runs whose extra FLOPs differ by less spent the same
_ALIKE_AICC = 2.0  # laws whose criteria differ by less describe the runs equally well
_FAMILY = ("d_model", "layers", "heads", "d_ff")


class Mean(NamedTuple):
    """Over seeds."""

    value: float
    error: float  # standard; 0 where no two seeds are
    seeds: int

    @property
    def span(self) -> tuple[float, float]:
        return self.value - self.error, self.value + self.error


class Ran(NamedTuple):
    """A run beside others that spent as much."""

    arm: str
    budget: float  # extra FLOPs, as a share of the dense model's
    row: Row
    off: float  # how far the run's own are from that, relative


class Chance(NamedTuple):
    """What seeds alone do to a difference between a run and the dense model trained on."""

    deviation: float  # standard, of one seed
    freedom: int  # 0 where no two seeds are
    pairs: int  # that are looked at

    @property
    def bar(self) -> float:
        """Standard errors that chance reaches in one of the pairs, to either side, in one of forty studies (Bonferroni)."""
        return float(student.ppf(1 - _CHANCE / (2 * self.pairs), self.freedom))


class Comparison(NamedTuple):
    """What may be done with the dense models of one family, trained for so many tokens."""

    name: str
    number: int
    runs: Sequence[Ran]
    apart: int  # runs that spent what no continued dense model did
    speeds: Speeds  # of shapes of models; empty where they were not timed

    @property
    def arms(self) -> list[str]:
        return sorted({run.arm for run in self.runs}, key=lambda arm: (arm != CONTINUED, arm))

    @property
    def budgets(self) -> list[float]:
        return sorted({run.budget for run in self.runs})

    def bits(self, arm: str, budget: float) -> dict[int, float]:
        """Held-out bits per byte, by seed."""
        mine = sorted((run for run in self.runs if (run.arm, run.budget) == (arm, budget)), key=lambda run: -run.off)
        rows = [run.row for run in mine]  # of a seed's runs the nearest counts, the last
        return {row.axes["seed"]: row.bits_per_byte for row in rows if row.bits_per_byte is not None}

    def means(self, arm: str) -> list[tuple[float, Mean]]:
        """Of each budget that has runs."""
        return [(budget, mean(list(bits.values()))) for budget in self.budgets if (bits := self.bits(arm, budget))]

    def gain(self, arm: str, budget: float) -> Mean | None:
        """Bits per byte less than the continued dense model's, seed by seed; None without a seed that both have."""
        both, chance = self.differences(arm, budget), self.chance
        return Mean(statistics.mean(both), chance.deviation / len(both) ** 0.5, len(both)) if both else None

    def differences(self, arm: str, budget: float) -> list[float]:
        """What each seed gains."""
        dense, mine = self.bits(CONTINUED, budget), self.bits(arm, budget)
        return [dense[seed] - mine[seed] for seed in sorted(dense.keys() & mine.keys())]

    @property
    def chance(self) -> Chance:
        """What seeds do to a difference, of all arms and budgets together."""
        found = [[self.differences(arm, budget) for budget in self.budgets] for arm in self.arms if arm != CONTINUED]
        every = [one for arm in found for one in arm if one]
        squares = sum((value - statistics.mean(one)) ** 2 for one in every for value in one)
        freedom = sum(max(len(one), 1) - 1 for one in every)
        # runs of an arm and a seed have most of their steps in common: its budgets count once
        once = sum(max(max(len(one), 1) - 1 for one in arm) for arm in found)
        return Chance((squares / freedom) ** 0.5 if freedom else 0.0, once, len(every))

    def speed(self, arm: str, kind: str) -> float | None:
        model = shape(next(run for run in self.runs if run.arm == arm).row.axes)
        return statistics.median(self.speeds[model][kind]) if model in self.speeds else None

    @property
    def batches(self) -> list[int]:
        """How many sequences were written at once."""
        kinds = {kind for speeds in self.speeds.values() for kind in speeds if kind.startswith(WRITE)}
        return sorted(int(kind.removeprefix(WRITE)) for kind in kinds)


def mean(values: Sequence[float]) -> Mean:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Mean(statistics.mean(values), error, len(values))


def comparisons(rows: Sequence[Row], timed: tuple[dict[str, int], Speeds] | None) -> list[Comparison]:
    """One for each family and number of dense tokens of which a dense model was continued."""
    done = [row for row in rows if row.status == "done" and row.tuned]
    begun = sorted((row for row in done if row.begin is not None), key=_key)
    found: list[Comparison] = []
    for (*family, tokens), group in groupby(begun, _key):
        others = [row for row in done if row.begin is None and _family(row) == family]
        twins = [row for row in others if row.experts == 1 and row.tokens == tokens]
        if not twins:
            continue
        dense = statistics.mean(row.flops for row in twins)
        spent = [(row, (row.flops - dense) / dense) for row in group]
        budgets = sorted({float(f"{more:.2g}") for row, more in spent if row.begin == CONTINUED})
        if not budgets:
            continue
        spent += [(row, row.flops / dense) for row in others if row not in twins]
        near = [(row, more, min(budgets, key=lambda budget, more=more: abs(budget / more - 1))) for row, more in spent]
        kept = [(row, budget, off) for row, more, budget in near if (off := abs(more / budget - 1)) < _ALIKE]
        ran = [Ran(_arm(row, [one for one, *_ in kept]), budget, row, off) for row, budget, off in kept]
        name = f"width {family[0]}, {family[1]} layers, {short(tokens)} tokens of the dense model"
        speeds = timed[1] if timed and [timed[0].get(key) for key in _FAMILY] == family else {}
        found.append(Comparison(name, len(found), ran, len(near) - len(kept), speeds))
    return found


def _family(row: Row) -> list[Any]:
    return [row.axes[name] for name in _FAMILY]


def _key(row: Row) -> list[Any]:
    return [*_family(row), row.axes["dense"]]


def _arm(row: Row, beside: Sequence[Row]) -> str:
    """How a run came about, and of what shape or router it is where others that came about so are of another."""
    alike = [one for one in beside if one.begin == row.begin]
    words = [row.begin or SCRATCH]
    words += [shape(row.axes)] * (len({shape(one.axes) for one in alike}) > 1)
    words += [row.axes["router"]] * (len({one.axes["router"] for one in alike if one.experts > 1}) > 1)
    return ", ".join(words)


def page_of(name: str, rows: Sequence[Row], timed: tuple[dict[str, int], Speeds] | None) -> Page:
    """The page as data."""
    found = comparisons(rows, timed)
    done = sum(row.status == "done" for row in rows)
    subtitle = f"{done} runs done of {len(rows)} · bits per byte, held out · means and standard errors over seeds"
    answer, sections = [], []
    for one in found:
        also = f" ({one.name})" if len(found) > 1 else ""
        answer += [line + also * (at == 0) for at, line in enumerate(verdict(one, budget) for budget in reversed(one.budgets))]
        sections += [
            Section(f"What is gained{also}", [*_trust(one), *_left_out(one)], [_table(one)], [_curves(one), _gains(one)]),
            Section(f"What it costs to use{also}", _untimed(one), _speeds(one), _costs(one)),
        ]
    if not found:
        answer = ["Nothing can be compared: no dense model that was trained on is done; add a part of `also` with experts: [1]."]
    sections += [
        Section("One law for all of them", one_law(rows)),
        Section("Runs", tables=[*tables.lost(rows), tables.runs(rows)]),
        again(name, rows, [f"moe study report {name}"]),
    ]
    return Page(f"Made sparse, or trained on as it is? {name}", subtitle, answer, not found, sections)


def verdict(study: Comparison, budget: float) -> str:
    """For a budget of extra training, which way is best, and what it costs in use."""
    at = f"After {budget:g}x the dense model's FLOPs more"
    gains = {arm: gain for arm in study.arms if arm != CONTINUED and (gain := study.gain(arm, budget)) is not None}
    if not gains:
        return f"{at}, nothing stands beside the dense model trained on."
    # an arm that lacks seeds is no better for the one that it has
    most = max(gain.seeds for gain in gains.values())
    best = max((arm for arm in gains if gains[arm].seeds == most), key=lambda arm: gains[arm].value)
    gain, chance = gains[best], study.chance
    far = f"{_told(gain._replace(value=abs(gain.value)))} bits a byte"
    if not chance.freedom or abs(gain.value) <= chance.bar * gain.error:
        how = f"is {far} {'better' if gain.value > 0 else 'behind'}"
        how += f", where up to {chance.bar * gain.error:.4f} may be chance" if chance.freedom else ", which may be chance"
        seeds = f"{gain.seeds} seed{'s' * (gain.seeds > 1)}"
        return f"{at}, whether anything beats training the dense model on cannot be told with {seeds}: the best, {best}, {how}."
    if gain.value < 0:
        return f"{at}, nothing beats training the dense model on: the best, {best}, is {far} behind."
    said = f"{at}, {best} is {far} better than the dense model trained on"
    rates = []
    for n in study.batches:
        fast, dense = study.speed(best, f"{WRITE}{n}"), study.speed(CONTINUED, f"{WRITE}{n}")
        if fast and dense:
            rates.append(f"{fast / dense:.2f}x as fast at batch {n}")
    return f"{said}; it writes {', '.join(rates)}." if rates else f"{said}."


def one_law(rows: Sequence[Row]) -> list[str]:
    """Whether the average number of parameters says more of all runs, however they began, than the final one."""
    x, loss = points(rows)
    if not len(loss):
        return ["No law was fitted, as no run is done."]
    for law in (JOURNEY, CHINCHILLA):
        if reason := why_not(law, x, loss):
            return [f"No law was fitted to all {len(loss)} runs, from scratch, continued and upcycled: {reason}."]
    average, final = fit(JOURNEY, x, loss), fit(CHINCHILLA, x, loss)
    nearer = "the average is nearer" if average.aicc < final.aicc else "the final number is nearer"
    nearer = "which is nearer cannot be told" if abs(average.aicc - final.aicc) < _ALIKE_AICC else nearer
    return [
        f"One law of Chinchilla's form for all {len(loss)} runs, from scratch, continued and upcycled, with the tokens of both parts: over "
        f"the number of active parameters averaged over those tokens (The Journey Matters) runs scatter around it by {average.spread:.2%} "
        f"(AICc {average.aicc:.0f}), over the final number by {final.spread:.2%} (AICc {final.aicc:.0f}): {nearer}."
    ]


def _told(one: Mean) -> str:
    return f"{one.value:.4f} ± {one.error:.4f}" if one.seeds > 1 else f"{one.value:.4f}"


def _trust(study: Comparison) -> list[str]:
    """What the standard errors are, and what does not count as one more confirmation."""
    chance = study.chance
    if not chance.freedom:
        return ["No two runs differ in their seed alone, so what chance does is unknown; add axes.seed."] if chance.pairs else []
    lines = [
        f"Gains are of runs of one seed; their standard errors are pooled over all {chance.pairs} pairs of a way and a budget, of which "
        f"chance alone brings one beyond {chance.bar:.1f} errors in one of {1 / _CHANCE:.0f} such studies."
    ]
    if any(run.row.trunk for run in study.runs):
        lines.append("The budgets of a way are cool-downs of one trunk a seed: that several agree confirms nothing.")
    return lines


def _left_out(study: Comparison) -> list[str]:
    spent = "extra FLOPs that no continued dense model spent"
    runs = "1 run is" if study.apart == 1 else f"{study.apart} runs are"
    lines = [f"{runs} left out that took {spent}; rule iso_flop makes them equal."] if study.apart else []
    if any(run.row.begin is None for run in study.runs):
        lines.append("A run from scratch spent less in all: what trained the dense model is not in its budget.")
    return lines


def _untimed(study: Comparison) -> list[str]:
    if study.speeds:
        later = sorted({shape(run.row.axes) for run in study.runs} - study.speeds.keys())
        also = f" Not among them, as they were not there to begin with: {', '.join(later)}." if later else ""
        return [
            "One thread of the processor, the models in turn, as runs begin with them, before they are trained further; those of equal "
            f"shape are equally fast.{also}"
        ]
    return ["How fast these models are was not measured: moe study run does so when all runs have ended, for the largest family."]


def _curves(study: Comparison) -> Figure:
    series = []
    for number, arm in enumerate(study.arms):
        means = study.means(arm)
        series.append(Series(arm, [(b, m.value) for b, m in means], "both", number, spans=[m.span for _, m in means]))
    xlabel = "extra training FLOPs / dense training FLOPs"
    caption = "Bars: one standard error over seeds."
    return Figure(_named("bits", study), "Held-out bits per byte", xlabel, "bits per byte", series, caption=caption)


def _named(name: str, study: Comparison) -> str:
    return f"{name}_{study.number}" if study.number else name


def _gains(study: Comparison) -> Figure:
    """Seed by seed, so that what a seed does to all arms falls out."""
    series = [Series(CONTINUED, [(budget, 0.0) for budget in study.budgets], "line", 0, dashed=True)]
    for number, arm in enumerate(study.arms):
        means = [(budget, gain) for budget in study.budgets if (gain := study.gain(arm, budget)) is not None]
        if arm != CONTINUED and means:
            series.append(Series(arm, [(b, m.value) for b, m in means], "both", number, spans=[m.span for _, m in means]))
    xlabel, ylabel = "extra training FLOPs / dense training FLOPs", "bits per byte less"
    caption = "Against the dense model trained on with the same seed and the same FLOPs: above the line, sparse is better."
    return Figure(_named("gains", study), "Gained over training on", xlabel, ylabel, series, caption=caption)


def _costs(study: Comparison) -> list[Figure]:
    """Speed against batch, and quality against speed."""
    if not study.batches:
        return []
    alone, kinds = f"{WRITE}{study.batches[0]}", {n: f"{WRITE}{n}" for n in study.batches}
    shapes = {name: [(n, statistics.median(rates[kind])) for n, kind in kinds.items()] for name, rates in study.speeds.items()}
    series = [Series(name, found, "both", number) for number, (name, found) in enumerate(shapes.items())]
    name, caption = _named("speed", study), "Greedy, token by token."
    drawn = [Figure(name, "Writing", "sequences at once", "tokens a second", series, "log2", "log", caption, study.batches)]
    trade = []
    for number, arm in enumerate(study.arms):
        if (speed := study.speed(arm, alone)) is not None:
            means = study.means(arm)
            words = [f"{arm}, +{told(budget)}x FLOPs" for budget, _ in means]
            dots = [(speed, m.value) for _, m in means]
            trade.append(Series(arm, dots, "dots", number, spans=[m.span for _, m in means], words=words))
    xlabel = f"tokens a second, {study.batches[0]} sequence{'s' if study.batches[0] > 1 else ''} at once"
    caption = "Lower is better, to the right is faster; one dot a budget, more training lower."
    return [*drawn, Figure(_named("trade", study), "Quality against speed", xlabel, "bits per byte", trade, caption=caption)]


def _table(study: Comparison) -> Table:
    lines = []
    for arm in study.arms:
        row, means = next(run.row for run in study.runs if run.arm == arm), dict(study.means(arm))
        bits = [_told(means[budget]) if budget in means else "" for budget in study.budgets]
        lines.append([arm, shape(row.axes), short(row.total), short(row.active), *bits])
    return Table("Held-out bits per byte", ["begun", "model", "N_total", "N_active", *(f"+{budget:g}x" for budget in study.budgets)], lines)


def _speeds(study: Comparison) -> list[Table]:
    kinds = [READ, *(f"{WRITE}{n}" for n in study.batches)]
    lines = [[name, *(f"{statistics.median(rates[kind]):,.0f}" for kind in kinds)] for name, rates in study.speeds.items()]
    return [Table("Tokens a second", ["model", *kinds], lines)] if lines else []
