"""The GPU lane is collected by a Python that has torch, Triton and pytest, and nothing else of what the package needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABSENT = ("pydantic", "jaxtyping", "beartype", "grain", "typer", "rich", "safetensors", "tokenizers", "transformers", "scipy", "yaml")
BLOCK = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("marks", ["gpu", "not gpu and not slow"])
def test_tests_of_kernels_are_collected_with_torch_alone(marks):
    command = [sys.executable, "-c", BLOCK, "-m", marks, "--collect-only", "-q", "-p", "no:cacheprovider", "tests/kernels", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_the_kernel_benchmark_runs_with_torch_alone():
    code = BLOCK.replace("import pytest\nsys.exit(pytest.main(sys.argv[1:]))", "from benchmarks.kernels import main\nmain()")
    command = [sys.executable, "-c", code, "--quick", "--layers", "torch"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_gpu_lane_takes_the_tests_of_kernels_where_the_rest_cannot_be_imported(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCK.partition("import pytest")[0])
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    command = ["bash", "launch/test.sh", "--gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "tests/gpu/test_triton.py::" in done.stdout
    assert "tests/verify" not in done.stdout
