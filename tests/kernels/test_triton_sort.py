"""The counting sort is torch's stable sort, whatever the number of assignments and of experts."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from moe.kernels import sort, triton_sort

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(expert, num_experts):
    """Three definitions at once: order sorts stably, position inverts it, counts count."""
    expert = expert.to(DEVICE)
    for found in (sort.sort(expert, num_experts), triton_sort.sort(expert, num_experts)):
        pairs = [(e, i) for i, e in enumerate(expert.tolist())]
        assert found.order.tolist() == [i for _, i in sorted(pairs)]
        assert found.position[found.order].tolist() == list(range(len(expert)))
        assert found.counts.tolist() == [expert.eq(e).sum().item() for e in range(num_experts)]
        assert {t.dtype for t in found} == {torch.int64}


@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 1023, 1024, 1025, 2500])
def test_any_number_of_assignments(n):
    check(torch.randint(0, 8, (n,)), 7)


@pytest.mark.parametrize("experts", [1, 2, 3, 31, 32, 33, 100, 511, 512, 1023, 1024])
def test_any_number_of_experts(experts):
    check(torch.randint(0, experts + 1, (1500,)), experts)


@pytest.mark.parametrize("expert", [0, 3, 5, 6])
def test_all_to_one_expert_or_all_dropped(expert):
    check(torch.full((1300,), expert), 6)


def test_skewed_choices_with_empty_experts():
    check(zipf(1100, 12) + 2, 16)


def zipf(n, experts):
    return torch.multinomial(1 / torch.arange(1.0, experts + 1), n, replacement=True)


def test_more_blocks_than_one_program_adds_up_at_once(monkeypatch):
    monkeypatch.setattr(triton_sort, "_STEPS", 1)
    monkeypatch.setattr(triton_sort, "_TABLE", 64)
    check(zipf(128 * 5 + 3, 20), 19)


def test_compiles_whole():
    expert = torch.randint(0, 6, (300,), device=DEVICE)
    compiled = torch.compile(triton_sort.sort, fullgraph=True, backend="aot_eager")(expert, 5)
    assert all(torch.equal(a, b) for a, b in zip(compiled, sort.sort(expert, 5), strict=True))
    torch.library.opcheck(torch.ops.moe.sort.default, (expert, 5))


def test_assignments_need_not_be_contiguous():
    check(torch.randint(0, 6, (150, 2))[:, 0], 5)
