from __future__ import annotations

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch

from moe.data.batch import IGNORE
from moe.data.corpus import Window, prepare
from moe.data.loader import Loader, Validation, pack
from moe.errors import DataError
from tests.data.makers import Given, byte_level

S = 16
WORDS = [f"text {n}: {'Ä日x'[n % 3] * (n % 13)}" for n in range(150)]
OTHER = [f"other {n} {'.' * (n % 5)}" for n in range(90)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return prepare([Given(WORDS)], "bytes", tmp_path_factory.mktemp("data") / "c", validation=0.2)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    sources = [Given(WORDS, weight=7.0), Given(OTHER, weight=3.0)]
    return prepare(sources, "bytes", tmp_path_factory.mktemp("data") / "c", validation=0.2)


def load(corpus, *, batch=4, seed=1, **options):
    return Loader(corpus, sequence=S, batch=batch, seed=seed, **options)


def rows(loader, steps):
    """Rows of inputs and targets of the coming steps, as tuples."""
    batches = [loader.take() for _ in range(steps)]
    return [tuple(row) for batch in batches for row in torch.cat([batch.ids, batch.targets[:, -1:]], 1).tolist()]


def test_an_epoch_is_every_block_of_the_packed_stream_once(corpus):
    train = corpus.parts[0].train
    flat = train.read(0, len(train)).ids.tolist()
    blocks = [tuple(flat[i : i + S + 1]) for i in range(0, len(flat) - S, S)]
    loader = load(corpus, batch=1)
    assert loader.blocks == [len(blocks)]
    first, second = rows(loader, len(blocks)), rows(loader, len(blocks))
    assert sorted(first) == sorted(second) == sorted(blocks)
    assert first != second
    assert first != blocks


def test_targets_are_the_next_tokens(corpus):
    batch = load(corpus).take()
    assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])
    assert [tensor.dtype for tensor in batch] == [torch.int64] * 5
    assert batch.index.tolist() == [list(range(r * S, (r + 1) * S)) for r in range(4)]


@pytest.mark.parametrize("which", ["corpus", "mixture"])
def test_any_number_of_ranks_sees_the_same_batches(which, request):
    data = request.getfixturevalue(which)
    alone = load(data, document_mask=True)
    whole = [alone.take() for _ in range(20)]
    for world in (2, 4):
        ranks = [load(data, rank=rank, world=world, document_mask=True) for rank in range(world)]
        for expected in whole:
            parts = [rank.take() for rank in ranks]
            for field in expected._fields:
                assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(expected, field)), field


def test_another_batch_size_cuts_the_same_order(corpus):
    assert rows(load(corpus, batch=4), 6) == rows(load(corpus, batch=8), 3)


@pytest.mark.parametrize("stop", [0, 1, 5, 37])
def test_a_run_resumes_to_the_token_on_another_world(mixture, stop):
    uninterrupted = load(mixture)
    expected = [uninterrupted.take() for _ in range(50)]
    before = [load(mixture, rank=rank, world=4) for rank in range(4)]
    for _ in range(stop):
        for loader in before:
            loader.take()
    states = [json.loads(json.dumps(loader.state())) for loader in before]
    assert all(state == states[0] for state in states)
    after = [load(mixture, rank=rank, world=2) for rank in range(2)]
    for loader in after:
        loader.restore(states[0])
    for batch in expected[stop:]:
        assert torch.equal(torch.cat([loader.take().ids for loader in after]), batch.ids)
    assert after[0].tokens_seen == uninterrupted.tokens_seen


def test_the_order_is_the_same_in_another_process(corpus, tmp_path):
    program = (
        "import sys; sys.path.insert(0, '.')\n"
        "from moe.data.corpus import open_corpus; from moe.data.loader import Loader\n"
        f"loader = Loader(open_corpus(sys.argv[1]), sequence={S}, batch=4, seed=1)\n"
        "print(sum([loader.take().ids.flatten().tolist() for _ in range(3)], []))"
    )
    folder = corpus.parts[0].tokens.shards[0].path.parent.parent
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=60, check=True)
    loader = load(corpus)
    assert json.loads(done.stdout) == torch.cat([loader.take().ids.flatten() for _ in range(3)]).tolist()
    assert done.stderr == ""  # no warning of a library about what is not installed


