"""Tile sizes of the Triton kernels: a table that is shipped, and a user's own, which `moe tune` writes.

Nothing is tuned while training. All ranks of a job use the first rank's table (`use`).
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe.errors import ConfigError

KERNELS = ("up", "down", "combine", "down_dgrad", "up_dgrad", "wgrad")
SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227}  # of a thread block, by architecture of the table
TABLE = "MOE_TRITON_TABLE"  # environment variable: path of the user's table
SHIPPED = Path(__file__).with_name("triton_configs.json")


class Config(NamedTuple):
    """How a kernel cuts its product.

    BLOCK_M x BLOCK_N is a tile of the result and BLOCK_K what a step of the reduction takes: rows x columns x contracted width,
    except in `wgrad`, whose result is a weight's gradient and whose reduction runs over rows. `up` keeps a tile per half of a
    gated weight. `combine` uses BLOCK_N and warps alone.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    warps: int
    stages: int
    group_m: int = 8  # row tiles that take a column of weights one after the other, while it is in the L2 cache
    tma: bool = False  # weights come through tensor descriptors: Hopper and newer
    persistent: bool = False  # a program a multiprocessor takes tile after tile: `down` and `up_dgrad` alone


class Entry(NamedTuple):
    """A configuration and what it is for: a result of N columns, K contracted (the result's rows in `wgrad`); None: any."""

    kernel: str
    arch: int
    itemsize: int  # bytes of an element
    n: int | None
    k: int | None
    rows: int  # mean rows per expert
    config: Config


class Shape(NamedTuple):
    """Experts of one layer on one rank, and how many tokens reach them at a time."""

    d: int = 2048
    f: int = 768
    experts: int = 128
    k: int = 8
    tokens: int = 8192
    dtype: torch.dtype = torch.bfloat16
    gated: bool = True
    keep: bool = True  # pre-activations are kept for the backward pass
    fixed: bool = True  # every token has k assignments
    scaled: bool = False  # the router scales gradients
    main_grad: torch.dtype | None = None  # weight gradients are added to ones of this dtype; None: stored


def lookup(kernel: str, arch: int, n: int, k: int, rows_per_expert: float, itemsize: int = 2) -> Config:
    """The configuration for a product, by the rule of `choose`, from the user's table and then the shipped one."""
    return _lookup(kernel, arch, n, k, bucket(rows_per_expert), itemsize)


def choose(own: Iterable[Entry], shipped: Iterable[Entry], kernel: str, arch: int, n: int, k: int, rows: int, itemsize: int = 2) -> Config:
    """The user's entry for exactly this N and K if there is one, else the shipped entry nearest in N and K; then nearest in rows.

    Near is by ratio. Rows are a power of two (`bucket`); of two equally near the one for fewer rows counts.
    """
    family = architecture(arch)

    def fitting(entries: Iterable[Entry]) -> list[Entry]:
        return [e for e in entries if (e.kernel, e.arch, e.itemsize) == (kernel, family, itemsize)]

    entries = [e for e in fitting(own) if (e.n, e.k) == (n, k)] or fitting(shipped)
    if not entries:
        raise ConfigError(
            f"no configuration of kernel {kernel} for architecture {arch} and elements of {itemsize} bytes; use backend torch"
        )
    return min(entries, key=lambda e: (_apart(e.n, n) + _apart(e.k, k), _apart(e.rows, rows), e.rows)).config


def bucket(rows_per_expert: float) -> int:
    """Mean rows per expert as a power of two, at least 1: the nearest by ratio."""
    return 1 << max(0, round(math.log2(max(rows_per_expert, 1))))


def architecture(arch: int) -> int:
    """The architecture of the table that a GPU of compute capability arch / 10 follows: the one with its instructions and limits."""
    if arch < 80:
        raise ConfigError(f"the Triton kernels need compute capability 8.0 or newer, this GPU has {arch / 10}; use backend torch")
    if arch in (86, 89) or arch >= 120:  # GeForce and workstation cards: 99 KiB of shared memory
        return 89
    return 100 if arch >= 100 else 90 if arch >= 90 else 80


