"""Which router for a language model: the quickstart's model with each of them, at equal active FLOPs, on the same text.

Each row is trained at a few settings, each for --tune-steps with seed 0, first at both values of its own main option, then with the
better one at another learning rate; then for --steps at the best of these with each of the seeds. Every run is an ordinary run folder
under --runs, its result a line of rows.jsonl there, and what is finished is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.report import RESULTS, write_report
from benchmarks.routers.figure import dots
from benchmarks.routers.language_cell import Cell, step_times, train_cell

BASE = Path("configs/debug.yaml")
RATES = (3e-3, 1.5e-3, 6e-3)  # a row with one variant is tried at all three, one with two variants at the first two
SEEDS = (0, 1, 2)
WIDTH = 192  # of an expert when a token has two; one expert a token is twice as wide, and so is the dense layer


class Row(NamedTuple):
    """A line of the comparison."""

    variants: tuple[dict[str, Any], ...]  # the router at each value of its main option
    later: Literal["", "in training", "always"] = ""  # when a token's experts depend on tokens after it


def rows(steps: int) -> dict[str, Row]:
    """Every line, for runs of so many steps: schedules are shares of a run."""

    def row(base: dict[str, Any], *variants: dict[str, Any], later: Literal["", "in training", "always"] = "") -> Row:
        return Row(tuple(base | variant for variant in variants or ({},)), later)

    def searched(router: dict[str, Any], share: float) -> dict[str, Any]:
        return {"name": "local_search", "router": router, "steps": max(round(share * steps), 1)}

    comet = [{"name": "comet", "entropy_loss": loss} for loss in (1e-3, 1e-4)]
    cooling = {"name": "dense_to_sparse", "temperature_start": 2.0, "temperature_end": 0.3}
    until = [{"decay_steps": max(round(share * steps), 1), "top_1_step": round(share * steps)} for share in (0.5, 0.8)]
    return {
        "dense": Row(({},)),
        "top_k": row({"name": "top_k"}, {"balance_loss": 0.01}, {"balance_loss": 0.001}),
        "top_k, k=1 (Switch)": row({"name": "top_k", "k": 1, "normalize": "none"}, {"balance_loss": 0.01}, {"balance_loss": 0.001}),
        "top_k, bias (DeepSeek-V3)": row(
            {"name": "top_k", "score": "sigmoid", "balance_loss": 0.0}, {"bias_rate": 1e-3}, {"bias_rate": 1e-2}
        ),
        "top_k, capacity (GShard)": row(
            {"name": "top_k", "second": "random", "balance_counts": "first"},
            {"capacity_factor": 1.25},
            {"capacity_factor": 2.0},
            later="always",
        ),
        "top_k, no balancing": row({"name": "top_k", "balance_loss": 0.0}, {"z_loss": 0.0}, {"z_loss": 1e-3}),
        "noisy_top_k": row({"name": "noisy_top_k"}, {"noise": "learned"}, {"noise": "fixed"}),
        "hash": row({"name": "hash"}, {"k": 2}, {"k": 1}),
        "sinkhorn": row({"name": "sinkhorn"}, {"k": 2}, {"k": 1}, later="in training"),
        "base": row({"name": "base"}, {"tolerance": 1e-3}, {"tolerance": 1e-2}, later="in training"),
        "sparse_ot": row({"name": "sparse_ot"}, {"gamma": 1.0}, {"gamma": 0.1}, later="in training"),
        "sigma": row({"name": "sigma"}, {"expert_dropout": 0.2}, {"expert_dropout": 0.05}),
        "comet": row({}, *comet),
        "dselect_k": row({"name": "dselect_k"}, {"entropy_loss": 1e-3}, {"entropy_loss": 1e-4}),
        "local_search of comet": row({}, *(searched(comet[0], share) for share in (0.25, 0.1))),
        "local_search of top_k": row({}, *(searched({"name": "top_k"}, share) for share in (0.25, 0.1))),
        "avg_k": row({"name": "avg_k"}, {"k": 2}, {"k": 1}),
        "sparse_mixer": row({"name": "sparse_mixer"}, {"estimator": "v2"}, {"estimator": "v2_star"}),
        "dense_to_sparse": row(cooling, *until),
        "remoe": row({"name": "remoe", "penalty": 1e-5}, {"penalty_rate": 1.03}, {"penalty_rate": 1.05}),
        "expert_choice": row({"name": "expert_choice", "leak": "allow"}, {"max_experts": None}, {"max_experts": 4}, later="always"),
        "sparse_ot of experts": row(
            {"name": "sparse_ot", "side": "experts", "leak": "allow"}, {"gamma": 1.0}, {"gamma": 0.1}, later="always"
        ),
    }


def one_expert(router: dict[str, Any]) -> bool:
    """Whether a token has one expert, at least when training ends."""
    return router.get("k") == 1 or router.get("name") in ("base", "dense_to_sparse")


def cell(row: str, router: dict[str, Any], lr: float, seed: int, stage: Literal["tune", "final"], steps: int, runs: Path) -> Cell:
    """The run of a row at one setting; its folder is named by its row and by a fingerprint of everything that it is given."""
    width = 2 * WIDTH if one_expert(router) else WIDTH
    model = (
        [f"model.moe.d_expert={width}", f"model.moe.router={json.dumps(router)}"]
        if router
        else ["model.moe=null", f"model.d_ff={2 * WIDTH}"]
    )
    text = json.dumps([{"name": "tokens", "paths": [str((runs / "tokens").resolve())]}])
    words = [
        *(str(BASE), f"data.sources={text}", "parallel.ranks=1", *model),
        *(f"train.steps={steps}", f"train.seed={seed}", "train.batch=4", f"optimizer.lr={lr}", f"schedule.warmup={max(steps // 10, 1)}"),
        *("evaluate.sequences=256", "evaluate.sample_tokens=1", "log.every=10", f"checkpoint.every={steps}"),
        f"evaluate.every={steps if stage == 'tune' else max(3 * steps // 4, 1)}",
    ]
    fingerprint = hashlib.sha256("\n".join([BASE.read_text(), *words]).encode()).hexdigest()[:10]
    setting = ", ".join(f"{key}={value}" for key, value in router.items() if key not in ("name", "leak", "router"))
    folder = runs / f"{''.join(c if c.isalnum() else '-' for c in row)}-{stage}-{fingerprint}"
    return Cell(row, setting, lr, seed, stage, steps, [f"run.folder={folder}", *words], fingerprint, folder)


class Results:
    """Lines of finished cells, kept in a file as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.of = {line["fingerprint"]: line for line in lines if "error" not in line}

    def add(self, line: dict[str, Any]) -> None:
        self.of[line["fingerprint"]] = line
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def make(self, cells: Iterable[Cell], pool: Any, deadline: float) -> None:
        """Train the cells that are not there yet; begin none after the deadline."""
        waiting = [pool.submit(_train_until, one, deadline) for one in cells if one.fingerprint not in self.of]
        for number, done in enumerate(as_completed(waiting), 1):
            line = done.result()
            if line is None:
                continue
            self.add(line)
            told = line.get("error") or f"{line['bits']:.4f} bits per byte, {line['seconds']:.0f} s"
            print(f"{number}/{len(waiting)} {line['row']} ({line['setting']}) lr {line['lr']:g} seed {line['seed']}: {told}", flush=True)

    def bits(self, one: Cell) -> float:
        return self.of.get(one.fingerprint, {}).get("bits", float("inf"))


