"""Task-specific pruning: the schedule, routers among survivors, and the dense layer at its end."""

from __future__ import annotations

import pytest
import torch

from moe.errors import ConfigError
from moe.model.layers import FeedForward as Dense
from moe.model.moe_layer import MoELayer
from moe.model.settings import Model
from moe.model.transformer import Transformer
from moe.routers import build
from moe.routers.base import Routing, Tokens
from moe.surgery.prune import Among, Pruning, Watch, choose, dense_layer, dense_settings, mass, survivors
from moe.surgery.resize import keep, remapped
from moe.surgery.variants import FeedForward

D, E, T = 12, 6, 80
TOP_2 = {"name": "top_k", "k": 2}


def pruning(experts=E, **options):
    return Pruning({0: experts}, **({"window": 10, "beta": 0.5, "until": 40} | options))


def test_the_schedule_of_the_paper_step_by_step():
    """Window of two steps, beta 1/2: shares below half of the mean go, then the next window counts anew, and at step six one stays."""
    p = pruning(4, window=2, beta=0.5, until=6)
    p.add({0: torch.tensor([1.0, 2.0, 3.0, 0.0])})
    assert not p.end_step(1)
    p.add({0: torch.tensor([0.0, 2.0, 3.0, 1.0])})
    assert p.end_step(2)  # shares 1/12, 4/12, 6/12, 1/12 against 1/8
    assert p.active == {0: [1, 2]}
    p.add({0: torch.tensor([0.0, 1.0, 2.9, 0.0])})
    p.end_step(3)
    assert not p.end_step(4)  # 1/3.9 against 1/4
    p.add({0: torch.tensor([0.0, 1.0, 0.5, 0.0])})
    p.end_step(5)
    assert p.end_step(6)
    assert p.active == {0: [1]}
    p.add({0: torch.tensor([9.0, 0.0, 9.0, 9.0])})
    assert not p.end_step(8)
    assert p.active == {0: [1]}


@pytest.mark.parametrize("seed", range(5))
def test_experts_only_leave_and_never_all(seed):
    generator = torch.Generator().manual_seed(seed)
    p, before = pruning(16, window=1, beta=0.9, until=30), set(range(16))
    for step in range(1, 40):
        p.add({0: torch.rand(16, generator=generator) ** 3})
        p.end_step(step)
        now = set(p.active[0])
        assert now <= before
        assert len(now) >= 1
        before = now
    assert len(before) == 1


def test_a_beta_of_zero_drops_none_and_one_above_the_mean_drops_at_least_one_of_uneven_experts():
    alpha = torch.rand(E, generator=torch.Generator().manual_seed(0)).double()
    everyone = list(range(E))
    assert survivors(alpha, everyone, 0.0) == everyone
    assert len(survivors(alpha, everyone, 1.0001)) < E
    assert survivors(alpha, everyone, 1e9) == [int(alpha.argmax())]
    assert survivors(alpha, everyone, 1e9, keep=3) == sorted(alpha.topk(3).indices.tolist())
    assert survivors(torch.zeros(E), everyone, 2.0) == everyone
    assert survivors(torch.ones(E), everyone, float("inf")) == [0]
    assert survivors(torch.tensor([5.0, 1.0, 1.0, 1.0, 1.0, 1.0]), [1, 2, 3], 1.0) == [1, 2, 3]


def test_a_forced_end_leaves_as_many_as_asked_even_without_a_score():
    p = pruning(until=5, keep=2)
    assert p.end_step(5)
    assert p.active == {0: [0, 1]}


def routed(router, x):
    with torch.no_grad():
        return router(x, Tokens.of(x))


@pytest.mark.parametrize(
    "options",
    [TOP_2, TOP_2 | {"normalize": "none"}, TOP_2 | {"score": "sigmoid", "bias_rate": 0.1}, {"name": "noisy_top_k"}, {"name": "sinkhorn"}],
    ids=["softmax", "switch", "bias", "noisy", "sinkhorn"],
)
def test_a_router_among_some_is_the_same_router_without_the_others(options):
    torch.manual_seed(0)
    x, whole, few = torch.randn(T, D).double(), build(options, D, E).double().eval(), build(options, D, 3).double().eval()
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter)
    if "bias_rate" in options:
        whole.bias += torch.randn(E)
    mapping = keep([4, 1, 2], E)
    few.load_state_dict({n: remapped(f"moe.router.{n}", v, mapping, options["name"]) for n, v in whole.state_dict().items()})
    among = Among(whole, options).eval()
    everyone, alone = routed(among, x), routed(whole, x)
    assert torch.equal(everyone.expert, alone.expert)
    assert torch.equal(everyone.weight, alone.weight)
    among.narrow([4, 1, 2])
    ours, theirs = routed(among, x), routed(few, x)
    assert torch.equal(ours.expert, torch.tensor([4, 1, 2])[theirs.expert])
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-12, atol=0)
    load = ours.load(E)
    assert not load[[0, 3, 5]].any()
    for name, value in theirs.stats.items():
        wanted = value if value.shape != (3,) else torch.zeros(E, dtype=value.dtype).index_copy(0, torch.tensor([4, 1, 2]), value)
        torch.testing.assert_close(ours.stats[name], wanted)


