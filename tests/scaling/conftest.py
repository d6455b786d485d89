"""One planted study, fitted once for all tests that read it."""

from __future__ import annotations

import pytest

from moe.scaling.model_selection import fits_of
from tests.scaling.planted import study


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """Its folder, with fit.json."""
    folder = study(tmp_path_factory.mktemp("studies") / "sparsity")
    fits_of(folder, draws=20)
    return folder


@pytest.fixture(scope="session")
def fits(planted):
    return fits_of(planted)