def _train_until(one: Cell, deadline: float) -> dict[str, Any] | None:
    return train_cell(one) if time.time() < deadline else None


def compare(options: argparse.Namespace, wanted: dict[str, list[dict[str, Any]]], results: Results, pool: Any, deadline: float) -> None:
    """All stages; `wanted` names rows and is filled with the cells of the last stage, as lines of results."""
    short, long = rows(options.tune_steps), rows(options.steps)

    def tuned(name: str, variant: int, lr: float) -> Cell:
        return cell(name, short[name].variants[variant], lr, 0, "tune", options.tune_steps, options.runs)

    def tune(settings: dict[str, list[tuple[int, float]]]) -> None:
        results.make([tuned(name, *setting) for name, some in settings.items() for setting in some], pool, deadline)

    def best(name: str, settings: list[tuple[int, float]]) -> tuple[int, float]:
        return min(settings, key=lambda setting: results.bits(tuned(name, *setting)))

    tried = {name: [(number, RATES[0]) for number in range(len(short[name].variants))] for name in wanted}
    tune(tried)
    for name, settings in tried.items():
        settings += [(best(name, settings)[0], lr) for lr in RATES[1 : 4 - len(settings)]]
    tune(tried)
    final = {}
    for name, settings in tried.items():
        variant, lr = best(name, settings)
        final[name] = [cell(name, long[name].variants[variant], lr, seed, "final", options.steps, options.runs) for seed in SEEDS]
    results.make([final[name][number] for number in range(len(SEEDS)) for name in wanted], pool, deadline)
    for name, cells in final.items():
        wanted[name] = [results.of[one.fingerprint] | {"folder": str(one.folder)} for one in cells if one.fingerprint in results.of]