def test_seeds_differ_and_are_not_each_other_shifted_by_an_epoch(corpus):
    count = load(corpus).blocks[0]
    orders = []
    for seed in (0, 1, 2, 2**40):
        loader = load(corpus, batch=1, seed=seed)
        orders += [tuple(rows(loader, count)), tuple(rows(loader, count))]
    assert len(set(orders)) == len(orders)


def test_weights_are_shares_of_the_sequences(mixture):
    loader = load(mixture, batch=10)
    drawn = [loader.order[place].source for place in range(1000)]
    assert drawn.count(1) == 300
    for _ in range(100):
        loader.take()
    assert loader.tokens_seen == {"given": 700 * S, "given-2": 300 * S}
    assert loader.epochs == pytest.approx({"given": 700 / loader.blocks[0], "given-2": 300 / loader.blocks[1]}, rel=5e-3)
    from_other = sum(b"other" in bytes(i % 256 for i in row) for row in rows(load(mixture, batch=1), 500))
    assert 120 < from_other <= 150


def test_tokens_seen_is_what_was_drawn_to_within_a_sequence(tmp_path):
    sources = [Given(WORDS, weight=0.517), Given(OTHER, weight=0.09), Given(WORDS[::-1], weight=1.0)]
    loader = load(prepare(sources, "bytes", tmp_path / "c"), batch=7)
    counts = [0, 0, 0]
    for step in range(60):
        for place in range(step * 7, step * 7 + 7):
            counts[loader.order[place].source] += 1
        loader.take()
        for seen, count in zip(loader.tokens_seen.values(), counts, strict=True):
            assert abs(seen / S - count) <= 2


def test_past_four_epochs_it_warns_once(corpus, caplog):
    loader = load(corpus, batch=4)
    with caplog.at_level(logging.WARNING, "moe.data"):
        while loader.epochs["given"] <= 4:
            assert not caplog.records
            loader.take()
        loader.take()
    assert [record.getMessage() for record in caplog.records] == [
        "source given has been read more than 4 times; more text would teach more"
    ]


def test_other_data_another_seed_or_length_is_refused(corpus, mixture):
    state = load(corpus).state()
    with pytest.raises(DataError, match=r"the data changed: the checkpoint's corpus is [0-9a-f]{12} and this one is [0-9a-f]{12}; "):
        load(mixture).restore(state)
    with pytest.raises(DataError, match=r"the checkpoint's data order has train\.seed=1, not 2; set train\.seed=1"):
        load(corpus, seed=2).restore(state)
    with pytest.raises(DataError, match=r"data\.sequence=16, not 8; set data\.sequence=16"):
        Loader(corpus, sequence=8, batch=4, seed=1).restore(state)


def test_too_little_text_is_named(corpus, tmp_path):
    with pytest.raises(DataError, match=r"source given has \d+ tokens to train on, fewer than a sequence of 100000 and its next token"):
        Loader(corpus, sequence=100_000, batch=1, seed=0)
    held = prepare([Given(WORDS, hold_out="all")], "bytes", tmp_path / "held")
    with pytest.raises(DataError, match="every document is held out, and none is left to train on"):
        load(held)
    single = prepare([Given([" ".join(WORDS)])], "bytes", tmp_path / "single")
    with pytest.raises(DataError, match=r"none of the corpus's 1 documents is held out; .*document: paragraph"):
        Validation(single, sequence=S, sequences=4, batch=4)


def window(*documents):
    ids = np.arange(sum(documents))
    return Window(ids, np.repeat(np.arange(len(documents)), documents))


def test_documents_and_positions_start_anew_under_the_mask():
    masked = pack([window(3, 2, 4), window(9)], 8, first_row=2, document_mask=True)
    assert masked.document.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2], [0] * 8]
    assert masked.position.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], list(range(8))]
    assert masked.index.tolist() == [list(range(16, 24)), list(range(24, 32))]
    plain = pack([window(3, 2, 4), window(9)], 8, first_row=2, document_mask=False)
    assert plain.position.tolist() == [list(range(8))] * 2
    assert torch.equal(plain.document, masked.document)


