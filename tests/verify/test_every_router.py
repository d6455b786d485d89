"""Every row of the routers' table, with every setting that its tests use, trains the same on four ranks as on one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe.config import load
from moe.verify.compare import causes
from moe.verify.layouts import parse
from moe.verify.plan import plan
from tests.routers.test_contract import CASES
from tests.verify.on_ranks import rows

DEBUG = Path(__file__).parents[2] / "configs" / "debug.yaml"
LAYOUTS = (
    "engine=ddp,ranks=4,expert_ranks=4,exchange=tokens,accumulate=2,balance_window=exact",
    "engine=fsdp2,ranks=4,expert_ranks=2,recompute=full,overlap=3",
    "engine=fsdp2,ranks=4,replicas=2,accumulate=2,balance_window=exact",
    "engine=fsdp2,ranks=4,expert_ranks=2,policy=hecate,hidden=6,chosen=after,rematerialise=true,machine_ranks=1,accumulate=2,balance_window=exact",
    "engine=ddp,ranks=4,expert_ranks=4,policy=cost,chosen=both,machine_ranks=2,tflops=1e-5",
)


def recipe(name: str, options: dict):
    """The debug recipe with a router; the small model's vocabulary is its own."""
    settings = {key: value for key, value in options.items() if key != "vocab"}
    if isinstance(wrapped := settings.get("router"), dict):
        settings["router"] = {key: value for key, value in wrapped.items() if key != "vocab"}
    return load([DEBUG], [f"model.moe.router={json.dumps({'name': name, **settings})}", "model.moe.experts=12"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_router_trains_the_same_on_four_ranks(name, options):
    checks, _, _ = plan(recipe(name, options), [parse(text) for text in LAYOUTS], ["float64"])
    for check, found in zip(checks, rows(checks), strict=True):
        assert not causes(found), f"{check.layout}, {check.optimizer}: {'; '.join(map(str, causes(found)))}"
