"""The hash router's tables: balanced as they say, one for each vocabulary, kept in checkpoints."""

from __future__ import annotations

import json

import pytest
import torch

from moe.errors import ConfigError
from moe.model.moe_layer import MoELayer
from moe.model.settings import Model
from moe.model.transformer import Transformer
from moe.routers import Tokens, build
from moe.routers.hash import balanced_table, clustered_table, random_table

D = 8
ZIPF = [1000 // (i + 1) for i in range(40)] + [0] * 10


def loads(table: torch.Tensor, counts: list[int], experts: int) -> torch.Tensor:
    tokens = torch.tensor([max(count, 1) for count in counts])[:, None].expand_as(table)
    return torch.zeros(experts, dtype=torch.int64).scatter_add_(0, table.flatten(), tokens.flatten())


def written(folder, content) -> str:
    path = folder / "table.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def tokens_of(ids: list[int], step: int = 0) -> Tokens:
    n = torch.arange(len(ids))
    return Tokens(torch.tensor(ids), torch.zeros_like(n), n, torch.ones(len(ids), dtype=torch.bool), step)


@pytest.mark.parametrize(
    ("vocab", "experts", "k"), [(1000, 8, 1), (1003, 8, 1), (1003, 6, 4), (1003, 7, 7), (5, 8, 3), (257, 12, 8), (9, 1, 1)]
)
def test_a_random_table_gives_every_expert_as_many_ids(vocab, experts, k):
    table = random_table(vocab, experts, k, stream=3)
    assert table.shape == (vocab, k)
    assert all(len(set(row)) == k for row in table.tolist())
    count = torch.bincount(table.flatten(), minlength=experts)
    assert count.sum() == vocab * k
    assert count.max() - count.min() <= 1


def test_random_tables_are_drawn_by_their_stream_alone():
    one, again, other = (random_table(2000, 8, 2, stream) for stream in (1, 1, 2))
    assert torch.equal(one, again)
    assert 0.05 < (one == other).double().mean() < 0.2  # an eighth by chance
    pairs = torch.zeros(8, 8, dtype=torch.int64).index_put((one[:, 0], one[:, 1]), torch.ones(2000, dtype=torch.int64), accumulate=True)
    assert (pairs + 100 * torch.eye(8, dtype=torch.int64)).min() > 0, "two experts never work together"
    assert len({frozenset(row) for row in random_table(8, 8, 4, 0).tolist()}) > 2, "the same four experts again and again"


@pytest.mark.parametrize("k", [1, 2])
def test_a_balanced_table_gives_the_next_most_frequent_id_to_the_emptiest_experts(k):
    table = balanced_table(ZIPF, 6, k)
    load = [0] * 6
    for token in sorted(range(50), key=lambda token: (-ZIPF[token], token)):
        emptiest = sorted(range(6), key=lambda e: (load[e], e))[:k]
        assert table[token].tolist() == emptiest
        for e in emptiest:
            load[e] += max(ZIPF[token], 1)
    assert balanced_table([5, 3, 3, 1, 1, 1], 2, 1).flatten().tolist() == [0, 1, 1, 0, 0, 1]


def test_a_clustered_table_cuts_the_ids_by_frequency_into_equal_shares():
    counts = [2, 30, 30, 1, 30, 30, 3, 34] + [20] * 4
    table = clustered_table(counts, 4, 1).flatten()
    order = sorted(range(len(counts)), key=lambda token: (-counts[token], token))
    assert (table[order].diff() >= 0).all(), "runs of like frequency"
    load = loads(table[:, None], counts, 4)
    assert (load - sum(counts) / 4).abs().max() <= max(counts)
    two = clustered_table(counts, 4, 2)
    assert torch.equal(two[:, 0], table)
    assert torch.equal(two[:, 1], (table + 1) % 4)
    assert clustered_table([6, 3, 2, 1], 2, 1).flatten().tolist() == [0, 1, 1, 1]


def test_frequency_balances_tokens_where_ids_alone_do_not():
    ideal = sum(max(count, 1) for count in ZIPF) / 4
    worst = {name: (loads(table, ZIPF, 4).max() / ideal).item() for name, table in tables(4).items()}
    assert worst["balanced"] < 1.02
    assert worst["balanced"] < worst["random"]
    assert worst["clustered"] < worst["random"]


def tables(experts: int) -> dict[str, torch.Tensor]:
    return {
        "random": random_table(len(ZIPF), experts, 1, 0),
        "balanced": balanced_table(ZIPF, experts, 1),
        "clustered": clustered_table(ZIPF, experts, 1),
    }


def test_the_table_decides_and_weights_are_equal(tmp_path):
    table = [[2, 0], [1, 2], [0, 3], [3, 1]]
    router = build({"name": "hash", "k": 2, "vocab": 4, "table": written(tmp_path, table)}, D, 4)
    assert list(router.parameters()) == []
    tokens = tokens_of([3, 0, 0, 2, 1])
    tokens = tokens._replace(valid=torch.tensor([True, True, False, True, True]))
    routing = router(torch.randn(5, D), tokens)
    assert routing.expert.view(5, 2).tolist() == [[3, 1], [2, 0], [4, 4], [0, 3], [1, 2]]
    assert routing.weight.view(5, 2).tolist() == [[0.5, 0.5], [0.5, 0.5], [0, 0], [0.5, 0.5], [0.5, 0.5]]
    assert routing.loss == 0
    flat = build({"name": "hash", "vocab": 4, "table": written(tmp_path, [2, 1, 0, 3])}, D, 4)
    assert flat(torch.randn(5, D), tokens).expert.tolist() == [3, 2, 4, 0, 1]


def test_relabelling_table_and_experts_changes_nothing():
    layer, relabelled = (MoELayer(D, experts=4, d_expert=6, router={"name": "hash", "k": 2, "vocab": 30}).double() for _ in range(2))
    relabelled.load_state_dict(layer.state_dict())
    order = torch.tensor([2, 3, 1, 0])
    with torch.no_grad():
        relabelled.router.table.copy_(order.argsort()[layer.router.table])
        for weight in relabelled.experts.parameters():
            weight.copy_(weight[order])
    x, tokens = torch.randn(20, D, dtype=torch.float64), tokens_of(list(range(20)))
    torch.testing.assert_close(relabelled(x, tokens)[0], layer(x, tokens)[0], rtol=1e-12, atol=1e-14)


def model(vocab: int = 50, seed: int = 0, **options) -> Transformer:
    settings = Model(
        layers=2, d_model=8, heads=2, d_ff=16, context=16, moe={"experts": 4, "d_expert": 8, "router": {"name": "hash", **options}}
    )
    return Transformer(settings, vocab, seed=seed)


def test_a_model_tells_its_vocabulary_and_every_layer_draws_its_own_table():
    first, second = (router.table for router in model().routers().values())
    assert first.shape == (50, 1)
    assert not torch.equal(first, second)
    again, other = (next(iter(model(seed=seed).routers().values())).table for seed in (0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with torch.device("meta"):
        shape = model(vocab=60)
    assert all(router.table.is_meta for router in shape.routers().values())
    shape.to_empty(device="cpu")
    for router in shape.routers().values():
        router.reset_buffers()
    assert torch.equal(shape.routers()[0].table, model(vocab=60).routers()[0].table)


def test_the_table_is_in_the_checkpoint_and_needs_no_file_there(tmp_path):
    path = written(tmp_path, [3] * 50)
    saved = model(table=path).state_dict()
    (tmp_path / "table.json").unlink()
    with torch.device("meta"):
        loaded = model(table=path)
    loaded.to_empty(device="cpu").load_state_dict(saved)
    assert loaded.routers()[1].table.flatten().tolist() == [3] * 50
    assert loaded.double().routers()[1].table.dtype == torch.int64


@pytest.mark.parametrize("kind", ["balanced", "clustered"])
def test_counts_come_from_a_file(tmp_path, kind):
    router = build({"name": "hash", "table": kind, "frequency": written(tmp_path, ZIPF), "vocab": 50}, D, 4)
    assert torch.equal(router.table, tables(4)[kind])


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ([0] * 4, {}, "has 4 token ids and the vocabulary 5; make the file with the model's tokenizer"),
        ([0, 1, 2, 4, 0], {}, "has 4 for token id 3; write an expert from 0 to 3"),
        ([0, 1, -2, 3, 0], {}, "has -2 for token id 2"),
        ([0, 1, 1.5, 3, 0], {}, r"has 1\.5 for token id 2"),
        ([0, 1, True, 3, 0], {}, "has true for token id 2"),
        ([[0, 1]] * 5, {}, r"has \[0, 1\] for token id 0; write an expert"),
        ([0] * 5, {"k": 2}, "has 0 for token id 0; write a list of 2 experts from 0 to 3"),
        ([[0, 1]] * 4 + [[2, 2]], {"k": 2}, "names an expert twice for token id 4"),
        ({"0": 1}, {}, "does not hold a list"),
        ("[1, 2", {}, "cannot be read as JSON"),
    ],
)
def test_a_wrong_table_file_is_refused(tmp_path, content, options, said):
    with pytest.raises(ConfigError, match=said) as caught:
        build({"name": "hash", "vocab": 5, "table": written(tmp_path, content), **options}, D, 4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"table": "balancd", "frequency": "x.json"}, "did you mean balanced"),
        ({"table": "clustered"}, "give router.frequency"),
        ({"frequency": "x.json"}, "has no effect with table=random"),
        ({"table": "nowhere.json"}, "router.table=nowhere.json does not exist"),
        ({"table": "balanced", "frequency": "nowhere.json"}, "router.frequency=nowhere.json does not exist"),
        ({"k": 5}, "k from 1 to 4"),
        ({"vocab": 0}, "vocab=0"),
    ],
)
def test_bad_settings_say_what_to_type(options, said):
    with pytest.raises(ConfigError, match=said) as caught:
        build({"name": "hash", "vocab": 5, **options}, D, 4)
    assert "\n" not in str(caught.value)


def test_a_count_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has -1 for token id 2; write a count of at least 0"):
        build({"name": "hash", "vocab": 3, "table": "balanced", "frequency": written(tmp_path, [3, 0, -1])}, D, 4)


def test_another_vocabulary_than_the_models_is_refused():
    with pytest.raises(ConfigError, match=r"vocab=49 token ids and the model has 50; leave router.vocab out"):
        build({"name": "hash", "vocab": 49}, D, 4).set_vocabulary(50)
    router = build("hash", D, 4)
    with pytest.raises(ConfigError, match=r"give router.vocab"):
        router(torch.zeros(1, D), tokens_of([0]))
