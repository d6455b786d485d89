"""From a name or a dictionary to a router: what is taken, and what is refused in which words."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moe.errors import ConfigError
from moe.routers import build

D = 16


def test_build_takes_a_name_or_a_dictionary_and_leaves_it_alone():
    options = {"name": "top_k", "k": 3}
    assert build(options, D, 6).k == 3
    assert options == {"name": "top_k", "k": 3}
    assert build("top_k", D, 6).weight.shape == (6, D)


@pytest.mark.parametrize(
    ("router", "said"),
    [
        ("topk", "did you mean top_k"),
        ({"name": "banana"}, "choose from .*top_k"),
        ({"k": 2}, "unknown router ''; choose from .*top_k"),
        ({"name": "top_k", "normalise": "none"}, "did you mean normalize"),
        ({"name": "top_k", "k": 9}, "k from 1 to 6"),
        ({"name": "top_k", "k": 0}, "k from 1 to 6"),
        ({"name": "top_k", "k": 1}, "gradient is exactly zero"),
        ({"name": "top_k", "groups": 4}, "groups=3"),
        ({"name": "top_k", "groups": 3, "groups_kept": 4}, "groups_kept from 1 to 3"),
        ({"name": "top_k", "groups": 3, "k": 4}, "larger router.groups_kept"),
        ({"name": "top_k", "jitter": 1.5}, "jitter=1.5"),
        ({"name": "top_k", "balance_loss": -0.1}, "balance_loss of at least 0"),
        ("expert_choice", "tokens after it.*router.leak=allow"),
        ({"name": "sparse_ot", "side": "experts"}, "tokens after it.*router.leak=allow"),
        ({"name": "expert_choice", "leak": "allow", "capacity_factor": 0.0}, "capacity factor of 0.0 .*capacity_factor=2"),
        ({"name": "expert_choice", "leak": "allow", "max_experts": 7}, "max_experts from 1 to 6"),
        ({"name": "sinkhorn", "k": 7}, "k from 1 to 6"),
        ({"name": "sinkhorn", "iterations": 0}, "iterations=20"),
        ({"name": "base", "tolerance": 0.0}, "tolerance=0.001"),
        ({"name": "base", "rounds": 0}, "rounds=256"),
        ({"name": "sparse_ot", "gamma": 0.0}, "gamma=1.0"),
        ({"name": "sparse_ot", "learning_rate": -1.0}, "learning_rate=0.01"),
    ],
)
def test_bad_settings_say_what_to_type(router, said):
    with pytest.raises(ConfigError, match=said) as caught:
        build(router, D, 6)
    assert "\n" not in str(caught.value)


def test_importing_the_table_loads_torch_alone():
    code = (
        "import sys\n"
        "for name in ('jaxtyping', 'pydantic', 'yaml', 'beartype'): sys.modules[name] = None\n"
        "from moe.routers import ROUTERS, build\n"
        "for name in ROUTERS: build({'name': name} | ({'leak': 'allow'} if name == 'expert_choice' else {}), 8, 4)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
