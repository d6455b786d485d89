"""Bad input ends with one sentence that says what to type, and a non-zero exit code, before anything is trained."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.workers import run_command

RECIPE = """
model: {layers: 1, d_model: 16, heads: 2, moe: {experts: 4, d_expert: 16}}
data: {sequence: 16, sources: [{name: text, paths: ["%s"]}], validation: 0.3}
train: {steps: 2, batch: 2}
evaluate: {every: 2, sequences: 2, sample_tokens: 2}
checkpoint: {every: 1, mode: blocking}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"some text of document {number}, long enough to train on\n" * 8)
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE % (tmp_path / "*.txt"))
    return path


def train(recipe: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_command("train", recipe, f"run.folder={recipe.parent / 'run'}", *overrides, **environment)


CASES = {
    "unknown key": (["train.stpes=3"], 2, ["train.stpes", "steps"]),
    "misspelt router": (["model.moe.router.name=topk"], 2, ["topk", "top_k"]),
    "more experts chosen than there are": (["model.moe.router.k=9"], 2, ["k=9", "4"]),
    "no such file": (["data.sources.0.paths=[/nowhere/*.txt]"], 3, ["/nowhere/*.txt"]),
    "a GPU that is not there": (["parallel.device=cuda"], 2, ["parallel.device=cuda", "cpu"]),
    "another world size": (["parallel.ranks=3"], 2, ["parallel.ranks=3", "--nproc 3"]),
}


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_an_exit_code(recipe: Path, case: str):
    overrides, code, words = CASES[case]
    done = train(recipe, *overrides, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == code, done.stderr
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (recipe.parent / "run" / "metrics.jsonl").exists()


def test_an_empty_corpus(recipe: Path):
    for path in recipe.parent.glob("*.txt"):
        path.write_text("")
    done = train(recipe)
    assert done.returncode == 3, done.stderr
    assert "empty" in done.stderr or "no text" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_cannot_be_read(recipe: Path):
    (recipe.parent / "3.txt").write_bytes(b"\xff\xfe\x00 not UTF-8 \x80")
    done = train(recipe)
    assert done.returncode == 3, done.stderr
    assert "3.txt" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_keeps_the_last_checkpoint_and_a_folder_keeps_its_recipe(recipe: Path):
    full = train(recipe, MOE_FAULTS="enospc@step=2,point=checkpoint/shard")
    assert full.returncode == 5, full.stderr
    assert "Traceback" not in full.stderr
    checkpoints = recipe.parent / "run" / "checkpoints"
    assert [path.name for path in sorted(checkpoints.iterdir()) if path.is_dir()] == ["step-00000001"]
    other = train(recipe, "optimizer.lr=0.5")
    assert other.returncode == 2, other.stderr
    assert "optimizer.lr" in other.stderr
    assert "run.folder" in other.stderr
    again = train(recipe)
    assert again.returncode == 0, again.stderr


def test_a_start_that_found_no_data_can_be_corrected_in_the_same_folder(recipe: Path):
    assert train(recipe, "data.sources.0.paths=[/nowhere/*.txt]").returncode == 3
    done = train(recipe)
    assert done.returncode == 0, done.stderr


def test_a_run_folder_that_is_a_file_is_one_sentence(recipe: Path):
    (recipe.parent / "run").write_text("mine")
    done = train(recipe)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (recipe.parent / "run").read_text() == "mine"
