"""Expert layers on a GPU, from the plan of the permutation to the sum over experts: ours, other libraries', and dense products.

TFLOP/s count useful work alone: 6 T k d f forward, twice that backward. `of dense` is the time of matrix products of the same
work, an expert's widths and all rows in one, over the layer's. Before a layer is timed, its output and gradients on the same
widths and routing are compared with the definition; one that differs is refused. Cells come in the order of their worth, and
each is written when it is done:

    python -m benchmarks.kernels --minutes 8
    python -m benchmarks.kernels --report benchmarks/results/kernels_*.jsonl

On a CPU, TRITON_INTERPRET=1 python -m benchmarks.kernels --quick shows that it works.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.kernel_cases import ROUTINGS, SHAPES, TINY, Case, Shape, difference, expected, make_case, results
from benchmarks.kernel_peers import CONTESTANTS, Contestant
from benchmarks.report import RESULTS, facts_here, slug, write_report

TOKENS = (32768, 8192, 16384, 4096)
FIRST = [(32768, "natural"), (32768, "balanced"), (8192, "natural"), (32768, "zipf"), (32768, "quarter empty"), (4096, "natural")]
CHECKED_ROWS = 640  # an expert's, on average: as many as choose the kernel's largest tiles
FLUSH = 256 << 20  # bytes: more than the L2 cache of any GPU
WARM_UP = 3
ABSENT = "not here: "
SENSORS = "clocks.sm,power.draw,temperature.gpu,clocks_throttle_reasons.active"
NOTES = (
    "kept: bytes held from forward to backward, the output included; peak: above what is there before, weight gradients included.",
    "natural: k experts at random; balanced: equally many assignments each; zipf: in proportion to 1/rank; "
    "quarter empty: a quarter of the experts without a token.",
    "L2 flushed before every forward pass; all layers of a cell take turns, round by round; medians.",
)


class Cell(NamedTuple):
    name: str
    shape: Shape
    tokens: int
    routing: str

    @property
    def flops(self) -> float:
        return 6.0 * self.tokens * self.shape.k * self.shape.d * self.shape.f


class Passes(NamedTuple):
    forward: Callable[[], Any]
    backward: Callable[[Any], Any]


class Bench:
    """One run of the benchmark: its device, dtype and rounds, and what has been found to be right or wrong."""

    def __init__(self, device: str, dtype: torch.dtype, rounds: int, layers: Sequence[str]) -> None:
        self.device, self.dtype, self.rounds, self.layers = device, dtype, rounds, layers
        self.verdicts: dict[tuple[Cell, str], str | None] = {}
        self.flush = torch.empty(FLUSH if device == "cuda" else 0, dtype=torch.uint8, device=device)

    def measure(self, cell: Cell) -> list[dict[str, Any]]:
        """A row for every layer; one that is absent, wrong or too large says so instead of its figures."""
        self.check(cell)
        case = make_case(cell.shape, cell.tokens, cell.routing, self.dtype, self.device)
        runners: dict[str, Passes] = {}
        memory: dict[str, tuple[float, float]] = {}
        refused = {name: verdict for name in self.layers if (verdict := self.verdicts[_scaled(cell), name]) is not None}
        for name in ("dense products", *(name for name in self.layers if name not in refused)):
            try:
                runner = dense(case) if name == "dense products" else passes(CONTESTANTS[name](case), case)
                for _ in range(WARM_UP if self.device == "cuda" else 1):
                    memory[name] = self.memory(runner)
                runners[name] = runner
            except torch.cuda.OutOfMemoryError:
                refused[name] = "out of memory"
        if "dense products" in refused:
            return [_row(cell, name, [], [], None) | {"refused": "out of memory"} for name in ("dense products", *self.layers)]
        times, sensors = self.rounds_of(runners)
        base = times["dense products"]
        rows = [_row(cell, name, times[name], base, memory[name]) | {"sensors": sensors} for name in runners]
        return rows + [_row(cell, name, [], base, None) | {"refused": why} for name, why in refused.items()]

    def check(self, cell: Cell) -> None:
        """Compare every layer with the definition on the cell's widths and routing, with fewer tokens where that is enough."""
        scaled = _scaled(cell)
        if (scaled, self.layers[0]) in self.verdicts:
            return
        case = make_case(cell.shape, scaled.tokens, cell.routing, self.dtype, self.device, seed=1)
        right = expected(case)
        for name in self.layers:
            self.verdicts[scaled, name] = verdict(name, case, right)
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def memory(self, runner: Passes) -> tuple[float, float]:
        """MiB kept from forward to backward, and the peak of both."""
        if self.device != "cuda":
            runner.backward(runner.forward())
            return 0.0, 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = runner.forward()
        kept = torch.cuda.memory_allocated() - before
        gradients = runner.backward(y)
        del y, gradients
        return kept / 2**20, (torch.cuda.max_memory_allocated() - before) / 2**20

    def rounds_of(self, runners: dict[str, Passes]) -> tuple[dict[str, list[tuple[float, float]]], str | None]:
        """Milliseconds forward and backward of every round, and clocks and power read in the middle of them."""
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
        reading = None
        for number in range(self.rounds):
            if number == self.rounds // 2:
                reading = start_sensors() if self.device == "cuda" else None
            clocks = {name: self.once(runner) for name, runner in runners.items()}
            if self.device == "cuda":
                torch.cuda.synchronize()
            for name, (a, b, c) in clocks.items():
                times[name].append((_between(a, b), _between(b, c)))
        return times, reading.communicate()[0].strip() if reading else None

    def once(self, runner: Passes) -> list[Any]:
        """Events (on a CPU: seconds) before the forward pass, between both, and after."""
        marks: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(3)] if self.device == "cuda" else [0.0] * 3
        self.flush.zero_()

        def mark(i: int) -> None:
            if self.device == "cuda":
                marks[i].record()
            else:
                marks[i] = time.perf_counter()

        mark(0)
        y = runner.forward()
        mark(1)
        runner.backward(y)
        mark(2)
        return marks


