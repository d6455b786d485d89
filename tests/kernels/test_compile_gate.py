"""Shipped configurations compile for the GPUs they are meant for, and what comes out is what it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton runs on Linux only")

from tests.kernels.compile_gate import Case, differences, faults

ROOT = Path(__file__).parents[2]
GATE = ROOT / "tests" / "kernels" / "compile_gate.py"
OTHER = "MOE_TRITON_OTHER"  # a folder with another Triton, from launch/triton.sh


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = os.pathsep.join(filter(None, (environment.pop("PYTHONPATH", ""), str(ROOT))))
    env = inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | environment
    return subprocess.run([sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True, check=False)


def test_configurations_compile_without_private_memory_and_with_asynchronous_copies():
    done = run(GATE, "--fast")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_every_shipped_configuration_of_every_architecture_compiles():
    done = run(GATE)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_another_triton_compiles_and_interprets_the_same_kernels():
    folder = os.environ.get(OTHER)
    if not folder:
        pytest.skip(f"needs another Triton: bash launch/triton.sh DIR 3.6.0, then {OTHER}=DIR bash launch/test.sh --all")
    done = run(GATE, PYTHONPATH=folder)
    assert done.returncode == 0, done.stderr
    tests = sorted(path for path in Path(__file__).parent.glob("test_triton_*.py"))
    done = run("-m", "pytest", "-q", "-m", "not slow and not gpu", *tests, PYTHONPATH=folder)
    assert done.returncode == 0, done.stdout[-4000:]


def case(kernel: str = "up", **changes) -> Case:
    import torch

    from moe.kernels.triton_configs import Config

    return Case(kernel, "", 90, torch.bfloat16, Config(128, 128, 64, 8, 3))._replace(**changes)


GOOD = {"registers": 190, "stack": 0, "instructions": 900, "mma": 8, "copies": 12, "local": 0, "shared": 147456}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stack": 40}, "local memory"),
        ({"local": 10}, "local memory"),
        ({"shared": 228 * 1024}, "228 KiB of shared memory"),
        ({"mma": 0}, "no HGMMA"),
        ({"copies": 0}, "no asynchronous copy"),
    ],
)
def test_machine_code_that_would_be_slow_or_not_start_is_refused(change, sentence):
    assert faults(case(), {"up_kernel": GOOD}) == []
    (wrong,) = faults(case(), {"up_kernel": GOOD | change})
    assert wrong.startswith("sm_90 up bfloat16 128x128x64 w8 s3: ")
    assert sentence in wrong


def test_kernels_that_multiply_nothing_need_no_tensor_cores():
    assert faults(case("combine"), {"combine_kernel": GOOD | {"mma": 0, "copies": 0}}) == []


def test_a_change_of_machine_code_is_named_figure_by_figure():
    golden = {"a": {"up_kernel": GOOD}, "b": {"up_kernel": GOOD}, "not compiled now": {"up_kernel": GOOD}}
    made = {"a": {"up_kernel": GOOD | {"registers": 200, "mma": 4}}, "b": {"other": GOOD}}
    assert differences(golden, made) == ["a [up_kernel]: registers 190 → 200, mma 8 → 4", "b [other]: new", "b [up_kernel]: gone"]
    assert differences(golden, golden) == []


def test_a_configuration_that_spills_turns_the_gate_red(tmp_path):
    entry = '{"kernel": "up_dgrad", "arch": 90, "itemsize": 2, "n": null, "k": null, "rows": 512, "tile": [128, 256, 64], "warps": 4, '
    (tmp_path / "table.json").write_text('{"entries": [' + entry + '"stages": 3, "group_m": 8, "tma": true}]}')
    done = run(GATE, "sm_90 up_dgrad bfloat16", "--table", tmp_path / "table.json")
    assert done.returncode == 1
    assert "up_dgrad_kernel keeps values in local memory" in done.stderr
