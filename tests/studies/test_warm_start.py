"""Runs that begin with their dense twin, as it is or made sparse: each thing is made once, whatever is killed, and goes when it is done.

Where it says so, a stand-in of `moe train` and `moe upcycle` that starts at once takes its place; its files and processes are real.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console

from moe.checkpoint.weights import load_weights
from moe.config import load
from moe.errors import ConfigError
from moe.scaling.model_selection import columns
from moe.scaling.results import RUNS, append, check_unedited, latest
from moe.scaling.speeds import SPEEDS
from moe.studies import inference_speed, runner
from moe.studies.cost_estimate import Pace, estimate
from moe.studies.grid import grid
from moe.studies.queue import Board, Share
from moe.studies.run_process import Job, Outcome, row_of
from moe.studies.spec import Means, Study
from moe.studies.status import show
from tests.studies.test_runner import PACE, crew, fork, killed_at_random, moe_study, table

BEGUN = """
recipe:
  model: {context: 32}
  data: {sequence: 32, sources: [{name: text, paths: [PATH]}]}
  checkpoint: {every: 7}
  evaluate: {sequences: 8, sample_tokens: 0, every: 1000}
rule: {name: iso_flop, values: [1.2e8, 2.4e8], tolerance: 0.2}
axes:
  family: [{d_model: 16, layers: 1, heads: 2, d_ff: 32}]
  experts: [4]
  top_k: [2]
  router: [top_k]
  begin: [null, {dense: 2_560}, {dense: 2_560, variant: {name: drop, ratio: 0.25}}]
also:
  - {experts: [1], begin: [{dense: 2_560}]}