def verdict(name: str, case: Case, right: Sequence[Tensor]) -> str | None:
    """Why a layer is not to be timed; None if it may be."""
    try:
        contestant = CONTESTANTS[name](case)
        y, x, weight, *weights = results(contestant.run, contestant.weights, case)
        return difference([y, x, weight, *contestant.stacked(*weights)], right, case.x.dtype)
    except ImportError as error:
        return f"{ABSENT}{error}"
    except torch.AcceleratorError as error:  # the GPU takes no further work from this process
        raise SystemExit(f"layer {name!r} ended with {error}; leave it out of --layers") from None
    except Exception as error:  # whatever another library raises is its row's message, not the end of the benchmark
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def passes(contestant: Contestant, case: Case) -> Passes:
    x, weight = case.x.detach().requires_grad_(), case.weight.detach().requires_grad_()
    leaves = (x, weight, *contestant.weights)
    return Passes(lambda: contestant.run(x, case.expert, weight), lambda y: torch.autograd.grad(y, leaves, case.upstream))


def dense(case: Case) -> Passes:
    """The products of one expert that all rows pass: two forward, four backward, into memory that is there already."""
    (t, d), k, f = case.x.shape, case.expert.shape[1], case.down.shape[2]
    up, down = case.up[0].flatten(0, 1).clone(), case.down[0].clone()
    x, hidden, activated = (case.x.new_empty(t * k, width).normal_() for width in (d, 2 * f, f))
    y, grad, into = torch.empty_like(x), torch.empty_like(activated), [torch.empty_like(t) for t in (up, down)]

    def forward() -> None:
        torch.mm(x, up.T, out=hidden)
        torch.mm(activated, down.T, out=y)

    def backward(_: None) -> None:
        torch.mm(y, down, out=grad)
        torch.mm(y.T, activated, out=into[1])
        torch.mm(hidden, up, out=y)
        torch.mm(hidden.T, x, out=into[0])

    return Passes(forward, backward)


def start_sensors() -> subprocess.Popen[str] | None:
    command = ["nvidia-smi", f"--query-gpu={SENSORS}", "--format=csv,noheader"]
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def cells(shapes: dict[str, Shape], tokens: Sequence[int], routings: Sequence[str]) -> Iterator[Cell]:
    """The most wanted first."""
    asked = [*FIRST, *(pair for pair in itertools.product(TOKENS, ROUTINGS) if pair not in FIRST)]
    asked += [pair for pair in itertools.product(tokens, routings) if pair not in asked]
    for number, routing in asked:
        if number in tokens and routing in routings:
            yield from (Cell(name, shape, number, routing) for name, shape in shapes.items())


def profile(bench: Bench, cell: Cell, steps: int = 5) -> list[dict[str, Any]]:
    """Where a step's time goes, kernel by kernel, of every layer that is right."""
    bench.check(cell)
    case = make_case(cell.shape, cell.tokens, cell.routing, bench.dtype, bench.device)
    gpu, rows = bench.device == "cuda", []
    activity = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    for name in (n for n in bench.layers if bench.verdicts[_scaled(cell), n] is None):
        runner = passes(CONTESTANTS[name](case), case)
        for _ in range(WARM_UP):
            runner.backward(runner.forward())
        with torch.profiler.profile(activities=[activity]) as profiler:
            for _ in range(steps):
                runner.backward(runner.forward())
        events = [(e.self_device_time_total if gpu else e.self_cpu_time_total, e) for e in profiler.key_averages()]
        total = sum(t for t, _ in events) or 1.0
        for microseconds, event in sorted(events, key=lambda pair: -pair[0])[:12]:
            figures = {"calls": event.count / steps, "µs": microseconds / steps, "share": microseconds / total}
            rows.append(
                {"shape": cell.name, "tokens": cell.tokens, "routing": cell.routing, "layer": name, "kernel": event.key[:60]} | figures
            )
    return rows


