"""The folder of checkpoints: names, what is committed, what is left over, what is kept."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

from moe import faults
from moe.checkpoint.manifest import Damaged, read_manifest, sync_folder
from moe.errors import CheckpointError

log = logging.getLogger("moe.checkpoint")
_COMMITTED = re.compile(r"step-(\d{8,})")
_REPLACED = re.compile(r"(step-(\d{8,}))\.old-[0-9a-f]+")
_LEFT_OVER = re.compile(r"step-\d{8,}\.(tmp|old)-[0-9a-f]+|trash-step-\d{8,}-[0-9a-f]+")


def name_of(step: int) -> str:
    """The folder name of a committed step."""
    return f"step-{step:08d}"


def committed(folder: Path) -> dict[int, Path]:
    """Step → path of every committed checkpoint, newest first; damaged ones included."""
    found = {}
    for path in _entries(folder):
        if match := _COMMITTED.fullmatch(path.name):
            found[int(match[1])] = path
    for path in _entries(folder):  # a kill in the middle of a replacement leaves the old one under this name
        if match := _REPLACED.fullmatch(path.name):
            found.setdefault(int(match[2]), path)
    return dict(sorted(found.items(), reverse=True))


def unfinished(folder: Path) -> list[str]:
    """Names of the folders that a killed save left behind."""
    return [path.name for path in _entries(folder) if ".tmp-" in path.name and _LEFT_OVER.fullmatch(path.name)]


def temporary(folder: Path, step: int) -> Path:
    """A new folder to write a step in."""
    path = folder / f"{name_of(step)}.tmp-{secrets.token_hex(4)}"
    path.mkdir()
    return path


def commit(temporary: Path, step: int) -> None:
    """Give a finished folder its final name. One of the same step is replaced, and it stays findable until then."""
    final = temporary.parent / name_of(step)
    old = None
    if final.exists():
        old = final.with_name(f"{final.name}.old-{secrets.token_hex(4)}")
        final.rename(old)
    temporary.rename(final)
    sync_folder(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def point_to(folder: Path, step: int) -> None:
    """Name the newest checkpoint in the file `latest`, for people and scripts; nothing here reads it."""
    pointer = folder / f"latest.{secrets.token_hex(4)}"
    pointer.write_text(name_of(step) + "\n")
    os.replace(pointer, folder / "latest")


def clean(folder: Path) -> None:
    """Remove what killed saves and removals left behind, once a replacement that was cut short is undone."""
    for path in _entries(folder):
        if (match := _REPLACED.fullmatch(path.name)) and not (folder / match[1]).exists():
            path.rename(folder / match[1])
        elif _LEFT_OVER.fullmatch(path.name) or re.fullmatch(r"latest\.[0-9a-f]{8}", path.name):
            _remove(path)


def retain(folder: Path, *, keep: int, durable_every: int | None, just: int) -> None:
    """Remove all whole checkpoints but the newest `keep`, the durable ones and the step `just` committed.

    Damaged ones neither count nor go: they may be all there is to look into.
    """
    whole = [step for step, path in committed(folder).items() if _whole(path)]
    for step in surplus(whole, keep=keep, durable_every=durable_every):
        if step == just:
            continue
        trash = folder / f"trash-{name_of(step)}-{secrets.token_hex(4)}"
        (folder / name_of(step)).rename(trash)  # a kill while files go must not leave a step that looks committed
        faults.point("checkpoint/retention", just)
        _remove(trash)


def surplus(steps: Iterable[int], *, keep: int, durable_every: int | None) -> list[int]:
    """Those of the steps that are neither among the newest nor durable."""
    old = sorted(steps, reverse=True)[keep:]
    return [step for step in old if durable_every is None or step % durable_every]


def _whole(path: Path) -> bool:
    try:
        read_manifest(path)
    except Damaged:
        return False
    except CheckpointError:
        return True  # of a newer format
    return True


def _remove(path: Path) -> None:
    try:
        path.unlink() if path.is_file() or path.is_symlink() else shutil.rmtree(path)
    except OSError as error:
        log.warning("%s cannot be removed: %s", path, error)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
