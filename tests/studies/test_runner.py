"""Studies end with the same table however often they are killed, and a shared trunk changes no run by a bit.

Where it says so, a stand-in of `moe train` that starts at once takes its place; what it writes, and its process, are real.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from moe.checkpoint.manifest import read_manifest
from moe.config import load
from moe.errors import ConfigError, DataError, Preempted
from moe.scaling.results import RUNS, latest, read
from moe.studies import runner
from moe.studies.cost_estimate import Pace, estimate, seconds_of
from moe.studies.grid import grid
from moe.studies.queue import Board, Share
from moe.studies.run_process import Job, Process, branch, make, prepare_corpus, take
from moe.studies.spec import Means, Study
from moe.studies.status import show
from moe.train.loop import train

PACE = Pace(1e-5, 0.0, 0.1)
TABLE = ("id", "status", "axes", "total", "loss", "bits_per_byte", "trunk", "steps", "cooldown_steps", "corpus")

SMALL = """
recipe:
  model: {context: 32}
  data: {sequence: 32, sources: [{name: text, paths: [PATH]}]}
  checkpoint: {every: 7}
  evaluate: {sequences: 8, sample_tokens: 0, every: 1000}
axes:
  family: [{d_model: 16, layers: 1, heads: 2, d_ff: 32}]
  experts: [1, 4]
  tokens: [2_560, 5_120, 10_240]
