"""What every test stands on: one thread, a seed, shapes checked, memory that is not zero by luck.

Shapes in signatures of the checked packages are enforced while tests run, except under torch.compile, which cannot trace the
checker, and in the ranks of `run_ranks`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its own functions are made for one or the other

try:
    import beartype  # noqa: F401
    import jaxtyping
except ImportError:  # the GPU lane runs on whatever Python is there
    jaxtyping = None

# custom operators, Triton's interpreter and a compiled backward read the bare function, so files that have such are left alone
FILES = (Path(__file__).parents[1] / "moe" / "kernels").glob("*.py")
KERNELS = [path for path in FILES if not any(word in path.read_text() for word in ("torch.library", "@triton.jit", "once_differentiable"))]
CHECKED = ["moe.routers", "moe.model", *(f"moe.kernels.{path.stem}" for path in KERNELS if path.stem != "__init__")]
EMPTY = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]

if jaxtyping is not None:
    jaxtyping.install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")  # an int is a float


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _compile_without_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first torch.compile of a test to its end, shapes are not checked and fresh memory is not poisoned."""
    compile = torch.compile

    def plain_compile(*args, **kwargs):
        modules = [module for name, module in list(sys.modules.items()) if name.split(".")[0] in ("moe", "tests")]
        classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
        for owner in (*modules, *(c for c in classes if c.__module__.startswith("moe."))):
            for name, value in list(vars(owner).items()):
                bare = _unchecked(value)
                if bare is not value:
                    monkeypatch.setattr(owner, name, bare)
        for owner, name in EMPTY:
            monkeypatch.setattr(owner, name, getattr(getattr(owner, name), "original", getattr(owner, name)))
        return compile(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", plain_compile)


def _unchecked(value):
    """A function, method or property of a checked package as it was written; anything else as it is."""
    if isinstance(value, property):
        return property(_unchecked(value.fget), value.fset, value.fdel) if _unchecked(value.fget) is not value.fget else value
    if isinstance(value, staticmethod | classmethod):
        return type(value)(_unchecked(value.__func__)) if _unchecked(value.__func__) is not value.__func__ else value
    checked = getattr(getattr(value, "__code__", None), "co_filename", "").endswith("jaxtyping/_decorator.py")
    return value.__wrapped__ if checked else value


@pytest.fixture(autouse=True)
def _poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tests/kernels, memory that moe.kernels asks for comes full of NaN (the largest value for integers)."""
    if request.path.parent.name != "kernels":
        return
    for owner, name in EMPTY:
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate):
    def poisoned(*args, **kwargs):
        x = allocate(*args, **kwargs)
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("moe.kernels") or x.is_meta:
            return x
        if x.dtype == torch.bool:
            return x.fill_(True)
        return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)

    poisoned.original = allocate
    return poisoned
