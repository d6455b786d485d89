"""`moe verify` as it is typed: real processes, a table, JSON and an exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe.cli import app
from moe.config import load
from moe.verify import prove
from moe.verify.compare import Row
from moe.verify.layouts import parse
from moe.verify.plan import plan
from moe.verify.report import record, table

ROOT = Path(__file__).parents[2]
DEBUG, MODEL, CPU = (str(ROOT / "configs" / name) for name in ("debug.yaml", "models/30m.yaml", "train/cpu.yaml"))


def verify(*words: str, timeout: float = 120) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "moe", "verify", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def test_a_layout_is_verified_on_real_processes_and_written_as_json(tmp_path):
    out = tmp_path / "found.json"
    done = verify(
        f"{MODEL}+{CPU}", "--layouts", "engine=fsdp2,ranks=2,expert_ranks=2", "--dtype", "float64", "--steps", "2", "--json", str(out)
    )
    assert done.returncode == 0, done.stderr
    assert "all 2 checks PASS" in done.stdout
    (entry,) = json.loads(out.read_text())
    assert (entry["recipe"], entry["passes"], entry["steps"]) == (f"{MODEL}+{CPU}", True, 2)
    assert [(check["optimizer"], check["backend"]) for check in entry["checks"]] == [("adamw", "threads"), ("plain sgd", "threads")]
    assert {row["family"] for row in entry["checks"][1]["rows"]} >= {"router", "experts", "attention", "norms", "embeddings"}
    assert all(0 <= row["difference"] <= 1e-10 for check in entry["checks"] for row in check["rows"])


def test_a_miss_is_exit_code_1(monkeypatch):
    monkeypatch.setattr(prove, "verify", lambda *_, **__: False)
    assert CliRunner().invoke(app, ["verify", DEBUG]).exit_code == 1


def checks(difference: float):
    """A plan whose second check misses by so much."""
    found, _, _ = plan(load([DEBUG]), [parse("engine=ddp,ranks=2")], ["float64"])
    for check, worst in zip(found, (0.0, difference), strict=True):
        check.rows = [Row("loss", None, 1e-16, 1e-10, "loss", 0), Row("gradient", "experts", worst, 1e-10, "layers.0.moe.experts.up", 1)]
    return found


@pytest.mark.parametrize("difference", [0.5, float("nan")])
def test_a_miss_is_named_beneath_its_line(difference):
    text = table(checks(difference), [("engine=deepspeed,ranks=2", "it is not installed")], "cpu")
    line, cause, *_ = text.splitlines()[1:]
    assert line.startswith("engine=ddp,ranks=2  float64")
    assert line.endswith("FAIL")
    assert cause == f"    plain sgd: gradient of experts differs by {difference:.1e} (layers.0.moe.experts.up, step 1)"
    assert "left out, because it is not installed: engine=deepspeed,ranks=2" in text
    assert "1 of 2 checks FAIL" in text
    entry = json.loads(json.dumps(record("debug", checks(difference), [], "cpu", 3), allow_nan=False))
    assert not entry["passes"]
    assert [check["passes"] for check in entry["checks"]] == [True, False]


def test_what_a_rank_refuses_is_a_miss_with_its_sentence():
    found = checks(0.0)
    found[0].case.refusal, found[0].rows = "six experts cannot be cut", []
    assert "    adamw: six experts cannot be cut" in table(found, [], "cpu").splitlines()


@pytest.mark.parametrize("words", [["--layouts", "engine=ddp,ranks=1"], ["--dtype", "float16"], ["--steps", "0"], ["absent.yaml"]])
def test_bad_input_is_exit_code_2(words):
    done = CliRunner().invoke(app, ["verify", DEBUG, *words])
    assert done.exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs" / "models").glob("*.yaml")))
def test_every_model_passes_under_every_layout_that_fits(name):
    done = verify(f"configs/models/{name}", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