scaling: {at: 1e4, lr: 1e-2, batch: 4, warmup: 500}
aim: {go_on: nothing is to be learned from this}
"""


@pytest.fixture
def study(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"line {number} of a text without end, which says that {number} is {number}\n" * 20)
    file = tmp_path / "study.yaml"
    file.write_text(SMALL.replace("PATH", str(text / "*.txt")))
    return lambda *words: load([file], [f"means.folder={tmp_path / 'study'}", *words], Study)


def crew(study, runs, *, share=Share(), again=None, **means):
    folder = Path(study.means.folder)
    folder.mkdir(exist_ok=True)
    board = Board(folder, runs, Means(**{"timeout": 0.01, **means}), PACE, share=share, again=again or {})
    return runner.Crew(board, "c" * 64, Console(quiet=True))


def table(folder):
    return sorted((tuple(str(getattr(row, name)) for name in TABLE) for row in latest(folder).values()), key=str)


def test_a_run_from_a_trunk_is_bit_by_bit_the_run_alone(study, tmp_path, capsys):
    folder = tmp_path / "study"
    runs = [run for run in grid(study()) if run.axes["experts"] == 4][:2]
    prepare_corpus(folder, study().recipe)
    trunk = runs[0].trunk
    for run in runs:  # the trunk goes on past the first run's cool-down
        assert run.trunk is not None
        assert run.trunk.id == trunk.id
        make(folder, run.trunk.recipe, trunk.id)
        train(run.trunk.recipe)
        assert branch(folder, run)
    run = runs[1]
    train(run.recipe)
    alone = run.recipe.model_copy(update={"run": run.recipe.run.model_copy(update={"folder": str(tmp_path / f"alone-{run.id}")})})
    train(alone)
    ends = [Path(r.run.folder) / "checkpoints" / f"step-{run.recipe.train.steps:08d}" for r in (run.recipe, alone)]
    ours, theirs = (read_manifest(end) for end in ends)
    assert ours.scalars == theirs.scalars
    assert [f.sha256 for f in ours.files if f.name != ".metadata"] == [f.sha256 for f in theirs.files if f.name != ".metadata"]
    losses = [[line for line in (Path(r.run.folder) / "metrics.jsonl").read_text().splitlines() if "validation_loss" in line][-1]
              for r in (run.recipe, alone)]  # fmt: skip
    assert losses[0] == losses[1]
    first = json.loads((Path(run.recipe.run.folder) / "metrics.jsonl").read_text().splitlines()[0])["step"]
    assert first > run.trunk.start
    capsys.readouterr()


def test_a_study_does_each_step_once(study, trainer, tmp_path):
    runs, folder = grid(study()), tmp_path / "study"
    crew(study(), runs, cores=3).work(3)
    rows = latest(folder)
    assert {row.status for row in rows.values()} == {"done"}
    assert set(rows) == {run.id for run in runs}
    taken = {path.parent.name: path.read_text().split() for path in (folder / RUNS).glob("*/taken")}
    for run in runs:
        assert run.trunk is not None
        assert taken[run.id] == [str(step) for step in range(run.trunk.start + 1, run.recipe.train.steps + 1)]
        longest = max(other.trunk.start for other in runs if other.trunk and other.trunk.id == run.trunk.id)
        assert taken[run.trunk.id] == [str(step) for step in range(1, longest + 1)]
        assert not list((folder / RUNS / run.id / "checkpoints").iterdir())
        assert [path.name for path in (folder / RUNS / run.trunk.id / "checkpoints").iterdir()] == [f"step-{longest:08d}"]


def test_what_a_killed_study_had_recorded_is_tidied_away_later(study, trainer, tmp_path):
    runs, folder = grid(study("axes.tokens=[2_560]")), tmp_path / "study"
    crew(study(), runs).work(2)
    left = folder / RUNS / runs[0].id / "checkpoints" / "step-00000020"
    left.mkdir()
    (folder / RUNS / runs[0].id / "weights").mkdir()
    crew(study(), runs).work(2)
    assert not left.exists()
    assert not (folder / RUNS / runs[0].id / "weights").exists()


def test_more_axes_repeat_nothing_and_longer_runs_go_on_from_their_trunk(study, trainer, tmp_path):
    folder = tmp_path / "study"
    small = grid(study("axes.tokens=[2_560, 5_120]", "axes.experts=[1]"))
    crew(study(), small).work(4)
    before = (folder / "results.jsonl").read_text()
    runs = grid(study("axes.tokens=[2_560, 5_120, 10_240]"))
    crew(study(), runs).work(4)
    assert (folder / "results.jsonl").read_text().startswith(before)
    assert len(latest(folder)) == len(runs) == 6
    for path in (folder / RUNS).glob("*/taken"):
        assert len(set(path.read_text().split())) == len(path.read_text().split())


@pytest.mark.parametrize(
    ("ending", "status", "why"),
    [
        (8, "diverged", "as it was asked to"),
        (1, "failed", "as it was asked to"),
        ("out of memory", "out of memory", "CUDA out of memory"),
        ("kill", "failed", "killed by SIGKILL"),
        ("sleep", "timed out", "did not end within"),
    ],
)
def test_a_run_that_fails_is_a_row_and_can_be_tried_again(study, trainer, tmp_path, ending, status, why):
    folder, runs = tmp_path / "study", grid(study("axes.tokens=[2_560]"))[: 1 if ending == "sleep" else 2]
    (folder / RUNS).mkdir(parents=True)
    (folder / RUNS / "ending").write_text(json.dumps({runs[0].id: ending}))
    crew(study(), runs, timeout=0.5 / 3600 if ending == "sleep" else 0.01).work(4)
    rows = latest(folder)
    assert rows[runs[0].id].status == status
    assert why in (rows[runs[0].id].why or "")
    assert rows[runs[0].id].loss is None
    assert all(rows[run.id].status == "done" for run in runs[1:])
    (folder / RUNS / "ending").write_text("{}")
    lines = (folder / "results.jsonl").read_text().count("\n")
    crew(study(), runs, again={runs[0].id: 1}).work(4)
    assert {row.status for row in latest(folder).values()} == {"done"}
    assert (folder / "results.jsonl").read_text().count("\n") == lines + 1


def test_a_trunk_that_fails_ends_the_runs_that_need_it(study, trainer, tmp_path):
    folder, runs = tmp_path / "study", grid(study())
    trunk = runs[0].trunk
    assert trunk is not None
    (folder / RUNS).mkdir(parents=True)
    (folder / RUNS / "ending").write_text(json.dumps({trunk.id: 8}))
    crew(study(), runs).work(4)
    rows = latest(folder)
    for run in runs:
        assert run.trunk is not None
        row = rows[run.id]
        assert row.status == ("diverged" if run.trunk.id == trunk.id else "done")
        assert row.why is None or row.why.startswith(f"its trunk {trunk.id} diverged")


def fork(action):
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        try:
            action()
        finally:
            os._exit(0)
    return pid


def test_a_study_that_is_killed_at_random_ends_with_the_same_table(study, trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINER_SECONDS", "0.02")
    runs, folder = grid(study()), tmp_path / "study"
    chance = random.Random(3)
    done = []
    for _ in range(5):
        pid = fork(lambda: crew(study(), runs).work(3))
        time.sleep(chance.uniform(0.2, 0.8))
        os.kill(pid, signal.SIGKILL)  # its processes live on, and hold their runs
        os.waitpid(pid, 0)
        done.append(len(latest(folder)))
    assert done[0] < len(runs)
    crew(study(), runs).work(3)
    killed = table(folder)
    lines = [json.loads(line)["id"] for line in (folder / "results.jsonl").read_text().splitlines()]
    assert sorted(lines) == sorted(run.id for run in runs)
    for path in (folder / RUNS).glob("*/taken"):  # the stand-in is not stopped with its study: what began, ended, and once
        assert len(set(path.read_text().split())) == len(path.read_text().split())
    other = study(f"means.folder={tmp_path / 'whole'}")
    crew(other, grid(other)).work(3)
    assert table(tmp_path / "whole") == killed


def test_two_workers_share_a_study(study, trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINER_SECONDS", "0.005")
    runs, folder = grid(study()), tmp_path / "study"
    folder.mkdir()
    pids = [fork(lambda share=Share(index, 2): crew(study(), runs, share=share).work(2)) for index in range(2)]
    for pid in pids:
        os.waitpid(pid, 0)
    rows = (folder / "results.jsonl").read_text().splitlines()
    assert sorted(json.loads(row)["id"] for row in rows) == sorted(run.id for run in runs)
    for path in (folder / RUNS).glob("*/taken"):
        assert len(set(path.read_text().split())) == len(path.read_text().split())


def test_a_study_that_is_asked_to_stop_goes_on_later(study, trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINER_SECONDS", "0.05")
    runs = grid(study())
    one = crew(study(), runs)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    with pytest.raises(Preempted, match="the same command goes on"):
        one.work(2)
    assert not one.under_way
    monkeypatch.setenv("TRAINER_SECONDS", "0.001")
    crew(study(), runs).work(4)
    assert {row.status for row in latest(tmp_path / "study").values()} == {"done"}


def test_an_edited_run_is_not_gone_on_with(study, trainer, tmp_path):
    runs, folder = grid(study()), tmp_path / "study"
    path = make(folder, runs[0].recipe, runs[0].id) / "recipe.yaml"
    path.write_text(path.read_text().replace("batch: 4", "batch: 5"))
    with pytest.raises(DataError, match="was edited since the study wrote it"):
        crew(study(), runs).work(2)


def test_a_lock_is_one_process_s_and_is_inherited(tmp_path):
    lock = take(tmp_path, "a")
    assert lock is not None
    assert take(tmp_path, "a") is None
    child = subprocess.Popen(["sleep", "30"], pass_fds=[lock.fileno()])
    lock.close()
    assert take(tmp_path, "a") is None
    child.kill()
    child.wait()
    again = take(tmp_path, "a")
    assert again is not None
    fcntl.flock(again, fcntl.LOCK_UN)


def test_a_process_holds_its_run_when_its_study_is_gone(study, trainer, tmp_path):
    run = grid(study("axes.tokens=[2_560]"))[0]
    folder, lock = tmp_path / "study", take(tmp_path / "study", run.id)
    make(folder, run.recipe, run.id)
    (folder / RUNS / "ending").write_text(json.dumps({run.id: "sleep"}))
    process = Process(Job(run.id, run.recipe, 20, run, 1.0), folder, lock, threads=1, seconds=60, device=None)
    process.lock.close()
    assert take(folder, run.id) is None
    os.killpg(process.process.pid, signal.SIGKILL)
    process.process.wait()
    assert take(folder, run.id) is not None


def test_a_run_begins_with_the_newest_checkpoint_that_its_rate_has_not_left(study, tmp_path):
    folder, run = tmp_path / "study", grid(study())[0]
    assert run.trunk is not None
    assert not branch(folder, run)
    for step in (run.trunk.start - 9, run.trunk.start - 2, run.trunk.start + 1):
        there = folder / RUNS / run.trunk.id / "checkpoints" / f"step-{step:08d}"
        there.mkdir(parents=True)
        (there / "shard").write_text(str(step))
    assert branch(folder, run)
    mine = folder / RUNS / run.id / "checkpoints"
    assert [path.name for path in mine.iterdir()] == [f"step-{run.trunk.start - 2:08d}"]
    assert next(mine.rglob("shard")).read_text() == str(run.trunk.start - 2)


def test_the_estimate_counts_a_trunk_once(study):
    runs = grid(study("axes.experts=[1]"))
    found = estimate(runs, PACE, Means(), workers=2)
    steps = sum(run.recipe.train.steps - run.trunk.start for run in runs if run.trunk) + max(run.trunk.start for run in runs if run.trunk)
    assert found.flops == steps * 128 * runs[0].price.training_flops
    assert found.flops < sum(run.flops for run in runs)
    assert found.seconds == pytest.approx((steps * 128 + 4 * 8 * 32 / 3) * 1e-5 + 6 * 0.1)
    assert 0.4 < found.longest < found.seconds
    assert seconds_of(runs[0], PACE) == pytest.approx((20 * 128 + 8 * 32 / 3) * 1e-5 + 0.1)


def test_progress_and_status_name_every_run(study, trainer, tmp_path, capsys):
    runs, folder = grid(study("axes.tokens=[2_560]")), tmp_path / "study"
    (folder / RUNS).mkdir(parents=True)
    (folder / RUNS / "ending").write_text(json.dumps({runs[0].id: 8}))
    one = crew(study(), runs)
    one.console = Console(width=200)
    one.work(2)
    said = capsys.readouterr().out
    assert said.count("of 2 runs") == 2
    show(folder, runs, Means(), Console(width=200))
    said = capsys.readouterr().out
    assert all(run.id in said for run in runs)
    assert "1 diverged, 1 done" in said
    assert "retry" in said


def test_a_folder_holds_runs_that_can_be_compared(study, trainer, tmp_path):
    one, folder = study("axes.tokens=[2_560]"), tmp_path / "study"
    crew(one, grid(one)).work(4)
    (folder / runner.STUDY).write_text(json.dumps(one.model_dump(mode="json", exclude_unset=True)))
    runner._same_ground(study("axes.tokens=[2_560, 5_120]", "axes.seed=[3]", "means.cores=2"), folder)
    with pytest.raises(ConfigError, match=r"holds runs with recipe.evaluate.sequences=8, and it is now 9"):
        runner._same_ground(study("recipe.evaluate.sequences=9"), folder)
    with pytest.raises(ConfigError, match=r"holds runs with scaling.decay=0.2, and it is now 0.3"):
        runner._same_ground(study("scaling.decay=0.3"), folder)


def test_the_verbs_refuse_in_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match="add --failed"):
        runner.retry(tmp_path, failed=False)
    with pytest.raises(ConfigError, match="holds no study"):
        runner.opened(tmp_path)
    with pytest.raises(ConfigError, match="no study is named"):
        runner.run(["axes.tokens=[1]"])
    with pytest.raises(ConfigError, match="--share 4/4 is no part"):
        Share.read("4/4")


def moe_study(verb, *words):
    """`moe study …` as a process of its own."""
    command = [sys.executable, "-m", "moe", "study", verb, *map(str, words)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def killed_at_random(words, *, times, seed, between):
    """Run a study and kill it so many times, then let it end; what the last one said."""
    chance, ends = random.Random(seed), []
    for _ in range(times):
        one = moe_study("run", *words)
        try:
            ends.append(one.wait(chance.uniform(*between)))
        except subprocess.TimeoutExpired:
            one.kill()
            one.wait()
    assert len(ends) < times
    last = moe_study("run", *words)
    said = last.communicate(timeout=900)[0]
    assert last.returncode == 0, said
    return said


@pytest.mark.slow
def test_a_real_study_that_is_killed_at_random_ends_with_the_same_table(tmp_path):
    debug = Path(__file__).parents[2] / "configs" / "studies" / "debug.yaml"
    words = (debug, "means.cores=2", "--yes")
    whole = moe_study("run", *words, f"means.folder={tmp_path / 'whole'}")
    assert whole.wait(900) == 0
    said = killed_at_random((*words, f"means.folder={tmp_path / 'killed'}"), times=5, seed=5, between=(15, 40))
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
    lines = [json.loads(line)["id"] for line in (tmp_path / "killed" / "results.jsonl").read_text().splitlines()]
    assert len(lines) == len(set(lines)) == 8
    assert "8 done" in said
    assert {row.status for row in read(tmp_path / "killed")} == {"done"}
    status = moe_study("status", tmp_path / "killed")
    assert "8 done" in status.communicate(timeout=120)[0]