@pytest.mark.parametrize("options", [{"name": "noisy_top_k"}, TOP_2 | {"jitter": 0.1}], ids=["noisy", "jitter"])
def test_in_training_it_draws_the_same_noise_and_knows_the_ranks_and_the_window(options):
    torch.manual_seed(0)
    x, whole = torch.randn(T, D), build(options, D, E)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter)
    among = Among(whole, options)
    for router in (whole, among):
        router.stream, router.total = 77, lambda counts: 3 * counts
    assert torch.equal(routed(among, x).weight, routed(whole, x).weight)
    torch.testing.assert_close(routed(among, x).loss, routed(whole, x).loss)
    # what other tokens did, not a multiple of what these do: noisy_top_k's losses do not change when all sums are scaled
    stats = routed(whole, 3 * torch.randn(T, D)).stats | {"tokens": torch.tensor(5 * T)}
    without = routed(whole, x).loss
    for router in (whole, among):
        router.window, router.window_stats, router.window_complete = torch.arange(E) * 7, stats, True
    torch.testing.assert_close(routed(among, x).loss, routed(whole, x).loss)
    assert abs(routed(whole, x).loss - without) > 0.01 * abs(without)
    among.narrow([1, 4])
    assert routed(among, x).load(E)[[0, 2, 3, 5]].sum() == 0


def test_experts_that_are_gone_get_no_gradient_and_the_bias_learns_from_those_that_are_left():
    torch.manual_seed(0)
    options = TOP_2 | {"bias_rate": 0.1}
    layer = MoELayer(D, experts=E, d_expert=8, router=options)
    layer.router = Among(layer.router, options)
    layer.router.narrow([0, 3])
    x = torch.randn(T, D)
    out, report = layer(x)
    (out.square().sum() + report.loss).backward()
    gone = [1, 2, 4, 5]
    inner = layer.router.router
    for gradient in (layer.experts.up.grad, layer.experts.down.grad, inner.weight.grad):
        assert not gradient[gone].any()
        assert gradient[[0, 3]].flatten(1).any(1).all()
    assert report.load.tolist() == [T, 0, 0, T, 0, 0]
    layer.router.update(torch.tensor([10, 0, 0, 30, 0, 0]), T)
    torch.testing.assert_close(inner.bias, torch.tensor([0.1, 0, 0, -0.1, 0, 0]))


def small(**moe):
    torch.manual_seed(0)
    settings = Model(layers=2, d_model=16, heads=2, moe={"experts": E, "d_expert": 20, "router": TOP_2} | moe)
    return Transformer(settings, 50, seed=1).double().eval()


