"""What the laws of the literature say of a budget, with no run at all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from moe.errors import ConfigError
from moe.scaling import LAWS
from moe.scaling.compute_optimal import DENSE, PLAIN, Budget, Choice, Family, Optimum, Sizes, best, compute, dense_multiple, six, smallest
from moe.scaling.laws import Column, Law
from moe.tables import entry, nearest

VOCABULARY = 32_000  # of the models that the joint law is asked about: its parameters count embeddings
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_NUMBER = re.compile(r"([+-]?(?:\d{1,3}(?:,\d{3})+|\d+(?:_\d+)*)?(?:\.\d*)?)(e[+-]?\d+)?\s*([a-z]*)", re.ASCII)


class Published(NamedTuple):
    """How a law's published values are asked: over which choices, for models of which make."""

    values: str
    family: Family
    choices: tuple[Choice, ...]
    runs: tuple[float, float] | str  # FLOPs of the smallest and the largest run behind the values; words, where they are not recorded
    dense: str | None = None  # the values of a dense model, where they are others
    note: str = ""


def _blocks(width: Column) -> Column:
    return width / 64


def _width_of_joint(base: Column) -> Column:
    """Of a model of `base` parameters, 2 d V + 13 d² blocks, with d/64 blocks: the one positive root, by Newton's steps."""
    width = (64 * base / 13) ** (1 / 3)
    for _ in range(60):
        width = width - (13 / 64 * width**3 + 2 * VOCABULARY * width - base) / (39 / 64 * width**2 + 2 * VOCABULARY)
    return width


def _replaced_in_joint(base: Column) -> Column:
    width = _width_of_joint(base)
    return 9 * width**2 * _blocks(width)


def _price_of_fine(sizes: Sizes, choice: Choice) -> Column:
    """Six FLOPs a parameter, and the router's, 14 d FLOPs an expert and block; 12 d² parameters a block, d/64 blocks."""
    width = (64 * sizes.base / 12) ** (1 / 3)
    return six(sizes, choice) + (14 * width * _blocks(width) * choice.experts if choice.experts > 1 else 0)


_ONE_OF = tuple(Choice(experts) for experts in (1, 2, 4, 8, 16, 32))
_FINE = tuple(Choice(64 * cut, cut, cut) for cut in (1, 2, 4, 8, 16))
PUBLISHED = {
    "chinchilla": Published("paper", PLAIN, (DENSE,), (6e18, 3e21), note="It knows dense models alone."),
    "krajewski": Published(
        "64 experts", Family(lambda base: 2 / 3 * base, _price_of_fine), _FINE, "How large its runs were is not recorded here",
        dense="dense",
        note="64 times the parameters of the dense layers, granularity 1 to 16; parameters without embeddings.",
    ),
    "abnar": Published(
        "paper", PLAIN, (*_ONE_OF, Choice(50)), (3e19, 1e21),
        note="One expert of each group of so many; beyond 50 (sparsity 0.98) nothing was measured, and the law has no optimum there.",
    ),
    "ludziejewski": Published(
        "paper", Family(_replaced_in_joint, six), _ONE_OF,
        "Its runs had at most 2.7B active parameters and 5B in all; their FLOPs are not recorded here",
        note=f"Top-1 of 1 to 32 experts; parameters with embeddings of {VOCABULARY:,} tokens.",
    ),
}  # fmt: skip
SILENT = {
    "clark": "knows nothing of tokens (all its runs saw 130B), so no budget divides between size and tokens",
    "journey": "has no published values; moe study fit finds some for your own runs",
}