def arch_of(device: torch.device) -> int:
    """Compute capability of a device, ten times; a CPU, where only Triton's interpreter runs, counts as 80."""
    return _capability(device.index) if device.type == "cuda" else 80


def table_path() -> Path:
    """Where the user's table lies: $MOE_TRITON_TABLE, else moe/triton.json in the folder of user settings."""
    if named := os.environ.get(TABLE):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "moe" / "triton.json"


def own_table() -> bytes:
    """The user's table as it is on disk, checked; empty if there is none."""
    path = table_path()
    if not path.exists() and TABLE not in os.environ:
        return b""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"the table of kernel configurations {path} cannot be read ({error.strerror}); unset {TABLE} or run moe tune"
        ) from None
    read(text, str(path))
    return text


def use(text: bytes) -> None:
    """Let this process choose from a table instead of the one on its disk; empty: from the shipped one alone."""
    _own.cache_clear()
    _lookup.cache_clear()
    _given[:] = [text]


def shipped(kernel: str, arch: int, itemsize: int) -> list[Config]:
    """The configurations that are shipped for a kernel, most rows first."""
    return [e.config for e in _shipped() if (e.kernel, e.arch, e.itemsize) == (kernel, architecture(arch), itemsize)]


def read(text: bytes, name: str) -> tuple[Entry, ...]:
    """Entries of a table; `name` is what an error calls it."""
    if not text:
        return ()
    try:
        return tuple(_entry(row) for row in json.loads(text)["entries"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{name} is not a table of kernel configurations ({error}); remove it, or write it anew with moe tune") from None


def row(entry: Entry) -> dict[str, Any]:
    """An entry as a table holds it."""
    tile, rest = entry.config[:3], entry.config._asdict()
    keys = {key: value for key, value in entry._asdict().items() if key != "config"}
    return keys | {"tile": list(tile)} | {key: rest[key] for key in ("warps", "stages", "group_m", "tma", "persistent")}


def _entry(row: dict[str, Any]) -> Entry:
    tile, warps, stages = row["tile"], row["warps"], row["stages"]
    config = Config(*tile, warps=warps, stages=stages, group_m=row["group_m"], tma=bool(row["tma"]), persistent=bool(row.get("persistent")))
    entry = Entry(row["kernel"], row["arch"], row["itemsize"], row["n"], row["k"], row["rows"], config)
    if entry.kernel not in KERNELS or entry.arch not in SHARED_KIB:
        raise ValueError(f"kernel {entry.kernel!r} of architecture {entry.arch!r} is unknown")
    sizes = {*range(4, 13)}  # exponents of tile sizes: 16 to 4096
    if not all(type(x) is int and x.bit_length() - 1 in sizes and x.bit_count() == 1 for x in tile):
        raise ValueError(f"tile {tile} is not of powers of two from 16 to 4096")
    if warps not in (1, 2, 4, 8, 16) or stages not in range(1, 9) or not (type(config.group_m) is int and config.group_m >= 1):
        raise ValueError(f"warps {warps}, stages {stages}, group_m {config.group_m} are out of range")
    return entry


def _apart(a: int | None, b: int | None) -> float:
    """How far apart two sizes are, in doublings."""
    return 0.0 if a is None or b is None else abs(math.log2(a) - math.log2(b))


_given: list[bytes] = []  # what `use` was told: one table for the process, as there is one for the job


@functools.cache
def _own() -> tuple[Entry, ...]:
    return read(_given[0], "the first rank's table") if _given else read(own_table(), str(table_path()))


@functools.cache
def _shipped() -> tuple[Entry, ...]:
    return read(SHIPPED.read_bytes(), SHIPPED.name)


@functools.cache
def _lookup(kernel: str, arch: int, n: int, k: int, rows: int, itemsize: int) -> Config:
    return choose(_own(), _shipped(), kernel, arch, n, k, rows, itemsize)


@functools.cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
