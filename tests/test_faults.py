"""Fault points: what they are read from, when they strike, and that they cost nothing unset."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from moe import faults


def strike(clauses: str, calls: str, **environment: str) -> subprocess.CompletedProcess:
    program = f"from moe import faults\n{calls}\nprint('through')"
    return subprocess.run(
        [sys.executable, "-c", program], env={"MOE_FAULTS": clauses} | environment, capture_output=True, text=True, timeout=30, check=False
    )


def test_unset_nothing_happens():
    assert faults.point("anywhere", step=3) is False


def test_a_clause_is_an_action_with_conditions():
    kill, delay = faults.parse("kill@step=3, rank=1,point=loop/step,once=/tmp/x; delay=2.5@point=save;")
    assert kill == faults.Fault("kill", 0.0, {"step": "3", "rank": "1", "point": "loop/step"}, "/tmp/x")
    assert delay == faults.Fault("delay", 2.5, {"point": "save"}, None)


@pytest.mark.parametrize("text", ["explode@step=3", "kill@stage=3"])
def test_what_cannot_be_read_is_named_with_what_could(text):
    with pytest.raises(ValueError, match="choose from"):
        faults.parse(text)


@pytest.mark.parametrize(
    ("action", "code", "error"),
    [
        ("kill", -signal.SIGKILL, ""),
        ("term", -signal.SIGTERM, ""),
        ("exit0", 0, ""),
        ("raise", 1, "InjectedFault"),
        ("enospc", 1, "No space left"),
    ],
)
def test_the_action_is_taken(action, code, error):
    done = strike(f"{action}@point=save", "faults.point('load'); faults.point('save')")
    assert done.returncode == code
    assert "through" not in done.stdout
    assert error in done.stderr


def test_conditions_must_all_hold():
    calls = "faults.point('save', step=2); faults.point('load', step=3)"
    assert strike("kill@point=save,step=3,rank=1", calls, RANK="1").returncode == 0
    assert strike("kill@point=save,step=2,rank=1", calls, RANK="0").returncode == 0
    assert strike("kill@point=save,step=2,rank=1", calls, RANK="1").returncode == -signal.SIGKILL


def test_once_disarms_it_for_the_next_process(tmp_path):
    clause = f"kill@once={tmp_path / 'done'}"
    assert strike(clause, "faults.point('x')").returncode == -signal.SIGKILL
    assert "through" in strike(clause, "faults.point('x')").stdout


def test_nan_asks_the_caller():
    assert "True False through" in strike("nan@step=1", "print(faults.point('x', step=1), faults.point('x', step=2), end=' ')").stdout
