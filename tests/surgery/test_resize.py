"""Growing, merging and keeping experts: what is exact, and that weights, rows, biases and moments follow the same mapping."""

from __future__ import annotations

import pytest
import torch

from moe.checkpoint.weights import load_weights
from moe.errors import ConfigError
from moe.model.moe_layer import MoELayer
from moe.model.settings import Model
from moe.model.transformer import Transformer
from moe.routers import build
from moe.surgery import resize, upcycle
from moe.surgery.check import load_ours
from moe.surgery.clusters import groups_by_likeness
from moe.surgery.experts import plan_resize
from moe.surgery.resize import (
    ROUTER_ROWS,
    Mapping,
    align,
    aligned,
    clone,
    cloned_router,
    keep,
    layer_of,
    merge,
    merged_by_outputs,
    merged_like,
    output_likeness,
    parted_rows,
    remapped,
    weight_likeness,
)
from moe.surgery.source import open_source
from moe.surgery.stream import Plan, write
from tests.surgery.tiny import llama

D, F, E, T = 10, 8, 4, 60


def layer_of_ours(router, experts=E, seed=0):
    torch.manual_seed(seed)
    layer = MoELayer(D, experts=experts, d_expert=F, router={"name": "top_k"} | router).double().eval()
    torch.nn.init.normal_(layer.router.weight)
    for weight in layer.experts.parameters():
        torch.nn.init.normal_(weight)
    return layer


@torch.no_grad()
def resized(layer, mapping, router, factor=1.0, rows=None, bias=1.0):
    new = MoELayer(D, experts=mapping.new, d_expert=F, router={"name": "top_k"} | router).double().eval()
    state = {name: remapped(f"layers.0.moe.{name}", value, mapping, "top_k") for name, value in layer.state_dict().items()}
    state["experts.down"] *= factor
    if "router.bias" in state:
        state["router.bias"] *= bias
    if rows is not None:
        state["router.weight"] = rows(state["router.weight"])
    new.load_state_dict(state)
    return new


