"""Random recipes under random layouts train what one process trains. A seed is a case: the same seed is the same case for ever.

A failing seed is repeated by `MOE_FUZZ=SEED pytest tests/parallel/test_fuzz_layouts.py -k one_seed`.
"""

from __future__ import annotations

import json
import os
import random
import time
from typing import Any

import pytest

from moe.config import load
from moe.errors import ConfigError
from moe.verify.compare import causes
from moe.verify.plan import plan
from tests.routers.test_contract import EXAMPLES
from tests.verify.on_ranks import rows

BATCH = 4  # seeds whose processes are started together
FIRST = 1000
PER_TOKEN = ("top_k", "noisy_top_k", "hash")  # give every token as many experts, as buffers of a fixed size need


def recipe(rng: random.Random) -> Any:
    """A random recipe; small already where that is what varies."""
    experts = rng.choice([4, 6, 8, 12])
    moe = {
        "experts": experts,
        "d_expert": 16,
        "router": router(rng),
        "d_shared": rng.choice([0, 0, 16]),
        "first_dense": rng.choice([0, 0, 1]),
        "every": rng.choice([1, 1, 2]),
        "backend": rng.choice(["auto", "reference", "torch"]),
    }
    if moe["d_shared"]:
        moe["shared_gate"] = rng.random() < 0.5
    model = {
        "layers": 4,
        "d_model": 32,
        "heads": 4,
        "kv_heads": rng.choice([None, 2, 1]),
        "qk_norm": rng.choice(["none", "head", "full"]),
        "tied_embeddings": rng.random() < 0.4,
        "attention_bias": rng.random() < 0.3,
        "window": rng.choice([None, None, 4]),
        "moe": moe,
    }
    sections = {
        "model": model,
        "data": {"sequence": 64, "document_mask": rng.random() < 0.5},
        "train": {"clip": rng.choice([None, 1.0]), "seed": rng.randrange(100), "dtype": "float64"},
        "optimizer": {"lr": 1e-2, "weight_decay": rng.choice([0.0, 0.1])},
    }
    return load([], [f"{name}={json.dumps(section)}" for name, section in sections.items()])


def router(rng: random.Random) -> dict[str, Any]:
    """A row of the table with options that its tests use, and, where it can, with a capacity."""
    name = rng.choice(list(EXAMPLES))
    options = {key: value for key, value in rng.choice(EXAMPLES[name]).items() if key != "vocab"}
    if isinstance(options.get("router"), dict):
        options["router"] = {key: value for key, value in options["router"].items() if key != "vocab"}
    if name in ("top_k", "noisy_top_k", "hash") and rng.random() < 0.4:
        options |= {"capacity_factor": rng.choice([0.75, 1.25]), "drop": rng.choice(["order", "priority", "weight"])}
    return {"name": name, **options}


def layout(rng: random.Random, world: int, router: str) -> dict[str, Any]:
    """A random layout of `world` ranks."""
    chosen: dict[str, Any] = {"engine": rng.choice(["ddp", "fsdp2"]), "ranks": world}
    replicas = rng.choice([1, 2]) if chosen["engine"] == "fsdp2" and world == 4 else 1
    share = rng.choice([n for n in (1, 2, 4) if world // replicas % n == 0])
    if share > 1:
        ways = ["rows", "tokens", "fixed"] if router in PER_TOKEN else ["rows", "tokens"]
        chosen |= {"expert_ranks": share, "exchange": rng.choice(ways)}
        if chosen["exchange"] == "fixed":
            chosen["exchange_room"] = rng.choice([0.5, 1.0, 4.0])
        elif rng.random() < 0.4:
            chosen |= copies(rng)
        if not chosen.get("rematerialise") and rng.random() < 0.4:
            chosen["overlap"] = rng.choice([2, 3])
    if replicas > 1:
        chosen["replicas"] = replicas
    if rng.random() < 0.5:
        chosen |= {"accumulate": rng.choice([2, 3]), "balance_window": rng.choice(["running", "exact"])}
    if rng.random() < 0.5:
        chosen["recompute"] = rng.choice(["experts", "full"])
    return chosen


def copies(rng: random.Random) -> dict[str, Any]:
    """Random copies and owners; arithmetic so slow that most copies pay."""
    chosen = {
        "policy": rng.choice(["hecate", "hecate", "cost"]),
        "copies": rng.choice([1, 2, 3]),
        "chosen": rng.choice(["ahead", "after", "both"]),
        "rematerialise": rng.random() < 0.5,
        "relay": rng.random() < 0.5,
        "machine_ranks": rng.choice([1, 2]),
        "tflops": 1e-5,
    }
    if chosen["policy"] == "hecate":
        chosen["hidden"] = rng.choice([1, 4])
    return chosen | ({"owners": "hecate", "owners_every": rng.choice([1, 2])} if rng.random() < 0.4 else {})


def case(seed: int, world: int) -> Any:
    """The check that a seed stands for."""
    rng = random.Random(seed)
    while True:
        try:
            drawn = recipe(rng)
            checks, _, _ = plan(drawn, [layout(rng, world, drawn.model.moe.router["name"])], ["float64"])
        except ConfigError:
            continue  # a draw that does not fit together
        return checks[rng.randrange(2)]


def check(seeds: list[int], world: int) -> None:
    checks = [case(seed, world) for seed in seeds]
    for seed, one, found in zip(seeds, checks, rows(checks), strict=True):
        again = f"MOE_FUZZ={seed} pytest tests/parallel/test_fuzz_layouts.py -k one_seed"
        missed = "; ".join(map(str, causes(found)))
        assert not missed, f"{missed}\n{one.layout}, {one.optimizer}: {' '.join(one.case.words)}\nagain: {again}"


def worlds(seed: int) -> int:
    return 2 if seed // BATCH % 2 == 0 else 4


def fuzz(first: int, seconds: float) -> int:
    """Batches of seeds from `first` until time is up; how many."""
    end, seed = time.monotonic() + seconds, first
    while time.monotonic() < end:
        check(list(range(seed, seed + BATCH)), worlds(seed))
        seed += BATCH
    return seed - first


def test_random_recipes_under_random_layouts_train_what_one_process_trains():
    assert fuzz(FIRST, 4) >= BATCH


@pytest.mark.slow
def test_more_of_them():
    assert fuzz(FIRST + 10_000, 240) >= BATCH


@pytest.mark.skipif("MOE_FUZZ" not in os.environ, reason="repeats the seed that MOE_FUZZ names")
def test_one_seed():
    seed = int(os.environ["MOE_FUZZ"])
    check([seed], worlds(seed))


def test_a_seed_is_the_same_case_again_and_seeds_differ():
    words = [tuple(case(seed, 4).case.words) for seed in (1, 2, 3, 1, 2, 3)]
    assert words[:3] == words[3:]
    assert len(set(words)) == 3
