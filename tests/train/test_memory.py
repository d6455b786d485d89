"""Out of memory ends in a sentence that says what is held and what to change; a CPU has no allocator to look into."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from moe.config import load
from moe.errors import ConfigError
from moe.kernels import memory as allocators
from moe.parallel.launch import _reason
from moe.train.inspect import inspect, show
from moe.train.memory import choices, kinds
from tests.engines.tiny_job import batch, engine
from tests.train.test_profile import recipe  # noqa: F401
from tests.workers import run_command as moe

GIB = 2**30


def test_out_of_memory_is_one_sentence_with_what_is_held_and_what_to_choose(recipe, tmp_path):  # noqa: F811
    fault = {"MOE_FAULTS": "oom@point=loop/learn,step=2"}
    done = moe("train", recipe, f"run.folder={tmp_path / 'run'}", **fault)
    assert done.returncode == 9
    assert len(done.stderr.strip().splitlines()) == 1
    assert "rank 0 ran out of memory in step 3, forward pass: 2.00 GiB were asked for; held: weights 0.00 GiB, gradients" in done.stderr
    assert "choose engine.recompute=full (activation checkpointing), train.accumulate=2 (" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_start_again_would_not_help():
    verdict = {"rank": 0, "code": 9, "message": "", "hung": False, "time": 0.0}
    failure = type("Failure", (), {"timestamp": 1, "exitcode": 9})()
    assert not _reason(1, {0: failure}, [verdict])["again"]


@pytest.mark.parametrize(
    ("words", "world", "activations", "expected"),
    [
        ([], 1, 1.0, ["engine.recompute=full", "train.accumulate=2", "a train.batch below 4"]),
        (["train.accumulate=4", "engine.recompute=full"], 1, 9.0, ["a train.batch below 4"]),
        (["train.accumulate=2"], 2, 9.0, ["engine.recompute=full", "engine.name=fsdp2", "a train.batch below 4"]),
        ([], 2, 0.1, ["engine.name=fsdp2", "engine.recompute=full", "train.accumulate=2", "a train.batch below 4"]),
        (["engine.name=fsdp2", "engine.recompute=full"], 4, 0.1, []),
    ],
)
def test_only_what_would_help_is_advised_the_most_promising_first(recipe, words, world, activations, expected):  # noqa: F811
    held = {"weights": GIB, "activations and the rest": int(activations * GIB)}
    found = choices(load([recipe], words), world, held)
    assert [text.split(" (")[0] for text in found] == expected


def test_weights_gradients_and_optimizer_state_are_counted_once():
    job = engine("ddp")
    job.step(batch(0), 0, 1e-2)
    size = sum(p.nbytes for p in job.model.parameters())
    found = kinds(job)
    assert found["weights"] == size
    assert size <= found["gradients"] <= 1.2 * size  # pieces of a bucket begin at round addresses
    assert found["optimizer state"] == 2 * size + 4 * len(list(job.model.parameters()))


def test_snapshots_of_a_cpu_are_refused(recipe, tmp_path):  # noqa: F811
    done = moe("train", recipe, f"run.folder={tmp_path / 'run'}", "log.memory=[2]", "parallel.device=cpu")
    assert done.returncode == ConfigError.exit_code
    assert "log.memory=[2] records a GPU's allocations, and this run is on a CPU; leave it out" in done.stderr
    with pytest.raises(ConfigError, match=r"log\.memory names step 6"):
        load([recipe], ["log.memory=[6]"])


def test_inspect_shows_the_peak_of_each_stage(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: {moe: {experts: 4}}\n")
    row = {"step": 1, "loss": 1.0, "tokens_per_second": 9.0, "memory_gib": 40.0}
    memory = {"resident": 20.0, "forward": 31.5, "backward": 40.0, "optimizer": 22.0}
    rows = [row | {"memory": memory}, row | {"step": 2, "memory": memory | {"forward": 32.25}}, row | {"step": 3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = inspect(tmp_path)
    assert facts["memory"] == memory | {"forward": 32.25}
    show(facts, Console(file=(out := io.StringIO()), width=80))
    assert "peak 40.00 GiB a GPU, 20.00 before a step" in out.getvalue()
    assert "by stage: forward 32.25, backward 40.00, optimizer 22.00" in out.getvalue()


def test_segments_grow_unless_the_user_has_said_how(monkeypatch):
    set_to = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", set_to.append)
    for name in (*allocators.SETTINGS, allocators.REGISTERED):
        monkeypatch.delenv(name, raising=False)
    assert allocators.expandable_segments()
    assert set_to == ["expandable_segments:True"]
    for name, value in (("PYTORCH_ALLOC_CONF", "max_split_size_mb:64"), ("PYTORCH_CUDA_ALLOC_CONF", ""), (allocators.REGISTERED, "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not allocators.expandable_segments()
    assert len(set_to) == 1
