"""How every benchmark says what it measured: a table on the screen, and a file that names commit, machine and date."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Processor (or GPU) and how many of it, as in "AMD EPYC, 4 cores"."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {torch.cuda.device_count()} GPU"
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{found[1].strip() if found else platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def commit() -> str:
    """The commit measured, with a + if tracked files of the package or the benchmarks differ; without a repository, $MOE_COMMIT."""
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", ".", "../moe"], cwd=here, capture_output=True, check=False)
    return (head or os.environ.get("MOE_COMMIT", "unknown")) + ("+" if changed.returncode == 1 else "")


def facts_here() -> dict[str, Any]:
    """Where and when figures are taken, and of what."""
    today = datetime.date.today().isoformat()
    return {"commit": commit(), "machine": machine(), "date": today, "torch": torch.__version__}


def slug(machine: str) -> str:
    """A machine's name as it stands in the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table; the first row names the columns."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_report(
    name: str,
    table: Sequence[dict[str, Any]],
    *,
    raw: Any,
    json_file: Path | None = None,
    quick: bool = False,
    notes: Sequence[str] = (),
    folder: Path = RESULTS,
    facts: dict[str, Any] | None = None,
) -> None:
    """Print the table, write raw figures to `json_file`, and, unless quick, both into `folder`.

    facts: as of `facts_here`, where the figures were not taken here and now.
    """
    facts = {"benchmark": name} | (facts_here() if facts is None else facts) | {"quick": quick}
    text = "\n".join(
        [
            f"# {name}",
            "",
            f"Commit {facts['commit']} · {facts['machine']} · {facts['date']} · torch {facts['torch']}{' · quick' if quick else ''}",
            "",
            markdown(table),
            "",
            *(f"- {note}" for note in notes),
        ]
    )
    print(text, flush=True)
    content = json.dumps(facts | {"rows": raw}, indent=1)
    if json_file is not None:
        json_file.write_text(content + "\n")
    if quick:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, body in (("md", text.rstrip()), ("json", content)):
        path = folder / f"{name}_{slug(facts['machine'])}_{facts['date']}.{suffix}"
        path.write_text(body + "\n")
        print(f"wrote {path}")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
