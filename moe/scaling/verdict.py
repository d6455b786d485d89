"""What a study says of a budget, in plain words, and whether it may say it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe.errors import ConfigError
from moe.scaling.compute_optimal import DENSE, Budget, Choice, Family, Optimum, Sizes, best, check, dense_multiple, points_of
from moe.scaling.fit import unusual
from moe.scaling.model_selection import Fits, Judged, as_good, between, differ, sees
from moe.scaling.published_laws import compute, short, weight
from moe.scaling.published_laws import times as factor
from moe.scaling.results import Row
from moe.scaling.size_family import choice_of, choices, family

_OPEN = 0.05  # of the loss: an answer less certain is none
_APART = 4.0  # times: sizes that the draws put further apart are not known
_FAR = 100.0  # times beyond the runs: a law is not followed further
_INSIDE = 1.05  # so little beyond the runs is among them
_ERROR = 0.05  # of the loss, held out
_DRAWS, _DENSE_DRAWS = 60, 30  # of the bootstrap, for which the whole question is asked again, and how much a dense model needs
_SURE = 0.95


class Verdict(NamedTuple):
    """The answer for one budget."""

    question: str
    limit: float  # parameters at most
    sentences: list[str]
    refused: list[str]  # why there is no answer; empty if there is one
    law: str | None
    answers: list[Optimum]  # one a choice, the best first
    half: float  # of the interval of the predicted loss
    sizes: tuple[float, float]  # between which the draws put N_active, nine of ten
    won: dict[Choice, float]  # in which share of the draws each choice is best
    dense: tuple[float, float, float] | None  # times the compute that a dense model needs, and the least and most of nine draws in ten
    further: dict[str, float]  # how far beyond the runs of its kind the answer lies, as a factor: in FLOPs, in N_active, in tokens
    others: dict[str, Optimum]  # what other laws answer that foresaw the largest runs as well

    @property
    def answer(self) -> Optimum:
        return self.answers[0]


def conclude(fits: Fits, flops: float | None = None, memory: float | None = None, *, weight_bytes: float = 2.0) -> Verdict:
    """The verdict for so many FLOPs (those of the largest run if not said) and bytes of weights."""
    most = float(fits.x["flops"].max())
    flops = most if flops is None else flops
    question = f"For {compute(flops)} FLOPs" + (f" and at most {weight(memory)} of weights" if memory else "")
    total = memory / weight_bytes if memory else np.inf
    none = Verdict(question, total, [], [], fits.best, [], np.nan, (np.nan, np.nan), {}, None, {}, {})
    if fits.best is None:
        return none._replace(refused=[f"no law could be fitted to them, not even the plainest: {fits.refused['chinchilla']}"])
    judged = fits.judged[fits.best]
    if reason := _blind(fits, judged):
        return none._replace(refused=[reason])
    budget, line, asked = Budget(flops, total), family(fits.rows), asked_of(judged, fits.rows)
    check(budget)
    try:
        answers = _fitting(judged, judged.values, budget, asked, line)
        again = [_fitting(judged, values, budget, asked, line)[0] for values in judged.draws[:_DRAWS]]
    except ConfigError as error:
        return none._replace(refused=[str(error)])
    others = {
        name: _fitting(fits.judged[name], fits.judged[name].values, budget, asked, line)[0]
        for name in as_good(fits.judged, fits.x)
        if name != fits.best and _blind(fits, fits.judged[name]) is None
    }
    half = max([_half(judged, answers[0]), *(abs(other.loss - answers[0].loss) for other in others.values())])
    low, high = np.quantile([one.active for one in again], [0.05, 0.95])
    won = {choice: sum(one.choice == choice for one in again) / len(again) for choice in asked}
    found = none._replace(answers=answers, half=half, sizes=(float(low), float(high)), won=won, others=others)
    found = found._replace(further=_further(fits, flops, answers[0]))
    found = found._replace(refused=unidentified(fits, judged, found))
    if found.refused:
        return found
    found = found._replace(dense=_dense(fits, judged, budget, found, line))
    return found._replace(sentences=_sentences(found, fits, weight_bytes))


def _blind(fits: Fits, judged: Judged) -> str | None:
    """Why a law cannot decide between these runs; None if it can."""
    name = judged.law.name
    if "tokens" not in judged.law.columns:
        return f"the law {name} knows nothing of tokens, so no budget divides between size and tokens; add runs of other lengths"
    if not sees(judged.law, fits.x):
        several = differ(fits.x)
        why = fits.refused["krajewski" if "granularity" in several else "ludziejewski"]
        return f"the runs differ in {' and '.join(several)}, which is nothing to the law {name}, and no other could be fitted: {why}"
    return None


def _dense(fits: Fits, judged: Judged, budget: Budget, found: Verdict, line: Family) -> tuple[float, float, float] | None:
    """Times the compute that a dense model needs, and between which nine of ten draws put that; None without dense runs to go by."""
    if found.answer.choice == DENSE or not any(row.experts == 1 for row in fits.rows):
        return None
    middle = dense_multiple(judged.law, judged.values, budget, found.answer.loss, line) or np.inf
    drawn = []
    for values in judged.draws[:_DENSE_DRAWS]:
        loss = _fitting(judged, values, budget, [found.answer.choice], line)[0].loss
        drawn.append(dense_multiple(judged.law, values, budget, loss, line) or np.inf)
    low, high = np.quantile(drawn, [0.05, 0.95], method="nearest")
    return middle, float(low), float(high)


def asked_of(judged: Judged, rows: Sequence[Row]) -> list[Choice]:
    """The choices between which the law can tell: all that were run, or for a law that knows nothing of experts the dense one."""
    known = {"experts", "sparsity", "total", "granularity"} & set(judged.law.columns)
    ran = {choice_of(row) for row in rows}
    return [choice for choice in choices(rows) if choice in ran] if known else [DENSE]


def _fitting(judged: Judged, values: dict[str, float], budget: Budget, asked: Sequence[Choice], line: Family) -> list[Optimum]:
    """The best sizes of every choice of which a model fits into the budget."""
    found, refused = [], None
    for choice in asked:
        try:
            found += best(judged.law, values, budget, [choice], line)
        except ConfigError as error:
            refused = error
    if not found:
        assert refused is not None
        raise refused
    return sorted(found, key=lambda one: one.loss)


def _further(fits: Fits, flops: float, answer: Optimum) -> dict[str, float]:
    """How many times an answer lies beyond the runs of its choice, as a factor: below 1 where it is beneath the smallest."""
    mine = np.array([choice_of(row) == answer.choice for row in fits.rows])
    mine = mine if mine.any() else ~mine
    places = {"FLOPs": ("flops", flops), "active parameters": ("active", answer.active), "tokens": ("tokens", answer.tokens)}

    def beyond(name: str, value: float) -> float:
        column = fits.x[name][mine]
        return float(value / np.clip(value, column.min(), column.max()))

    return {what: beyond(name, value) for what, (name, value) in places.items()}


def _half(judged: Judged, answer: Optimum) -> float:
    sizes = Sizes(*(np.array([size]) for size in (answer.base, answer.active, answer.total)))
    x = points_of(sizes, np.array([answer.tokens]), answer.choice)
    low, high = between(judged.law, judged.draws, x, np.array([answer.loss]), judged.spread)
    return float(high[0] - low[0]) / 2


def unidentified(fits: Fits, judged: Judged, found: Verdict) -> list[str]:
    """Why the runs do not carry this conclusion; none if they do."""
    reasons, answer = [], found.answer
    pushed = [name for name in judged.at_bounds if name in ("alpha", "beta")]
    if pushed:
        reasons.append(f"the runs push {' and '.join(pushed)} of the law {judged.law.name} out of the range of any scaling law")
    if judged.held is None:
        reasons.append("too few runs are left to fit when the largest are held out, so the law was never tried")
    elif judged.held.error > _ERROR:
        reasons.append(f"the law misses the largest runs, held out, by {judged.held.error:.1%} where at most {_ERROR:.0%} would do")
    if found.half > _OPEN * answer.loss:
        reasons.append(f"the loss of the answer is open by ± {found.half / answer.loss:.1%} where at most {_OPEN:.0%} would do")
    if found.sizes[1] > _APART * found.sizes[0]:
        low, high = (short(size) for size in found.sizes)
        reasons.append(f"the best size is open: nine of ten draws put N_active between {low} and {high}")
    if answer.least:
        reasons.append(f"the best size is below the smallest that is asked about, {short(answer.base)} parameters of a dense model")
    for what, times in found.further.items():
        if max(times, 1 / times) > _FAR:
            reasons.append(f"its {what} are {_beyond(times)} those of any run of its kind, and further than {_FAR:.0f}x no law is followed")
    return reasons


def _beyond(times: float) -> str:
    return f"{factor(times)} above" if times > 1 else f"{factor(1 / times)} below"


def _sentences(found: Verdict, fits: Fits, weight_bytes: float) -> list[str]:
    answer, judged = found.answer, fits.judged[found.law or ""]
    size = f"N_active = {short(answer.active)}, D = {short(answer.tokens)} tokens"
    loss = f"predicted loss {answer.loss:.3f} ± {found.half:.3f} (19 of 20 runs)"
    lines = [f"{found.question}: {answer.choice}, {size}; {loss}{_of_dense(found)}.", _certain(found)]
    if answer.limit:
        lines.append(f"The {answer.limit} keeps the model from being larger: all {weight(answer.total * weight_bytes)} of it are used.")
    lines += [_edge(found), extrapolation(found), *_doubts(fits, judged, found)]
    if judged.held is not None:
        tried = f"Fitted to all but the largest {int(fits.held.sum())} runs, the law {judged.law.name} foresees those"
        lines.append(f"{tried} to {judged.held.error:.2%} (worst {judged.held.worst:.2%}).")
    return [line for line in lines if line]


def _of_dense(found: Verdict) -> str:
    if found.dense is None:
        return ""
    times, low, high = found.dense
    if times == np.inf:
        return "; no dense model would reach that, not at 10,000x the compute"
    most = "any multiple" if high == np.inf else factor(high)
    return f"; dense would need {factor(times)} the compute ({factor(low)} to {most})"


def extrapolation(found: Verdict) -> str:
    """How far from the runs of its kind an answer lies; nothing if it lies among them."""
    beyond = [f"{_beyond(times)} in {what}" for what, times in found.further.items() if max(times, 1 / times) > _INSIDE]
    return f"This is an extrapolation, beyond the runs of its kind: {', '.join(beyond)}." if beyond else ""


def _doubts(fits: Fits, judged: Judged, found: Verdict) -> list[str]:
    lines = [
        f"The law {name}, which foresaw the largest runs about as well, says {other.choice}, N_active = {short(other.active)}, "
        f"loss {other.loss:.3f}."
        for name, other in found.others.items()
    ]
    odd = unusual(np.log(fits.loss) - np.log(judged.loss(fits.x)))
    if odd.any():
        names = ", ".join(row.id[:8] for row, far in zip(fits.rows, odd, strict=True) if far)
        lines.append(f"{int(odd.sum())} of the runs lie further from the law than chance brings, and count for little: {names}.")
    if judged.law.coefficients[-1] in judged.at_bounds and not judged.law.decadic:
        lines.append("The runs do not show a loss that no size or length removes, so losses far beyond them come out too low.")
    return lines


def _certain(found: Verdict) -> str:
    share = found.won.get(found.answer.choice, 0.0)
    low, high = (short(size) for size in found.sizes)
    sizes = f"Nine of ten draws of the bootstrap put N_active {f'at {low}' if low == high else f'between {low} and {high}'}"
    if len(found.won) < 2:
        return f"{sizes}."
    if share >= _SURE:
        return f"{sizes}; {found.answer.choice} is best in {share:.0%} of them."
    other, of_other = max(((c, s) for c, s in found.won.items() if c != found.answer.choice), key=lambda pair: pair[1])
    return f"{sizes}. The choice is not sure: {found.answer.choice} is best in {share:.0%} of them, {other} in {of_other:.0%}."


def _edge(found: Verdict) -> str:
    many = max(one.choice.experts / one.choice.top_k for one in found.answers)
    answer = found.answer
    if len(found.answers) > 1 and answer.choice.experts / answer.choice.top_k == many:
        return "That is the sparsest choice that was run: the optimum may lie further, among more experts."
    return ""
