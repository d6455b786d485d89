from __future__ import annotations

import hashlib
import math
import struct
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from moe.routers import draw as drawing
from moe.routers.draw import Law, draw_, quantiles

UNIT = Law("truncated", 1.0)
WORD = (1 << 64) - 1


def draw(law: Law, *shape: int, key: object = "w", seed: int = 0, box: list[range] | None = None, dtype=torch.float32) -> Tensor:
    box = box or [range(n) for n in shape]
    value = torch.full([len(held) for held in box], math.nan, dtype=dtype)
    draw_(value, law, (seed, key), box, shape)
    return value


def by_hand(key: tuple, row: int, column: int, columns: int, scale: float) -> float:
    """One truncated normal value by Python's integers, from the definition alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    start, stride = struct.unpack(">QQ", digest)
    stride |= 1
    assert (stride ^ stride >> 1).bit_count() >= 24
    x = (start + (row * -(-columns // 4) + column // 4) * stride) & WORD
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & WORD
    x ^= x >> 31
    point = (x >> 16 * (column % 4)) & 0xFFFF
    normal = NormalDist()
    share = normal.cdf(-3) + (point + 0.5) / 65536 * (normal.cdf(3) - normal.cdf(-3))
    return struct.unpack("f", struct.pack("f", round(normal.inv_cdf(share) * 2**20) / 2**20 * scale))[0]


def test_every_value_is_that_of_the_definition():
    drawn = draw(Law("truncated", 0.02), 3, 5, 7)
    rows = drawn.view(15, 7)
    assert [[by_hand((0, "w"), r, c, 7, 0.02) for c in range(7)] for r in range(15)] == rows.tolist()


@pytest.mark.parametrize("kind", ["truncated", "normal", "uniform"])
def test_the_law_is_the_one_it_is_called(kind):
    """Kolmogorov and Smirnov's distance of 4 million values: a law off by 0.2 % anywhere would show."""
    drawn = draw(Law(kind, 1.0), 1000, 4000).double().flatten().sort().values
    count = len(drawn)
    if kind == "uniform":
        below = (drawn + 1) / 2
    else:
        below = torch.special.ndtr(drawn)
        if kind == "truncated":
            low, high = torch.special.ndtr(torch.tensor([-3.0, 3.0], dtype=torch.float64))
            below = (below - low) / (high - low)
    rank = torch.arange(count, dtype=torch.float64)
    distance = max((below - rank / count).max(), ((rank + 1) / count - below).max()).item()
    assert distance < 1.95 / math.sqrt(count)  # chance 0.1 % for the true law
    assert abs(drawn.mean()) < 4 * drawn.std() / math.sqrt(count)
    std = {"truncated": 0.98658, "normal": 1.0, "uniform": 1 / math.sqrt(3)}[kind]
    assert drawn.std().item() == pytest.approx(std, rel=2e-3)
    assert drawn.abs().max() < {"truncated": 3.0, "normal": 4.33, "uniform": 1.0}[kind]


def test_the_points_of_a_law_are_its_quantiles():
    for kind in ("truncated", "normal", "uniform"):
        points = quantiles(kind)
        assert len(points) == 65536
        assert torch.equal(points, -points.flip(0))
        assert (points.diff() > 0).all()
    share = (quantiles("uniform") + 1) / 2
    torch.testing.assert_close(share, (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536, rtol=0, atol=0)


def test_neighbours_columns_experts_names_and_seeds_are_independent():
    """Correlations of values and of their squares, over 400,000 pairs each: chance 0.01 % to lie above the bound."""
    one = draw(UNIT, 4, 200, 2000).double()
    pairs = {
        "columns": (one[..., :-1], one[..., 1:]),
        "columns of two hashes": (one[..., :-4], one[..., 4:]),
        "rows": (one[:, :-1], one[:, 1:]),
        "experts": (one[:-1], one[1:]),
        "name": (one, draw(UNIT, 4, 200, 2000, key="v").double()),
        "seed": (one, draw(UNIT, 4, 200, 2000, seed=1).double()),
        "one column over": (one[..., 4:], draw(UNIT, 4, 200, 2000, seed=1).double()[..., :-4]),
    }
    for what, (a, b) in pairs.items():
        for power in (1, 2):
            found = torch.corrcoef(torch.stack([a.flatten() ** power, b.flatten() ** power]))[0, 1].item()
            assert abs(found) < 3.9 / math.sqrt(a.numel()), (what, power)


def test_each_bit_of_a_hash_is_fair_and_no_two_go_together():
    """All 64 bits of the counters, through the points that their values stand for."""
    drawn = draw(Law("uniform", 1.0), 50_000, 4).double()
    point = ((drawn + 1) * 32768).long()
    bit = torch.cat([(point[:, lane, None] >> torch.arange(16)) & 1 for lane in range(4)], 1).double() * 2 - 1
    together = bit.T @ bit / len(bit)
    together.fill_diagonal_(0)
    assert bit.mean(0).abs().max() < 4.5 / math.sqrt(len(bit))
    assert together.abs().max() < 5.2 / math.sqrt(len(bit))  # of 2016 pairs


def test_a_part_is_that_of_the_whole_in_whatever_blocks(monkeypatch):
    shape = (5, 3, 11)
    whole = draw(UNIT, *shape)
    boxes = [
        [range(1, 4), range(3), range(11)],
        [range(5), range(1, 2), range(2, 9)],
        [range(5), range(3), range(10, 11)],
        [range(2, 2), range(3), range(11)],
    ]
    for hashes in (1, 7, 1 << 14):
        monkeypatch.setitem(drawing._HASHES, "cpu", hashes)
        monkeypatch.setattr(drawing, "_GRAIN", hashes)
        for law in (UNIT, Law("normal", 0.3, equal_rows=True), Law("constant", 2)):
            whole = draw(law, *shape)
            for box in boxes:
                part = whole[tuple(slice(held.start, held.stop) for held in box)]
                assert torch.equal(draw(law, *shape, box=box), part), (hashes, law, box)
    assert torch.equal(draw(UNIT, 9, 3, 11)[:5], draw(UNIT, *shape))  # more experts change none of those before
    assert draw(UNIT, 7).shape == (7,)


def test_other_dtypes_are_float32_rounded_or_widened():
    for law in (Law("truncated", 0.02), Law("normal", 0.02, equal_rows=True), Law("uniform", 0.05)):
        for dtype in (torch.float64, torch.bfloat16):
            assert torch.equal(draw(law, 4, 33, dtype=dtype), draw(law, 4, 33).to(dtype))


def test_equal_rows_keep_their_directions_and_have_the_deviation_asked_for():
    drawn, equal = draw(Law("normal", 0.3), 6, 50), draw(Law("normal", 0.3, equal_rows=True), 6, 50)
    torch.testing.assert_close(equal.norm(dim=1), torch.full((6,), 0.3 * math.sqrt(50)), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cosine_similarity(drawn, equal), torch.ones(6), rtol=0, atol=1e-6)
    assert drawn.norm(dim=1).std() > 0.05


def test_a_stride_of_long_runs_of_bits_is_mended(monkeypatch):
    class Poor:
        def __init__(self, *_, **__): ...

        def digest(self):
            return bytes(16)

    monkeypatch.setattr(drawing.hashlib, "blake2b", Poor)
    assert drawing._sequence(("key",)) == (0, (0xAAAAAAAAAAAAAAAB) - (1 << 64))
