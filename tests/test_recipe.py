"""The recipe: what its sections demand of each other, and of the ranks that carry it out."""

from __future__ import annotations

import pytest

from moe.config import dump, load, schema
from moe.errors import ConfigError
from moe.parallel.layout import Layout
from moe.recipe import Recipe

REFUSALS = {
    "model.heads=7": "model.d_model=256 does not split into model.heads=7 heads of even width; choose model.heads=4 or 8",
    "model.head_dim=33": "model.head_dim=33 is odd, and rotary positions turn pairs; choose 34",
    "model.kv_heads=3": "model.kv_heads=3 does not divide model.heads=8; choose model.kv_heads=2 or 4",
    "model.moe.router.k=9": "model.moe.router: a router cannot choose k=9 of 8 experts; choose router.k from 1 to 8",
    "model.moe.router.k=1": "model.moe.router: k=1 with normalize=selected makes every weight 1",
    "model.moe.router.groups=3": "model.moe.router: 8 experts do not split into 3 equal groups",
    "model.moe.router.d_model=3": "model.moe.router.d_model is not a setting",
    "model.moe.first_dense=4": "model.moe.first_dense=4 and model.moe.every=1 leave no sparse layer of model.layers=4",
    "model.moe.dense_layers=[0,1,2,3]": "model.moe.first_dense=0 and model.moe.every=1 and model.moe.dense_layers=[0, 1, 2, 3] leave no",
    "model.moe.dense_layers=[4]": "model.moe.dense_layers names layer 4 of model.layers=4; choose from 0 to 3",
    "model.moe.every=5": "model.moe.first_dense=0 and model.moe.every=5 leave no sparse layer of model.layers=4",
    "model.moe.backend=cuda": "model.moe.backend=cuda is not a choice; choose from auto,",
    "model.rope={scaling: llama3, factor: 8, high_frequency: 1}": "model.rope.high_frequency=1.0 is not above model.rope.low_frequency=1.0",
    "data.sequence=5000": "data.sequence=5000 is longer than model.context=4096; choose at most 4096, or raise model.context",
    "data.validation=1": "data.validation=1 should be less than 1",
    "data.sources=[text]": "data.sources.0.paths is missing; add it",
    "train.accumulate=5": "train.accumulate=5 does not divide train.batch=16; choose train.accumulate=4 or 8",
    "optimizer.betas=[0.9, 1.0]": "optimizer.betas.1=1.0 should be less than 1",
    "checkpoint.durable_every=700": "checkpoint.durable_every=700 is not a multiple of checkpoint.every=500",
    "parallel={ranks: 8, replicas: 3}": "parallel.replicas=3 does not divide 8 ranks; choose parallel.replicas from 1, 2, 4, 8",
    "parallel={ranks: 8, expert_ranks: 3}": "parallel.expert_ranks=3 does not divide 8 ranks; choose parallel.expert_ranks from 1, 2, 4, 8",
    "parallel.expert_ranks=3": "8 experts do not split evenly over parallel.expert_ranks=3; "
    "choose parallel.expert_ranks from 1, 2, 4, 8, or model.moe.experts=9",
    "parallel={expert_ranks: 2, exchange: token}": "parallel.exchange=token is not a choice",
    "parallel={expert_ranks: 2, exchange: fixed, exchange_room: 0}": "parallel.exchange_room=0 should be greater than 0",
    "engine.name=zero": "engine.name=zero is not a choice; choose from ddp, fsdp2",
    "lr=1": "lr is not a setting; did you mean optimizer.lr?",
}

