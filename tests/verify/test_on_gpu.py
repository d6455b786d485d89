"""`moe verify` where there is a GPU: NCCL's collectives and the GPU's backend, in every dtype."""

from __future__ import annotations

import pytest
import torch

from moe.parallel.drift import digest
from tests.verify.test_prove import DEBUG, verify

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_gpu_under_fsdp2_trains_like_one_under_ddp(dtype):
    done = verify(DEBUG, "--layouts", "engine=fsdp2,ranks=1", "--dtype", dtype)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NCCL on GPUs" in done.stdout


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_layouts_over_gpus_train_like_one_gpu():
    done = verify(DEBUG, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_digest_does_not_depend_on_where_a_tensor_lies():
    for x in (torch.randn(300_000), torch.randn(7, dtype=torch.float64), torch.randn(5).bfloat16(), torch.arange(3), torch.empty(0)):
        assert digest(x.cuda()).cpu() == digest(x)
