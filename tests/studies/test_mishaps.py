"""What goes wrong beside a study costs no run that was done or is alive, and is told in a sentence.

A stand-in of `moe train` and `moe upcycle` that starts at once takes its place; its files and processes are real.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from moe.config import load
from moe.errors import ConfigError
from moe.parallel.launch import PARENT, StopSignal
from moe.scaling.results import RUNS, STUDY, latest
from moe.studies import cost_estimate, runner, status
from moe.studies import run_process as job
from moe.studies.grid import grid
from moe.studies.queue import Board, Share
from moe.studies.run_process import Job, make, quoted, spent, take, workers_of
from moe.studies.spec import Means, Study
from tests.studies.test_runner import PACE, SMALL, crew, fork
from tests.studies.test_warm_start import BEGUN, COPY, steps_of, timed

FORMS = {"small": SMALL, "begun": BEGUN}


@pytest.fixture
def of(tmp_path, trainer, monkeypatch):
    """A study of one of the two forms, whose speed nobody measures."""
    monkeypatch.setattr(cost_estimate, "measure", lambda *_: PACE)
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"line {number} of a text without end, which says that {number} is {number}\n" * 20)
    for name, form in FORMS.items():
        (tmp_path / f"{name}.yaml").write_text(form.replace("PATH", str(text / "*.txt")))
    return lambda name, *words: load([tmp_path / f"{name}.yaml"], [f"means.folder={quoted(tmp_path / 'study')}", *words], Study)


def ending(folder, **endings):
    (folder / RUNS).mkdir(parents=True, exist_ok=True)
    (folder / RUNS / "ending").write_text(json.dumps(endings))


def go(study, *, workers=3):
    return runner._run(study, Path(study.means.folder), yes=True, workers=workers, share=Share())


def test_what_a_process_says_is_printed_as_it_is(of, tmp_path, capsys):
    study, folder = of("small", "axes.tokens=[2_560]"), tmp_path / "study"
    ending(folder, **{grid(study)[0].id: "[/b] [red]"})
    assert go(study, workers=1) == 1
    assert capsys.readouterr().out.count("[/b]") == 2
    status.show(folder, grid(study), study.means, Console(width=200))
    assert "[/b]" in capsys.readouterr().out


def test_a_study_that_was_moved_goes_on_where_it_is(of, tmp_path):
    study, folder = of("begun", *COPY), timed(tmp_path / "study")
    ending(folder, **{run.origin.id: 3 for run in grid(study) if run.origin})
    assert go(study) == 1
    ending(folder)
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert runner.retry(moved, failed=True, workers=3) == 0
    assert not folder.exists()
    assert {row.status for row in latest(moved).values()} == {"done"}
    for number, named in enumerate(("", STUDY)):
        there = moved.rename(tmp_path / f"moved-{number}")
        assert runner.run([str(there / named)], yes=True, workers=3) == 0
        assert not moved.exists()
        moved = there
    assert status.home(moved / STUDY) == status.home(moved) == moved
    assert status.home(tmp_path / STUDY) is None


def test_a_run_that_has_its_own_checkpoint_outlives_its_trunk(of, tmp_path):
    study, folder = of("small", "axes.experts=[1]"), tmp_path / "study"
    runs = grid(study)
    trunk = runs[0].trunk.id
    alive = make(folder, runs[2].recipe, runs[2].id) / "checkpoints" / "step-00000060"
    alive.mkdir(parents=True)
    ending(folder, **{trunk: 1})
    crew(study, runs).work(1)
    rows = latest(folder)
    assert [rows[run.id].status for run in runs] == ["failed", "failed", "done"]


def test_a_process_that_nobody_waits_for_any_more_is_not_cut_short(of, tmp_path):
    study = of("small", "axes.experts=[1]", "axes.tokens=[2_560]")
    [run] = grid(study)
    crew(study, [run]).work(1)
    one, looks, stopped = crew(study, [run]), iter([False, True]), []
    process = SimpleNamespace(
        job=Job("0", None, 0, None, 1.0),
        start=time.monotonic(),
        ended=lambda: next(looks),
        outcome=lambda: None,
        stop=lambda: stopped.append(1),
        lock=SimpleNamespace(close=lambda: None),
    )
    one.under_way.append(process)
    one.work(1)
    assert not stopped
    assert not one.under_way


def test_a_conversion_that_fails_ends_no_run_that_has_begun(of, tmp_path):
    study, folder = of("begun", *COPY, "means.trunks=false"), timed(tmp_path / "study")
    runs = grid(study)
    [first, second] = [run for run in runs if run.origin]
    (make(folder, second.recipe, second.id) / "checkpoints" / "step-00000020").mkdir(parents=True)
    ending(folder, **{first.origin.id: 3})
    crew(study, runs, trunks=False).work(1)
    assert [latest(folder)[run.id].status for run in runs] == ["done", "failed", "done"]


def test_a_run_that_another_worker_is_at_gets_no_row_of_its_trunk(of, tmp_path):
    study, folder = of("small", "axes.experts=[1]", "axes.tokens=[5_120, 10_240]"), tmp_path / "study"
    runs = grid(study)
    one = crew(study, runs)
    (folder / RUNS).mkdir()
    with (folder / RUNS / f"{runs[0].id}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        one._end(runs, runner.Outcome("failed", "its trunk failed"), runner._Silent())
    assert list(latest(folder)) == [runs[1].id]


def test_another_corpus_is_refused_before_anything_runs(of, tmp_path):
    folder = tmp_path / "study"
    go(of("small", "axes.tokens=[2_560]"))
    shutil.rmtree(folder / "tokens")
    (tmp_path / "text" / "0.txt").write_text("another text\n" * 50)
    with pytest.raises(ConfigError, match=r"with corpus [0-9a-f]{16}, and recipe.data now makes [0-9a-f]{16}"):
        go(of("small", "axes.tokens=[2_560, 5_120]"))
    assert len(latest(folder)) == 2


def test_a_copy_whose_links_were_followed_goes_on(of, tmp_path):
    go(of("small", "axes.tokens=[2_560]"))
    shutil.copytree(tmp_path / "study", tmp_path / "copy")
    study = of("small", "axes.tokens=[2_560]", f"means.folder={tmp_path / 'copy'}")
    crew(study, grid(study), again={run.id: 1 for run in grid(study)}).work(2)
    assert len((tmp_path / "copy" / "results.jsonl").read_text().splitlines()) == 4


def test_a_folder_may_have_any_name(tmp_path):
    for name in ("{folder}", "a: b", "[x", "é 😀", '"', "# x"):
        [*_, word, _] = Job("0123", None, 20, None, 1.0).words(tmp_path / name)
        found = load([], ["train.steps=1", word], "recipe").run.folder
        assert found == str(tmp_path / name / RUNS / "0123")


def test_files_that_cannot_be_are_named_or_made_again(of, tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        with pytest.raises(ConfigError, match=f"means.folder=.*{name} is a file, or below one"):
            go(of("small", f"means.folder={tmp_path / name}"))
    with pytest.raises(ConfigError, match=r"nofile.yaml is not there; .*configs/studies/debug.yaml"):
        runner.run([str(tmp_path / "nofile.yaml")])
    for text in ("", '{"of": [1, 2', '{"pace": [1, 2]}', "[]"):
        (tmp_path / "pace.json").write_text(text)
        assert cost_estimate.remembered(tmp_path) is None


def test_a_run_that_was_done_stays_done_if_training_it_once_more_fails(of, tmp_path):
    study, folder = of("begun", *COPY), timed(tmp_path / "study")
    crew(study, grid(study)).work(3)
    before = latest(folder)
    twin = next(run.origin.twin.id for run in grid(study) if run.origin)
    more = of("begun", *COPY, "rule.values=[1.2e8, 2.4e8, 4.8e8]", "means.trunks=false")
    runs = grid(more)
    [new] = [run.id for run in runs if run.id not in before]
    ending(folder, **{twin: 1})
    crew(more, runs).work(3)
    rows = latest(folder)
    assert {name: rows[name] for name in before} == before
    assert rows[new].why == f"its dense twin {twin}, trained once more for its weights, failed: error: as it was asked to"
    ending(folder)
    crew(more, runs, again={new: 1}).work(3)
    assert latest(folder)[new].status == "done"


def test_two_who_try_again_at_once_repeat_each_run_once(of, tmp_path, monkeypatch):
    study, folder = of("small", "axes.tokens=[2_560, 5_120]", "means.trunks=false"), tmp_path / "study"
    runs = grid(study)
    ending(folder, **{run.id: 3 for run in runs})
    assert go(study) == 1
    ending(folder, **{runs[0].id: 3})
    for path in (folder / RUNS).glob("*/taken"):
        path.unlink()
    monkeypatch.setenv("TRAINER_SECONDS", "0.01")
    pids = [fork(lambda: runner.retry(folder, failed=True, workers=1)) for _ in range(2)]
    for pid in pids:
        os.waitpid(pid, 0)
    assert len((folder / "results.jsonl").read_text().splitlines()) == 8
    assert all(len(set(steps)) == len(steps) for steps in steps_of(folder).values())


def test_trying_again_starts_nothing_else(of, tmp_path):
    few, folder = of("begun", *COPY, "rule.values=[1.2e8]"), timed(tmp_path / "study")
    [twin, failed] = grid(few)
    ending(folder, **{failed.id: 3})
    assert go(few) == 1
    ending(folder)
    (folder / STUDY).write_text(json.dumps(of("begun").model_dump(mode="json", exclude_unset=True)))
    assert runner.retry(folder, failed=True, workers=3) == 0
    assert {name: row.status for name, row in latest(folder).items()} == {twin.id: "done", failed.id: "done"}


def test_a_worker_waits_for_what_another_is_at_and_leaves_when_others_are_at_all_that_is_left(of, tmp_path):
    study, folder = of("begun", *COPY), timed(tmp_path / "study")
    runs = grid(study)
    twin = take(folder, next(run.origin.twin.id for run in runs if run.origin))
    timer = threading.Timer(0.5, twin.close)
    timer.start()
    crew(study, runs, share=Share(1, 2)).work(2)
    timer.join()
    assert {row.status for row in latest(folder).values()} == {"done"}
    (folder / "results.jsonl").unlink()
    with contextlib.ExitStack() as locks:
        for run in runs:
            locks.enter_context(take(folder, run.id))
        crew(study, runs, share=Share(1, 2)).work(2)
    assert not latest(folder)


def test_a_run_s_seconds_are_those_of_all_its_processes(of, tmp_path, monkeypatch):
    study, folder = of("small", "axes.tokens=[2_560]", "axes.experts=[1]"), tmp_path / "study"
    [run] = grid(study)
    make(folder, run.recipe, run.id)
    assert (spent(folder, run.id, 100.0), spent(folder, run.id, 20.0)) == (100.0, 120.0)
    crew(study, [run]).work(1)
    assert 120 < latest(folder)[run.id].seconds < 150
    assert latest(folder)[run.id].machine == ""


def test_rows_of_runs_that_are_no_more_asked_for_are_counted(of, tmp_path, capsys):
    study, folder = of("small", "axes.tokens=[2_560]"), tmp_path / "study"
    crew(study, grid(study)).work(2)
    for words, said in ((("axes.experts=[1]",), "also holds 1 run that"), (("axes.tokens=[5_120]",), "also holds 2 runs that")):
        other = of("small", "axes.tokens=[2_560]", *words)
        status.show(folder, grid(other), other.means, Console(width=200))
        assert said in capsys.readouterr().out
    status.show(folder, grid(study), study.means, Console(width=200))
    assert "also holds" not in capsys.readouterr().out


def test_the_disk_is_at_most_what_is_said(of, tmp_path):
    study = of("small", "axes.experts=[1]", "recipe.checkpoint.keep=5")
    runs, one = grid(study), grid(study)[0].price.bytes
    found = cost_estimate.estimate(runs, PACE, study.means, workers=2, corpus=1000)
    checkpoints = 6 * (1 + 2) + 3 + 1  # the trunk's, two runs', what each run left the trunk with, and the trunk's that stays
    assert found.peak == 1000 + 3 * 300_000 + one * (3 * checkpoints + 2)
    durable = cost_estimate.estimate(
        grid(of("small", "axes.experts=[1]", "recipe.checkpoint={every: 5, durable_every: 10}")), PACE, study.means, 2
    )
    assert durable.peak > cost_estimate.estimate(grid(of("small", "axes.experts=[1]")), PACE, study.means, 2).peak


def test_a_trunk_leaves_no_weights(of, tmp_path, monkeypatch):
    study, folder = of("small", "axes.experts=[1]"), tmp_path / "study"
    monkeypatch.setattr(Board, "clear", lambda *_: None)
    crew(study, grid(study)).work(2)
    assert {path.parent.name for path in (folder / RUNS).glob("*/weights")} == {run.id for run in grid(study)}


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    monkeypatch.setattr(job, "devices", list)
    assert workers_of(Means()) == 3
    assert workers_of(Means(cores=8, threads=2)) == 4


def test_all_that_were_asked_to_stop_share_one_deadline(of, tmp_path, monkeypatch):
    study = of("small", "axes.tokens=[2_560]")
    one, waits, now = crew(study, grid(study)), [], [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for _ in range(2):
        process = SimpleNamespace(stop=lambda: None, wait=lambda seconds: (waits.append(seconds), now.__setitem__(0, now[0] + 100)))
        one.under_way.append(process)
    monkeypatch.setattr(one, "_record", lambda *_: None)
    one._stop()
    assert waits == [120, 20]


def test_a_share_of_an_array_with_steps_is_one_of_those_there_are():
    script = (Path(__file__).parents[2] / "launch" / "study.sbatch").read_text()
    share = re.search(r'--share "(.*)"', script)[1]
    told = []
    for task in ("1", "4", "7"):
        facts = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "3", "SLURM_ARRAY_TASK_COUNT": "3"}
        told.append(
            subprocess.run(["bash", "-uc", f'echo "{share}"'], env=facts, capture_output=True, text=True, check=True).stdout.strip()
        )
    assert told == ["0/3", "1/3", "2/3"]


def test_weights_that_another_study_at_the_same_folder_needs_stay(of, tmp_path):
    few, folder = of("begun", *COPY, "rule.values=[1.2e8]"), timed(tmp_path / "study")
    more = of("begun", *COPY, "rule.values=[1.2e8, 2.4e8]")
    other = crew(more, grid(more)).board
    other.claim()
    crew(few, grid(few)).work(2)
    [origin] = {run.origin.id for run in grid(few) if run.origin}
    assert (folder / RUNS / origin / "weights").is_dir()
    other.disclaim()
    crew(few, grid(few)).work(2)
    assert not list((folder / RUNS).glob("*/weights"))


def test_what_a_kill_left_half_written_goes(of, tmp_path):
    study, folder = of("begun", *COPY), timed(tmp_path / "study")
    runs = grid(study)
    crew(study, runs).work(2)
    left = [folder / RUNS / runs[0].id / name for name in ("weights.tmp-0123abcd", "weights.gone")]
    left += [folder / RUNS / f".{'0' * 16}.partial"]
    held = folder / RUNS / f".{'1' * 16}.partial"
    for path in (*left, held):
        path.mkdir()
    with take(folder, "1" * 16):
        crew(study, runs).work(2)
    assert not any(path.exists() for path in left)
    assert held.exists()


def test_a_run_whose_study_ended_before_it_could_look_is_asked_to_stop(monkeypatch):
    gone = subprocess.Popen(["true"])
    gone.wait()
    for name, asked in ((f"{PARENT}{gone.pid}", True), (f"{PARENT}{os.getppid()}", False), ("another-launcher", False)):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        with StopSignal() as stop:
            assert stop.asked == asked