def batches(count=8, seed=0):
    return list(torch.randint(50, (count, 4, 12), generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("score", ["gate", "hits", "probability"])
def test_scores_are_what_their_names_say(score):
    model = small()
    schedule = Pruning({0: E, 1: E}, window=100, beta=0.0, until=100)
    watch, (ids,) = Watch(model, schedule, score=score), batches(1)
    from moe.surgery.routers import hidden_states

    hidden = hidden_states(model, ids)[1]
    watch.close()
    probability = (hidden @ model.layers[1].moe.router.weight.T).softmax(-1)
    best, chosen = probability.topk(2)
    amount = {"gate": best / best.sum(-1, keepdim=True), "hits": torch.ones_like(best)}.get(score)
    wanted = probability.sum(0) if amount is None else torch.zeros(E).double().index_add(0, chosen.flatten(), amount.flatten())
    torch.testing.assert_close(schedule.alpha[1], wanted)


def test_padding_and_dropped_assignments_score_nothing():
    routing = Routing.per_token(torch.tensor([[0, 2], [3, 3]]), torch.tensor([[0.25, 0.75], [0.0, 0.0]]))
    assert mass(routing, 3, "gate").tolist() == [0.25, 0, 0.75]
    assert mass(routing, 3, "hits").tolist() == [1, 0, 1]


def test_what_is_kept_does_not_depend_on_how_the_batch_was_shared_out():
    whole = Pruning({0: E, 1: E}, window=1, beta=0.8, until=4)
    kept = choose(small(), batches(4, seed=6), whole)
    assert kept != {0: [0], 1: [0]}
    ranks = [Pruning({0: E, 1: E}, window=100, beta=0.0, until=100) for _ in range(2)]
    together = Pruning({0: E, 1: E}, window=1, beta=0.8, until=4)
    models = [small(), small()]
    watches = [Watch(model, rank) for model, rank in zip(models, ranks, strict=True)]
    for step, ids in enumerate(batches(4, seed=6), 1):
        for model, part in zip(models, (ids[:1], ids[1:]), strict=True):
            model.predict(part)
        together.add({layer: sum(rank.alpha[layer] for rank in ranks) for layer in (0, 1)})
        if together.end_step(step):
            for watch in watches:
                for layer, router in watch.routers.items():
                    router.narrow(together.active[layer])
        for rank in ranks:
            for alpha in rank.alpha.values():
                alpha.zero_()
    assert together.active == kept
    assert all(len(active) == 1 for active in kept.values())


def test_the_expert_made_for_the_data_survives_fine_tuning():
    """The data is one expert's own function; the router finds that out, and the schedule with it."""
    torch.manual_seed(0)
    options = TOP_2 | {"balance_loss": 0.0}
    layer = MoELayer(D, experts=E, d_expert=16, router=options)
    torch.nn.init.normal_(layer.experts.up, std=0.5)
    torch.nn.init.normal_(layer.experts.down, std=0.5)
    target = dense_layer(layer.experts.up[4].detach().clone(), layer.experts.down[4].detach().clone())
    among = layer.router = Among(layer.router, options)
    p = pruning(window=30, beta=0.5, until=120)
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.05)
    for step in range(1, 121):
        x = torch.randn(64, D)
        x[:, 0] = 1  # what all tokens have in common, so that a row can be preferred by all
        wanted = (torch.nn.functional.silu(x @ target.gate.T) * (x @ target.up.T)) @ target.down.T
        routing = layer.route(x, Tokens.of(x))
        p.add({0: mass(routing, E, "gate")})
        loss = (layer.compute(x, routing) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if p.end_step(step):
            among.narrow(p.active[0])
    assert p.active == {0: [4]}


@pytest.mark.parametrize("moe", [{}, {"router": TOP_2 | {"scale": 2.5}}, {"d_shared": 10}], ids=["plain", "scaled", "shared"])
@torch.no_grad()
def test_one_expert_a_layer_is_a_dense_model_with_equal_logits(moe):
    model = small(**moe)
    kept = choose(model, batches(4), Pruning({0: E, 1: E}, window=2, beta=0.7, until=4))
    watch = Watch(model, Pruning({0: E, 1: E}, window=9, beta=0.0, until=99))
    for layer, router in watch.routers.items():
        router.narrow(kept[layer])
    (ids,) = batches(1, seed=9)
    wanted = model.predict(ids, last=12)
    watch.close()
    assert kept != {0: [0], 1: [0]}
    assert (model.predict(ids, last=12) - wanted).abs().max() > 1e-6

    dense = Transformer(dense_settings(model.settings), 50).double().eval()
    state, old = {}, model.state_dict()
    for name in dense.state_dict():
        if ".mlp." not in name:
            state[name] = old[name]
    for layer, (expert,) in kept.items():
        at = f"layers.{layer}.moe."
        shared = FeedForward(*(old[f"{at}shared.{m}.weight"] for m in ("gate", "up", "down"))) if moe.get("d_shared") else None
        scale = model.settings.moe.router["scale"]
        ffn = dense_layer(old[f"{at}experts.up"][expert], old[f"{at}experts.down"][expert], scale=scale, shared=shared)
        state |= {f"layers.{layer}.mlp.{name}.weight": value for name, value in ffn._asdict().items()}
    dense.load_state_dict(state)
    assert (dense.predict(ids, last=12) - wanted).abs().max() < 1e-12


@torch.no_grad()
def test_an_ungated_expert_becomes_an_ungated_layer():
    torch.manual_seed(0)
    layer = MoELayer(D, experts=1, d_expert=8, router={"name": "top_k", "k": 1}, gated=False, activation="relu2").double()
    ffn, dense = dense_layer(layer.experts.up[0], layer.experts.down[0]), Dense(D, 8, gated=False, activation="relu2").double()
    dense.load_state_dict({"up.weight": ffn.up, "down.weight": ffn.down})
    x = torch.randn(T, D).double()
    torch.testing.assert_close(layer(x)[0], dense(x), rtol=1e-12, atol=1e-12)
    assert ffn.gate is None


@pytest.mark.parametrize(
    ("moe", "word"),
    [
        ({"router": {"name": "sigma"}}, "sigmoid of its logit"),
        ({"d_shared": 8, "shared_gate": True}, "shared_gate"),
        ({"router": {"name": "sparse_mixer", "output_scale": "learned"}}, "output_scale"),
        ({"first_dense": 1}, "1024 wide and the others become 20"),
    ],
)
def test_a_mixture_that_is_no_dense_model_is_refused_in_a_sentence(moe, word):
    with pytest.raises(ConfigError, match=word):
        dense_settings(Model(layers=2, d_model=16, heads=2, moe={"experts": 2, "d_expert": 20} | moe))
    with pytest.raises(ConfigError, match="dense already"):
        dense_settings(Model(layers=2, d_model=16, heads=2, moe=None))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: pruning(beta=-1.0), "beta=-1.0"),
        (lambda: pruning(window=0), "window=0"),
        (lambda: pruning(keep=7), "keep=7 of 6"),
        (lambda: Among(build({"name": "comet"}, D, 4), {"name": "comet"}), "comet has no rows to leave out"),
        (lambda: choose(small(), batches(2), Pruning({0: E, 1: E}, window=1, beta=0.5, until=3)), "has 2 batches"),
    ],
)
def test_what_cannot_be_is_refused(make, word):
    with pytest.raises(ConfigError, match=word):
        make()
