from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.model.initialise import initial_value, stream
from tests.model import small


def test_first_values_depend_on_seed_name_and_expert_alone():
    settings = small.settings(init_std=0.02)

    def value(name: str, *shape: int, seed: int = 0) -> Tensor:
        return initial_value(name, shape, settings, seed)

    up = value("layers.0.moe.experts.up", 4, 2, 16, 32)
    assert torch.equal(value("layers.0.moe.experts.up", 3, 2, 16, 32), up[:3])  # an expert does not depend on their number
    assert not torch.equal(up[0], up[1])
    assert not torch.equal(up, value("layers.1.moe.experts.up", 4, 2, 16, 32))
    assert not torch.equal(up, value("layers.0.moe.experts.up", 4, 2, 16, 32, seed=1))
    torch.rand(5)  # the global stream has no part in it
    assert torch.equal(up, value("layers.0.moe.experts.up", 4, 2, 16, 32))
    assert torch.equal(initial_value("embed.weight", (8, 8), settings, 0, torch.float64).float(), value("embed.weight", 8, 8))


def test_first_values_have_their_scale():
    settings = small.settings(init_std=0.02, layers=8)
    for name, shape, std in (
        ("embed.weight", (500, 200), 0.02),
        ("layers.0.attention.o.weight", (300, 300), 0.005),
        ("layers.0.mlp.down.weight", (300, 300), 0.005),
        ("layers.0.mlp.up.weight", (300, 300), 0.02),
        ("layers.0.moe.experts.down", (4, 150, 150), 0.005),
        ("layers.0.moe.shared.down.weight", (300, 300), 0.005),
        ("layers.0.moe.router.weight", (300, 300), 0.02),
    ):
        value = initial_value(name, shape, settings, 0)
        assert value.std().item() == pytest.approx(0.9866 * std, rel=0.02), name
        assert value.abs().max() <= 3 * std
    assert torch.equal(initial_value("layers.0.attention.q_norm.weight", (8,), settings, 0), torch.ones(8))
    assert torch.equal(initial_value("layers.0.attention.q.bias", (8,), settings, 0), torch.zeros(8))


def test_router_streams_differ_by_layer_and_seed_and_never_change():
    streams = [[router.stream for router in small.model(seed=seed).routers().values()] for seed in (0, 1)]
    assert len({s for row in streams for s in row}) == 4
    assert all(0 <= s < 2**63 for row in streams for s in row)
    assert stream(0, "layers.0.moe.router") == streams[0][0] == 9150343574896822577
