"""Text to token shards, written whole or not at all; and an index over token files that others wrote."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Column

from moe.data.formats import Integer, find
from moe.data.shards import Shard, TokenSet, file_digest, open_tokens, write_index
from moe.data.sources import Source, TextSource, TokenFiles, build
from moe.data.tokenizer import Tokenizer, open_tokenizer
from moe.errors import ConfigError, DataError, MoeError, NoSpace

SHARD_TOKENS = 2**28
_BATCH_BYTES = 2**22  # text encoded at once: enough to keep all cores of the `tokenizers` library busy
_SCAN_TOKENS = 2**22
_PIECE_TOKENS = 2**16  # a "document" of token files that mark none

Advance = Callable[[int], object]  # called with bytes, or tokens, done


def tokenize(
    sources: Sequence[Source | str | Mapping[str, Any]], out: str | Path, tokenizer: str = "bytes", *, shard_tokens: int = SHARD_TOKENS
) -> TokenSet:
    """Tokenise text sources into the new folder `out`, which a `tokens` source reads; `out` appears when it is whole.

    A source is a name, a dictionary {name, options…} or a Source.
    """
    out, made, coder = Path(out), [build(source) for source in sources], open_tokenizer(tokenizer)
    texts = [source for source in made if isinstance(source, TextSource)]
    if len(texts) < len(made) or not texts:
        raise ConfigError("give sources of text to tokenise: stdlib, text, jsonl or huggingface")
    if shard_tokens < 1:
        raise ConfigError(f"a shard of {shard_tokens} tokens cannot be written; give a positive number, such as {SHARD_TOKENS}")
    if out.exists():
        raise ConfigError(f"{out} exists already; give a folder that does not, or remove it")
    with whole_folder(out) as folder:
        write_text(texts, folder, coder, shard_tokens=shard_tokens)
        coder.save(folder)
    return open_tokens(out)


def write_text(sources: Sequence[TextSource], folder: Path, tokenizer: Tokenizer, *, shard_tokens: int = SHARD_TOKENS) -> None:
    """Tokenise `sources` into `folder`, with a progress bar at a terminal; each document ends with the end id."""
    writer = _Writer(folder, tokenizer, shard_tokens)
    sizes = [source.size for source in sources]
    name = ", ".join(source.describe() for source in sources)
    with progress_bar(f"tokenise {name}", None if None in sizes else sum(size or 0 for size in sizes)) as advance:
        for source in sources:
            for texts in _batches(source.documents()):
                advance(writer.write(texts))
    if not writer.keys:
        raise DataError(f"the corpus is empty: {name} holds no text")
    write_index(folder, writer.finish({"description": name, "vocab": tokenizer.vocab, "end": tokenizer.end, "tokenizer": tokenizer.hash}))


def index_files(source: TokenFiles, tokenizer: Tokenizer, folder: Path) -> None:
    """Write into `folder` an index of token files, which stay where they are."""
    if [form for _, form in source.files] == ["moe"]:
        tokens = open_tokens(source.files[0][0])
        made_by = tokens.meta.get("tokenizer")
        if made_by != tokenizer.hash:
            raise DataError(
                f"{source.files[0][0]} was tokenised by another tokenizer ({str(made_by)[:12]}… instead of {tokenizer.hash[:12]}…); "
                "set data.tokenizer to that one"
            )
        write_index(folder, tokens)
        return
    shards, offsets, keys = [], [np.zeros(1, np.int64)], []
    end = tokenizer.end if source.end is None else source.end
    smallest: Integer = "uint16" if tokenizer.vocab <= 2**16 else "uint32"
    dtype = source.dtype or smallest
    found = [find(path, form, dtype) for path, form in source.files]
    with progress_bar(f"index {source.describe()}", sum(f.shard.size for f in found)) as advance:
        for shard, known in found:
            ends = _scan(shard, end, tokenizer.vocab)
            inner = np.unique(known if known is not None else _boundaries(ends, shard.tokens))
            keys.append(_keys(shard, inner))
            offsets.append(inner[1:] + offsets[-1][-1])
            shards.append(Shard(shard.path, shard.dtype, shard.start, shard.tokens, file_digest(shard.path)))
            advance(shard.size)
    meta = {"description": source.describe(), "vocab": tokenizer.vocab, "end": end, "tokenizer": tokenizer.hash}
    write_index(folder, TokenSet(shards, np.concatenate(offsets), np.concatenate(keys), meta))


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` to write into; it becomes `out` at the end, or vanishes when anything fails."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, out)
    except OSError as error:
        if isinstance(error, MoeError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"the disk under {out.parent} is too full to write the tokens; free some space or give another folder") from error
        raise DataError(f"cannot write {out}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def progress_bar(text: str, total: int | None) -> Iterator[Advance]:
    """A bar in bytes at a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", table_column=Column(max_width=30, no_wrap=True, overflow="ellipsis")),
        BarColumn(10),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=total)
        yield lambda done: progress.advance(task, done)


