"""Batches: this rank's rows of each global batch, for training and for held-out text."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from moe.data.batch import IGNORE, Batch
from moe.data.corpus import Corpus, Window
from moe.data.order import Draw, Order
from moe.errors import DataError

MANY_EPOCHS = 4  # past this, repeated text teaches little (Muennighoff et al., 2023)
_log = logging.getLogger(__name__)


class Loader:
    """Training batches of `batch` sequences over `world` ranks, the same ones however they are shared out.

    Documents, each with its end id, are packed one after the other and cut into blocks of `sequence` + 1 tokens that share
    one token with the next; what is left at a source's end is not used.
    """

    def __init__(
        self, corpus: Corpus, *, sequence: int, batch: int, seed: int, rank: int = 0, world: int = 1, document_mask: bool = False
    ) -> None:
        assert batch % world == 0, f"{batch} sequences over {world} ranks"
        self.corpus, self.sequence, self.batch, self.seed = corpus, sequence, batch, seed
        self.document_mask = document_mask
        self.rows = range(rank * (batch // world), (rank + 1) * (batch // world))
        self.blocks = [max(len(part.train) - 1, 0) // sequence for part in corpus.parts]
        self.parts = [number for number, part in enumerate(corpus.parts) if part.train.documents]
        if not self.parts:
            raise DataError("every document is held out, and none is left to train on; give more text, or lower data.validation")
        for number in self.parts:
            if not self.blocks[number]:
                part = corpus.parts[number]
                raise DataError(
                    f"source {part.name} has {len(part.train)} tokens to train on, fewer than a sequence of {sequence} and its next token; "
                    "give more text, or lower data.sequence"
                )
        self.order = Order([self.blocks[n] for n in self.parts], [corpus.parts[n].weight for n in self.parts], seed)
        self.samples = 0  # sequences taken by all ranks together
        self.warned: set[str] = set()

    def take(self) -> Batch:
        """This rank's rows of the next global batch."""
        windows = []
        for row in self.rows:
            draw = self.order[self.samples + row]
            stream = self.corpus.parts[self.parts[draw.source]].train
            windows.append(stream.read(draw.block * self.sequence, self.sequence + 1))
        self.samples += self.batch
        self._warn()
        return pack(windows, self.sequence, first_row=self.rows.start, document_mask=self.document_mask)

    @property
    def tokens_seen(self) -> dict[str, int]:
        """Tokens predicted so far by source, over all ranks, to within a sequence."""
        return {name: round(share * self.samples) * self.sequence for name, share in self._shares().items()}

    @property
    def epochs(self) -> dict[str, float]:
        """Times each source has been read."""
        blocks = {self.corpus.parts[n].name: self.blocks[n] for n in self.parts}
        return {name: share * self.samples / blocks[name] for name, share in self._shares().items()}

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on with the next sequence; plain JSON."""
        return {"samples": self.samples, "seed": self.seed, "sequence": self.sequence, "fingerprint": self.corpus.fingerprint}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, on any number of ranks; refuses other data, another seed or sequence length."""
        here = self.state()
        if state["fingerprint"] != here["fingerprint"]:
            raise DataError(
                f"the data changed: the checkpoint's corpus is {state['fingerprint'][:12]} and this one is {here['fingerprint'][:12]}; "
                "restore the old data, or start a new run.folder"
            )
        for key, setting in (("seed", "train.seed"), ("sequence", "data.sequence")):
            if state[key] != here[key]:
                raise DataError(f"the checkpoint's data order has {setting}={state[key]}, not {here[key]}; set {setting}={state[key]}")
        self.samples = int(state["samples"])

    def _shares(self) -> dict[str, float]:
        return {self.corpus.parts[n].name: share for n, share in zip(self.parts, self.order.shares, strict=True)}

    def _warn(self) -> None:
        if self.rows.start:
            return
        for name, epochs in self.epochs.items():
            if epochs > MANY_EPOCHS and name not in self.warned:
                self.warned.add(name)
                _log.warning("source %s has been read more than %d times; more text would teach more", name, MANY_EPOCHS)


