"""A run's tokens: prepared once by one rank, opened by all; split by document into training and held-out streams."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe.data.prepare import index_files, whole_folder, write_text
from moe.data.shards import TokenSet, open_tokens, read_json
from moe.data.sources import Source, TextSource, TokenFiles, build
from moe.data.tokenizer import Tokenizer, open_tokenizer
from moe.errors import DataError

FORMAT, VERSION = "moe-corpus", 1


class Window(NamedTuple):
    """Consecutive tokens of a stream."""

    ids: np.ndarray  # int64
    document: np.ndarray  # 0 for the document of the first token, 1 for the next …


class Stream:
    """Some of the documents of a token set, one after the other."""

    def __init__(self, tokens: TokenSet, chosen: np.ndarray) -> None:
        self.tokens = tokens
        self.starts = tokens.offsets[:-1][chosen]
        self.ends = np.cumsum(np.diff(tokens.offsets)[chosen])  # in the stream

    @property
    def documents(self) -> int:
        return len(self.starts)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, first: int, count: int) -> Window:
        """Tokens first … first+count-1."""
        a, b = (int(np.searchsorted(self.ends, at, "right")) for at in (first, first + count - 1))
        ends = self.ends[a : b + 1]
        begins = np.concatenate([[first], ends[:-1]])
        sizes = np.minimum(ends, first + count) - begins
        places = self.starts[a : b + 1].copy()
        places[0] += first - (int(self.ends[a - 1]) if a else 0)
        document = np.repeat(np.arange(b + 1 - a), sizes)
        # Documents that also follow one another on disk are read at once: all of them, but for those of the other stream.
        heads = np.flatnonzero(np.concatenate([[True], places[1:] != places[:-1] + sizes[:-1]]))
        runs = np.add.reduceat(sizes, heads)
        parts = [self.tokens.read(int(place), int(size)) for place, size in zip(places[heads], runs, strict=True)]
        return Window(parts[0] if len(parts) == 1 else np.concatenate(parts), document)


class Part(NamedTuple):
    """One source of a corpus."""

    name: str
    weight: float  # share of the training sequences
    tokens: TokenSet
    train: Stream
    held_out: Stream

    @property
    def bytes_scale(self) -> float:
        """Bytes of text per byte that the tokenizer counts: 1 unless it normalises text before it cuts it."""
        meta = self.tokens.meta
        return meta["text_bytes"] / meta["token_bytes"] if meta.get("token_bytes") else 1.0


class Corpus(NamedTuple):
    """Everything a run reads."""

    tokenizer: Tokenizer
    parts: list[Part]
    fingerprint: str  # of tokens, documents, weights and split

    def describe(self) -> str:
        """A line a source: what it is, how much, and the split."""
        return "\n".join(_describe(part) for part in self.parts)


def prepare(sources: Sequence[Source | str | Mapping[str, Any]], tokenizer: str, folder: str | Path, *, validation: float = 0.05) -> Corpus:
    """Make `folder` the corpus of these sources, unless it already is; for one rank, the others then open it.

    Text is tokenised into the folder; token files stay where they are. What the folder holds is what is trained on, even if
    a source has changed since. `validation` is the share of documents held out.
    """
    folder, coder = Path(folder), open_tokenizer(tokenizer)
    asked = {"sources": [_asked(source) for source in sources], "tokenizer": coder.hash, "validation": validation}
    if folder.exists():
        held, asked = _read_index(folder)["asked"], json.loads(json.dumps(asked))
        if changed := [key for key in asked if held[key] != asked[key]]:
            raise DataError(f"{folder} was prepared with other data.{changed[0]}; restore that setting, or give another run.folder")
        return open_corpus(folder)
    made = [build(source) for source in sources]
    with whole_folder(folder) as partial:
        parts = []
        for number, source in enumerate(made):
            part = {"name": _label(made, number), "folder": f"{number}-{source.name}", "weight": source.weight, "hold_out": source.hold_out}
            (partial / part["folder"]).mkdir()
            _write(source, coder, partial / part["folder"])
            parts.append(part)
        index = {"format": FORMAT, "version": VERSION, "asked": asked, "tokenizer": coder.save(partial), "parts": parts}
        (partial / "corpus.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return open_corpus(folder)


def open_corpus(folder: str | Path) -> Corpus:
    """The corpus that `prepare` made; raises DataError when a file is absent, short or changed."""
    folder = Path(folder)
    index = _read_index(folder)
    tokenizer = open_tokenizer("bytes" if index["tokenizer"] == "bytes" else str(folder))
    if tokenizer.hash != index["asked"]["tokenizer"]:
        raise DataError(f"the tokenizer in {folder} has changed since the corpus was prepared; remove {folder} to prepare it again")
    sets = [open_tokens(folder / part["folder"], elsewhere=True) for part in index["parts"]]
    masks = _held_out(sets, [part["hold_out"] for part in index["parts"]], index["asked"]["validation"])
    total = sum(part["weight"] for part in index["parts"])
    parts = [
        Part(part["name"], part["weight"] / total, tokens, Stream(tokens, ~mask), Stream(tokens, mask))
        for part, tokens, mask in zip(index["parts"], sets, masks, strict=True)
    ]
    return Corpus(tokenizer, parts, _fingerprint(index, sets))


def _held_out(sets: list[TokenSet], hold_out: list[str], share: float) -> list[np.ndarray]:
    """Which documents are held out: by a hash of each alone, so that more documents move none across.

    Should chance hold none out, the one with the smallest hash is, as long as another is left to train on.
    """
    limit = np.uint64(min(int(share * 2**64), 2**64 - 1))
    masks = [
        tokens.keys < limit if how == "share" else np.full(len(tokens.keys), how == "all")
        for tokens, how in zip(sets, hold_out, strict=True)
    ]
    candidates = [i for i, how in enumerate(hold_out) if how == "share"]
    if not any(mask.any() for mask in masks) and sum(len(mask) for mask in masks) > 1 and candidates:
        least = min(candidates, key=lambda i: sets[i].keys.min())
        masks[least] = sets[least].keys == sets[least].keys.min()
    return masks


def _read_index(folder: Path) -> dict[str, Any]:
    index = read_json(folder / "corpus.json", FORMAT, VERSION)
    sound = (
        {"asked", "tokenizer", "parts"} <= index.keys()
        and {"sources", "tokenizer", "validation"} <= index["asked"].keys()
        and all({"name", "folder", "weight", "hold_out"} <= part.keys() for part in index["parts"])
    )
    if not sound:
        raise DataError(f"{folder / 'corpus.json'} is damaged; remove {folder} to prepare it again")
    return index


def _write(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    if isinstance(source, TextSource):
        write_text([source], folder, tokenizer)
    elif isinstance(source, TokenFiles):
        index_files(source, tokenizer, folder)


def _asked(source: Source | str | Mapping[str, Any]) -> Any:
    if isinstance(source, Source):
        return {"name": source.name, "what": source.describe(), "weight": source.weight, "hold_out": source.hold_out}
    return source if isinstance(source, str) else dict(source)


def _label(sources: Sequence[Source], number: int) -> str:
    name = sources[number].name
    earlier = sum(source.name == name for source in sources[:number])
    return f"{name}-{earlier + 1}" if earlier else name


def _fingerprint(index: dict[str, Any], sets: list[TokenSet]) -> str:
    facts = [
        [part["weight"], part["hold_out"], tokens.meta["sha256"], [[s.tokens, s.sha256] for s in tokens.shards]]
        for part, tokens in zip(index["parts"], sets, strict=True)
    ]
    return hashlib.sha256(json.dumps([facts, index["asked"]["tokenizer"], index["asked"]["validation"]]).encode()).hexdigest()


def _describe(part: Part) -> str:
    meta, train, held = part.tokens.meta, part.train, part.held_out
    text = f", {meta['text_bytes'] / 1e6:.2f} MB, text sha256 {meta['text_sha256'][:12]}" if "text_bytes" in meta else ""
    split = f"{len(train):,} tokens of {train.documents:,} documents to train on, {len(held):,} of {held.documents:,} held out"
    return f"{part.name}: {meta['description']}{text}; {split}"
