"""Rows of results survive kills, and refuse to be mixed or edited."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

from moe.config import dump
from moe.errors import DataError
from moe.recipe import Recipe
from moe.scaling.fit import check
from moe.scaling.laws import CLARK
from moe.scaling.results import RESULTS, Row, append, identity, latest, points, read


def row(name="a", **changes):
    made = Row(
        id=name, status="done", why=None, axes={"lr_factor": 1.0}, total=200, active=100, base=90, average=100.0, experts=4,
        granularity=1.0, sparsity=0.75, tokens=1000, flops=6e5, bytes=800, loss=2.5, bits_per_byte=3.6, step_ms=10.0, tokens_per_s=1e4,
        health={}, trunk=None, steps=10, cooldown_steps=2, commit=None, machine="", corpus="c" * 64, tokenizer="bytes", seconds=1.0,
    )  # fmt: skip
    return made._replace(**changes)


def test_the_last_row_of_a_run_counts(tmp_path):
    for one in (row("a", status="failed", loss=None), row("b"), row("a", loss=2.4)):
        append(tmp_path, one)
    assert [(one.id, one.status, one.loss) for one in read(tmp_path)] == [("a", "done", 2.4), ("b", "done", 2.5)]


def test_a_line_that_a_kill_cut_short_was_never_a_row(tmp_path):
    append(tmp_path, row("a"))
    with (tmp_path / RESULTS).open("a") as file:
        file.write('{"id": "b", "sta')
    assert list(latest(tmp_path)) == ["a"]
    append(tmp_path, row("c"))
    assert list(latest(tmp_path)) == ["a", "c"]


def test_a_line_that_is_no_row_is_named(tmp_path):
    append(tmp_path, row("a"))
    (tmp_path / RESULTS).write_text('{"id": 3}\n' + (tmp_path / RESULTS).read_text())
    with pytest.raises(DataError, match=r"results.jsonl:1 is no row of a study"):
        read(tmp_path)


def test_writers_that_are_killed_lose_no_row(tmp_path):
    writers = []
    for number in range(3):
        pid = os.fork()
        if pid == 0:
            for count in range(100_000):
                append(tmp_path, row(f"{number}-{count}", why="x" * 3000))
            os._exit(0)
        writers.append(pid)
    time.sleep(0.3)
    for pid in writers:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    append(tmp_path, row("last"))
    names = list(latest(tmp_path))
    assert len(names) > 3
    assert names[-1] == "last"
    for number in range(3):
        counts = [int(name.split("-")[1]) for name in names if name.startswith(f"{number}-")]
        assert counts == list(range(len(counts)))


def test_corpora_and_tokenizers_do_not_mix(tmp_path):
    append(tmp_path, row("a"))
    append(tmp_path, row("b", corpus="d" * 64))
    with pytest.raises(DataError, match="mixes corpora: run a has cccccccccccccccc and run b has dddddddddddddddd"):
        read(tmp_path)
    (tmp_path / RESULTS).unlink()
    append(tmp_path, row("a"))
    append(tmp_path, row("b", tokenizer="other.json"))
    with pytest.raises(DataError, match="mixes tokenizers"):
        read(tmp_path)
    with pytest.raises(DataError, match="holds no results of a study"):
        read(tmp_path / "nowhere")


def test_an_edited_run_is_refused(tmp_path):
    recipe = Recipe.model_validate({"train": {"steps": 20}})
    name = identity(recipe)
    append(tmp_path, row(name))
    (tmp_path / "runs" / name).mkdir(parents=True)
    file = tmp_path / "runs" / name / "recipe.yaml"
    file.write_text(dump(recipe))
    assert len(read(tmp_path)) == 1
    file.write_text(dump(recipe).replace("steps: 20", "steps: 21"))
    with pytest.raises(DataError, match=r"recipe.yaml was edited since the study wrote it"):
        read(tmp_path)
    file.write_text("train: {stepz: 3}")
    with pytest.raises(DataError, match=r"was edited"):
        read(tmp_path)


def test_a_run_is_known_by_what_it_learns_from_and_a_trunk_at_any_length():
    def of(**tree):
        return identity(Recipe.model_validate(tree))

    assert of(run={"folder": "a"}) == of(run={"folder": "b"}) == of()
    assert of(train={"seed": 1}) != of(train={"seed": 2})
    assert of(train={"steps": 5}) != of(train={"steps": 6})
    trunk = {"name": "constant", "warmup": 2}
    assert of(schedule=trunk, train={"steps": 5}) == of(schedule=trunk, train={"steps": 6})


def test_what_a_run_begins_with_counts_by_its_name_alone():
    def of(**init):
        return identity(Recipe.model_validate({"init": init}))

    assert of(**{"from": "studies/a/runs/0123"}) == of(**{"from": "/elsewhere/0123"})
    assert len({of(**{"from": "runs/0123"}), of(**{"from": "runs/4567"}), of()}) == 3


def test_a_row_says_how_its_run_began(tmp_path):
    append(tmp_path, row("a"))
    append(tmp_path, row("b", axes={"lr_factor": 1.0, "begin": "copy", "dense": 500}))
    assert [one.begin for one in read(tmp_path)] == [None, "copy"]


def test_fits_see_the_runs_that_are_done_at_the_rate_of_the_rule(tmp_path):
    of_two = row("d", experts=8, sparsity=0.75, loss=2.25)
    rows = [row("a"), row("b", axes={"lr_factor": 2.0}), row("c", status="diverged", loss=None), of_two]
    columns, loss = points(rows)
    assert loss.tolist() == [2.5, 2.25]
    assert columns["experts"].tolist() == [4, 4]  # for each one that a token meets: one of 4, two of 8
    with pytest.raises(DataError, match="needs runs of at least 3 values"):
        check(CLARK, columns, np.asarray(loss))


def test_a_line_of_another_encoding_is_named(tmp_path):
    append(tmp_path, row("a"))
    with (tmp_path / RESULTS).open("ab") as file:
        file.write(b'{"id": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=r"results.jsonl:2 is no row of a study"):
        read(tmp_path)


def test_a_row_that_is_done_is_not_replaced_by_one_that_is_not(tmp_path):
    for one in (row("a", loss=2.4), row("a", status="failed", loss=None), row("b", status="failed", loss=None), row("b")):
        append(tmp_path, one)
    assert [(one.id, one.status, one.loss) for one in read(tmp_path)] == [("a", "done", 2.4), ("b", "done", 2.5)]
    append(tmp_path, row("a", loss=2.3))
    assert latest(tmp_path)["a"].loss == 2.3
