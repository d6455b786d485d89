"""From a study to its runs: what is equal where a rule says so, what is counted, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moe.config import load
from moe.engines.schedule import learning_rate
from moe.errors import ConfigError
from moe.scaling import LAWS
from moe.studies import inference_speed
from moe.studies.grid import cooldown, grid
from moe.studies.identifiability import further, judge
from moe.studies.spec import Study
from moe.tables import entry

SMALL = """
means: {folder: studies/test}
recipe: {model: {context: 64}, data: {sequence: 64}}
axes:
  family: [{d_model: 32, layers: 2, heads: 2, d_ff: 96}, {d_model: 64, layers: 2, heads: 2, d_ff: 192}]
  experts: [1, 4]
  tokens: [50_000, 100_000]
scaling: {warmup: 5_000}
"""
BEGUN = [
    "axes.family=[{d_model: 32, layers: 2, heads: 2, d_ff: 96}]",
    "axes.experts=[4]",
    "axes.top_k=[2]",
    "axes.router=[top_k]",
    "axes.tokens=null",
    "rule={name: iso_flop, values: [1.2e10, 2.4e10]}",
    "axes.begin=[null, {dense: 50_000}, {dense: 50_000, variant: {name: drop, ratio: 0.25}}]",
    "also=[{experts: [1], begin: [{dense: 50_000}, {dense: 50_000, variant: noise}]}]",
]
FOURTHS = "axes.begin=[{dense: 50_000, variant: {name: virtual_group, granularity: 4}}]"
CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "studies").glob("*.yaml"))


@pytest.fixture
def study(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(SMALL)
    return lambda *words: load([file], words, Study)


def test_sizes_are_those_of_a_count_by_hand(study):
    # 2 d V + 13 l d² parameters a token and 2 d V + (4 + 9 E) l d² in all, of Ludziejewski et al., and beside them what they leave out
    for d, layers, experts, total in ((256, 4, 1, 19_791_872), (256, 4, 8, 36_306_944), (512, 8, 8, 192_151_552)):
        family = f"axes.family=[{{d_model: {d}, layers: {layers}, heads: 4, d_ff: {3 * d}}}]"
        run = grid(study(family, f"axes.experts=[{experts}]", "recipe.model.vocab=32000", "axes.tokens=[100_000]"))[0]
        norms, routers = (2 * layers + 1) * d, d * experts * layers * (experts > 1)
        assert run.price.parameters == total + norms + routers
        assert run.price.active == 2 * d * 32000 + 13 * layers * d**2 + norms + routers
        assert run.base == 2 * d * 32000 + 13 * layers * d**2 + norms
        # six a weight of a matrix that a token meets, the embedding only looked up; attention over 32.5 positions
        matrices = d * 32000 + 13 * layers * d**2 + routers
        assert run.price.training_flops == pytest.approx(6 * matrices + 6 * layers * 2 * d * 32.5)
        assert run.facts()["sparsity"] == 1 - 1 / experts


def test_a_study_is_its_runs_wherever_it_lives_and_however_it_grows(study):
    ids = [run.id for run in grid(study())]
    assert len(set(ids)) == 8
    assert [run.id for run in grid(study("means.folder=elsewhere", "means.cores=3"))] == ids
    grown = [run.id for run in grid(study("axes.experts=[1, 2, 4]", "axes.seed=[0, 1]"))]
    assert set(ids) < set(grown)
    assert len(grown) == 24
    trunks = {run.trunk.id for run in grid(study()) if run.trunk}
    assert trunks <= {run.trunk.id for run in grid(study("axes.tokens=[50_000, 100_000, 200_000]")) if run.trunk}


def test_a_dense_model_has_no_experts_to_vary(study):
    runs = grid(study("axes.experts=[1, 4]", "axes.top_k=[1, 2]", "axes.granularity=[1, 2]", "axes.tokens=[50_000]"))
    assert [run.axes["experts"] for run in runs].count(1) == 2
    assert len(runs) == 2 * (1 + 4)
    assert runs[0].recipe.model.moe is None


def test_iso_flop_runs_spend_what_the_budget_says(study):
    runs = grid(study("rule={name: iso_flop, values: [5e11, 1e12]}", "axes.tokens=null"))
    assert len(runs) == 8
    for run in runs:
        assert run.flops == pytest.approx(run.axes["budget"], rel=0.05)


def test_iso_active_models_meet_the_parameters_of_their_twin(study):
    runs = grid(study("rule.name=iso_active", "axes.granularity=[1, 2, 4]", "axes.experts=[1, 8]", "axes.tokens=[50_000]"))
    assert {run.axes["top_k"] for run in runs} == {1, 2, 4}
    for run in runs:
        assert run.price.active == pytest.approx(run.base, rel=0.05)


def test_iso_parameter_and_iso_memory_find_the_width(study):
    one = "axes.family=[{d_model: 32, layers: 2, heads: 2, d_ff: 96}]"
    runs = grid(study("rule={name: iso_parameter, values: [3e5, 1e6], tolerance: 0.01}", one, "axes.tokens=[50_000]"))
    assert len(runs) == 4
    for run in runs:
        assert run.price.parameters == pytest.approx(run.axes["budget"], rel=0.01)
        assert run.axes["d_ff"] / run.axes["d_model"] == pytest.approx(3, rel=0.25)
    for run in grid(study("rule={name: iso_memory, values: [4e6], tolerance: 0.01}", one, "axes.tokens=[50_000]")):
        cached = 4 * 2 * 2 * run.axes["d_model"] * 64
        assert run.price.bytes + cached == pytest.approx(4e6, rel=0.01)


def test_the_rate_follows_size_and_experts_as_the_rule_says(study):
    runs = grid(study("scaling={lr: 1e-2, at: 1e5, lr_power: -0.5, lr_experts: -0.25, warmup: 5000}", "axes.lr=[1, 2]"))
    for run in runs:
        experts = run.axes["experts"]
        assert run.recipe.optimizer.lr == pytest.approx(run.axes["lr_factor"] * 1e-2 * (run.base / 1e5) ** -0.5 * experts**-0.25, rel=1e-3)
    batches = {run.recipe.train.batch for run in grid(study("scaling={batch: 8, at: 1e5, batch_power: 1, warmup: 5000}"))}
    assert len(batches) == 2


def test_a_trunk_learns_at_the_rates_of_the_runs_that_leave_it(study):
    for run in grid(study()):
        assert run.trunk is not None
        own, shared, lr = run.recipe, run.trunk.recipe, run.recipe.optimizer.lr
        rates = [learning_rate(own.schedule, step, own.train.steps, lr) for step in range(own.train.steps)]
        for step in range(run.trunk.start):
            assert rates[step] == learning_rate(shared.schedule, step, shared.train.steps, lr)
        assert rates[-1] == 0 < rates[run.trunk.start - 1]
        assert run.trunk.start == cooldown(own)
        assert run.facts()["cooldown_steps"] == pytest.approx(0.2 * own.train.steps, abs=1)


def test_a_trunk_that_only_one_run_would_leave_is_none(study):
    assert all(run.trunk is None for run in grid(study("axes.tokens=[50_000]")))
    assert all(run.trunk is None for run in grid(study("means.trunks=false")))


def test_what_begins_with_a_dense_twin_spends_the_budget_beyond_it(study):
    runs = grid(study(*BEGUN))
    [twin] = [run for run in runs if run.axes["experts"] == 1 and run.origin is None]
    assert runs.index(twin) < min(runs.index(run) for run in runs if run.origin)
    begun = [run for run in runs if run.origin]
    assert [run.axes["begin"] for run in begun] == [
        *["copy"] * 2, *["drop ratio=0.25 channels=common"] * 2, *["continued dense"] * 2,
    ]  # fmt: skip
    assert len(runs) == 1 + 2 + len(begun)  # the dense model has no variants
    for run in begun:
        assert run.origin.twin.id == twin.id
        assert run.axes["dense"] == twin.tokens
        assert run.flops == pytest.approx(run.axes["budget"], rel=0.05)
        facts = run.facts()
        assert facts["tokens"] == twin.tokens + run.tokens
        assert facts["flops"] == twin.flops + run.flops
        assert facts["average"] * facts["tokens"] == pytest.approx(twin.price.active * twin.tokens + run.price.active * run.tokens)
        assert run.recipe.train.seed != twin.recipe.train.seed == run.axes["seed"]
        assert run.recipe.origin == Path("studies/test/runs") / run.origin.id
        assert run.trunk is not None
        assert run.trunk.recipe.origin == run.recipe.origin
    assert {run.origin.id == twin.id for run in begun if run.axes["experts"] == 1} == {True}
    assert len({run.origin.id for run in begun}) == 3
    assert all("begin" not in run.axes and run.facts()["average"] == run.price.active for run in runs if run.origin is None)


def test_what_runs_begin_with_is_named_by_what_it_is_made_of(study):
    ids = [run.id for run in grid(study(*BEGUN))]
    assert [run.id for run in grid(study(*BEGUN, "means.folder=elsewhere"))] == ids
    assert not {run.id for run in grid(study(*BEGUN, "scaling.lr=1e-3")) if run.origin} & set(ids)
    seeds = grid(study(*BEGUN, "axes.seed=[0, 1]"))
    assert len(seeds) == 2 * len(ids)
    assert set(ids) < {run.id for run in seeds}


def test_a_twin_is_a_run_like_others_and_may_be_one_of_them(study):
    runs = grid(
        study(
            *BEGUN[:-3], "axes.begin=[{dense: 50_000}]", "axes.tokens=[100_000]", "also=[{experts: [1], begin: [null], tokens: [50_000]}]"
        )
    )
    assert len(runs) == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["axes.granularity=[2]"], r"width 48 \(granularity 2\) as copy, which makes experts of width 96 .*write axes.granularity: \[1\]"),
        ([FOURTHS], r"makes experts of width 24 .* write axes.granularity: \[4\]"),
        ([FOURTHS, "axes.granularity=[4]"], "does not choose whole groups of granularity=4"),
        (["axes.router=[{name: top_k, normalize: none}]"], r"their router \(name=top_k, normalize=none\) does not weigh"),
        (["axes.router=[sigma]"], r"their router \(name=sigma\) does not weigh"),
        (["axes.begin=[{dense: 50_000, variant: {name: shuffled, d_expert: 0}}]"], "makes experts of no width; give d_expert above 0"),
        (["axes.begin=[{dense: 50_000, variant: {name: noise, std: .inf}}]"], "where std=inf is no number"),
        (["axes.begin=[{dense: 5_000}]"], "5,000 tokens are 10 steps"),
        (["axes.router=[{name: top_k, scale: 2.0}]"], "a router with scale=2.0 changes from the first step"),
        (["axes.router=[{name: top_k, capacity_factor: 1.0}]"], r"a router with capacity_factor=1.0 changes"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_of_a_twin_is_a_sentence(study, words, sentence):
    with pytest.raises(ConfigError, match=sentence) as raised:
        grid(study(*BEGUN, *words))
    assert "\n" not in str(raised.value)


def test_a_shared_expert_and_layers_that_stay_dense_are_made_too(study):
    also = "also.0={experts: [1], begin: [{dense: 50_000}]}"
    runs = grid(study(*BEGUN, also, "recipe.model.moe={first_dense: 1, d_shared: 32}", "axes.begin=[{dense: 50_000}]"))
    [asked] = {json.dumps(run.origin.asked) for run in runs if run.origin and run.origin.asked}
    assert json.loads(asked) == {
        "experts": 4, "top_k": 2, "variant": "copy", "settings": {}, "layers": "1", "seed": 0, "d_shared": 32,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["axes.top_k=[8]"], "asks for 8 of 4 experts"),
        (["axes.granularity=[5]"], "5 times narrower than d_ff=96"),
        (["axes.tokens=[5000]"], "5,000 tokens are 10 steps of 512 tokens, too few after 10 of warm-up"),
        (["rule={name: iso_flop, values: [1e9]}", "axes.tokens=null"], "too few after"),
        (["rule={name: iso_flop, values: [1e11], tolerance: 1e-4}", "axes.tokens=null"], "rule.name=iso_flop cannot be met"),
        (["rule={name: iso_active, tolerance: 0.001}"], "rule.name=iso_active cannot be met: 4 experts"),
        (["rule={name: iso_parameter, values: [2e4], tolerance: 0.001}"], "rule.name=iso_parameter cannot be met"),
        (["rule={name: iso_parameter, values: [1e25]}"], "rule.name=iso_parameter cannot be met"),
        (["axes.tokens=[50_000, 50_001]"], "one and the same run .tokens 50000 and 50001., at"),
        (["axes.lr=[1, 1.00001]"], "one and the same run .factor 1.0 and 1.00001., at"),
        (["recipe.model.kv_heads=4"], "model.kv_heads=4 does not divide model.heads=2"),
        (["axes.router=[top_k]"], "never learns"),
    ],
)
def test_what_cannot_be_met_is_a_sentence(study, words, sentence):
    with pytest.raises(ConfigError, match=sentence) as raised:
        grid(study(*words))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("axes.tokenz=[1]", "did you mean axes.tokens"),
        ("axes.experts=[4, 4]", "axes.experts is empty or names a value twice"),
        ("recipe.train.steps=5", "recipe.train.steps is what axes and scaling decide"),
        ("recipe.model.moe.experts=5", "recipe.model.moe.experts is what axes"),
        ("rule={name: iso_flop, values: [1e9]}", "axes.tokens is what rule.name=iso_flop decides"),
        ("rule.name=iso_parameter", "has no rule.values"),
        ("rule.tolerance=0.1", "has no effect with rule.name=grid"),
        ("scaling={schedule: cosine, decay: 0.1}", "has no effect with scaling.schedule=cosine"),
        ("axes.tokens=null", "axes.tokens is missing"),
        ("axes.begin=[{}]", "axes.begin.0.dense is missing"),
        ("axes.begin=[{dense: 9, variant: dropp}]", "did you mean drop"),
        ("aim.law=chinchila", "did you mean chinchilla"),
    ],
)
def test_a_wrong_setting_is_named(study, line, sentence):
    with pytest.raises(ConfigError, match=sentence):
        study(line)


def test_a_wrong_line_is_named_by_its_place(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(SMALL.replace("experts: [1, 4]", "experts: [1, four]"))
    with pytest.raises(ConfigError, match=r"study.yaml:6: axes.experts.1=four is not a whole number"):
        load([file], [], Study)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_studies_of_the_house_are_studies(path):
    study = load([path], [], Study)
    runs = grid(study)
    assert len(runs) == len({run.id for run in runs})
    if path.stem != "sparsity":
        return
    tuned = [run for run in runs if run.axes["lr_factor"] == 1]
    cells = {(run.axes["d_model"], run.axes["experts"]): 0 for run in tuned}
    assert len({width for width, _ in cells}) >= 3
    assert len({experts for _, experts in cells}) >= 4
    for width, experts in cells:
        here = [run for run in tuned if (run.axes["d_model"], run.axes["experts"]) == (width, experts) and run.axes["seed"] == 0]
        assert len({run.axes["tokens"] for run in here}) == 3
        assert len({run.trunk.id if run.trunk else None for run in here}) == 1
    swept = {run.axes["experts"] for run in runs if run.axes["lr_factor"] != 1}
    assert swept == {1, max(experts for _, experts in cells)}
    assert {run.axes["seed"] for run in runs} == {0, 1, 2}


def test_a_design_that_cannot_identify_its_law_is_refused_in_a_sentence(study):
    found, sentence = judge(study("aim.law=ludziejewski").aim, grid(study()))
    assert found is None
    assert sentence is not None
    assert "needs runs of at least 3 values" in sentence
    with pytest.raises(ConfigError, match=r"aim.values does not suit the law chinchilla: A is missing"):
        judge(study("aim.values={alpha: 0.3}").aim, grid(study()))
    assert set(LAWS) >= {"chinchilla", "ludziejewski"}


def test_two_settings_of_one_router_are_two_routers(study):
    both = study("axes.router=[top_k, {name: top_k, normalize: none, balance_loss: 0.1}]", "axes.experts=[4]", "axes.top_k=[2]")
    assert {run.axes["router"] for run in grid(both)} == {"top_k", "top_k normalize=none balance_loss=0.1"}


def test_values_that_would_be_worse_than_guessing_are_no_truth(study):
    three = [f"{{d_model: {width}, layers: 2, heads: 2, d_ff: {3 * width}}}" for width in (16, 32, 64)]
    small = study(f"axes.family=[{', '.join(three)}]", "axes.tokens=[20_000, 40_000, 80_000]", "axes.experts=[1]")
    _, sentence = judge(small.aim, grid(small))
    assert sentence is not None
    assert "nats a token, where guessing takes 5.55; give aim.values" in sentence


def test_of_every_choice_the_largest_run_is_foreseen_further_out():
    design = {"experts": [1, 1, 8, 8], "granularity": [1, 1, 1, 2], "flops": [1e9, 2e9, 3e9, 1e9], "tokens": [5.0, 4.0, 3.0, 2.0]}
    design = {name: np.array(values, float) for name, values in design.items()} | {
        name: np.arange(4.0) for name in ("total", "active", "base", "average", "sparsity")
    }
    found = further(design, 2)
    assert found["tokens"].tolist() == [8, 6, 4]
    assert found["active"].tolist() == [2, 4, 6]
    assert found["experts"].tolist() == [1, 8, 8]


@pytest.mark.slow
def test_the_study_of_sparsity_can_identify_its_law():
    study = load([next(path for path in CONFIGS if path.stem == "sparsity")], [], Study)
    _, sentence = judge(study.aim, grid(study))
    assert sentence is None
    assert entry(LAWS, study.aim.law, "law").name == study.aim.law


@pytest.mark.parametrize("name", ["iso_parameter", "iso_memory"])
def test_a_rule_that_changes_the_width_suits_no_run_that_begins_with_another(study, name):
    with pytest.raises(ConfigError, match=f"axes.begin cannot be beside rule.name={name}"):
        study(*BEGUN[:-3], f"rule={{name: {name}, values: [1e6]}}", "axes.tokens=[50_000]", "axes.begin=[null, {dense: 50_000}]")


@pytest.mark.parametrize("setting", ["engine.recompute=experts", "log.stages=false", "optimizer.decay_router=true"])
def test_a_dense_run_leaves_out_what_has_no_effect_in_it(study, setting):
    try:
        given = study(f"recipe.{setting}", "recipe.parallel.expert_ranks=2")
    except ConfigError as error:
        pytest.fail(str(error))
    assert {run.axes["experts"] for run in grid(given)} == {1, 4}


def test_a_run_that_cannot_be_says_which_of_its_settings_is_wrong(study):
    with pytest.raises(ConfigError, match=r"cannot be: recipe\.optimizer\.lr: Input should be a finite number") as raised:
        grid(study("scaling={lr: 1e300, lr_power: -50, warmup: 5_000}"))
    assert "\n" not in str(raised.value)


def test_a_folder_of_home_is_there(study, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = study("means.folder=~/studies/x")
    assert given.means.folder == str(tmp_path / "studies/x")
    assert grid(given)[0].recipe.run.folder.startswith(str(tmp_path / "studies/x/runs/"))


def test_speeds_of_one_shape_are_not_wanted(study):
    assert inference_speed.timed(grid(study(*BEGUN))).keys() == {"dense", "4 experts top-2"}
    assert inference_speed.timed(grid(study(*BEGUN, "axes.experts=[1]", "axes.begin=[{dense: 50_000}]"))) == {}
