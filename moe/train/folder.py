"""The run's folder: recipe, environment, metrics, checkpoints, samples, weights; and whether a recipe may go on in it."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import moe
from moe.config import dump, load
from moe.errors import ConfigError, NoSpace
from moe.recipe import Recipe

# What may differ from the recipe a run began with: it changes how the run is carried out, not what is learned.
FREE = (
    "run",
    "parallel",
    "engine",
    "checkpoint",
    "evaluate",
    "log",
    "model.moe.backend",
    "train.accumulate",
    "train.steps",
    "train.check_replicas",
    "train.deterministic",
    "train.skip_limit",
    "train.restarts",
)


def open_folder(recipe: Recipe) -> Path:
    """Make the run's folder, or go on in one that was begun with the same recipe; writes recipe and environment.

    A start that failed before its first step binds the folder to nothing.
    """
    folder = Path(recipe.run.folder).expanduser()
    known = folder / "recipe.yaml"
    if known.exists() and begun(folder):
        differing = differences(load([known], []), recipe)
        if differing:
            key, before, now = differing[0]
            more = f" (and {len(differing) - 1} more keys)" if len(differing) > 1 else ""
            raise ConfigError(
                f"{folder} holds a run of another recipe: {key} was {before!r} and is now {now!r}{more}; set run.folder to a new folder"
            )
    elif folder.is_dir() and any(folder.iterdir()) and not known.exists():
        raise ConfigError(f"{folder} is not empty and holds no run; set run.folder to a new folder")
    with writing(folder):
        for part in ("checkpoints", "samples"):
            (folder / part).mkdir(parents=True, exist_ok=True)
    write_whole(known, dump(recipe))
    write_whole(folder / "environment.json", json.dumps(environment(), indent=2) + "\n")
    return folder


def begun(folder: Path) -> bool:
    """Whether a run's folder holds anything that was learned."""
    metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    return (metrics.is_file() and metrics.stat().st_size > 0) or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def differences(before: Recipe, now: Recipe) -> list[tuple[str, Any, Any]]:
    """Keys, with both values, in which two recipes would train different models."""
    a, b = flatten(before.model_dump()), flatten(now.model_dump())
    return [
        (key, a.get(key), b.get(key))
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and not any(key == free or key.startswith(free + ".") for free in FREE)
    ]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"model.moe.experts": 8, …}: every leaf of a recipe under its dotted key."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else None
    if items is None:
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in items:
        leaves |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def processor() -> str:
    """The processor's name where the system tells it, as in "AMD EPYC"; its architecture elsewhere."""
    file = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", file.read_text()) if file.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """What the run was made with: versions, machine, commit."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or [processor()]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "moe": moe.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "devices": devices,
        "cpus": os.cpu_count(),
        "world": int(os.environ.get("WORLD_SIZE", "1")),
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }


def commit() -> str | None:
    """Git commit of the package's checkout, with "+changes" when files differ from it; None outside a checkout."""
    package = Path(moe.__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=package, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        return head + ("+changes" if git("status", "--porcelain", "--untracked-files=no", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step, so that a kill leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write `path`, in a run's folder, into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"{path} cannot be written, because the disk is full; free some space, and the same command goes on") from None
        raise ConfigError(f"{path} cannot be written ({error.strerror}); set run.folder to a folder that can") from None