IDLE = {
    "model.rope.factor": (["model.rope.factor=2"], "with model.rope.scaling=none"),
    "model.rope.beta_fast": (["model.rope={scaling: linear, beta_fast: 3}"], "with model.rope.scaling=linear"),
    "model.rope": (["model={positions: learned, rope: {theta: 100}}"], "with model.positions=learned"),
    "model.mlp_bias": (["model.mlp_bias=true"], "where every layer is sparse and has no shared expert"),
    "model.d_ff": (["model.d_ff=8"], "where every layer is sparse"),
    "model.moe.shared_gate": (["model.moe.shared_gate=true"], "without shared experts"),
    "optimizer.momentum": (["optimizer.momentum=0.9"], "with optimizer.name=adamw"),
    "optimizer.eps": (["optimizer={name: sgd, eps: 1e-6}"], "with optimizer.name=sgd"),
    "optimizer.decay_router": (["optimizer={weight_decay: 0, decay_router: false}"], "with optimizer.weight_decay=0"),
    "schedule.decay": (["schedule.decay=0.5"], "with schedule.name=cosine"),
    "schedule.final": (["schedule={name: constant, final: 0.5}"], "with schedule.name=constant"),
    "train.balance_window": (["train.balance_window=exact"], "with train.accumulate=1"),
    "parallel.replicas": (["parallel.replicas=2"], "with engine.name=ddp"),
    "parallel.exchange": (["parallel.exchange=tokens"], "with parallel.expert_ranks=1"),
    "parallel.exchange_room": (["parallel={expert_ranks: 2, exchange_room: 3}"], "with parallel.exchange=rows"),
    "parallel.overlap": (["parallel.overlap=2"], "with parallel.expert_ranks=1"),
    "evaluate.prompt": (["evaluate={sample_tokens: 0, prompt: x}"], "with evaluate.sample_tokens=0"),
}
DENSE = {
    "engine.recompute": ["engine.recompute=experts"],
    "parallel.expert_ranks": ["parallel.expert_ranks=2"],
    "parallel.exchange": ["parallel={expert_ranks: 2, exchange: tokens}"],
    "parallel.overlap": ["parallel={expert_ranks: 2, overlap: 2}"],
    "train.balance_window": ["train={accumulate: 2, balance_window: exact}"],
    "optimizer.decay_router": ["optimizer.decay_router=false"],
}

VALID = [
    ["model.head_dim=34"],
    ["model.moe=null", "model.d_ff=8"],
    ["model.moe.first_dense=1", "model.d_ff=8"],
    ["model.moe.dense_layers=[1]", "model.d_ff=8"],
    ["model.moe={d_shared: 8, shared_gate: true, every: 2}"],
    ["model.moe.router={k: 1, normalize: none}"],
    ["model={positions: learned, gated: false, activation: gelu_tanh, mlp_bias: true, moe: {d_shared: 8}}"],
    ["model.rope={scaling: yarn, factor: 4, original: 2048}"],
    ["optimizer={name: sgd, momentum: 0}"],
    ["optimizer={name: muon, eps: 1e-6, momentum: 0.9}"],
    ["optimizer={weight_decay: 0}"],
    ["schedule={name: wsd, decay: 0.5}"],
    ["schedule.name=constant"],
    ["train={accumulate: 2, balance_window: exact, clip: null, dtype: bfloat16}"],
    ["parallel={ranks: 8, replicas: 2}", "engine.name=fsdp2"],
    ["data.sources=[stdlib, {name: jsonl, paths: ['a b.jsonl'], weight: 0.5}]"],
    ["evaluate={sample_tokens: 0}", "log.wandb_project=no"],
    ["checkpoint={every: 10, durable_every: 100}"],
]


@pytest.mark.parametrize("override", REFUSALS)
def test_what_does_not_fit_is_refused(override):
    with pytest.raises(ConfigError) as error:
        load([], [override])
    assert str(error.value).startswith(f"command line: {REFUSALS[override]}")


@pytest.mark.parametrize("key", IDLE)
def test_a_setting_without_effect_is_refused(key):
    overrides, reason = IDLE[key]
    with pytest.raises(ConfigError) as error:
        load([], overrides)
    assert str(error.value).startswith(f"command line: {key}=")
    assert f"has no effect {reason}" in str(error.value)


@pytest.mark.parametrize("key", DENSE)
def test_a_dense_model_refuses_settings_of_routing(key):
    load([], DENSE[key])
    with pytest.raises(ConfigError, match=f"{key}=.* has no effect in a dense model"):
        load([], ["model.moe=null", *DENSE[key]])


@pytest.mark.parametrize("router", ["remoe", "{name: sparse_ot, side: experts, leak: allow}", "{name: dense_to_sparse, dense_steps: 2}"])
def test_fixed_buffers_are_refused_where_tokens_differ_in_their_number_of_experts(router):
    with pytest.raises(ConfigError, match=r"parallel\.exchange=fixed needs a router .* choose parallel\.exchange=rows or tokens"):
        load([], [f"model.moe.router={router}", "parallel={expert_ranks: 2, exchange: fixed}"])
    load([], [f"model.moe.router={router}", "parallel={expert_ranks: 2, exchange: tokens}"])


@pytest.mark.parametrize("router", ["hash", "sparse_ot", "{name: dense_to_sparse, selection: best, evaluation: dense}"])
def test_fixed_buffers_take_routers_that_give_every_token_as_many_experts(router):
    load([], [f"model.moe.router={router}", "parallel={expert_ranks: 2, exchange: fixed}"])


def test_muon_is_refused_where_matrices_are_cut():
    with pytest.raises(ConfigError, match=r"choose engine.name=ddp or optimizer.name=adamw"):
        load([], ["optimizer.name=muon", "engine.name=fsdp2"])