class Validation:
    """The same held-out sequences each time it is iterated: the first of a fixed shuffle, mixed as in training, none twice.

    The end of the held-out text is padded (target IGNORE, document -1), and so is the last batch, to equal rows on all ranks.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        sequence: int,
        sequences: int,
        batch: int,
        rank: int = 0,
        world: int = 1,
        document_mask: bool = False,
    ) -> None:
        assert batch % world == 0, f"{batch} sequences over {world} ranks"
        self.corpus, self.sequence, self.batch, self.document_mask = corpus, sequence, batch, document_mask
        self.rank, self.world = rank, world
        self.parts = [number for number, part in enumerate(corpus.parts) if len(part.held_out) > 1]
        if not self.parts:
            documents = sum(len(part.tokens.keys) for part in corpus.parts)
            raise DataError(
                f"none of the corpus's {documents} documents is held out; give more documents (for one large file, document: paragraph), "
                "or a source with hold_out: all"
            )
        self.draws = self._draw(sequences)

    def __len__(self) -> int:
        return -(-len(self.draws) // self.batch)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self.draws), self.batch):
            draws = self.draws[first : first + self.batch]
            rows = -(-len(draws) // self.world)
            windows = [self._read(draw) for draw in draws[self.rank * rows : (self.rank + 1) * rows]]
            windows += [Window(np.zeros(0, np.int64), np.zeros(0, np.int64))] * (rows - len(windows))
            yield pack(windows, self.sequence, first_row=self.rank * rows, document_mask=self.document_mask)

    @property
    def bytes(self) -> float:
        """UTF-8 bytes of the text that all ranks' targets stand for: the divisor of bits per byte.

        Exact for byte-level tokenizers; for others in the held-out source's ratio of text to token bytes.
        """
        counts = dict.fromkeys(self.parts, 0)
        for draw in self.draws:
            counts[self.parts[draw.source]] += int(self.corpus.tokenizer.bytes_of(self._read(draw).ids[1:]).sum())
        return sum(count * self.corpus.parts[part].bytes_scale for part, count in counts.items())

    def _draw(self, sequences: int) -> list[Draw]:
        blocks = [-(-(len(self.corpus.parts[n].held_out) - 1) // self.sequence) for n in self.parts]
        order = Order(blocks, [self.corpus.parts[n].weight for n in self.parts], seed=0)
        draws: list[Draw] = []
        left, place = list(blocks), 0
        while len(draws) < sequences and any(left):
            draw = order[place]
            place += 1
            if left[draw.source]:  # a source that has given all it has is passed over
                left[draw.source] -= 1
                draws.append(draw)
        return draws

    def _read(self, draw: Draw) -> Window:
        stream = self.corpus.parts[self.parts[draw.source]].held_out
        first = draw.block * self.sequence
        return stream.read(first, min(self.sequence + 1, len(stream) - first))


def pack(windows: list[Window], sequence: int, *, first_row: int, document_mask: bool) -> Batch:
    """Rows of inputs and next-token targets from windows of up to `sequence` + 1 tokens, padded at their end."""
    shape = (len(windows), sequence)
    ids, position = np.zeros(shape, np.int64), np.tile(np.arange(sequence), (len(windows), 1))
    targets, document = np.full(shape, IGNORE), np.full(shape, -1)
    for row, window in enumerate(windows):
        count = max(len(window.ids) - 1, 0)
        ids[row, :count], targets[row, :count], document[row, :count] = window.ids[:count], window.ids[1:], window.document[:count]
        if document_mask and count:
            starts = np.searchsorted(window.document[:count], np.arange(window.document[count - 1] + 1))
            position[row, :count] -= starts[window.document[:count]]
    index = (first_row * sequence + np.arange(len(windows) * sequence)).reshape(shape)
    return Batch(*(torch.from_numpy(array) for array in (ids, targets, document, position, index)))
