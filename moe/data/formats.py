"""Token files that other programs wrote: nanoGPT, modded-nanogpt, Megatron, OLMo, NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from moe.data.shards import Shard
from moe.errors import DataError

Format = Literal["auto", "moe", "nanogpt", "modded", "megatron", "olmo", "npy"]
Integer = Literal["uint8", "uint16", "uint32", "int32", "int64"]

_MODDED_MAGIC, _MODDED_HEADER = 20240520, 256 * 4
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_HEADER = 9 + 8 + 1 + 8 + 8
_MEGATRON_DTYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_NUMPY_MAGIC = b"\x93NUMPY"


class Found(NamedTuple):
    """A foreign file: where its tokens lie, and its documents where it knows them."""

    shard: Shard
    offsets: np.ndarray | None  # int64 within the shard, 0 … tokens


def detect(path: Path) -> Format:
    """The format of a file or folder, from its first bytes, its name and its neighbours."""
    if path.is_dir():
        return "moe"
    if path.suffix == ".idx" or path.with_suffix(".idx").is_file():
        return "megatron"
    head = _head(path, 8)
    if head.startswith(_NUMPY_MAGIC):
        return "npy"
    if path.suffix == ".npy":
        return "olmo"
    if head[:4] == _MODDED_MAGIC.to_bytes(4, "little"):
        return "modded"
    if path.suffix == ".bin":
        return "nanogpt"
    raise DataError(f"cannot tell the token format of {path}; add format: nanogpt, modded, megatron, olmo or npy")


def find(path: Path, form: Format, dtype: Integer) -> Found:
    """Where the tokens of a foreign file lie; `dtype` is that of the formats that do not say."""
    if form == "megatron":
        return _megatron(path)
    if form == "modded":
        return Found(_modded(path), None)
    if form == "npy":
        return Found(_npy(path), None)
    return Found(_bare(path, np.dtype(dtype).newbyteorder("<")), None)


def _bare(path: Path, dtype: np.dtype) -> Shard:
    size = _size(path)
    if size == 0 or size % dtype.itemsize:
        raise DataError(f"{path} has {size} bytes, which is no number of {dtype.name} tokens; it was cut short, or add dtype")
    return Shard(path, dtype.str, 0, size // dtype.itemsize)


def _modded(path: Path) -> Shard:
    head = np.frombuffer(_head(path, 12), "<i4")
    if len(head) < 3 or head[0] != _MODDED_MAGIC:
        raise DataError(f"{path} does not begin like a modded-nanogpt shard ({_MODDED_MAGIC}); add format: nanogpt if it is one")
    if head[1] != 1 or head[2] < 1:
        raise DataError(f"{path} says version {head[1]} and {head[2]} tokens in its header; version 1 with tokens can be read")
    shard = Shard(path, "<u2", _MODDED_HEADER, int(head[2]))
    shard.check()
    return shard


def _npy(path: Path) -> Shard:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        start, dtype, shape = tokens.offset, tokens.dtype, tokens.shape  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is no whole NumPy array: {error}") from error
    if dtype.kind not in "ui" or len(shape) != 1 or dtype.byteorder == ">":
        raise DataError(f"{path} holds {dtype} of shape {shape}; a row of little-endian integers can be read")
    shard = Shard(path, dtype.str, start, shape[0])
    shard.check()
    return shard


def _megatron(path: Path) -> Found:
    index, tokens = path.with_suffix(".idx"), path.with_suffix(".bin")
    size = _size(index)
    head = _head(index, _MEGATRON_HEADER)
    if not head.startswith(_MEGATRON_MAGIC):
        raise DataError(f"{index} does not begin like a Megatron index ({_MEGATRON_MAGIC[:7].decode()})")
    if len(head) < _MEGATRON_HEADER:
        raise DataError(f"{index} has {size} bytes, fewer than the {_MEGATRON_HEADER} of its header; it was cut short")
    version, code = int.from_bytes(head[9:17], "little"), head[17]
    sequences, boundaries = (int(n) for n in np.frombuffer(head[18:34], "<u8"))
    if version != 1 or code not in _MEGATRON_DTYPES:
        raise DataError(f"{index} says version {version} and dtype code {code}; version 1 and integers can be read")
    expected = _MEGATRON_HEADER + 12 * sequences + 8 * boundaries
    if size != expected:
        raise DataError(f"{index} has {size} bytes instead of {expected}; it was cut short or replaced")
    body = index.read_bytes()[_MEGATRON_HEADER:]
    lengths = np.frombuffer(body, "<i4", sequences).astype(np.int64)
    pointers = np.frombuffer(body, "<i8", sequences, 4 * sequences)
    documents = np.frombuffer(body, "<i8", boundaries, 12 * sequences)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    shard = Shard(tokens, _MEGATRON_DTYPES[code], 0, int(starts[-1]))
    item = np.dtype(shard.dtype).itemsize
    sound = (lengths >= 0).all() and (pointers == starts[:-1] * item).all() and len(documents) and documents[0] == 0
    if not (sound and documents[-1] == sequences and (np.diff(documents) >= 0).all()):
        raise DataError(f"{index} describes sequences that do not follow one another; write the data set again with Megatron's tools")
    shard.check()
    return Found(shard, starts[documents])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _head(path: Path, count: int) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
