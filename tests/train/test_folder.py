"""A run's folder goes on with its own recipe and refuses another one."""

from __future__ import annotations

import errno
import json

import pytest

from moe.config import load
from moe.errors import ConfigError, NoSpace
from moe.train.folder import differences, flatten, open_folder, write_whole


def recipe(folder, *overrides: str):
    return load([], [f"run.folder={folder}", *overrides])


def test_a_folder_holds_recipe_and_environment(tmp_path):
    first = recipe(tmp_path / "run", "optimizer.lr=0.002")
    open_folder(first)
    assert load([tmp_path / "run" / "recipe.yaml"], []) == first
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert {"moe", "torch", "python", "commit", "devices"} <= environment.keys()


def test_the_same_recipe_goes_on(tmp_path):
    open_folder(recipe(tmp_path / "run"))
    open_folder(recipe(tmp_path / "run"))


def test_another_layout_goes_on_and_is_recorded(tmp_path):
    open_folder(recipe(tmp_path / "run"))
    open_folder(recipe(tmp_path / "run", "engine.name=fsdp2", "log.every=7"))
    assert load([tmp_path / "run" / "recipe.yaml"], []).engine.name == "fsdp2"


@pytest.mark.parametrize("override", ["optimizer.lr=0.5", "train.seed=9", "model.d_model=64", "data.sequence=128"])
def test_another_recipe_is_refused_with_the_differing_key(tmp_path, override):
    (open_folder(recipe(tmp_path / "run")) / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        open_folder(recipe(tmp_path / "run", override))


def test_a_start_that_failed_before_its_first_step_does_not_bind_the_folder(tmp_path):
    (open_folder(recipe(tmp_path / "run")) / "metrics.jsonl").touch()
    corrected = recipe(tmp_path / "run", "optimizer.lr=0.5")
    open_folder(corrected)
    assert load([tmp_path / "run" / "recipe.yaml"], []) == corrected


def test_a_checkpoint_binds_the_folder(tmp_path):
    (open_folder(recipe(tmp_path / "run")) / "checkpoints" / "step-00000005").mkdir()
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        open_folder(recipe(tmp_path / "run", "optimizer.lr=0.5"))


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=r"set run\.folder"):
            open_folder(recipe(folder))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "kept.txt").write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(NoSpace, match=r"kept\.txt"):
        write_whole(tmp_path / "kept.txt", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    assert (tmp_path / "kept.txt").read_text() == "old"


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no run"):
        open_folder(recipe(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_differences_name_the_leaf():
    assert differences(recipe("a"), recipe("b", "model.layers=3")) == [("model.layers", 4, 3)]
    assert flatten({"a": {"b": [1, {"c": 2}]}}) == {"a.b.0": 1, "a.b.1.c": 2}


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_folder(recipe("~/run")) == tmp_path / "run"
    assert (tmp_path / "run" / "recipe.yaml").is_file()