def table(
    lines: dict[str, list[dict[str, Any]]], short: dict[str, list[dict[str, Any]]], times: dict[str, list[float]], later: dict[str, str]
) -> list[dict[str, Any]]:
    """A line a row, best first, by the figure that holds for generating; last, rows that have short runs alone, by their best."""
    against = {one["seed"]: one["bits_alone"] for one in lines["top_k"]}
    made, unfinished = [], []
    for name, some in lines.items():
        tried = sorted(one["bits"] for one in short.get(name, []))
        if not some:
            best = min(short.get(name, []), key=lambda one: one["bits"], default=None)
            if best is not None:
                unfinished.append({"router": name, "setting": _setting(best), "seeds": 0} | _tried(tried))
            continue
        ahead = [one["bits_alone"] - against[one["seed"]] for one in some if one["seed"] in against]
        line = {
            "router": name,
            "setting": _setting(some[0]),
            "seeds": len(some),
            "bits per byte": round(_mean(some, "bits_alone"), 4),
            "±": _rounded(standard_error([one["bits_alone"] for one in some])),
            "against top_k": round(statistics.mean(ahead), 4) if ahead else "",
            "± of that": _rounded(standard_error(ahead)),
            "sees later tokens": f"always: {_mean(some, 'bits'):.3f}" if later.get(name) == "always" else later.get(name, ""),
        }
        more = {"step time": _step_time(times, name), "parameters, M": round(some[0]["parameters"] / 1e6, 2)}
        made.append(line | _routing(some) | more | _tried(tried))
    return sorted(made, key=lambda line: line["bits per byte"]) + sorted(unfinished, key=lambda line: line["short runs"])


def _setting(one: dict[str, Any]) -> str:
    return ", ".join(filter(None, [f"lr={one['lr']:g}", one["setting"]]))


def _tried(bits: list[float]) -> dict[str, str]:
    return {"short runs": " / ".join(f"{value:.3f}" for value in bits)}


def _routing(some: list[dict[str, Any]]) -> dict[str, Any]:
    """The columns that a dense model has not."""
    columns = {
        "experts a token": ("experts", 1, 2),
        "at the end": ("experts_late", 1, 2),
        "held out": ("experts_held_out", 1, 2),
        "load CV": ("cv", 1, 2),
        "CV held out": ("cv_held_out", 1, 2),
        "dropped %": ("drop_rate", 100, 1),
        "dead of 32": ("dead_held_out", 1, 1),
        "churn %": ("churn", 100, 1),
    }
    return {
        column: round(factor * _mean(some, name), digits) if some[0].get(name) is not None else ""
        for column, (name, factor, digits) in columns.items()
    }


def _step_time(times: dict[str, list[float]], name: str) -> float | str:
    if name not in times or "top_k" not in times:
        return ""
    return round(statistics.median(a / b for a, b in zip(times[name], times["top_k"], strict=True)), 2)


