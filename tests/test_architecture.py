"""The plan of the house, held: budgets, floors, tables, and what may be imported where.

Raising a number here is a reviewed one-line change with a reason.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moe"
FILES = sorted(PACKAGE.rglob("*.py"))
PROGRAMS = [*FILES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
LINES_OF_A_FILE = 400
LINES_OF_A_FUNCTION = 60
DEEPER = {"moe/checkpoint/families"}  # the one folder below the second level
VAGUE = {"utils", "util", "common", "helpers", "misc"}

TABLES = {  # table: the folder whose tests must speak of each of its rows
    "moe.routers:ROUTERS": "tests/routers",
    "moe.kernels:GROUPED_MLP": "tests/kernels",
    "moe.kernels:SORT": "tests/kernels",
    "moe.parallel:POLICIES": "tests/parallel",
    "moe.parallel:OWNERS": "tests/parallel",
    "moe.engines:ENGINES": "tests/engines",
    "moe.data.sources:SOURCES": "tests/data",
    "moe.surgery:VARIANTS": "tests/surgery",
    "moe.scaling:LAWS": "tests/scaling",
}
ROWS = [(table, name) for table in TABLES for name in getattr(importlib.import_module(table.split(":")[0]), table.split(":")[1])]


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, at any depth of the file."""
    named = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return named


@pytest.mark.parametrize("path", PROGRAMS, ids=where)
def test_a_file_is_one_idea_and_short(path):
    assert len(path.read_text().splitlines()) <= LINES_OF_A_FILE
    assert path.stem not in VAGUE


@pytest.mark.parametrize("path", PROGRAMS, ids=where)
def test_a_function_does_one_thing(path):
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno + 1 > LINES_OF_A_FUNCTION}
    assert not long


@pytest.mark.parametrize("path", FILES, ids=where)
def test_a_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_folders_are_two_levels_deep():
    deep = {where(path.parent) for path in FILES if len(path.relative_to(ROOT).parts) > 3}
    assert deep <= DEEPER


def test_the_top_level_is_the_agreed_one():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listed.stdout.splitlines()}
    agreed = {
        "pyproject.toml",
        "moe",
        "launch",
        "configs",
        "tests",
        "benchmarks",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
    }
    assert {name for name in top if not name.startswith(".")} <= agreed


@pytest.mark.parametrize("path", FILES, ids=where)
def test_communication_and_triton_stay_on_their_floors(path):
    floor = path.relative_to(PACKAGE).parts[0]
    named = imports(path)
    if floor not in ("parallel", "engines", "checkpoint"):
        assert not {name for name in named if name.startswith("torch.distributed")}
    if floor != "kernels":
        assert not {name for name in named if name.split(".")[0] == "triton"}
    assert floor == "shapes.py" or not {name for name in named if name.split(".")[0] == "jaxtyping"}


def test_no_module_imports_itself_in_a_circle():
    """At any depth of the file: an import inside a function hides a circle, it does not remove it."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    edges = {name: {other for other in imports(path) if other in names and other != name} for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(edges[name] - {name.rpartition(".")[0]}):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(names):
        visit(name, ())


def test_the_floors_contract_holds():
    pytest.importorskip("importlinter")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize(("table", "name"), ROWS, ids=[f"{table.split(':')[1]}-{name}" for table, name in ROWS])
def test_each_row_of_a_table_loads_and_is_tested(table, name):
    module, _, attribute = table.partition(":")
    target, _, kind = getattr(importlib.import_module(module), attribute)[name].partition(":")
    assert hasattr(importlib.import_module(target), kind)
    tests = "".join(path.read_text() for path in (ROOT / TABLES[table]).glob("test_*.py"))
    stem = target.rpartition(".")[2]
    assert attribute in tests or f'"{name}"' in tests or target in tests or stem in tests, f"no test in {TABLES[table]} speaks of {name}"


@pytest.mark.parametrize("floor", ["kernels", "routers"])
def test_arithmetic_and_decisions_need_torch_alone(floor):
    of_triton = (
        "triton_tiles",
        "triton_sort",
        "triton_softmax",
        "triton_top_k",
        "triton_split",
        "triton_forward",
        "triton_backward",
        "triton_mlp",
        "tune",
    )  # only its users import them
    blocked = ["pydantic", "jaxtyping", "beartype", "yaml", "typer", "rich", "numpy", "triton", "megablocks", "transformers"]
    modules = [f"moe.{floor}", *(f"moe.{floor}.{p.stem}" for p in (PACKAGE / floor).glob("[a-z]*.py") if not p.stem.startswith(of_triton))]
    program = f"import sys; sys.modules.update(dict.fromkeys({blocked}, None)); import {', '.join(modules)}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]


def test_importing_the_package_or_its_words_imports_no_torch():
    program = "import sys, moe, moe.errors, moe.faults, moe.cli; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