scaling: {at: 1e4, lr: 1e-2, batch: 4, warmup: 500}
"""
COPY = ["axes.begin=[{dense: 2_560}]", "also=[]"]


@pytest.fixture
def study(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"line {number} of a text without end, which says that {number} is {number}\n" * 20)
    file = tmp_path / "study.yaml"
    file.write_text(BEGUN.replace("PATH", str(text / "*.txt")))
    return lambda *words: load([file], [f"means.folder={tmp_path / 'study'}", *words], Study)


def timed(folder):
    """As if speeds had been measured."""
    folder.mkdir(exist_ok=True)
    (folder / SPEEDS).write_text("{}")
    return folder


def begun(runs, label):
    return [run for run in runs if run.axes.get("begin") == label]


def steps_of(folder):
    return {path.parent.name: path.read_text().split() for path in (folder / RUNS).glob("*/taken")}


def test_the_twin_and_each_conversion_are_made_once_and_then_go(study, trainer, tmp_path):
    runs, folder = grid(study()), timed(tmp_path / "study")
    [twin] = [run for run in runs if run.axes["experts"] == 1 and run.origin is None]
    made = {run.origin.id for run in runs if run.origin is not None and run.origin.asked}
    assert (len(runs), len(made)) == (9, 2)
    assert {run.origin.twin.id for run in runs if run.origin} == {twin.id}
    crew(study(), runs).work(3)
    rows = latest(folder)
    assert {row.why for row in rows.values()} == {None}
    assert set(rows) == {run.id for run in runs}
    assert sorted((folder / RUNS / "upcycled").read_text().split()) == sorted(made)
    assert all(len(set(steps)) == len(steps) for steps in steps_of(folder).values())
    assert not list((folder / RUNS).glob("*/weights"))
    assert not list((folder / RUNS).glob("*.gone"))


def test_nothing_starts_before_what_it_begins_with_is_known_to_be_whole(study, tmp_path):
    runs, folder = grid(study(*COPY)), tmp_path / "study"
    board = crew(study(), runs).board
    run = next(run for run in runs if run.origin)
    conversion = Job(run.origin.id, None, 0, None, 1.0, run.origin)
    jobs = [conversion, Job(run.trunk.id, run.trunk.recipe, run.trunk.start, None, 1.0)]
    alone = Board(folder, [one._replace(trunk=None) for one in runs], Means(), PACE)
    mine = Job(run.id, run.recipe, run.recipe.train.steps, alone.runs[run.id], 1.0)
    for name in (run.origin.twin.id, run.origin.id):
        assert not any(board.ready(job) for job in jobs)
        assert not alone.ready(mine)
        (folder / RUNS / name / "weights").mkdir(parents=True)  # of a process whose end is not recorded yet
    assert not any(board.ready(job) for job in jobs)
    assert not alone.ready(mine)
    twin = board.runs[run.origin.twin.id]
    append(folder, row_of(folder, twin, Outcome("failed", "it was"), "c" * 64, 1.0)._replace(status="done"))
    assert [board.ready(job) for job in jobs] == [False, True]  # the mixture is there
    assert alone.ready(mine)
    (folder / RUNS / run.origin.id / "weights").rmdir()
    assert [board.ready(job) for job in jobs] == [True, False]


def test_weights_stay_while_speeds_are_to_be_measured_on_them(study, trainer, tmp_path):
    runs, folder = grid(study()), tmp_path / "study"
    crew(study(), runs).work(3)
    there = {path.parent.name for path in (folder / RUNS).glob("*/weights")}
    assert there == set(inference_speed.timed(runs).values())
    assert set(inference_speed.timed(runs)) == {"dense", "4 experts top-2"}
    timed(folder)
    crew(study(), runs).work(1)
    assert not list((folder / RUNS).glob("*/weights"))


def test_speeds_of_models_whose_weights_are_gone_are_not_measured(study, tmp_path):
    said = inference_speed.measure(tmp_path / "study", grid(study()))
    assert said == "how fast the models are in use was not measured: weights of 4 experts top-2, dense are gone"
    assert inference_speed.measure(tmp_path / "study", [run for run in grid(study()) if run.origin is None]) is None


def test_a_twin_may_leave_a_trunk_that_other_dense_runs_share(study, trainer, tmp_path):
    words = ("rule={name: grid}", "also=[]", "axes.experts=[1]", "axes.tokens=[5_120]", "axes.begin=[null, {dense: 2_560}]")
    runs, folder = grid(study(*words)), timed(tmp_path / "study")
    [one, twin, further] = runs
    assert one.trunk.id == twin.trunk.id
    assert further.origin.id == twin.id
    crew(study(), runs).work(2)
    assert {row.status for row in latest(folder).values()} == {"done"}
    assert all(len(set(steps)) == len(steps) for steps in steps_of(folder).values())
    assert len(steps_of(folder)[twin.id]) < 20


def test_a_longer_study_trains_the_twin_again_whose_weights_are_gone(study, trainer, tmp_path):
    folder = timed(tmp_path / "study")
    crew(study(*COPY), grid(study(*COPY))).work(2)
    before = latest(folder)
    runs = grid(study(*COPY, "rule.values=[1.2e8, 2.4e8, 4.8e8]", "means.trunks=false"))
    assert set(before) < {run.id for run in runs}
    crew(study(), runs).work(2)
    after = latest(folder)
    assert {row.status for row in after.values()} == {"done"}
    assert {name: after[name].loss for name in before} == {name: row.loss for name, row in before.items()}
    assert not list((folder / RUNS).glob("*/weights"))


def test_a_twin_that_fails_ends_the_runs_that_begin_with_it(study, trainer, tmp_path):
    runs, folder = grid(study()), timed(tmp_path / "study")
    twin = next(run.origin.twin.id for run in runs if run.origin)
    (folder / RUNS).mkdir(parents=True)
    (folder / RUNS / "ending").write_text(json.dumps({twin: 8}))
    crew(study(), runs).work(3)
    rows = latest(folder)
    assert rows[twin].status == "diverged"
    for run in runs:
        if run.origin is not None:
            assert rows[run.id].status == "failed"
            assert rows[run.id].why == f"its dense twin {twin} diverged: error: as it was asked to"
        elif run.id != twin:
            assert rows[run.id].status == "done"
    (folder / RUNS / "ending").write_text("{}")
    crew(study(), runs, again={row.id: 1 for row in rows.values() if row.status != "done"}).work(3)
    assert {row.status for row in latest(folder).values()} == {"done"}


def test_a_conversion_that_fails_ends_the_runs_that_need_it_and_no_other(study, trainer, tmp_path):
    runs, folder = grid(study()), timed(tmp_path / "study")
    [bad] = {run.origin.id for run in begun(runs, "copy") if run.origin}
    (folder / RUNS).mkdir(parents=True)
    (folder / RUNS / "ending").write_text(json.dumps({bad: 3}))
    crew(study(), runs).work(3)
    rows = latest(folder)
    for run in runs:
        assert rows[run.id].status == ("failed" if run.origin and run.origin.id == bad else "done")
    assert rows[begun(runs, "copy")[0].id].why == f"making its dense twin sparse ({bad}) failed: error: as it was asked to"
    (folder / RUNS / "ending").write_text("{}")
    crew(study(), runs, again={row.id: 1 for row in rows.values() if row.status != "done"}).work(3)
    assert {row.status for row in latest(folder).values()} == {"done"}
    assert not list((folder / RUNS).glob("*/weights"))


def test_a_study_that_is_killed_at_random_makes_nothing_twice(study, trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINER_SECONDS", "0.01")
    runs, folder = grid(study()), timed(tmp_path / "study")
    chance = random.Random(4)
    for _ in range(5):
        pid = fork(lambda: crew(study(), runs).work(3))
        time.sleep(chance.uniform(0.2, 0.7))
        os.kill(pid, signal.SIGKILL)  # its processes live on, and hold their runs
        os.waitpid(pid, 0)
    assert len(latest(folder)) < len(runs)
    pids = [fork(lambda share=Share(index, 2): crew(study(), runs, share=share).work(2)) for index in range(2)]
    for pid in pids:
        os.waitpid(pid, 0)
    crew(study(), runs).work(2)
    lines = [json.loads(line)["id"] for line in (folder / "results.jsonl").read_text().splitlines()]
    assert sorted(lines) == sorted(run.id for run in runs)
    assert {row.status for row in latest(folder).values()} == {"done"}
    assert all(len(set(steps)) == len(steps) for steps in steps_of(folder).values())
    made = (folder / RUNS / "upcycled").read_text().split()
    assert len(made) == len(set(made)) == 2


def test_a_study_that_was_moved_begins_from_where_it_now_is(study, trainer, tmp_path):
    runs, folder = grid(study(*COPY)), timed(tmp_path / "study")
    twin = next(run.origin.twin.id for run in runs if run.origin)
    (folder / RUNS).mkdir(parents=True)
    (folder / RUNS / "ending").write_text(json.dumps({run.id: 3 for run in runs if run.origin}))
    crew(study(), [run._replace(trunk=None) for run in runs]).work(3)
    (folder / RUNS / "ending").write_text("{}")
    moved = tmp_path / "moved"
    folder.rename(moved)
    again = grid(study(*COPY, f"means.folder={moved}"))
    assert [run.id for run in again] == [run.id for run in runs]
    failed = {run.id: 1 for run in runs if run.origin}
    crew(study(f"means.folder={moved}"), [run._replace(trunk=None) for run in again], again=failed).work(3)
    assert {row.status for row in latest(moved).values()} == {"done"}
    assert len(steps_of(moved)[twin]) == 20
    for name in failed:
        check_unedited(moved / RUNS / name)


def test_the_price_counts_the_twin_and_its_conversions(study):
    runs = grid(study(*COPY, "means.trunks=false"))
    pace = Pace(1e-5, 0.0, 0.1)
    found = estimate(runs, pace, Means(), workers=2)
    assert (found.runs, found.conversions) == (3, 1)
    assert found.flops == pytest.approx(sum(run.flops for run in runs))
    held_out = 8 * 32 / 3
    alone = [(run.tokens + held_out) * 1e-5 + 0.1 for run in runs]
    assert found.seconds == pytest.approx(sum(alone) + 0.1)
    assert found.longest == pytest.approx(alone[0] + 0.1 + max(alone[1:]))


def test_status_says_what_a_run_waits_for(study, trainer, tmp_path, capsys):
    runs, folder = grid(study(*COPY)), tmp_path / "study"
    folder.mkdir()
    show(folder, runs, Means(), Console(width=240))
    said = capsys.readouterr().out
    assert said.count("waiting, its dense twin is not ready") == 2
    assert "3 waiting" in said
    assert "4 experts top-2, copy after 0.00256M tokens, 0.0" in said


def test_laws_of_runs_from_scratch_are_fitted_to_no_others(study, trainer, tmp_path):
    runs, folder = grid(study()), timed(tmp_path / "study")
    crew(study(), runs).work(3)
    fitted, x, _ = columns(list(latest(folder).values()))
    assert {row.id for row in fitted} == {run.id for run in runs if run.origin is None}
    assert len(x["tokens"]) == 3


def test_a_design_is_judged_by_its_runs_from_scratch_and_where_it_has_an_aim(study, capsys):
    runner._judge(study(), grid(study()), Console(width=200))
    assert "the study names no aim" in capsys.readouterr().out
    aimed = study("aim={law: chinchilla}")
    with pytest.raises(ConfigError, match=r"or say in aim\.go_on why to start all the same"):
        runner._judge(aimed, grid(aimed), Console(width=200))


@pytest.mark.slow
def test_a_real_study_that_is_killed_ends_with_the_same_weights_and_its_page(study, tmp_path):
    study()
    words = (tmp_path / "study.yaml", "means={cores: 2, keep_weights: true}", "axes.begin=[{dense: 2_560, variant: drop}]", "--yes")
    whole = moe_study("run", *words, f"means.folder={tmp_path / 'whole'}")
    said = whole.communicate(timeout=600)[0]
    assert whole.returncode == 0, said
    assert "dense twins made sparse 1x" in said
    killed_at_random((*words, f"means.folder={tmp_path / 'killed'}"), times=4, seed=7, between=(12, 30))
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
    lines = [json.loads(line)["id"] for line in (tmp_path / "killed" / "results.jsonl").read_text().splitlines()]
    assert len(lines) == len(set(lines)) == 5
    folders = sorted(path.parent.name for path in (tmp_path / "whole" / RUNS).glob("*/weights"))
    assert len(folders) == 6  # one of them the conversion
    for name in folders:
        ours, theirs = (load_weights(tmp_path / where / RUNS / name / "weights") for where in ("whole", "killed"))
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours)
    page = moe_study("report", tmp_path / "killed")
    said = page.communicate(timeout=120)[0]
    assert page.returncode == 0, said
    assert "the dense model's FLOPs more" in said
    text = (tmp_path / "killed" / "report.md").read_text()
    assert "| drop ratio=0.5 channels=common | 4 experts top-2 |" in text
    assert "| 4 experts top-2 | " in text[text.index("Tokens a second") :]
    assert Path(tmp_path / "killed" / SPEEDS).exists()
