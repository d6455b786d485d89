"""A stand-in for the processes of a study."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from moe.studies import runner


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Processes of a study run the stand-in."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {Path(__file__).parent / "trainer.py"} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(runner, "_LOOK_SECONDS", 0.02)