@pytest.mark.parametrize("overrides", VALID, ids=str)
def test_the_resolved_recipe_loads_back(overrides, tmp_path):
    recipe = load([], overrides)
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    again = load([tmp_path / "recipe.yaml"], [])
    assert again == recipe
    assert dump(again) == dump(recipe)


def test_a_recipe_in_python_is_one_from_yaml():
    assert Recipe() == load([])
    assert Recipe(train={"steps": 3}) == load([], ["train.steps=3"])


def test_defaults_resolve_every_option():
    recipe = load([])
    assert recipe.model.moe.router["name"] == "top_k"
    assert recipe.model.moe.router["k"] == 2
    assert recipe.data.sources == [{"name": "stdlib", "weight": 1.0, "hold_out": "share"}]


def test_the_schema_of_a_recipe_has_the_tables():
    described = schema(Recipe)["$defs"]
    router = described["Moe"]["properties"]["router"]["oneOf"]
    sources = described["Data"]["properties"]["sources"]["items"]["oneOf"]
    assert router[0]["properties"]["name"] == {"const": "top_k"}
    assert {entry["properties"]["name"]["const"] for entry in sources[:-1]} >= {"stdlib", "text", "jsonl"}
    assert described["Train"]["additionalProperties"] is False


def test_a_layout_names_the_number_of_processes_it_wants():
    Layout(ranks=2).check(2, batch=4, accumulate=2)
    with pytest.raises(ConfigError) as error:
        Layout(ranks=8).check(2, batch=16, accumulate=1)
    assert str(error.value) == "parallel.ranks=8 but 2 processes were started; start with --nproc 8 or set parallel.ranks=2"
    with pytest.raises(ConfigError, match="1 process was started"):
        Layout(ranks=8).check(1, batch=16, accumulate=1)


def test_a_batch_that_ranks_cannot_share_names_what_fits():
    Layout().check(4, batch=16, accumulate=4)
    with pytest.raises(ConfigError) as error:
        Layout().check(3, batch=16, accumulate=2)
    assert "train.batch=16 does not split over 3 ranks in train.accumulate=2 micro-batches each" in str(error.value)
    assert "choose train.batch=12 or 18, or a number of ranks from 1, 2, 4, 8" in str(error.value)
    with pytest.raises(ConfigError, match=r"choose train.batch=32, or a number of ranks from 1, 2$"):
        Layout().check(4, batch=16, accumulate=8)
    with pytest.raises(ConfigError, match=r"choose train.batch=32,"):
        Layout().check(32, batch=16, accumulate=1)


def test_replicas_divide_the_ranks():
    Layout(replicas=2).check(4, batch=4, accumulate=1)
    with pytest.raises(ConfigError, match=r"parallel.replicas=3 does not divide 4 ranks; choose parallel.replicas from 1, 2, 4"):
        Layout(replicas=3).check(4, batch=4, accumulate=1)


def test_expert_ranks_that_do_not_fit_name_those_that_share_out_the_experts_too():
    with pytest.raises(ConfigError, match=r"=2 does not divide 3 ranks; choose parallel.expert_ranks from 1$"):
        Layout(expert_ranks=2).check(3, batch=3, accumulate=1, experts=8)
    with pytest.raises(ConfigError, match=r"=2 does not divide 1 rank; choose parallel.expert_ranks from 1, or start with --nproc 2$"):
        Layout(expert_ranks=2).check(1, batch=4, accumulate=1, experts=8)
    with pytest.raises(ConfigError, match=r"=4 does not divide 2 ranks of a replica; choose .* from 1, 2, or start with --nproc 8$"):
        Layout(expert_ranks=4, replicas=2).check(4, batch=4, accumulate=1, experts=8)


@pytest.mark.parametrize("word", ["between_gbit=1e-12", "within_gbit=0", "latency_us=1e300", "tflops=1e-300"])
def test_hardware_that_whole_numbers_cannot_price_is_refused(word):
    name = word.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"parallel.hardware.{name}=.* should be (greater|less) than or equal to"):
        load([], ["parallel.expert_ranks=2", "parallel.copies.policy=cost", f"parallel.hardware.{word}"])


def test_ranks_on_a_machine_divide_the_ranks():
    layout = Layout(expert_ranks=2, copies={"policy": "hecate"}, machine_ranks=3)
    with pytest.raises(
        ConfigError, match=r"parallel.machine_ranks=3 does not divide 2 ranks; choose parallel.machine_ranks from 1, 2, or leave"
    ):
        layout.check(2, batch=4, accumulate=1)
    layout.check(6, batch=6, accumulate=1)
