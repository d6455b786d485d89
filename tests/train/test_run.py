"""Whole runs, through the command that a user types: trained, stopped, killed, resumed, inspected, sampled from."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moe.checkpoint.weights import load_weights
from tests.workers import run_command as moe

RECIPE = """
model: {layers: 2, d_model: 32, heads: 2, moe: {experts: 4, d_expert: 32, router: {name: top_k, k: 2, bias_rate: 0.01, jitter: 0.01}}}
data: {sequence: 32, sources: [{name: text, paths: ["%s"]}], validation: 0.3}
train: {steps: 20, batch: 4}
optimizer: {lr: 0.01}
evaluate: {every: 10, sequences: 8, sample_tokens: 8}
checkpoint: {every: 5}
log: {every: 1}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A small model on a few files of text."""
    folder = tmp_path_factory.mktemp("recipe")
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"def f{number}(x):\n    return x * {number}\n" * 40)
    path = folder / "tiny.yaml"
    path.write_text(RECIPE % (folder / "*.txt"))
    return path


def losses(run: Path) -> dict[int, tuple[float, float]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows if "loss" in row}


def same_weights(a: Path, b: Path) -> bool:
    one, other = load_weights(a / "weights"), load_weights(b / "weights")
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory) -> Path:
    """A run of two ranks that nothing disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    command = [sys.executable, "-m", "moe", "train", str(recipe), f"run.folder={run}", "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr
    for word in (
        "loss",
        "bits per byte",
        "tokens/s",
        "routing:",
        "sample",
        str(run),
        "experts by backend threads: 4 of 32 x 32, 2 a token",
    ):
        assert word in done.stdout
    return run


@pytest.fixture(scope="module")
def stopped(recipe: Path, tmp_path_factory) -> Path:
    """A run of two ranks that SIGTERM stopped after eight steps."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    done = moe("train", recipe, f"run.folder={run}", "--nproc", "2", MOE_FAULTS="term@step=7,rank=1,point=loop/step")
    assert done.returncode == 75, done.stderr
    assert "the same command" in done.stderr
    assert (run / "checkpoints" / "step-00000008").is_dir()
    return run


def test_a_run_leaves_everything_in_its_folder(whole: Path):
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if "loss" in row]
    validation = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in training] == list(range(1, 21))
    assert {"loss", "tokens_per_second", "grad_norm", "lr", "layers"} <= training[0].keys()
    assert [row["step"] for row in validation] == [10, 20]
    assert {"bits_per_byte", "perplexity"} <= validation[0].keys()
    assert 0 <= validation[1]["churn"] <= 1
    assert training[-1]["loss"] < training[0]["loss"]
    assert len(list((whole / "samples").glob("*.txt"))) == 1
    assert len(list((whole / "checkpoints").glob("step-????????"))) == 3


def test_inspect_and_generate_read_the_run(whole: Path):
    facts = json.loads(moe("inspect", whole, "--json").stdout)
    assert facts["steps"] == {"done": 20, "planned": 20}
    assert set(facts["layers"]) == {"0", "1"}
    shown = moe("inspect", whole)
    assert "bits per byte" in shown.stdout
    assert shown.returncode == 0
    words = ("generate", whole, "--prompt", "def ", "--tokens", "12", "--seed", "3")
    text = moe(*words)
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("def ")
    assert moe(*words).stdout == text.stdout


def test_a_killed_rank_is_started_again_and_nothing_is_lost(recipe: Path, whole: Path, tmp_path: Path):
    run = tmp_path / "run"
    done = moe(
        *("train", recipe, f"run.folder={run}", "train.restarts=1", "--nproc", "2"),
        MOE_FAULTS=f"kill@step=13,rank=1,point=loop/step,once={tmp_path / 'struck'}",
    )
    assert done.returncode == 0, done.stderr
    assert "SIGKILL" in done.stderr
    assert losses(run) == losses(whole)
    assert same_weights(run, whole)


def test_sigterm_saves_and_the_same_command_goes_on(recipe: Path, whole: Path, stopped: Path, tmp_path: Path):
    run = shutil.copytree(stopped, tmp_path / "run")
    done = moe("train", recipe, f"run.folder={run}", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert "going on from step 8" in done.stdout
    assert losses(run) == losses(whole)
    assert same_weights(run, whole)


def test_another_number_of_ranks_and_another_engine_go_on(recipe: Path, whole: Path, stopped: Path, tmp_path: Path):
    run = shutil.copytree(stopped, tmp_path / "run")
    done = moe("train", recipe, f"run.folder={run}", "engine.name=fsdp2", "parallel.device=cpu")
    assert done.returncode == 0, done.stderr
    alone, together = losses(run), losses(whole)
    assert max(abs(alone[step][0] - together[step][0]) for step in together) < 1e-4


@pytest.mark.chaos
def test_a_job_killed_at_random_steps_ends_with_the_same_weights(recipe: Path, whole: Path, tmp_path: Path):
    """SIGKILL to every process of the job, five times; the same command each time."""
    run = tmp_path / "run"
    steps = sorted(random.Random(0).sample(range(2, 20), 5))
    command = [sys.executable, "-m", "moe", "train", str(recipe), f"run.folder={run}", "--nproc", "2"]
    for step in steps:
        # slow enough that the kill strikes while the step runs
        environment = os.environ | {"MOE_FAULTS": f"delay=2@step={step},point=loop/step"}
        with subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as job:
            deadline = time.monotonic() + 90
            while time.monotonic() < deadline and (not (run / "metrics.jsonl").exists() or max(losses(run), default=0) < step):
                time.sleep(0.05)
            kill_session(job.pid)
    done = moe(*command[3:])
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(whole)
    assert same_weights(run, whole)


def kill_session(leader: int) -> None:
    """SIGKILL to the processes of a session that this test started, ranks first in their own groups included."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == leader:
            os.kill(int(entry.parent.name), signal.SIGKILL)
