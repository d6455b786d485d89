from __future__ import annotations

import hashlib

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


OWN = {  # routers, and what they draw by laws of their own
    "top_k": "top_k",  # nothing
    "noisy_top_k": "noisy_top_k",
    "sparse_mixer": {"name": "sparse_mixer", "output_scale": "learned"},
    "sigma": "sigma",
    "dselect_k": "dselect_k",
    "local_search": {"name": "local_search", "router": "comet"},
}
GOLDEN = {
    "top_k": "a85a6dd2b866a801",
    "noisy_top_k": "4d7b76537c76b08a",
    "sparse_mixer": "3d6bde81da078522",
    "sigma": "080739221aeaa20d",
    "dselect_k": "897e67f169fa9d29",
    "local_search": "10ca43dfc99993bc",
}


def digest(router: str | dict) -> str:
    """A hash of all first weights of a small model, by name."""
    found = hashlib.sha256()
    model = small.model({"experts": 4, "d_expert": 12, "d_shared": 8, "router": router}, layers=2, tied_embeddings=False)
    for name, value in sorted(model.named_parameters()):
        found.update(f"{name} {tuple(value.shape)}".encode() + value.detach().float().numpy().tobytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize("router", OWN)
def test_first_values_are_the_same_bits_everywhere(router):
    """On any processor and version of torch; a change of these numbers is a change of every run that is begun anew."""
    assert digest(OWN[router]) == GOLDEN[router]


def test_some_first_values():
    settings = small.settings(init_std=0.02)
    for name, shape, values in (
        ("embed.weight", (50, 32), [-0.01607421785593033, -0.012315597385168076, -0.003400135086849332]),
        ("layers.1.moe.experts.up", (4, 2, 8, 32), [0.020128173753619194, 0.021816348657011986, -0.028415793552994728]),
        ("layers.1.moe.experts.down", (4, 32, 8), [0.0035190200433135033, -0.0049718571826815605, -0.01012312900274992]),
    ):
        assert initial_value(name, shape, settings, 0).flatten()[[0, 1, -1]].tolist() == values, name
