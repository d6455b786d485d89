"""What this machine has, and which backends run on it."""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.table import Table

import moe
from moe.kernels import GROUPED_MLP, why
from moe.train.folder import processor

OPTIONAL = ("triton", "transformers", "datasets", "deepspeed", "megablocks", "tensorboard", "wandb")


def doctor() -> Table:
    """Versions, cores, GPUs, and of each backend why it does not run here."""
    table = Table.grid(padding=(0, 2))
    table.add_row("moe", moe.__version__)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    table.add_row("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}")
    cores = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads a process"
    table.add_row("cpu", f"{processor()}, {cores}")
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        table.add_row(f"gpu {i}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}")
    if not torch.cuda.is_available():
        table.add_row("gpu", "none that torch sees")
    for name in GROUPED_MLP:
        table.add_row(f"backend {name}", why(name) or "runs here")
    table.add_row("C compiler", compiler() or "not found: Triton cannot start a kernel without one; install gcc, or set CC to a compiler")
    table.add_row(
        "Python.h", header() or f"not found: Triton compiles with it; install python{'.'.join(platform.python_version_tuple()[:2])}-dev"
    )
    for package in OPTIONAL:
        try:
            table.add_row(package, version(package))
        except PackageNotFoundError:
            table.add_row(package, "not installed (optional)")
    return table


def compiler() -> str | None:
    """Path of the C compiler that Triton would take: CC, or the first of gcc and clang."""
    return next((found for name in (os.environ.get("CC"), "gcc", "clang") if name and (found := shutil.which(name))), None)


def header() -> str | None:
    """Path of this Python's C header, which Triton's launchers include."""
    path = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return str(path) if path.exists() else None