class _Writer:
    """Appends documents to shards of at most `shard_tokens`; a document may go on in the next shard."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self.folder, self.tokenizer, self.shard_tokens = folder, tokenizer, shard_tokens
        self.dtype = np.dtype("<u2" if tokenizer.vocab <= 2**16 else "<u4")
        self.offsets, self.keys = array("q", [0]), array("Q")
        self.shards: list[Shard] = []
        self.text_bytes = self.token_bytes = 0
        self.text_hash = hashlib.sha256()

    def write(self, texts: list[bytes]) -> int:
        parts = []
        for text, ids in zip(texts, self.tokenizer.encode_many([text.decode() for text in texts]), strict=True):
            digest = hashlib.sha256(text).digest()
            self.text_hash.update(digest)
            self.keys.append(int.from_bytes(digest[:8], "little"))
            self.offsets.append(self.offsets[-1] + len(ids) + 1)
            self.text_bytes += len(text)
            self.token_bytes += int(self.tokenizer.bytes_of(ids).sum())
            parts += [ids, [self.tokenizer.end]]
        self._append(np.concatenate(parts).astype(self.dtype))
        return sum(map(len, texts))

    def _append(self, ids: np.ndarray) -> None:
        while len(ids):
            if not self.shards or self.shards[-1].tokens == self.shard_tokens:
                self.shards.append(Shard(self.folder / f"{len(self.shards):05d}.bin", self.dtype.str, 0, 0))
            last = self.shards[-1]
            part, ids = np.split(ids, [self.shard_tokens - last.tokens])
            with open(last.path, "ab", buffering=0) as file:
                file.write(part.tobytes())
            self.shards[-1] = Shard(last.path, last.dtype, 0, last.tokens + len(part))

    def finish(self, meta: dict[str, Any]) -> TokenSet:
        shards = [Shard(s.path, s.dtype, s.start, s.tokens, file_digest(s.path)) for s in self.shards]
        meta |= {"text_bytes": self.text_bytes, "token_bytes": self.token_bytes, "text_sha256": self.text_hash.hexdigest()}
        return TokenSet(shards, np.array(self.offsets, np.int64), np.array(self.keys, np.uint64), meta)


def _batches(documents: Iterator[str]) -> Iterator[list[bytes]]:
    batch, size = [], 0
    for document in documents:
        if not document:
            continue
        batch.append(document.encode("utf-8", "replace"))  # JSON can spell half of a surrogate pair, which no UTF-8 can
        size += len(batch[-1])
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _scan(shard: Shard, end: int, vocab: int) -> np.ndarray:
    """Positions after each end id; refuses ids that the vocabulary does not have."""
    ends = []
    for first in range(0, shard.tokens, _SCAN_TOKENS):
        ids = shard.read(first, min(_SCAN_TOKENS, shard.tokens - first))
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab:
            wrong = low if low < 0 else high
            raise DataError(
                f"{shard.path} read as {np.dtype(shard.dtype).name} holds token {wrong}, and the tokenizer has 0 to {vocab - 1}; "
                "set data.tokenizer to the one that made it, or the source's dtype"
            )
        ends.append(np.flatnonzero(ids == end) + first + 1)
    return np.concatenate(ends)


def _boundaries(ends: np.ndarray, tokens: int) -> np.ndarray:
    inside = ends if len(ends) else np.arange(_PIECE_TOKENS, tokens, _PIECE_TOKENS)
    return np.concatenate([[0], inside, [tokens]])


def _keys(shard: Shard, offsets: np.ndarray) -> np.ndarray:
    """A hash of each document's ids, the same in every file format."""
    keys, i = array("Q"), 0
    while i < len(offsets) - 1:
        j = max(i + 1, int(np.searchsorted(offsets, offsets[i] + _SCAN_TOKENS, "right")) - 1)
        ids = shard.read(int(offsets[i]), int(offsets[j] - offsets[i])).astype("<u4").tobytes()
        starts = (4 * (offsets[i : j + 1] - offsets[i])).tolist()
        keys.extend(int.from_bytes(hashlib.sha256(ids[a:b]).digest()[:8], "little") for a, b in pairwise(starts))
        i = j
    return np.array(keys, np.uint64)