class Prediction(NamedTuple):
    """What a law makes of a budget."""

    law: Law
    published: Published
    budget: Budget
    found: list[Optimum]  # one a choice, the best first
    dense: float | None  # times the FLOPs with which a dense model would be as good; None: within these limits, none

    @property
    def beyond(self) -> str:
        """How far the budget lies outside the runs behind the law, in a sentence; empty if it does not."""
        runs = self.published.runs
        if isinstance(runs, str):
            return f"{runs}, so whether this goes beyond them is not known."
        low, high = runs
        flops = _training_flops(self.found[0], self.published.family)
        if low <= flops <= high:
            return ""
        far = f"this is {times(flops / high)} the largest" if flops > high else f"the smallest had {times(low / flops)} as many as this"
        return f"Its runs had {compute(low)} to {compute(high)} FLOPs; {far}."


def ask(law: Law, budget: Budget) -> Prediction:
    """The published law's answer; ConfigError, in one sentence, if it has none."""
    if law.name in SILENT:
        raise ConfigError(f"the law {law.name} {SILENT[law.name]}")
    published = PUBLISHED[law.name]
    values = dict.fromkeys(published.choices, law.published[published.values])
    if published.dense is not None:
        values[DENSE] = law.published[published.dense]
    found, refused = [], None
    for choice, of_choice in values.items():
        try:
            found += best(law, of_choice, budget, [choice], published.family)
        except ConfigError as error:  # so many experts do not fit, fewer may
            refused = refused or error
    if not found:
        raise refused or ConfigError(f"the law {law.name} has no choices")
    found.sort(key=lambda one: one.loss)
    if found[0].least:
        raise ConfigError(f"by the law {law.name} {budget} are best spent on less than {smallest(found[0].choice)}; raise --flops")
    dense = dense_multiple(law, values.get(DENSE, law.published[published.values]), budget, found[0].loss, published.family)
    return Prediction(law, published, budget, found, 1.0 if found[0].choice == DENSE else dense)


def predict(law: str, flops: str, memory: str | None, *, weight_bytes: float, active: str | None, served: str, as_json: bool) -> Any:
    """Print what one law, or all of them, say; the same as data if asked for."""
    limit = quantity(memory, "--memory", "B") / weight_bytes if memory else np.inf
    most, use = quantity(active, "--active") if active else np.inf, quantity(served, "--served", least=0)
    budget = Budget(quantity(flops, "--flops"), limit, most, use)
    if law != "all" and law not in LAWS:
        raise ConfigError(f"unknown law {law!r}; {nearest(law, [*LAWS, 'all'])}")
    answers, silent = [], {}
    for name in LAWS if law == "all" else [law]:
        try:
            answers.append(ask(entry(LAWS, name, "law"), budget))
        except ConfigError as error:
            silent[name] = str(error)
    if not answers:
        raise ConfigError(next(why for name, why in silent.items() if name == law or name in PUBLISHED))
    if as_json:
        return [_data(answer, weight_bytes) for answer in answers] + [{"law": name, "why_not": why} for name, why in silent.items()]
    console = Console(highlight=False)
    for answer in answers:
        console.print(_table(answer, weight_bytes))
        for line in _sentences(answer, weight_bytes):
            console.print(line, soft_wrap=True)
        console.print()
    for name, why in silent.items():
        console.print(f"No answer of {name}: {why}.", soft_wrap=True)
    return None


def quantity(text: str, option: str, unit: str = "", *, least: float = 1e-300) -> float:
    """A number of a command line: 1e21, 1,500,000, 80GB, 2GiB, 1.5T, 7B (billions, where no bytes are meant)."""
    found = _NUMBER.fullmatch(text.strip().lower())
    front, power, tail = found.groups() if found else ("", "", "")
    if unit == "B":
        base, letter = (1024, tail[:-2]) if re.fullmatch("[kmgtp]ib", tail) else (1000, tail.removesuffix("b"))
    else:
        base, letter = 1000, "g" if tail == "b" else tail
    if not re.search(r"\d", front) or letter not in _UNITS or (power and letter):  # 7e9B is a slip for 7B
        raise ConfigError(f"{option} {text} is no number; write {'80GB or 2GiB' if unit == 'B' else '1e21 or 7B'}")
    value = float(front.replace(",", "") + (power or "")) * float(base) ** _UNITS[letter]
    if not least <= value < np.inf:
        raise ConfigError(f"{option} {text} is out of range; give a finite number{', 0 or above' if least == 0 else ' above 0'}")
    return value


