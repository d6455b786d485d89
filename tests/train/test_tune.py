"""`moe tune`: the shapes of a recipe, and one table for all ranks."""

from __future__ import annotations

import json
import os

import pytest
import torch
from typer.testing import CliRunner

from moe.cli import app
from moe.config import load
from moe.errors import ConfigError
from moe.kernels import triton_configs
from moe.kernels.triton_configs import Config, Entry, Shape
from moe.parallel.layout import Layout
from moe.parallel.mesh import start
from moe.train.tune import read_shape, shape_of, share_table
from tests.workers import run_ranks

MINE = Config(64, 32, 32, 4, 5)


def write_table(folder, rank: int) -> None:
    (folder / "moe").mkdir(parents=True)
    entry = Entry("up", 90, 2, 768, 2048, 512, MINE._replace(group_m=rank + 3))
    (folder / "moe" / "triton.json").write_text(json.dumps({"entries": [triton_configs.row(entry)]}))


def choice_of_rank(rank: int, world: int, folder) -> Config:
    os.environ["XDG_CONFIG_HOME"] = str(folder / str(rank))
    write_table(folder / str(rank), rank)
    share_table(start(Layout()))
    return triton_configs.lookup("up", 90, 768, 2048, 512)


def refusal_of_rank(rank: int, world: int, folder) -> str:
    os.environ["XDG_CONFIG_HOME"] = str(folder / str(rank))
    write_table(folder / str(rank), rank)
    if rank == 0:
        (folder / "0" / "moe" / "triton.json").write_text("{")
    with pytest.raises(ConfigError) as caught:
        share_table(start(Layout()))
    return str(caught.value)


def test_every_rank_takes_the_first_ranks_choice(tmp_path):
    assert run_ranks(2, choice_of_rank, tmp_path) == [MINE._replace(group_m=3)] * 2


def test_a_damaged_table_of_the_first_rank_stops_every_rank(tmp_path):
    first, second = run_ranks(2, refusal_of_rank, tmp_path)
    assert first == second
    assert "0/moe/triton.json is not a table of kernel configurations" in first


def test_the_shape_of_a_recipe_is_what_one_rank_sees_of_it():
    recipe = load(["configs/debug.yaml"], ["train.batch=16", "train.accumulate=2", "train.dtype=bfloat16"])
    moe, tokens = recipe.model.moe, 8 * recipe.data.sequence
    assert shape_of(recipe, None) == Shape(recipe.model.d_model, moe.d_expert, moe.experts, 2, tokens, torch.bfloat16)
    assert shape_of(recipe, 4).tokens == tokens // 4
    recipe = load(["configs/debug.yaml"], ["train.batch=16", f"parallel.expert_ranks={moe.experts}"])
    alone = shape_of(recipe, moe.experts)
    assert (alone.experts, alone.k, alone.tokens) == (1, 1, 2 * 2 * recipe.data.sequence), "as many rows reach a rank as it sends"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [(["model.moe=null"], "is dense"), (["train.dtype=float64"], "no float64"), (["model.moe.router=dense_to_sparse"], "no fixed number")],
)
def test_a_recipe_without_anything_to_tune_is_refused(overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        shape_of(load(["configs/debug.yaml"], overrides), None)


def test_sizes_as_typed():
    assert read_shape("d=16, f=32,experts=4,k=2,tokens=64,dtype=float16") == Shape(16, 32, 4, 2, 64, torch.float16)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("d=16,f=32,experts=4,k=2", "needs tokens, a number of at least 1"),
        ("d=0,f=32,experts=4,k=2,tokens=8", "needs d, a number of at least 1, not '0'"),
        ("width=3", "--shape has no 'width'"),
        ("d=16,f=32,experts=4,k=5,tokens=8", "k=5, more than experts=4"),
        ("d=16,f=32,experts=4,k=2,tokens=8,dtype=float64", "no float64; choose from bfloat16"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_shape(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("words", [["configs/debug.yaml"], ["--shape", "d=16,f=32,experts=4,k=2,tokens=64"]])
def test_without_a_gpu_the_verb_says_where_to_run_it(words):
    done = CliRunner().invoke(app, ["tune", *words])
    assert done.exit_code == 2
    assert done.stderr == "error: moe tune measures on a GPU, and torch sees none here; run it on the machine that is to train\n"


@pytest.mark.parametrize("words", [[], ["configs/debug.yaml", "--shape", "d=16"]])
def test_the_verb_takes_a_recipe_or_sizes(words):
    done = CliRunner().invoke(app, ["tune", *words])
    assert done.exit_code == 2
    assert "takes a recipe or --shape, one of them" in done.stderr
