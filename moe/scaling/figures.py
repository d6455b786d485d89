"""The figures of a study's page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from moe.errors import ConfigError
from moe.pages.figure import Figure, Series
from moe.pages.scale import told
from moe.scaling.compute_optimal import DENSE, Budget, Choice, Optimum, optimum
from moe.scaling.model_selection import Fits, between
from moe.scaling.moe_vs_dense import gains, together
from moe.scaling.published_laws import compute
from moe.scaling.results import Row
from moe.scaling.size_family import choice_of, choices, family
from moe.scaling.verdict import Verdict, asked_of

_STEPS = 25  # of a drawn curve
_TICKS = 6


def figures(rows: Sequence[Row], fits: Fits, verdict: Verdict) -> list[Figure]:
    """Those for which the study has runs."""
    drawn = [_compute(fits), *_gained(fits)]
    if fits.best is not None:
        drawn += [*_flat(fits, verdict), _measured(fits), *_held(fits), _residuals(fits)]
    drawn += _by_experts(fits.rows)
    return [*drawn, *_swept(rows)]


def name_of(choice: Choice, alike: Sequence[Choice]) -> str:
    """A choice, in as few words as tell it from those beside it."""
    if choice == DENSE:
        return "dense"
    words = [f"{choice.experts} experts"]
    if len({one.top_k for one in alike if one != DENSE}) > 1:
        words.append(f"top-{choice.top_k}")
    if len({one.granularity for one in alike if one != DENSE}) > 1:
        words.append(f"G={choice.granularity:g}")
    return " ".join(words)


def _said(row: Row) -> str:
    width = f", width {row.axes['d_model']}" if "d_model" in row.axes else ""
    return f"{choice_of(row)}{width}, {told(row.tokens)} tokens, seed {row.axes.get('seed', 0)}: {row.loss:.4f} nats"


def _of(fits: Fits, choice: Choice) -> list[int]:
    return [at for at, row in enumerate(fits.rows) if choice_of(row) == choice]


def _compute(fits: Fits) -> Figure:
    """Runs as dots, and for each choice the least loss that the law foresees."""
    flops, every = fits.x["flops"], choices(fits.rows)
    dots, lines = [], []
    for number, choice in enumerate(every):
        mine = _of(fits, choice)
        points = [(float(flops[at]), float(fits.loss[at])) for at in mine]
        dots.append(Series(name_of(choice, every), points, colour=number, words=[_said(fits.rows[at]) for at in mine], size=3.6))
        if fits.best is not None:
            budgets = np.geomspace(flops.min(), flops.max() * 3, _STEPS)
            curve = [(float(budget), one.loss) for budget in budgets if (one := _at(fits, budget, choice))]
            lines.append(Series("", curve, "line", colour=number))
    law = f"Lines: the least loss at each compute by the law {fits.best}, sizes and tokens at their best." if fits.best else ""
    return Figure("compute", "Loss against compute", "training FLOPs", "loss, nats a token", [*lines, *dots], "log", "log", law)


def _gained(fits: Fits) -> Iterator[Figure]:
    """What mixtures gain over dense runs of equal FLOPs, by how long both are."""
    found = [gain for gain in gains(fits) if gain.router in {row.axes.get("router") for row in fits.rows}]
    every, series = choices(fits.rows), []
    for number, choice in enumerate(every):
        mine = sorted({gain.tokens for gain in found if gain.choice == choice})
        pooled = [together([gain for gain in found if gain.choice == choice and gain.tokens == tokens]) for tokens in mine]
        spans = [(one.nats - one.error, one.nats + one.error) for one in pooled if one.error > 0]
        points = [(float(one.tokens), one.nats) for one in pooled]
        words = [f"{one.choice}, {one.width}, {told(one.tokens)} tokens: {one.nats:+.4f} nats" for one in pooled]
        if points:
            series.append(Series(name_of(choice, every), points, "both", number, spans=spans, words=words))
    if series:
        title = "Gained over dense models of equal FLOPs"
        caption = "Means over widths, a standard error to both sides: above zero the mixture is better."
        ticks = sorted({gain.tokens for gain in found})
        ticks = ticks if len(ticks) <= _TICKS else ()
        yield Figure("gained", title, "training tokens", "nats a token less", series, "log", "linear", caption, ticks)


def _at(fits: Fits, flops: float, choice: Choice, total: float = np.inf) -> Optimum | None:
    judged = fits.judged[fits.best or ""]
    try:
        found = optimum(judged.law, judged.values, Budget(flops, total), choice, family(fits.rows))
    except ConfigError:
        return None
    return None if found.least else found


def _flat(fits: Fits, verdict: Verdict) -> Iterator[Figure]:
    """Along each budget, the best loss against how sparse a model is."""
    judged = fits.judged[fits.best or ""]
    asked = sorted(asked_of(judged, fits.rows), key=lambda choice: choice.experts / choice.top_k)
    if len(asked) < 2:
        return
    series, stars = [], []
    most = float(fits.x["flops"].max())
    for number, budget in enumerate((most / 10, most / 3, most, most * 3, most * 10)):
        found = [one for choice in asked if (one := _at(fits, budget, choice, verdict.limit))]
        if not found:
            continue
        points = [(one.choice.experts / one.choice.top_k, one.loss) for one in found]
        series.append(Series(f"{told(float(f'{budget:.2g}'))}", points, "both", colour=number + 1, size=3))
        first = min(range(len(found)), key=lambda at: found[at].loss)
        stars.append((points[first], f"{found[first].choice} at {compute(budget)} FLOPs: {found[first].loss:.3f}"))
    if not series:
        return
    best = Series("optimum", [star for star, _ in stars], "dots", 0, hollow=True, size=8, words=[words for _, words in stars])
    limit = f"at most {told(float(f'{verdict.limit:.3g}'))} parameters" if np.isfinite(verdict.limit) else "no limit of memory"
    caption = f"By the law {fits.best}, {limit}; each line is a budget in FLOPs, with the sizes and tokens that suit it best."
    title = "Loss against sparsity at equal FLOPs"
    ticks = [choice.experts / choice.top_k for choice in asked]
    yield Figure(
        "isoflop", title, "experts for each one that a token meets", "loss, nats a token", [*series, best], "log2", "log", caption, ticks
    )
    if verdict.answers:
        yield _sizes(fits, asked)


def _sizes(fits: Fits, asked: Sequence[Choice]) -> Figure:
    """The valley of each choice at the largest run's FLOPs: loss against active parameters."""
    judged, line = fits.judged[fits.best or ""], family(fits.rows)
    most = float(fits.x["flops"].max())
    series = []
    for number, choice in enumerate(asked):
        middle = _at(fits, most, choice)
        if middle is None:
            continue
        points = []
        for factor in np.geomspace(0.2, 5, _STEPS):
            sizes = line.sizes(np.array([middle.base * factor]), choice)
            tokens = most / line.price(sizes, choice)
            x = {"active": sizes.active, "average": sizes.active, "base": sizes.base, "total": sizes.total, "tokens": tokens}
            x |= {"experts": np.array([choice.experts / choice.top_k]), "sparsity": np.array([1 - choice.top_k / choice.experts])}
            x |= {"granularity": np.array([float(choice.granularity)])}
            points.append((float(sizes.active[0]), float(judged.law.loss(judged.values, x)[0])))
        series.append(Series(name_of(choice, asked), points, "line", colour=number))
        series.append(Series("", [(middle.active, middle.loss)], "dots", colour=number, hollow=True, size=5))
    caption = f"At {compute(most)} FLOPs, the compute of the largest run, by the law {fits.best}; the optimum of each choice is marked."
    return Figure("sizes", "Loss against size at equal FLOPs", "active parameters", "loss, nats a token", series, "log", "log", caption)


