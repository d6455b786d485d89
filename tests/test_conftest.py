"""The nets under the other tests hold: shapes are checked, kernels get poisoned memory, compile works under both."""

from __future__ import annotations

import pytest
import torch

from moe.kernels import permute
from moe.routers import Tokens
from moe.routers.top_k import TopK
from tests import conftest

CHECKED = pytest.mark.skipif(conftest.jaxtyping is None, reason="jaxtyping or beartype is not installed")


@CHECKED
def test_a_wrong_shape_is_refused_by_the_signature():
    router, x = TopK(8, 4, k=2), torch.randn(5, 8)
    router(x, Tokens.of(x))
    with pytest.raises(conftest.jaxtyping.TypeCheckError, match="d"):
        router(torch.randn(5, 2, 8), Tokens.of(x))


def test_a_checked_router_compiles_whole():
    router, x = TopK(8, 4, k=2), torch.randn(5, 8)
    expected = router(x, Tokens.of(x))
    compiled = torch.compile(router, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, Tokens.of(x)).weight, expected.weight)


@CHECKED
def test_shapes_are_checked_again_after_a_test_that_compiled():
    test_a_wrong_shape_is_refused_by_the_signature()


def test_only_kernels_get_poisoned_memory():
    ours = conftest._poisoned(torch.empty)
    assert eval("ours(3)", {"ours": ours, "__name__": permute.__name__}).isnan().all()
    zeros = conftest._poisoned(torch.zeros)
    assert zeros(3).eq(0).all()
    assert eval("ours(3, dtype=d)", {"ours": ours, "d": torch.int32, "__name__": permute.__name__}).eq(2**31 - 1).all()
