"""Token shards on disk: files of bare integers with an index of documents, read by position and never past their end."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe.errors import DataError

FORMAT, VERSION = "moe-tokens", 1
FULL_CHECK_BYTES = 2**28  # digests of larger folders would cost every rank seconds at every start: sizes only
_CHUNK = 2**24


@dataclass(frozen=True)
class Shard:
    """One file: `tokens` integers of `dtype` from byte `start` on."""

    path: Path
    dtype: str
    start: int
    tokens: int
    sha256: str = ""

    @property
    def size(self) -> int:
        """Bytes from the beginning of the file to the end of its tokens."""
        return self.start + self.tokens * np.dtype(self.dtype).itemsize

    def check(self) -> None:
        """Raise DataError unless the file is as long as it must be."""
        try:
            actual = self.path.stat().st_size
        except OSError as error:
            raise DataError(f"cannot read token shard {self.path}: {error.strerror}") from error
        if actual != self.size:
            raise DataError(f"token shard {self.path} has {actual} bytes instead of {self.size}; it was cut short or replaced")

    def read(self, first: int, count: int) -> np.ndarray:
        """`count` tokens from the `first` on; read, not mapped, because a mapped file that shrinks kills the process."""
        item = np.dtype(self.dtype).itemsize
        try:
            handle = os.open(self.path, os.O_RDONLY)
            try:
                parts = _pread(handle, self.start + first * item, count * item)
            finally:
                os.close(handle)
        except OSError as error:
            raise DataError(f"cannot read token shard {self.path}: {error.strerror}") from error
        if len(parts) != count * item:
            self.check()
            raise DataError(f"token shard {self.path} ended early at token {first + len(parts) // item} of {self.tokens}")
        return np.frombuffer(parts, self.dtype)


@dataclass
class TokenSet:
    """Shards read as one row of tokens; document i is tokens offsets[i] … offsets[i+1]-1, known by keys[i]."""

    shards: list[Shard]
    offsets: np.ndarray  # int64, one more than documents
    keys: np.ndarray  # uint64: the beginning of a hash of the document
    meta: dict[str, Any]

    def __post_init__(self) -> None:
        self.firsts = np.cumsum([0] + [shard.tokens for shard in self.shards])

    def read(self, first: int, count: int) -> np.ndarray:
        """Tokens first … first+count-1 (int64)."""
        shard = int(np.searchsorted(self.firsts, first, "right")) - 1
        parts = []
        while count > 0:
            here = min(count, int(self.firsts[shard + 1]) - first)
            parts.append(self.shards[shard].read(first - int(self.firsts[shard]), here))
            first, count, shard = first + here, count - here, shard + 1
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


def write_index(folder: Path, tokens: TokenSet) -> None:
    """Write meta.json, offsets.npy and keys.npy; shards inside `folder` are named relative to it."""
    for name in ("offsets", "keys"):
        np.save(folder / f"{name}.npy", getattr(tokens, name), allow_pickle=False)
    shards = [asdict(shard) | {"path": _name(shard.path, folder)} for shard in tokens.shards]
    index = {name: file_digest(folder / f"{name}.npy") for name in ("offsets", "keys")}
    meta = {"format": FORMAT, "version": VERSION, **tokens.meta, "tokens": int(tokens.firsts[-1]), "shards": shards, "sha256": index}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def open_tokens(folder: Path, *, elsewhere: bool = False) -> TokenSet:
    """A folder of shards that `write_index` described; `elsewhere` allows shards outside of it."""
    meta = read_json(folder / "meta.json", FORMAT, VERSION)
    try:
        shards = [Shard(folder / s["path"], s["dtype"], int(s["start"]), int(s["tokens"]), s["sha256"]) for s in meta["shards"]]
        wanted = {folder / f"{name}.npy": meta["sha256"][name] for name in ("offsets", "keys")}
        total = int(meta["tokens"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{folder / 'meta.json'} is damaged: {error!r}; tokenise again") from error
    if not elsewhere and (outside := [s.path for s in shards if s.path.parent != folder]):
        raise DataError(f"{folder / 'meta.json'} names a shard outside of its folder: {outside[0]}")
    for shard in shards:
        shard.check()
    if sum(shard.size for shard in shards) <= FULL_CHECK_BYTES:
        wanted |= {shard.path: shard.sha256 for shard in shards}
    for path, digest in wanted.items():
        if (actual := file_digest(path)) != digest:
            raise DataError(f"{path} has changed since it was written: sha256 {actual[:12]}… instead of {digest[:12]}…")
    try:
        offsets, keys = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("offsets", "keys"))
    except ValueError as error:
        raise DataError(f"the index in {folder} is no NumPy array: {error}") from error
    _check_offsets(folder, offsets, keys, total, sum(shard.tokens for shard in shards))
    return TokenSet(shards, offsets, keys, meta)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def read_json(path: Path, form: str, version: int) -> dict[str, Any]:
    """The JSON object in `path`, refused unless it is of this format and version."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict) or found.get("format") != form:
        raise DataError(f"{path} does not describe {form}; give a folder that `moe tokenize` wrote")
    if found.get("version") != version:
        raise DataError(f"{path} has version {found.get('version')!r} of {form}, and this program reads {version}; tokenise again")
    return found


def _check_offsets(folder: Path, offsets: np.ndarray, keys: np.ndarray, total: int, in_shards: int) -> None:
    sound = (
        offsets.dtype == np.int64
        and keys.dtype == np.uint64
        and offsets.ndim == keys.ndim == 1
        and len(offsets) == len(keys) + 1
        and offsets[0] == 0
        and offsets[-1] == total == in_shards
        and bool((np.diff(offsets) > 0).all())
    )
    if not sound:
        raise DataError(f"{folder / 'offsets.npy'} does not fit its shards ({in_shards} tokens, {len(keys)} documents); tokenise again")


def _pread(handle: int, start: int, size: int) -> bytes:
    parts = []
    while size > 0 and (part := os.pread(handle, min(size, _CHUNK), start)):
        parts.append(part)
        start, size = start + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _name(path: Path, folder: Path) -> str:
    return path.name if path.parent == folder else str(path.absolute())