def _measured(fits: Fits) -> Figure:
    """Foreseen against measured, the held-out runs by the fit that has not seen them."""
    judged = fits.judged[fits.best or ""]
    stated, (low, high) = judged.loss(fits.x), judged.interval(fits.x)
    series = []
    seen = [at for at in range(len(fits.rows)) if judged.held is None or not fits.held[at]]
    ends = [float(fits.loss.min()), float(fits.loss.max())]
    series.append(Series("equal", [(end, end) for end in ends], "line", colour=0, dashed=True))
    series.append(_against(fits, seen, stated, low, high, "fitted", 1, hollow=False))
    if judged.held is not None:
        of_held = judged.law.loss(judged.held.values, fits.x)
        low, high = between(judged.law, judged.held.draws, fits.x, of_held, judged.spread)
        largest = [at for at in range(len(fits.rows)) if fits.held[at]]
        series.append(_against(fits, largest, of_held, low, high, "held out: the largest", 4, hollow=True))
    caption = f"The law {fits.best}, with intervals of 95 % for one more run, which are narrow; the next figure shows those held out."
    return Figure("measured", "Foreseen against measured", "measured loss, nats a token", "foreseen", series, "log", "log", caption)


def _against(fits: Fits, mine: Sequence[int], stated, low, high, name: str, colour: int, *, hollow: bool) -> Series:
    points = [(float(fits.loss[at]), float(stated[at])) for at in mine]
    spans = [(float(low[at]), float(high[at])) for at in mine]
    return Series(name, points, "dots", colour, hollow, spans=spans, words=[_said(fits.rows[at]) for at in mine], size=3.6)


