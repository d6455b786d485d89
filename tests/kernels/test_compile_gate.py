"""Shipped configurations compile for the GPUs they are meant for, and what comes out is what it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton runs on Linux only")

from tests.kernels.compile_gate import GOLDEN, PRODUCTS, Case, blocks, differences, faults, pipeline

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
GOOD |= {"buffers": 3, "ahead": 1, "shape": "m64n256k16", "blocks": 1, "advice": ""}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stack": 40}, "local memory"),
        ({"local": 10}, "local memory"),
        ({"shared": 228 * 1024}, "228 KiB of shared memory"),
        ({"mma": 0}, "no HGMMA"),
        ({"copies": 0}, "no asynchronous copy"),
        ({"ahead": 0}, "has 3 buffers and waits for all copies in every step; take more stages"),
        ({"buffers": 0}, "not pipelined"),
        ({"advice": "Potential Performance Loss: serialized"}, "ptxas warns: Potential Performance Loss: serialized"),
    ],
)
def test_machine_code_that_would_be_slow_or_not_start_is_refused(change, sentence):
    assert faults(case(), {"up_kernel": GOOD}) == []
    (wrong,) = faults(case(), {"up_kernel": GOOD | change})
    assert wrong.startswith("sm_90 up bfloat16 128x128x64 w8 s3: ")
    assert sentence in wrong


def test_down_dgrad_must_run_two_blocks_a_multiprocessor():
    assert faults(case("down_dgrad"), {"down_dgrad_kernel": GOOD | {"blocks": 2}}) == []
    (wrong,) = faults(case("down_dgrad"), {"down_dgrad_kernel": GOOD | {"registers": 133}})
    assert "down_dgrad_kernel runs one block a multiprocessor with 133 registers" in wrong


def test_kernels_that_multiply_nothing_need_no_tensor_cores():
    assert faults(case("combine"), {"combine_kernel": GOOD | {"mma": 0, "copies": 0, "buffers": 0, "ahead": 0}}) == []


def test_blocks_of_a_multiprocessor_are_bounded_by_registers_shared_memory_and_warps():
    assert blocks(90, {"registers": 128, "shared": 98328}, 8) == 2
    assert blocks(90, {"registers": 129, "shared": 98328}, 8) == 1, "registers are given out in eights: 136 * 256 * 2 > 65536"
    assert blocks(90, {"registers": 128, "shared": 116000}, 8) == 1
    assert blocks(89, {"registers": 16, "shared": 0}, 8) == 6
    assert blocks(80, {"registers": 32, "shared": 0}, 8) == 8


LOOP = """
$L__BB0_1:
	cp.async.commit_group;
	cp.async.wait_group 	0;
	@%p1 bra 	$L__BB0_1;
$L__BB0_2:
	cp.async.wait_group 	4;
	wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {%r1}, %rd1, %rd2;
	wgmma.wait_group.sync.aligned 1;
	cp.async.commit_group;
	cp.async.commit_group;
	@%p2 bra 	$L__BB0_2;
	cp.async.wait_group 	0;
"""
BUFFERS = "%a = ttg.local_alloc : () -> !ttg.memdesc<4x128x64xbf16, #shared>\n%b = ttg.local_alloc : () -> !ttg.memdesc<4x1xi64, #shared1>"


def test_a_pipeline_is_read_from_the_product_loop_alone():
    assert pipeline(BUFFERS, LOOP) == {"buffers": 4, "ahead": 2, "shape": "m64n256k16"}
    assert pipeline(BUFFERS, LOOP.replace("wait_group \t4", "wait_group \t1"))["ahead"] == 0, "half of a step's copies"
    tma = LOOP.replace("\tcp.async.wait_group \t4;", "\tcp.async.bulk.tensor.2d;").replace("cp.async.commit_group;", "")
    assert pipeline(BUFFERS, tma)["ahead"] == 2
    assert pipeline("", "ret;") == {"buffers": 0, "ahead": 0, "shape": ""}


def test_on_hopper_every_product_copies_ahead_and_down_dgrad_runs_two_blocks_a_multiprocessor():
    found = {name: kernels for name, kernels in json.loads(GOLDEN.read_text())["cases"].items() if name.startswith("sm_90 ")}
    products = {name: f for name, kernels in found.items() if name.split()[1] in PRODUCTS for k, f in kernels.items() if k != "sum_blocks"}
    assert len(products) > 10
    assert [name for name, f in products.items() if f["ahead"] < 1 or f["local"] or f["stack"]] == []
    two = {name: f["blocks"] for name, f in products.items() if "down_dgrad" in name and "float32" not in name}
    assert [name for name, blocks in two.items() if blocks < 2] == []
    wgrad = [f for name, f in products.items() if name.startswith("sm_90 wgrad") and "128x256x64" in name]
    assert wgrad
    assert all(f["buffers"] >= 3 and f["shape"] == "m64n256k16" for f in wgrad)


def test_a_change_of_machine_code_is_named_figure_by_figure():
    golden = {"a": {"up_kernel": GOOD}, "b": {"up_kernel": GOOD}, "not compiled now": {"up_kernel": GOOD}}
    made = {"a": {"up_kernel": GOOD | {"registers": 200, "mma": 4}}, "b": {"other": GOOD}}
    assert differences(golden, made) == ["a [up_kernel]: registers 190 → 200, mma 8 → 4", "b [other]: new", "b [up_kernel]: gone"]
    assert differences(golden, golden) == []


def test_configurations_that_spill_or_do_not_copy_ahead_turn_the_gate_red(tmp_path):
    rest = {"arch": 90, "itemsize": 2, "n": None, "k": None, "rows": 512, "group_m": 8, "persistent": False}
    spills = rest | {"kernel": "up_dgrad", "tile": [128, 256, 64], "warps": 4, "stages": 3, "tma": True}
    waits = rest | {"kernel": "wgrad", "tile": [128, 128, 64], "warps": 8, "stages": 2, "tma": False}
    (tmp_path / "table.json").write_text(json.dumps({"entries": [spills, waits]}))
    done = run(GATE, "--fast", "--table", tmp_path / "table.json")
    assert done.returncode == 1
    assert "up_dgrad_kernel keeps values in local memory" in done.stderr
    assert "wgrad_kernel has 2 buffers and waits for all copies in every step" in done.stderr