def test_a_short_window_is_padded_with_nothing_to_predict():
    for mask in (False, True):
        batch = pack([window(2, 3), window(0)], 6, first_row=0, document_mask=mask)
        assert batch.targets.tolist() == [[1, 2, 3, 4, IGNORE, IGNORE], [IGNORE] * 6]
        assert batch.document.tolist() == [[0, 0, 1, 1, -1, -1], [-1] * 6]
        assert batch.position.min() >= 0


def targets_of(batches):
    return [target for batch in batches for target in batch.targets.flatten().tolist() if target != IGNORE]


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_bits_per_byte_divides_by_the_bytes_of_the_text_that_is_predicted(kind, tmp_path):
    name = "bytes" if kind == "bytes" else str(byte_level(tmp_path))
    corpus = prepare([Given(WORDS)], name, tmp_path / "c", validation=0.3)
    held = corpus.parts[0].held_out
    everything = Validation(corpus, sequence=S, sequences=10**6, batch=4)
    ids = held.read(0, len(held)).ids
    ends = int((ids == corpus.tokenizer.end).sum())
    text = corpus.tokenizer.decode(ids)
    # All held-out text but what its very first token stands for, which nothing predicts.
    assert everything.bytes == len(text.encode()) - corpus.tokenizer.bytes_of(ids[:1]).sum()
    targets = targets_of(everything)
    assert sorted(targets) == sorted(ids[1:].tolist())
    assert targets.count(corpus.tokenizer.end) == ends
    few = Validation(corpus, sequence=S, sequences=5, batch=4)
    assert few.bytes == corpus.tokenizer.bytes_of(np.array(targets_of(few))).sum()


def test_a_tokenizer_that_drops_text_is_charged_for_all_of_it(tmp_path):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    library = Tokenizer(models.WordLevel({"</s>": 0, "[UNK]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    library.normalizer, library.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    corpus = prepare([Given([f"{'A ' * n}b" for n in range(1, 60)])], str(tmp_path), tmp_path / "c", validation=0.3)
    part = corpus.parts[0]
    assert part.bytes_scale == part.tokens.meta["text_bytes"] / part.tokens.meta["token_bytes"]
    assert 1.5 < part.bytes_scale < 2  # a space a letter, which the vocabulary cannot say


def test_validation_is_fixed_repeats_nothing_and_is_not_in_order(corpus):
    everything = Validation(corpus, sequence=S, sequences=10**6, batch=4)
    first, second = (rows_of(everything) for _ in range(2))
    assert first == second
    blocks = [draw.block for draw in everything.draws]
    assert sorted(blocks) == list(range(len(blocks)))
    assert blocks != sorted(blocks)
    some = Validation(corpus, sequence=S, sequences=6, batch=4)
    assert rows_of(some) == first[:6]
    assert (len(some), len(list(some))) == (2, 2)


def rows_of(validation):
    return [tuple(row.tolist()) for batch in validation for row in batch.ids if row.any()]


@pytest.mark.parametrize("world", [2, 4])
def test_validation_over_ranks_is_the_same_set_in_equal_shares(mixture, world):
    alone = Validation(mixture, sequence=S, sequences=11, batch=4)
    ranks = [Validation(mixture, sequence=S, sequences=11, batch=4, rank=rank, world=world) for rank in range(world)]
    assert all(rank.bytes == alone.bytes for rank in ranks)
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert len({len(part.ids) for part in parts}) == 1
        for field in ("ids", "targets", "document", "index"):
            joined = torch.cat([getattr(part, field) for part in parts])
            assert torch.equal(joined[: len(whole.ids)], getattr(whole, field)), field
            assert field != "targets" or (joined[len(whole.ids) :] == IGNORE).all()


def test_validation_is_mixed_as_training_is(mixture):
    validation = Validation(mixture, sequence=S, sequences=10, batch=10)
    assert [draw.source for draw in validation.draws].count(1) == 3
    everything = Validation(mixture, sequence=S, sequences=10**6, batch=10)
    assert len(everything.draws) == sum(-(-(len(part.held_out) - 1) // S) for part in mixture.parts)
    assert len(set(everything.draws)) == len(everything.draws)