def short(number: float, units: Sequence[str] = ("", "k", "M", "B", "T")) -> str:
    """A number in three digits: 41.2M, 1.5e18."""
    size = number
    for unit in units:
        if abs(size) < 999.5:
            return f"{size:.3g}{unit}"
        size /= 1000
    return f"{compute(number)}{units[0]}"


def times(factor: float) -> str:
    """A factor in two digits: 1.9x, 380x, 2,100x, 6e9x."""
    if factor < 99.5:
        return f"{factor:.2g}x"
    rounded = float(f"{factor:.2g}")
    return f"{rounded:,.0f}x" if rounded < 1e6 else f"{compute(rounded)}x"


def weight(number: float) -> str:
    """Bytes in three digits: 1.84 GB."""
    return short(number, (" B", " kB", " MB", " GB", " TB", " PB"))


def _training_flops(found: Optimum, family: Family) -> float:
    sizes = Sizes(*(np.array([x]) for x in (found.base, found.active, found.total)))
    return float(family.price(sizes, found.choice)[0] * found.tokens)


def _sentences(answer: Prediction, weight_bytes: float) -> list[str]:
    first = answer.found[0]
    said = f"{answer.law.name}: {first.choice}; N_active = {short(first.active)}, N_total = {short(first.total)} "
    said += f"({weight(first.total * weight_bytes)}), D = {short(first.tokens)} tokens; predicted loss {first.loss:.3f}"
    if first.limit:
        said += f"; the {first.limit} keeps it from being larger"
    lines = [f"{said}.", comparison(answer.dense, first, limited=answer.budget.limited), _beaten(answer)]
    lines += [f"{answer.law.source}. {answer.published.note}".strip(), answer.beyond]
    return [line for line in lines if line]


def comparison(dense: float | None, first: Optimum, *, limited: bool) -> str:
    """What a dense model would need for the same loss; `limited`: whether memory or inference is."""
    if first.choice == DENSE:
        return ""
    if dense is None:
        return f"No dense model{' within these limits' * limited} would reach that, not at 10,000x the compute."
    return f"Dense would need {times(dense)} the compute."


def _beaten(answer: Prediction) -> str:
    """That dense is better than all mixtures, where it is."""
    first, *others = answer.found
    if first.choice != DENSE or not others:
        return ""
    within = " within these limits" * answer.budget.limited
    return f"Dense is better than every mixture{within}: the best of them, {others[0].choice}, ends at {others[0].loss:.3f}."


def _table(answer: Prediction, weight_bytes: float) -> Table:
    table = Table("experts", "top-k", "granularity", "active", "total", "weights", "tokens", "loss", "limit", box=None, header_style="bold")
    for column in table.columns:
        column.justify = "right"
    for one in answer.found:
        sizes = short(one.active), short(one.total), weight(one.total * weight_bytes), short(one.tokens)
        limit = "no smaller asked" if one.least else one.limit
        table.add_row(str(one.choice.experts), str(one.choice.top_k), f"{one.choice.granularity:g}", *sizes, f"{one.loss:.4f}", limit)
    return table


def _data(answer: Prediction, weight_bytes: float) -> Mapping[str, Any]:
    found = [one._asdict() | one.choice._asdict() | {"bytes": one.total * weight_bytes} for one in answer.found]
    for one in found:
        del one["choice"]
    of_dense = {"dense_values": dict(answer.law.published[answer.published.dense])} if answer.published.dense else {}
    return {"law": answer.law.name, "source": answer.law.source, "dense_needs": answer.dense, "note": answer.published.note,
            "beyond": answer.beyond, "values": dict(answer.law.published[answer.published.values]), **of_dense, "found": found}  # fmt: skip