def _held(fits: Fits) -> Iterator[Figure]:
    """How far the held-out runs are missed, with intervals wide enough to be seen."""
    judged, every = fits.judged[fits.best or ""], choices(fits.rows)
    if judged.held is None:
        return
    stated = judged.law.loss(judged.held.values, fits.x)
    low, high = between(judged.law, judged.held.draws, fits.x, stated, judged.spread)
    miss, under, over = (100 * (side / fits.loss - 1) for side in (stated, low, high))
    ends = [float(fits.loss[fits.held].min()), float(fits.loss[fits.held].max())]
    series = [Series("", [(end, 0.0) for end in ends], "line", 0, dashed=True)]
    for number, choice in enumerate(every):
        mine = [at for at in _of(fits, choice) if fits.held[at]]
        points = [(float(fits.loss[at]), float(miss[at])) for at in mine]
        spans = [(float(under[at]), float(over[at])) for at in mine]
        words = [_said(fits.rows[at]) for at in mine]
        series.append(Series(name_of(choice, every), points, colour=number, hollow=True, spans=spans, words=words))
    caption = "The largest runs, foreseen by a fit to all the others: bars of 95 % should hold the line 19 times of 20."
    yield Figure(
        "held_out", "Held-out runs", "measured loss, nats a token", "foreseen minus measured, %", series, "linear", "linear", caption
    )


def _residuals(fits: Fits) -> Figure:
    judged, every = fits.judged[fits.best or ""], choices(fits.rows)
    rest = 100 * (fits.loss / judged.loss(fits.x) - 1)
    flops = fits.x["flops"]
    ends = [float(flops.min()), float(flops.max())]
    wide = 200 * (fits.noise.relative if fits.noise.known else judged.spread)
    name = "two deviations of the noise of seeds" if fits.noise.known else "two deviations"
    series = [Series(name, [(end, 0.0) for end in ends], "band", 0, spans=[(-wide, wide)] * 2)]
    for number, choice in enumerate(every):
        mine = _of(fits, choice)
        points = [(float(flops[at]), float(rest[at])) for at in mine]
        series.append(Series(name_of(choice, every), points, colour=number, words=[_said(fits.rows[at]) for at in mine], size=3.6))
    caption = "What the law misses should be no wider than what seeds do, and show no slope in any colour."
    return Figure("residuals", "Residuals", "training FLOPs", "measured minus stated loss, %", series, "log", "linear", caption)


_HEALTH = {
    "load_max_over_mean": ("Fullest expert", "its load over the mean load (1 is balance)", "The worst layer at the end of training."),
    "unused_experts": ("Experts without a token", "experts of all layers", "In the last step of training."),
    "entropy": ("Entropy of the router's choice", "nats", "Mean over tokens and layers at the end of training."),
}


def _by_experts(rows: Sequence[Row]) -> Iterator[Figure]:
    """Routing health and step time against the number of experts, a line a width."""
    counts = sorted({row.experts for row in rows})
    if len(counts) < 2:
        return
    for name, (title, ylabel, caption) in _HEALTH.items():
        if sparse := [row for row in rows if row.experts > 1 and name in row.health]:
            series = _lines(sparse, [row.health[name] for row in sparse])
            yield Figure(f"health_{name}", title, "experts of a layer", ylabel, series, "log2", "linear", caption, counts)
    if timed := [row for row in rows if row.step_ms]:
        series = _lines(timed, [float(row.step_ms or 0) for row in timed])
        caption = "Median of a run; of several runs of a size, their median. Runs that shared the machine disturb one another."
        yield Figure("step_time", "Step time", "experts of a layer (1 is dense)", "milliseconds", series, "log2", "log", caption, counts)


def _lines(rows: Sequence[Row], values: Sequence[float]) -> list[Series]:
    """Medians over the runs of each width and number of experts."""
    widths = sorted({(row.base, row.axes.get("d_model", row.base)) for row in rows})
    series = []
    for number, (base, width) in enumerate(widths):
        found: dict[int, list[float]] = {}
        for row, value in zip(rows, values, strict=True):
            if row.base == base:
                found.setdefault(row.experts, []).append(value)
        points = [(float(experts), float(np.median(seen))) for experts, seen in sorted(found.items())]
        series.append(Series(f"width {told(width)}", points, "both", colour=number + 1))
    return series


def _swept(rows: Sequence[Row]) -> Iterator[Figure]:
    """Loss against the learning rate, where it was swept."""
    places: dict[str, list[Row]] = {}
    for row in rows:
        if row.status == "done":
            fixed = {name: value for name, value in row.axes.items() if name not in ("lr", "lr_factor", "seed")}
            places.setdefault(str(fixed), []).append(row)
    swept = [found for found in places.values() if len({row.axes.get("lr_factor") for row in found}) > 2]
    if not swept:
        return
    series = []
    for number, found in enumerate(swept):
        points = sorted((float(row.axes["lr_factor"]), float(row.loss or np.nan)) for row in found)
        means = {factor: float(np.mean([loss for at, loss in points if at == factor])) for factor, _ in points}
        series.append(
            Series(f"{choice_of(found[0])}, width {found[0].axes.get('d_model', '?')}", list(means.items()), "both", colour=number)
        )
    caption = "At the ends of the study: a baseline whose rate is wrong cannot win the argument for the other side."
    yield Figure("learning_rate", "Learning rate", "times the rate of the rule", "loss, nats a token", series, "log2", "linear", caption)