@torch.no_grad()
def off(a, b):
    x = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = a(x)[0]
    return ((b(x)[0] - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize(
    "router",
    [
        {"k": 2},
        {"k": 1, "normalize": "none"},
        {"k": 2, "score": "sigmoid", "normalize": "none"},
        {"k": 3, "score": "sigmoid", "bias_rate": 0.0, "scale": 2.5},
        {"k": 2, "bias_rate": 0.0},
    ],
    ids=["mixtral", "switch", "sigmoid", "deepseek", "ernie"],
)
def test_experts_all_cloned_m_times_are_the_same_layer_with_m_times_k_and_merging_the_clones_undoes_it(router):
    layer = layer_of_ours(router)
    if layer.router.bias is not None:
        layer.router.bias += torch.tensor([0.3, -0.2, 0.1, 0.0])
    mapping = clone(E, 3 * E)
    assert mapping.copies == 3
    options, factor, bias = cloned_router({"name": "top_k", "normalize": "selected", "score": "softmax"} | router, mapping.copies)
    big = resized(layer, mapping, router | {"k": options["k"]}, factor, bias=bias)
    assert options["k"] == 3 * router["k"]
    assert off(layer, big) < 1e-12
    back = resized(
        big, merged_like(weight_likeness(big.experts.up.detach(), big.experts.down.detach()), E), router, 1 / factor, bias=1 / bias
    )
    assert off(layer, back) < 1e-12


def test_clones_with_the_old_k_are_rivals_whether_or_not_noise_parts_them():
    layer = layer_of_ours({"k": 2})
    mapping = clone(E, 2 * E)
    assert off(layer, resized(layer, mapping, {"k": 2})) > 0.1
    for std, at_most in ((1e-3, 0.05), (0.0, 1e-12)):
        rows = lambda w, std=std: parted_rows(w, mapping, std=std, seed=0, layer=0)  # noqa: E731
        assert off(layer, resized(layer, mapping, {"k": 4}, rows=rows)) < at_most
    parted = parted_rows(torch.zeros(2 * E, D), mapping, std=1.0, seed=0, layer=0)
    assert not parted[::2].any()
    assert parted[1::2].all()


def test_uneven_clones_go_to_the_busiest_and_promise_nothing():
    mapping = clone(E, 6, torch.tensor([5, 1, 9, 2]))
    assert mapping.weight.argmax(1).tolist() == [0, 0, 1, 2, 2, 3]
    assert mapping.copies is None
    with pytest.raises(ConfigError, match="all cloned equally often"):
        cloned_router({"name": "top_k", "k": 2, "normalize": "selected", "score": "softmax"}, mapping.copies)


def test_keeping_all_in_another_order_changes_nothing_but_the_order():
    layer = layer_of_ours({"k": 2})
    assert off(layer, resized(layer, keep([2, 0, 3, 1], E), {"k": 2})) < 1e-12
    assert keep([2, 0, 3, 1], E).copies == 1
    assert keep([2, 0], E).copies is None


def test_a_merged_expert_is_the_mean_by_load_in_weights_rows_biases_and_moments_alike():
    mapping = merge([[0, 2], [1], [3]], torch.tensor([3.0, 7.0, 1.0, 5.0]))
    torch.manual_seed(0)
    state = {
        "model.layers.5.moe.experts.up": torch.randn(E, 2, F, D),
        "model.layers.5.moe.experts.down": torch.randn(E, D, F),
        "model.layers.5.moe.router.weight": torch.randn(E, D),
        "model.layers.5.moe.router.bias": torch.randn(E),
        "optimizer.exp_avg.layers.5.moe.experts.up": torch.randn(E, 2, F, D),
        "optimizer.exp_avg_sq.layers.5.moe.router.weight": torch.rand(E, D),
    }
    for name, value in state.items():
        assert layer_of(name) == 5
        new = remapped(name, value, mapping, "top_k")
        torch.testing.assert_close(new, torch.stack([0.75 * value[0] + 0.25 * value[2], value[1], value[3]]))
        assert torch.equal(new[1], value[1])


@pytest.mark.parametrize(
    "name", ["model.layers.1.attention.q.weight", "optimizer.step", "model.embed.weight", "model.layers.1.moe.shared.up.weight"]
)
def test_what_does_not_belong_to_experts_is_left_alone(name):
    value = torch.randn(3)
    assert layer_of(name) is None
    assert remapped(name, value, clone(E, 8), "top_k") is value


def test_a_routers_state_that_is_not_of_experts_is_kept_and_one_that_is_no_rows_is_refused():
    omega = torch.randn(D)
    assert remapped("layers.0.moe.router.omega", omega, clone(E, 8), "sparse_mixer") is omega
    with pytest.raises(ConfigError, match="name=comet is not one row an expert"):
        remapped("layers.0.moe.router.leaf", omega, clone(E, 8), "comet")


OPTIONS = {"top_k": {"bias_rate": 0.1}, "dense_to_sparse": {"activation": "tanh"}, "expert_choice": {"leak": "allow"}}


@pytest.mark.parametrize("router", ROUTER_ROWS)
def test_the_table_of_rows_names_every_tensor_of_a_router_that_grows_with_its_experts(router):
    options = {"name": router} | OPTIONS.get(router, {})
    try:
        few, many = (build(options, D, experts).state_dict() for experts in (6, 12))
    except ConfigError:  # other routers that look across tokens say so, too
        few, many = (build(options | {"leak": "allow"}, D, experts).state_dict() for experts in (6, 12))
    growing = {name for name in few if few[name].shape != many[name].shape}
    assert growing == set(ROUTER_ROWS[router])
    assert all(few[name].shape[0] == 6 for name in growing)


def test_experts_are_read_one_at_a_time_and_keep_their_dtype():
    stack = torch.randn(E, 3, F).bfloat16()
    read = []

    def one(e):
        read.append(e)
        return stack[e]

    assert torch.equal(clone(E, 6).expert(1, one), stack[0])
    merged = merge([[1, 3], [0], [2]]).expert(0, one)
    assert read == [0, 1, 3]
    assert torch.equal(merged, ((stack[1].float() + stack[3].float()) / 2).bfloat16())


def test_likeness_of_weights_is_the_cosine_however_it_is_cut(monkeypatch):
    torch.manual_seed(0)
    up, down = torch.randn(E, 2, F, D), torch.randn(E, D, F)
    flat = torch.cat([up.flatten(1), down.flatten(1)], 1).double()
    wanted = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
    torch.testing.assert_close(weight_likeness(up, down), wanted)
    monkeypatch.setattr(resize, "_CHUNK", 3 * E)
    torch.testing.assert_close(weight_likeness(up, down), wanted)


def test_likeness_of_outputs_sees_through_the_order_of_channels_and_alignment_undoes_it():
    torch.manual_seed(0)
    up, down = torch.randn(3, 2, F, D).double(), torch.randn(3, D, F).double()
    order = torch.randperm(F)
    up[2], down[2] = up[0][:, order], down[0][:, order]
    x = torch.randn(T, D, dtype=torch.float64)
    alike = output_likeness(zip(up, down, strict=True), x, "silu")
    assert alike[0, 2].item() == pytest.approx(1, abs=1e-12)
    assert abs(alike[0, 1]) < 0.5
    assert weight_likeness(up, down)[0, 2] < 0.9
    assert torch.equal(order[align(up[0], down[0], up[2], down[2])], torch.arange(F))
    groups = groups_by_likeness(alike, 2)
    assert groups == [[0, 2], [1]]
    mapping = merge(groups, order=aligned(groups, up, down))
    torch.testing.assert_close(mapping.stack(up, 1)[0], up[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mapping.stack(down, 1)[0], down[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(merge(groups).stack(down, 1)[0], down[0])


@torch.no_grad()
def test_experts_that_do_the_same_in_another_order_of_channels_merge_by_outputs_without_a_loss():
    settings = {"layers": 2, "d_model": 16, "heads": 2, "init_std": 0.3}
    before = Transformer(Model(**settings, moe={"experts": 4, "d_expert": F, "first_dense": 1}), 40).double().eval()
    order = torch.randperm(F, generator=torch.Generator().manual_seed(0))
    layer = before.layers[1].moe
    for twin, e in ((2, 0), (3, 1)):
        layer.experts.up[twin], layer.experts.down[twin] = layer.experts.up[e][:, order], layer.experts.down[e][:, order]
        layer.router.weight[twin] = layer.router.weight[e]
    ids = torch.arange(60).view(3, 20) % 40
    mappings = merged_by_outputs(before, ids, 2)
    assert mappings.keys() == {1}
    for name, stack in (("up", layer.experts.up), ("down", layer.experts.down)):
        merged = remapped(f"layers.1.moe.experts.{name}", stack, mappings[1], "top_k")
        torch.testing.assert_close(merged, stack[:2], rtol=1e-12, atol=1e-12)
    with pytest.raises(ConfigError, match="from 1 to 4"):
        merged_by_outputs(before, ids, 5)


def test_groups_join_by_average_likeness():
    likeness = torch.eye(5).double()
    for a, b, value in ((0, 1, 0.9), (3, 4, 0.8), (1, 2, 0.85), (0, 2, 0.1), (2, 3, 0.5), (2, 4, 0.5)):
        likeness[a, b] = likeness[b, a] = value
    # after {0, 1}: 2 is like it by (0.85 + 0.1) / 2 = 0.475, and like {3, 4} by 0.5
    assert groups_by_likeness(likeness, 4) == [[0, 1], [2], [3], [4]]
    assert groups_by_likeness(likeness, 2) == [[0, 1], [2, 3, 4]]
    likeness = torch.eye(5).double()
    for a, b, value in ((0, 1, 0.95), (0, 2, 0.8), (1, 2, 0.8), (0, 3, 0.2), (1, 3, 0.2), (2, 3, 0.8), (3, 4, 0.5)):
        likeness[a, b] = likeness[b, a] = value
    # 3 is like {0, 1, 2} by (0.2 + 0.2 + 0.8) / 3 = 0.4
    assert groups_by_likeness(likeness, 2) == [[0, 1, 2], [3, 4]]
    assert groups_by_likeness(torch.ones(4, 4), 2) == [[0, 1, 2], [3]]


def test_clones_share_the_gradient_of_what_they_were_out_evenly():
    layer = layer_of_ours({"k": 2})
    x = torch.randn(T, D, dtype=torch.float64)
    mapping = clone(E, 2 * E)
    big = resized(layer, mapping, {"k": 4})

    def gradients(model):
        model.zero_grad()
        model(x)[0].square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    small, large = gradients(layer), gradients(big)
    for name in ("experts.up", "experts.down"):
        torch.testing.assert_close(2 * large[name], mapping.stack(small[name]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: keep([1, 1], 4), "expert 1 is named 2 times among those to keep; name it once"),
        (lambda: keep([4], 4), "from 0 to 3"),
        (lambda: clone(8, 4), "choose at least 8, or merge"),
        (lambda: merged_like(torch.eye(4), 5), "from 1 to 4"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(make, word):
    with pytest.raises(ConfigError, match=word):
        make()


def test_a_mapping_counts():
    assert (clone(4, 8).old, clone(4, 8).new) == (4, 8)
    assert Mapping(torch.eye(3).double() * 0.5).copies is None


def test_a_text_says_which_experts_of_a_model_on_disk_merge(tmp_path):
    write(
        Plan(upcycle.plan, {"source": str(llama(tmp_path / "dense")), "experts": 4, "top_k": 2, "variant": "drop", "to": "moe"}),
        tmp_path / "moe",
    )
    text = tmp_path / "text.txt"
    text.write_text("a text of the task, " * 20)
    source = str(tmp_path / "moe")
    write(Plan(plan_resize, {"source": source, "experts": 2, "data": str(text)}), tmp_path / "merged")
    ids = torch.tensor([list(text.read_bytes()[: 3 * 128])]).view(3, 128)
    mappings = merged_by_outputs(load_ours(open_source(source)), ids, 2)
    before, after = (load_weights(tmp_path / name / "weights") for name in ("moe", "merged"))
    for name, tensor in before.items():
        layer = layer_of(name)
        wanted = tensor if layer is None else remapped(name, tensor, mappings[layer], "top_k")
        torch.testing.assert_close(after[name], wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(ConfigError, match="--data is for merging, and 4 experts become 8"):
        plan_resize(source, experts=8, data=str(text))
