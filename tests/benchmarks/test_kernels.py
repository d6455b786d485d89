"""The kernel benchmark runs, asks for routings that are what they are called, and times nothing that is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import kernel_cases, kernel_peers, kernels
from benchmarks.kernel_cases import ROUTINGS, SHAPES, TINY, Shape, difference, distance, expected, make_case, results
from benchmarks.kernels import Bench, Cell, cells
from moe.kernels import GROUPED_MLP

ROOT = Path(__file__).parents[2]
SHAPE = Shape(16, 32, 8, 3)


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.kernels", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_quick_run_writes_every_cell_of_every_layer_that_is_here(tmp_path):
    done = run("--quick", "--layers", "torch", "loop", "liger", "--json", str(tmp_path / "raw.json"), "--folder", str(tmp_path / "no"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "raw.json").read_text())["rows"]
    timed = [row for row in rows if "both TFLOP/s" in row]
    assert {(row["shape"], row["routing"], row["layer"]) for row in timed} == {
        (shape, routing, layer) for shape in TINY for routing in ROUTINGS for layer in ("dense products", "torch", "loop")
    }
    assert all(len(row["times"]) == 2 and row["both ms"] > 0 for row in timed)
    assert all("liger_kernel" in row["refused"] for row in rows if row["layer"] == "liger")
    assert "liger: not here" in done.stdout
    assert list((tmp_path / "no").iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available() or "triton" not in GROUPED_MLP, reason="a GPU is here, or the table has no Triton")
def test_tritons_layers_are_right_in_the_interpreter(tmp_path):
    options = ("--quick", "--routings", "quarter empty", "--layers", "triton", "triton, recomputed", "--json", str(tmp_path / "raw.json"))
    done = run(*options, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "raw.json").read_text())["rows"]
    assert len(rows) == 3 * len(TINY)
    assert all(row["both ms"] > 0 for row in rows), [row.get("refused") for row in rows]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_the_real_shapes_are_not_begun_on_a_cpu():
    done = run()
    assert done.returncode == 1
    assert done.stderr == "there is no GPU here; --quick runs tiny shapes on the CPU\n"


def test_a_report_is_made_of_what_cut_runs_left(tmp_path):
    bench, elsewhere = Bench("cpu", torch.float32, 2, ["torch"]), kernels.run_here(2) | {"machine": "GPU 9000"}
    for tokens, run_of in ((20, elsewhere), (30, elsewhere), (40, elsewhere | {"commit": "another"})):
        rows = bench.measure(Cell("tiny", TINY["tiny"], tokens, "natural"))
        (tmp_path / f"{tokens}.jsonl").write_text("".join(json.dumps(row | {"run": run_of}) + "\n" for row in rows))
    done = run("--report", *(str(tmp_path / f"{n}.jsonl") for n in (20, 30)), "--folder", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    (markdown,) = (tmp_path / "out").glob("kernels_gpu-9000_*.md")
    assert all(f"| tiny | {n} | natural | torch |" in markdown.read_text() for n in (20, 30))
    done = run("--report", *(str(tmp_path / f"{n}.jsonl") for n in (20, 40)), "--folder", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "commit another" in done.stderr


def test_a_wrong_layer_is_refused_with_a_reason_and_the_right_ones_are_timed(monkeypatch):
    def off(case):
        right = kernel_peers.ours(case, "torch")
        return right._replace(run=lambda *given: right.run(*given) * 1.05)

    def broken(case):
        raise ValueError("no such kernel\nand a long trace")

    contestants = {"off": off, "broken": broken, "torch": kernel_peers.CONTESTANTS["torch"]}
    monkeypatch.setattr(kernels, "CONTESTANTS", contestants)
    bench = Bench("cpu", torch.bfloat16, 2, list(contestants))
    rows = {row["layer"]: row for row in bench.measure(Cell("tiny", TINY["tiny"], 40, "zipf"))}
    assert "output is wrong" in rows["off"]["refused"]
    assert rows["broken"]["refused"] == "ValueError: no such kernel"
    assert "times" not in rows["off"]
    assert rows["torch"]["both TFLOP/s"] > 0
    assert [row["forward TFLOP/s"] for row in kernels.table([rows["off"]])] == [rows["off"]["refused"]]


def test_useful_work_is_counted_against_time():
    cell = Cell("one", Shape(10, 20, 4, 2), 100, "natural")
    assert cell.flops == 6 * 100 * 2 * 10 * 20
    row = kernels._row(cell, "x", [(1.0, 3.0), (2.0, 4.0), (1.0, 3.0)], [(0.5, 1.0)] * 3, (1, 2))
    assert row["forward TFLOP/s"] == pytest.approx(cell.flops / 1e-3 / 1e12)
    assert row["backward TFLOP/s"] == pytest.approx(2 * cell.flops / 3e-3 / 1e12)
    assert row["both TFLOP/s"] == pytest.approx(3 * cell.flops / 4e-3 / 1e12)
    assert row["both of dense"] == pytest.approx(1.5 / 4)


@pytest.mark.parametrize("shape", [SHAPE, Shape(16, 16, 5, 5), Shape(16, 16, 4, 1)])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_token_goes_to_different_experts(shape, routing):
    if routing == "quarter empty" and shape.k == shape.experts:
        pytest.skip("all experts are asked for")
    expert = kernel_cases.route(shape, 50, routing, torch.Generator().manual_seed(3))
    assert expert.shape == (50, shape.k)
    assert ((expert >= 0) & (expert < shape.experts)).all()
    assert all(len(set(row)) == shape.k for row in expert.tolist())


def test_routings_are_what_they_are_called():
    draw = torch.Generator().manual_seed(0)
    count = {r: kernel_cases.route(Shape(16, 16, 32, 2), 4000, r, draw).flatten().bincount(minlength=32) for r in ROUTINGS}
    assert (count["balanced"] == 250).all()
    assert count["natural"].min() < 250 < count["natural"].max() < 350
    assert (count["quarter empty"] == 0).sum() == 8
    falling = count["zipf"].sort(descending=True).values.double()
    assert 1.4 < falling[1] / falling[3] < 2.4
    assert falling[0] / falling[15] > 8


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_answer_is_the_definitions(routing):
    case = make_case(SHAPE, 30, routing, torch.float32, "cpu")
    case = kernel_cases.Case(*(t.double() if t.is_floating_point() else t for t in case))
    right = kernel_peers.ours(case, "reference")
    y, x, weight, up, down = results(right.run, right.weights, case)
    single = kernel_cases.Case(*(t.float() if t.is_floating_point() else t for t in case))  # answered in float64
    for a, b in zip((y, x, weight, up, down), expected(single), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["torch", "loop", "transformers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_layers_pass(name, dtype):
    if name == "transformers":
        pytest.importorskip("transformers")
    case = make_case(SHAPE, 60, "zipf", dtype, "cpu")
    assert kernels.verdict(name, case, expected(case)) is None


@pytest.mark.parametrize("what", range(5))
@pytest.mark.parametrize("mistake", ["one element", "nan", "factor", "an expert's rows", "shape"])
def test_mistakes_are_seen(what, mistake):
    case = make_case(SHAPE, 60, "zipf", torch.bfloat16, "cpu")
    right = expected(case)
    got = [t.clone() for t in right]
    assert difference(got, right, torch.bfloat16) is None
    flat = got[what].view(-1)
    if mistake == "one element":
        flat[7] += 0.06 * (right[what][0] if right[what].dim() > 2 else right[what]).abs().max()
    if mistake == "nan":
        flat[7] = torch.nan
    if mistake == "factor":
        got[what] *= 1.02
    if mistake == "an expert's rows":
        rare = case.expert.flatten().bincount(minlength=SHAPE.experts).argmin()
        got[what][rare if what > 2 else (case.expert == rare).any(1)] = 0
    if mistake == "shape":
        got[what] = got[what][:-1]
    assert kernel_cases.NAMES[what] in str(difference(got, right, torch.bfloat16))


def test_zeros_must_be_zeros():
    assert distance(torch.zeros(2, 3, 3), torch.zeros(2, 3, 3), 0.1, 0.1) == (0.0, 0.0)
    assert distance(torch.full((3,), 1e-9), torch.zeros(3), 0.1, 0.1)[1] > 1


def test_every_cell_comes_once_and_the_most_wanted_first():
    order = list(cells(SHAPES, kernels.TOKENS, ROUTINGS))
    assert len(set(order)) == len(order) == len(SHAPES) * len(kernels.TOKENS) * len(ROUTINGS)
    assert {(c.tokens, c.routing) for c in order[: 2 * len(SHAPES)]} == {(32768, "natural"), (32768, "balanced")}
    assert [c.tokens for c in cells(TINY, [40], ["zipf"])] == [40] * len(TINY)
