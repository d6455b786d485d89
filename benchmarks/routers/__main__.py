"""Dispatch to one of the comparisons."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import benchmarks.routers

TABLES = {
    "regressors": "benchmarks.routers.regressors",
    "gradients": "benchmarks.routers.gradients",
    "language": "benchmarks.routers.language",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routers", description=benchmarks.routers.__doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of that table; TABLE --help lists them")
    chosen = parser.parse_args()
    module = importlib.import_module(TABLES[chosen.table])
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.routers {chosen.table}", description=module.__doc__)
    parser.add_argument("--json", type=Path, help="also write the raw rows to this file")
    parser.add_argument("--quick", action="store_true", help="something tiny, to see that it works; nothing goes into benchmarks/results")
    module.add_arguments(parser)
    module.run(parser.parse_args(chosen.options))


if __name__ == "__main__":
    main()
