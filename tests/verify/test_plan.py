"""What is verified in place of a recipe: a small model of the same router, layouts that fit, and the right thing to compare with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe.config import load
from moe.data.batch import IGNORE
from moe.errors import ConfigError
from moe.model.transformer import Transformer, sparse_layers
from moe.verify.layouts import default, describe, parse, words
from moe.verify.plan import plan
from moe.verify.shrink import POSITIONS, VOCAB, batch, built, shrink
from tests.routers.test_contract import CASES
from tests.verify.on_ranks import rows

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = sorted((CONFIGS / "models").glob("*.yaml"))


def recipe(*overrides, files=(CONFIGS / "debug.yaml",)):
    return load(list(files), overrides)


def small(whole, rule="recipe", **options):
    return built(shrink(whole, dtype="float64", rule=rule, rows=16, **options))


@pytest.mark.parametrize("file", MODELS, ids=lambda path: path.stem)
def test_a_small_model_has_the_router_and_the_structure_of_the_recipe_s(file):
    whole = recipe(files=[file, CONFIGS / "train" / "h100_node.yaml"])
    model, moe = small(whole).model, whole.model.moe
    assert model.moe.router == moe.router
    assert model.moe.experts % 4 == moe.experts % 4
    assert len(set(sparse_layers(model))) == len(set(sparse_layers(whole.model)))
    assert (model.kv_heads == model.heads) == (whole.model.kv_heads in (None, whole.model.heads))
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(model, VOCAB).parameters()) < 200_000


def test_a_small_model_has_a_dense_layer_where_the_recipe_names_one():
    whole = recipe("model.moe.dense_layers=[1, 3]")
    assert sparse_layers(whole.model) == [True, False, True, False]
    assert sparse_layers(small(whole).model) == [True, True, False]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_router_can_be_made_small(name, options):
    options = {key: value for key, value in options.items() if key != "vocab"}
    whole = recipe(f"model.moe.router={ {'name': name, **options} }".replace("'", '"').replace("None", "null"), "model.moe.experts=12")
    made = small(whole).model.moe
    assert made.experts in (8, 12)
    assert made.router["name"] == name
    with torch.device("meta"):
        Transformer(small(whole).model, VOCAB)


def test_experts_that_many_ranks_share_out_stay_divisible():
    assert small(recipe("model.moe.experts=48"), expert_ranks=3).model.moe.experts == 12
    assert small(recipe("model.moe.experts=30")).model.moe.experts == 10  # not by four, as the recipe's are not
    assert small(recipe("model.moe.experts=5")).model.moe.experts == 5


def test_plain_sgd_neither_clips_nor_decays():
    train, optimizer = small(recipe(), "sgd").train, small(recipe(), "sgd").optimizer
    assert (train.clip, optimizer.name, optimizer.weight_decay) == (None, "sgd", 0)
    assert small(recipe()).optimizer == recipe().optimizer
    assert small(recipe("train.clip=null")).train.clip is None


def test_a_batch_has_documents_uneven_padding_and_no_token_twice_in_a_row():
    found = batch(small(recipe("data.document_mask=true")), 0)
    valid = found.document >= 0
    assert len(valid.sum(1).unique()) > 3
    assert valid[-1].sum() == 0
    assert torch.equal(valid, found.targets != IGNORE)
    assert found.document.amax() >= 2
    assert ((found.position == 0) & valid).sum() > 16
    assert all(len(row[inside].unique()) == inside.sum() for row, inside in zip(found.ids, valid, strict=True))
    assert torch.equal(found.index.flatten(), torch.arange(16 * POSITIONS))


def test_a_layout_takes_what_it_leaves_open_from_the_recipe():
    whole = recipe("parallel={expert_ranks: 4, exchange: tokens, copies: {policy: hecate, copies: 3}}", "train.accumulate=4")
    for text, exchange, copies in (
        ("ranks=2,expert_ranks=2", "tokens", 3),
        ("ranks=2,expert_ranks=2,exchange=rows,policy=hecate", "rows", 2),
        ("ranks=2", "rows", 2),
    ):
        parallel = built(plan(whole, [parse(text)], ["float64"])[0][0].case.words).parallel
        assert (parallel.exchange, parallel.copies.copies) == (exchange, copies)
        assert (parallel.copies.policy == "hecate") == ("expert_ranks" in text)
    assert not any("copies" in word for word in words(whole, parse("engine=deepspeed,expert_ranks=2")))


def test_experts_suit_every_layout_that_is_asked_for():
    whole = recipe("model.moe.experts=60")
    checks, _, _ = plan(whole, [parse("expert_ranks=3"), parse("expert_ranks=5"), parse("expert_ranks=4")], ["float64"])
    assert {check.small.model.moe.experts for check in checks} == {60}
    checks, _, _ = plan(whole, [parse("expert_ranks=3")], ["float64"])
    assert {check.small.model.moe.experts for check in checks} == {12}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_recipe_s_own_sgd_is_not_the_plain_one(momentum):
    checks, _, _ = plan(recipe(f"optimizer={{name: sgd, momentum: {momentum}}}"), [parse("ranks=2")], ["float64"])
    own, plain = rows(checks)
    assert all(row.passes for row in own + plain)
    assert any(row.quantity == "gradient" for row in plain)
    assert not any(row.quantity == "gradient" for row in own)
    assert any(row.quantity == "moment" for row in own) == (momentum > 0)


def test_default_layouts_are_those_that_fit():
    chosen, left_out = default(recipe("model.moe.experts=6"), 4)
    kinds = [(layout["engine"], layout["ranks"], layout.get("expert_ranks", 1)) for layout in chosen]
    assert {("ddp", 2, 1), ("ddp", 4, 1), ("fsdp2", 2, 1), ("fsdp2", 4, 1), ("ddp", 2, 2), ("fsdp2", 4, 2)} <= set(kinds)
    assert not any(share == 4 for _, _, share in kinds)
    assert any("6 experts cannot be shared out over 4 ranks" in why for _, why in left_out)
    assert all(layout["ranks"] == 2 for layout in default(recipe(), 2)[0])


def test_what_a_recipe_s_optimizer_forbids_is_left_out_with_the_reason():
    checks, left_out, _ = plan(recipe("optimizer={name: muon, lr: 1e-3}"), [], [])
    assert {check.layout for check in checks if check.optimizer == "muon"} == {
        check.layout for check in checks if check.layout.startswith("engine=ddp")
    }
    assert any("muon needs whole matrices" in why for _, why in left_out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("engin=ddp", "'engin' is not part of a layout; did you mean engine?"),
        ("engine=ddp,ranks=1", "that is the one process"),
        ("ranks=two", "ranks=two is not a number above 0"),
        ("ranks=2,ranks=4", "ranks is given twice"),
        ("engine=ddp,ranks=2,replicas=2", "parallel.replicas=2 has no effect with engine.name=ddp"),
        ("engine=fsdp2,ranks=6,expert_ranks=3", "choose expert_ranks from 1, 2, 4, 8"),
        ("engine=fsdp2,ranks=4,replicas=3", "parallel.replicas=3 does not divide 4 ranks; choose parallel.replicas from 1, 2, 4"),
        ("engine=fsdp,ranks=2", "there is no engine 'fsdp'; did you mean fsdp2"),
        ("ranks=2,exchange=tokens", "has no effect with parallel.expert_ranks=1"),
    ],
)
def test_a_layout_that_cannot_be_verified_is_refused_in_one_sentence(text, message):
    with pytest.raises(ConfigError) as refusal:
        plan(recipe(), [parse(text)], [])
    assert message in str(refusal.value)
    assert str(refusal.value).startswith("--layouts ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "parallel", ["{exchange: fixed, overlap: 2}", "{copies: {policy: hecate, rematerialise: true}}", "{overlap: 3, copies: {policy: cost}}"]
)
def test_what_a_recipe_says_of_experts_is_left_out_where_a_layout_cannot_have_it(parallel):
    whole = recipe(f"parallel={parallel}", "parallel.expert_ranks=2")
    checks, _, _ = plan(whole, default(whole, 8)[0], ["float64"])
    found = {check.layout: built(check.case.words).parallel for check in checks}
    plain, moving = found["engine=ddp,ranks=2,expert_ranks=2"], next(each for layout, each in found.items() if "rematerialise" in layout)
    assert (plain.exchange, plain.overlap, plain.copies.rematerialise) == (
        whole.parallel.exchange,
        whole.parallel.overlap,
        whole.parallel.copies.rematerialise,
    )
    assert (moving.exchange, moving.overlap) == ("rows", 1)
    assert not found["engine=ddp,ranks=2,expert_ranks=2,overlap=2"].copies.rematerialise


def test_a_layout_says_what_it_leaves_open():
    assert parse("expert_ranks=4") == {"engine": "ddp", "ranks": 4, "expert_ranks": 4}
    text = "engine=fsdp2,ranks=4,exchange=fixed,exchange_room=1.5"
    assert describe(parse(text)) == text


@pytest.mark.parametrize(
    ("router", "layout"),
    [
        ("{name: top_k, balance_scope: micro, balance_loss: 0.5}", "ranks=2,accumulate=2,balance_window=running"),
        ("{name: top_k, balance_scope: global, balance_loss: 0.5}", "ranks=2,accumulate=2,balance_window=running"),
        ("{name: top_k, balance_scope: global, balance_loss: 0.5}", "ranks=2,accumulate=2,balance_window=exact"),
    ],
)
def test_losses_of_less_than_the_batch_are_compared_with_a_process_that_takes_it_in_the_same_parts(router, layout):
    checks, _, _ = plan(recipe(f"model.moe.router={router}"), [parse(layout)], ["float64"])
    check = checks[1]
    assert all(row.passes for row in rows([check])[0])
    assert (check.reference.ranks, built(check.reference.words).train.accumulate) == (
        (1, 4) if "micro" in router else (2, 2) if "running" in layout else (1, 1)
    )
