"""Freed memory stays with the process, where the C library can be asked to keep it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from moe.kernels.memory import keep_freed_memory
torch.set_num_threads(1)
kept = keep_freed_memory()
for _ in range(16):  # fragments left by importing are used up
    torch.ones(8 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(8 << 20)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_a_tensor_of_a_size_seen_before_faults_no_page_in():
    kept, faults = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout.split()
    assert kept == "True"
    assert int(faults) < 1000  # 4 fresh mappings of 32 MiB would be 32,768