def draw(path: Path, made: list[dict[str, Any]]) -> None:
    """A chart of the differences from top_k; a star at rows that see later tokens, in training or always."""
    points = [
        (line["router"] + " *" * bool(line["sees later tokens"]), line["against top_k"], line["± of that"])
        for line in made
        if isinstance(line.get("± of that"), float)
    ]
    dots(path, points, "Routers on a language model", "bits per byte above top_k's, held-out text; mean over seeds ± standard error")


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def _mean(some: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(one[name] for one in some)


def _rounded(value: float) -> float | str:
    return "" if value != value else round(value, 4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--tune-steps", type=int, default=150)
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="these rows and top_k alone; all without it")
    parser.add_argument("--runs", type=Path, default=Path("runs/routers"))
    parser.add_argument("--parallel", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many; the same command goes on")


def run(options: argparse.Namespace) -> None:
    """Make what is missing of the comparison, and write its table."""
    from moe.data.prepare import tokenize

    os.environ["OMP_NUM_THREADS"] = "1"
    deadline = time.time() + 60 * options.minutes
    if options.quick:
        options.steps, options.tune_steps, options.rows = 8, 4, ["comet"]
    known = rows(options.steps)
    if wrong := [name for name in options.rows or [] if name not in known]:
        raise SystemExit(f"there is no row {wrong[0]!r}; choose from: {'; '.join(known)}")
    lines = {name: [] for name in known if not options.rows or name in [*options.rows, "top_k"]}
    options.runs.mkdir(parents=True, exist_ok=True)
    if not (options.runs / "tokens").exists():
        tokenize(["stdlib"], options.runs / "tokens")
    results = Results(options.runs / "rows.jsonl")
    with ProcessPoolExecutor(options.parallel, mp_context=multiprocessing.get_context("spawn")) as pool:
        compare(options, lines, results, pool, deadline)
    print("timing a step of each", file=sys.stderr, flush=True)
    times = step_times({name: Path(some[0]["folder"]) for name, some in lines.items() if some}, 2 if options.quick else 9)
    commits = sorted(
        {line["commit"][:7] + ("+" if line["commit"].endswith("+changes") else "") for some in lines.values() for line in some}
    )
    notes = [
        f"Runs of {options.steps} steps of 4 x 256 bytes, seeds {SEEDS}, after 3 settings a row with {options.tune_steps} steps each; "
        f"made at {', '.join(commits)} (+ for a changed checkout).",
        *NOTES,
    ]
    raw = {"finished": list(results.of.values()), "step_seconds": times}
    short = {name: [one for one in results.of.values() if (one["row"], one["stage"]) == (name, "tune")] for name in lines}
    made = table(lines, short, times, {name: row.later for name, row in known.items()})
    write_report("routers_language", made, raw=raw, json_file=options.json, quick=options.quick, notes=notes)
    if not options.quick:
        draw(RESULTS / "routers_language.svg", made)


NOTES = (
    f"Equal active FLOPs: two experts of width {WIDTH} a token, or one of {2 * WIDTH} (k=1, base, dense_to_sparse), or a dense layer of "
    f"{2 * WIDTH}. comet, dselect_k, remoe and dense_to_sparse, and local_search while it searches, have more experts a token at "
    "first: the columns say how many over all steps, over the last tenth, and in evaluation.",
    "±: standard errors over seeds. Against top_k: the mean of the differences at equal seeds, which share text and order; less is "
    "better. The best setting was chosen by the validation figure of the short runs, with seed 0.",
    "Bits per byte are of 65,536 held-out bytes when every token is routed as a sequence of its own, as in generating token by token. "
    "Rows that always see later tokens have an ordinary validation figure too, named in that column: it looked ahead in the text to "
    "be predicted, and is no figure of a language model. Expert choice alone gives a token all experts, or max_experts of them.",
    "Load CV and drops: means over layers and the last tenth of the steps, of 1024 tokens each. Held out and dead: over 65,536 "
    "held-out tokens, in four layers of 8 experts. Churn: share of 1024 held-out tokens' assignments that changed in the last quarter.",
    "Short runs: ordinary validation figures of the settings that were tried, best first; a row without seeds has these alone.",
    "Step time: processor seconds of one training step at the end, forward, backward and optimizer, on one thread, as a ratio to "
    "top_k; medians of rounds in which all rows take turns.",
)
