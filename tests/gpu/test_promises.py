"""What a run promises on a GPU: the same bits under `train.deterministic`, and an end to waiting within `parallel.timeout`."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from moe.checkpoint.weights import load_weights
from moe.errors import CollectiveTimeout
from moe.parallel import deadline
from moe.parallel.host_copy import to_host
from tests.gpu.problems import DEVICE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")]
RECIPE = """
model: {layers: 2, d_model: 256, heads: 4, context: 256, moe: {experts: 8, d_expert: 128, d_shared: 128, router: {name: %s}}}
data: {sequence: 256, sources: [stdlib]}
train: {steps: 6, batch: 16, accumulate: 2, dtype: bfloat16, deterministic: true}
evaluate: {every: 100, sequences: 16, sample_tokens: 8}
checkpoint: {every: 3}
parallel: {device: %s}
"""


@pytest.mark.parametrize("router", ["top_k", "expert_choice, leak: allow", "sparse_ot"])
def test_a_run_again_and_a_run_stopped_and_resumed_end_with_the_same_bits(tmp_path, router):
    """In processes of their own: cuBLAS reads its variable once."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE % (router, DEVICE))
    ends = []
    for name, stops in (("whole", [6]), ("again", [6]), ("resumed", [3, 6])):
        for steps in stops:
            command = [sys.executable, "-m", "moe", "train", str(recipe), f"run.folder={tmp_path / name}", f"train.steps={steps}"]
            command.append("schedule.name=constant")  # of another length: the rate must not depend on it
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stderr
        ends.append(load_weights(tmp_path / name / "weights"))
    for other in ends[1:]:
        assert all(torch.equal(ends[0][name], other[name]) for name in ends[0])


def test_a_device_that_does_not_get_as_far_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(deadline, "_limit", 0.2)
    x = torch.ones(1, device=DEVICE)
    assert to_host(x).item() == 1
    torch.cuda._sleep(4_000_000_000)  # cycles: two seconds
    began = time.monotonic()
    with pytest.raises(CollectiveTimeout, match=r"did not end within parallel\.timeout=0\.2 s"):
        to_host(x * 2)
    assert time.monotonic() - began < 1
    torch.cuda.synchronize()
    assert to_host(x * 2).item() == 2
