"""The counter-based numbers: their definition in Python's integers, their statistics, and that they are pure."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats

from moe.routers import noise

WORD = (1 << 64) - 1
EULER = 0.5772156649015329


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def definition(stream: int, step: int, index: int, column: int) -> int:
    golden, row = 0x9E3779B97F4A7C15, 0
    for part in (stream, step, index):
        row = mix((row + part + golden) & WORD)
    return mix((row + (column + 1) * golden) & WORD)


COUNTERS = [(0, 0, 0), (1, 2, 3), (WORD, 10**6, 2**40), (2**63, 7, 2**62), (-5, 0, 1)]


@pytest.mark.parametrize(("stream", "step", "index"), COUNTERS)
def test_bits_equal_the_definition_in_unbounded_integers(stream, step, index):
    drawn = noise.bits(stream, step, torch.tensor([index]), 5)[0].tolist()
    assert [b & WORD for b in drawn] == [definition(stream & WORD, step, index, c) for c in range(5)]


@pytest.mark.parametrize(("stream", "step", "index"), COUNTERS)
def test_uniform_is_twenty_three_bits_of_the_definition(stream, step, index):
    drawn = noise.uniform(stream, step, torch.tensor([index]), 5)[0].tolist()
    halves = [
        h
        for c in range(3)
        for h in (definition(stream & WORD, step, index, c) & 0xFFFFFFFF, definition(stream & WORD, step, index, c) >> 32)
    ]
    assert drawn == [((h >> 9) + 0.5) * 2.0**-23 for h in halves[:5]]


def test_splitmix64_known_sequence():
    """The first outputs of the published generator for seed 0: a row with hash 0 would be this sequence."""
    golden = 0x9E3779B97F4A7C15
    assert [mix(n * golden & WORD) for n in (1, 2, 3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("draw", [noise.uniform, noise.normal, noise.gumbel])
def test_rows_do_not_depend_on_their_company(draw: Callable):
    index = torch.arange(1000) * 7
    whole = draw(3, 4, index, 9)
    assert torch.equal(whole, torch.cat([draw(3, 4, part, 9) for part in index.split([1, 998, 1])]))
    order = torch.randperm(1000)
    assert torch.equal(whole[order], draw(3, 4, index[order], 9))
    assert torch.equal(whole[:, :4], draw(3, 4, index, 4))
    assert draw(3, 4, index[:0], 9).shape == (0, 9)
    assert not torch.equal(whole, draw(3, 5, index, 9))
    assert not torch.equal(whole, draw(4, 4, index, 9))


def test_uniform_never_reaches_zero_or_one():
    top = torch.tensor([0x7FFFFF]).float().add_(0.5).mul_(2.0**-23)
    assert 0 < top.item() < 1
    drawn = noise.uniform(0, 0, torch.arange(100_000), 8)
    assert drawn.min() > 0
    assert drawn.max() < 1
    assert noise.gumbel(0, 0, torch.arange(100_000), 8).isfinite().all()


@pytest.mark.parametrize(
    ("draw", "law", "mean", "variance"),
    [
        (noise.uniform, stats.uniform, 0.5, 1 / 12),
        (noise.normal, stats.norm, 0.0, 1.0),
        (noise.gumbel, stats.gumbel_r, EULER, math.pi**2 / 6),
    ],
)
def test_distribution(draw, law, mean, variance):
    drawn = draw(11, 5, torch.arange(50_000), 4).double().flatten()
    n = len(drawn)
    assert abs(drawn.mean().item() - mean) < 4 * math.sqrt(variance / n)
    assert drawn.var().item() == pytest.approx(variance, rel=0.02)
    assert stats.kstest(drawn.numpy(), law.cdf).pvalue > 1e-3
    cells = torch.histc(torch.from_numpy(law.cdf(drawn.numpy())), 256, 0, 1)
    assert stats.chisquare(cells.numpy()).pvalue > 1e-3


def test_neighbours_are_uncorrelated():
    index = torch.arange(4096)
    grid = (
        torch.stack([noise.uniform(s, 0, index, 8) for s in range(4)] + [noise.uniform(0, s, index, 8) for s in range(1, 4)]).double() - 0.5
    )
    limit = 5 / 12 / math.sqrt(4096 * 8)  # five standard errors of a mean product of two uniforms
    for shifted in (
        grid[1:4] * grid[:3],  # streams
        grid[5:] * grid[4:6],  # steps
        grid[:, 1:] * grid[:, :-1],  # tokens
        grid[:, :, 1:] * grid[:, :, :-1],  # columns
        grid[:1] * grid[4:5],  # stream 0, step 1 against step 0
    ):
        assert abs(shifted.mean().item()) < limit


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 62, 63])
def test_every_bit_is_fair_and_flips_half_the_time(bit):
    drawn = noise.bits(0, 0, torch.arange(20_000), 2)
    ones = (drawn >> bit & 1).double()
    assert abs(ones.mean().item() - 0.5) < 5 * 0.5 / math.sqrt(40_000)
    flips = (drawn[1:] ^ drawn[:-1]) >> bit & 1
    assert abs(flips.double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(40_000)


def test_gumbel_arg_max_samples_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5])
    chosen = (logits + noise.gumbel(1, 1, torch.arange(40_000), 4)).argmax(1)
    expected = logits.softmax(0).double() * 40_000
    assert stats.chisquare(chosen.bincount(minlength=4).numpy(), (expected * (40_000 / expected.sum())).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_no_tokens_draw_nothing(columns):
    assert noise.uniform(1, 2, torch.arange(0), columns).shape == (0, columns)
