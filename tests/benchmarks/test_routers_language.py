"""The comparison of routers on a language model: its recipes, its bookkeeping, its table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.routers import language, language_cell
from moe.model.cost import cost
from moe.model.transformer import Transformer
from moe.routers import ROUTERS, build
from moe.routers.base import Tokens

STEPS = 40
VARIANTS = [(name, number) for name, row in language.rows(STEPS).items() for number in range(len(row.variants))]


def cell(name: str, variant: int, tmp_path: Path, *, lr: float = 3e-3, seed: int = 0):
    return language.cell(name, language.rows(STEPS)[name].variants[variant], lr, seed, "final", STEPS, tmp_path)


def test_every_router_has_a_row():
    named = {variant.get("name") for row in language.rows(STEPS).values() for variant in row.variants}
    assert named - {None} == set(ROUTERS)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_row_is_a_recipe_of_equal_active_flops(name, variant, tmp_path):
    recipe = language_cell.recipe(cell(name, variant, tmp_path))
    assert recipe.train.steps == STEPS
    with torch.device("meta"):
        model = Transformer(recipe.model, 257, seed=0)
        for router in model.routers().values():
            if not hasattr(router, "k"):  # experts a token that this one aims at, or ends with
                vars(router)["k"] = getattr(router, "capacity_factor", 1)
        price = cost(model, recipe.data.sequence)
        dense = cost(Transformer(language_cell.recipe(cell("dense", 0, tmp_path)).model, 257, seed=0), recipe.data.sequence)
    assert price.forward_flops == pytest.approx(dense.forward_flops, rel=0.02)


def test_a_fingerprint_names_everything_that_is_given_but_the_folder(tmp_path):
    same = cell("top_k", 0, tmp_path)
    assert same.fingerprint == cell("top_k", 0, tmp_path).fingerprint
    others = [
        cell("top_k", 0, tmp_path, lr=1e-3),
        cell("top_k", 0, tmp_path, seed=1),
        cell("top_k", 1, tmp_path),
        cell("hash", 0, tmp_path),
    ]
    assert len({one.fingerprint for one in [same, *others]}) == 5
    assert len({one.folder for one in [same, *others]}) == 5


@dataclass
class AtOnce:
    """A pool that trains nothing and remembers what it was asked for."""

    lines: Callable[[Any], dict[str, Any]]
    asked: list[Any] = field(default_factory=list)

    def submit(self, work, one, deadline):
        self.asked.append(one)
        done = Future()
        done.set_result(self.lines(one))
        return done


def line_of(one, bits=2.0):
    return one.facts | {"bits": bits, "seconds": 1.0, "commit": "abc"}


def options(tmp_path):
    return argparse.Namespace(steps=STEPS, tune_steps=STEPS // 2, runs=tmp_path)


def test_each_row_is_judged_at_the_best_of_three_settings(tmp_path):
    def bits(one):  # the second value of the main option and the second rate are better
        return 3.0 - ("0.001" in one.setting) - 0.5 * (one.lr == language.RATES[1])

    pool, wanted = AtOnce(lambda one: line_of(one, bits(one))), {"top_k": [], "dense": []}
    language.compare(options(tmp_path), wanted, language.Results(tmp_path / "rows.jsonl"), pool, 0.0)
    tuned = [one for one in pool.asked if one.stage == "tune"]
    assert [sum(one.row == name for one in tuned) for name in wanted] == [3, 3]
    assert {(line["setting"], line["lr"]) for line in wanted["top_k"]} == {("balance_loss=0.001", language.RATES[1])}
    assert [line["seed"] for line in wanted["top_k"]] == [0, 1, 2]


def test_what_is_finished_is_not_run_again_and_what_failed_is(tmp_path):
    path, good, bad = tmp_path / "rows.jsonl", cell("top_k", 0, tmp_path), cell("hash", 0, tmp_path)
    first = AtOnce(lambda one: line_of(one) if one is good else one.facts | {"error": "NonFinite: no"})
    language.Results(path).make([good, bad], first, 0.0)
    assert len(path.read_text().splitlines()) == 2
    second = AtOnce(line_of)
    language.Results(path).make([good, bad], second, 0.0)
    assert second.asked == [bad]


def test_a_cell_that_fails_is_a_line_of_results(tmp_path):
    one = cell("top_k", 0, tmp_path)
    one = one._replace(words=[*one.words, "model.moe.router.k=99"])
    line = language_cell.train_cell(one)
    assert "k=99" in line["error"]
    assert line["row"] == "top_k"
    json.dumps(line)


def figures(*bits, peek=0.0):
    routing = {"experts": 2.0, "experts_late": 2.0, "experts_held_out": 2.0, "cv": 0.5, "cv_held_out": 0.5, "drop_rate": 0.1}
    others = {"dead_held_out": 1, "churn": 0.2, "parameters": 2_700_000, "lr": 1e-3, "setting": "x"}
    return [routing | others | {"seed": seed, "bits": value - peek, "bits_alone": value} for seed, value in enumerate(bits)]


def test_the_table_compares_at_equal_seeds_what_holds_without_later_tokens():
    lines = {"top_k": figures(2.0, 2.2, 2.4), "hash": figures(2.1, 2.3, 2.5), "expert_choice": figures(3.0, 3.1, 3.2, peek=2.0), "base": []}
    times = {"top_k": [1.0, 2.0], "hash": [0.9, 1.8], "expert_choice": [2.0, 4.0]}
    short = {name: [{"lr": 1e-3, "setting": "", "bits": bits} for bits in (4.0, 3.5)] for name in ("base", "hash")}
    made = language.table(lines, short, times, {"expert_choice": "always"})
    assert [row["router"] for row in made] == ["top_k", "hash", "expert_choice", "base"]
    assert made[3] == {"router": "base", "setting": "lr=0.001", "seeds": 0, "short runs": "3.500 / 4.000"}
    hashed = made[1]
    assert (hashed["bits per byte"], hashed["±"]) == (2.3, round(0.2 / 3**0.5, 4))
    assert (hashed["against top_k"], hashed["± of that"]) == (0.1, 0.0)  # what the seeds share cancels
    assert (hashed["step time"], hashed["dropped %"]) == (0.9, 10.0)
    assert made[2]["sees later tokens"] == "always: 1.100"


def test_rows_of_one_seed_are_in_the_table_and_not_in_the_chart(tmp_path):
    made = language.table({"top_k": figures(2.0, 2.2), "base": figures(2.1)}, {}, {}, {"base": "in training"})
    assert [row["±"] for row in made] == [round(0.1 * 2**0.5 / 2**0.5, 4), ""]
    language.draw(tmp_path / "chart.svg", made)
    assert "top_k" in (tmp_path / "chart.svg").read_text()
    assert "base" not in (tmp_path / "chart.svg").read_text()


def test_a_watch_counts_experts_in_training_and_balance_on_held_out_text(tmp_path):
    model = Transformer(language_cell.recipe(cell("top_k", 0, tmp_path)).model, 257, seed=0)
    watch = language_cell.Watch(2)
    ids = torch.randint(257, (2, 8))
    index = torch.arange(16).view(2, 8)
    batch = (ids, ids, torch.zeros_like(ids), torch.arange(8).expand(2, 8), index)
    model.register_forward_hook(watch)
    model.eval()
    model(*batch)
    model.train()
    for step in range(2):
        model(*batch, step=step)
    model.eval()
    model(*batch)
    figures = watch.figures()
    assert figures["experts"] == figures["experts_late"] == figures["experts_held_out"] == 2.0
    assert watch.held is not None
    assert int(watch.held[0].stats["tokens"]) == 16  # of the last evaluation


def test_routed_alone_a_token_depends_on_no_other():
    x = torch.randn(12, 16)
    choice = build({"name": "expert_choice", "leak": "allow"}, 16, 4).eval()
    x, tokens = language_cell.alone(choice, (x, Tokens.of(x)))
    whole = choice(x, tokens)
    part = choice(*language_cell.alone(choice, (x[:5], Tokens.of(x[:5]))))
    mine = {(int(t), int(e)): w.item() for t, e, w in zip(whole.token, whole.expert, whole.weight, strict=True) if t < 5}
    assert mine == {(int(t), int(e)): w.item() for t, e, w in zip(part.token, part.expert, part.weight, strict=True)}