def _scaled(cell: Cell) -> Cell:
    return cell._replace(tokens=min(cell.tokens, -(-CHECKED_ROWS * cell.shape.experts // cell.shape.k)))


def _between(a: Any, b: Any) -> float:
    return (b - a) * 1e3 if isinstance(a, float) else a.elapsed_time(b)


def _row(cell: Cell, name: str, times: list, base: list, memory: tuple[float, float] | None) -> dict[str, Any]:
    row: dict[str, Any] = {"shape": cell.name, "tokens": cell.tokens, "routing": cell.routing, "layer": name}
    if memory is None:
        return row
    for what, work, pick in (("forward", 1, lambda t: t[0]), ("backward", 2, lambda t: t[1]), ("both", 3, sum)):
        ms, dense_ms = (statistics.median(map(pick, t)) for t in (times, base))
        row |= {f"{what} TFLOP/s": work * cell.flops / ms / 1e9, f"{what} of dense": dense_ms / ms, f"{what} ms": ms}
    if any(memory):  # the dense products have theirs beforehand, and a CPU does not count
        row |= {"kept MiB": round(memory[0]), "peak MiB": round(memory[1])}
    return row | {"times": times}


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The columns to read; a refusal stands where the figures would."""
    columns = ["shape", "tokens", "routing", "layer", "forward TFLOP/s", "backward TFLOP/s", "both TFLOP/s"]
    columns += ["forward of dense", "backward of dense", "both of dense", "kept MiB", "peak MiB"]
    there = (row for row in rows if not row.get("refused", "").startswith(ABSENT))
    return [{c: row.get(c, "") for c in columns} | ({"forward TFLOP/s": row["refused"]} if "refused" in row else {}) for row in there]


def run_here(rounds: int) -> dict[str, Any]:
    """What a run's rows say of it, so that a report may be made of them elsewhere."""
    try:
        import triton

        kernels = triton.__version__
    except ImportError:
        kernels = "none"
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        seen = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        seen = "none"
    versions = f"triton {kernels}; CUDA {torch.version.cuda or 'none'}; driver, highest clock and power limit: {seen}"
    return facts_here() | {"versions": versions, "rounds": rounds}


def report(rows: list[dict[str, Any]], folder: Path, json_file: Path | None, quick: bool) -> None:
    """Print a table of rows of one machine, commit and day, and write it."""
    runs = {json.dumps(row["run"], sort_keys=True): row["run"] for row in rows}
    if len(runs) != 1:
        told = "; ".join(f"{run['machine']}, commit {run['commit']}, {run['date']}" for run in runs.values()) or "none"
        raise SystemExit(f"one report is of one machine, commit, day and number of rounds, not of: {told}")
    (run,) = runs.values()
    notes = [f"{run['rounds']} rounds; {run['versions']}.", *NOTES]
    absent = {row["layer"]: row["refused"] for row in rows if row.get("refused", "").startswith(ABSENT)}
    notes += [f"{layer}: {words}" for layer, words in absent.items()]
    readings = {f"{row['shape']} {row['tokens']} {row['routing']}": row["sensors"] for row in rows if row.get("sensors")}
    notes += [f"{SENSORS} in the middle of the rounds: " + "; ".join(f"{cell}: {seen}" for cell, seen in readings.items())] * bool(readings)
    facts = {name: run[name] for name in ("commit", "machine", "date", "torch")}
    write_report("kernels", table(rows), raw=rows, json_file=json_file, quick=quick, notes=notes, folder=folder, facts=facts)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="begin no cell after this time")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--layers", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="list kernels by the time they take, instead of timing layers")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results go")
    parser.add_argument("--json", type=Path, help="also write the raw times to this file")
    parser.add_argument("--report", type=Path, nargs="+", help="measure nothing; make one report of these .jsonl files")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it works")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    if chosen.report:
        rows = [json.loads(line) for path in chosen.report for line in path.read_text().splitlines()]
        return report(rows, chosen.folder, chosen.json, quick=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not chosen.quick:
        raise SystemExit("there is no GPU here; --quick runs tiny shapes on the CPU")
    shapes, tokens, rounds = {name: SHAPES[name] for name in chosen.shapes}, chosen.tokens, chosen.rounds
    if chosen.quick:
        shapes, tokens, rounds = TINY, [40], 2
    bench = Bench(device, getattr(torch, chosen.dtype), rounds, chosen.layers)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    run = run_here(rounds)
    kind = "profile" if chosen.profile else "kernels"
    lines = chosen.folder / f"{kind}_{slug(run['machine'])}_{run['date']}.jsonl"
    deadline, rows = time.monotonic() + 60 * chosen.minutes, []
    for cell in cells(shapes, tokens, chosen.routings):
        if time.monotonic() > deadline:
            break
        found = profile(bench, cell) if chosen.profile else bench.measure(cell)
        rows += [row | {"run": run} for row in found]
        if not chosen.quick:
            with lines.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows[-len(found) :])
        print(f"{cell.name}, {cell.tokens} tokens, {cell.routing}: done", flush=True)
    if chosen.profile:
        return write_report(
            "profile", rows, raw=rows, json_file=chosen.json, quick=chosen.quick, folder=chosen.folder, notes=[run["versions"]]
        )
    report(rows, chosen.folder, chosen.json, chosen.quick)


if __name__ == "__main__":
    main()
