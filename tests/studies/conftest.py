"""One planted study, fitted once for all tests that read it; a stand-in for the processes of a study."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from moe.studies import runner
from moe.studies.compare import fits_of
from tests.studies.planted import study


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """Its folder, with fit.json."""
    folder = study(tmp_path_factory.mktemp("studies") / "sparsity")
    fits_of(folder, draws=20)
    return folder


@pytest.fixture(scope="session")
def fits(planted):
    return fits_of(planted)


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Processes of a study run the stand-in."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {Path(__file__).parent / "trainer.py"} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(runner, "_LOOK_SECONDS", 0.02)
