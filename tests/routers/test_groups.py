"""Groups: sequences as rows of a rectangle, however a call lists its tokens."""

from __future__ import annotations

import torch

from moe.routers import Tokens
from moe.routers.groups import capacity, groups, most_taken


def make_tokens(lengths: list[int], length: int | None = None) -> Tokens:
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    t = len(sequence)
    return Tokens(torch.zeros(t, dtype=torch.int64), sequence, torch.arange(t) + 7, torch.arange(t) % 4 > 0, 0, length)


def test_equal_sequences_are_the_same_groups_whether_their_length_is_told_or_found():
    told, found = groups(make_tokens([6, 6, 6], 6)), groups(make_tokens([6, 6, 6]))
    assert torch.equal(told.index, found.index)
    assert torch.equal(told.valid, found.valid)
    assert torch.equal(told.index, torch.arange(18).view(3, 6))


def test_short_sequences_are_filled_up_with_places_that_hold_no_token():
    tokens = make_tokens([2, 4, 1])
    at = groups(tokens)
    assert at.index.tolist() == [[0, 1, 7, 7], [2, 3, 4, 5], [6, 7, 7, 7]]
    assert at.valid.tolist() == [[bool(i < 7 and i % 4) for i in row] for row in at.index.tolist()]


def test_tokens_stand_in_the_order_of_their_index_whatever_the_order_of_the_call():
    tokens = make_tokens([5, 3, 4])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = groups(Tokens(*(a[order] for a in tokens[:4]), 0))
    straight = groups(tokens)
    present = straight.index < 12
    assert torch.equal(shuffled.index < 12, present)
    assert torch.equal(order[shuffled.token][present], straight.index[present])
    assert torch.equal(shuffled.valid, straight.valid)


def test_scatter_undoes_gather():
    for tokens in (make_tokens([5, 2, 4]), make_tokens([4, 4], 4), make_tokens([], 4), make_tokens([])):
        at = groups(tokens)
        x = torch.randn(len(tokens.id), 3)
        assert torch.equal(at.scatter(at.gather(x)), x)


def test_capacity_rounds_up_what_is_not_whole_in_decimal():
    count = torch.tensor([0, 1, 10, 11, 3])
    assert capacity(count, 4, 1.2).tolist() == [0, 1, 3, 4, 1]
    assert 50 * 1.1 / 11 > 5
    assert capacity(torch.tensor([50]), 11, 1.1).item() == most_taken(50, 11, 1.1) == 5
    assert capacity(torch.tensor([3]), 2, 9.0).item() == most_taken(3, 2, 9.0) == 3
