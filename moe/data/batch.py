"""What the loader hands to the engine."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moe.shapes import Int

IGNORE = -100  # a target that is not predicted: padding


class Batch(NamedTuple):
    """This rank's rows of one global batch; b sequences of s positions."""

    ids: Int[Tensor, "b s"]
    targets: Int[Tensor, "b s"]  # the next token, IGNORE where there is none to predict
    document: Int[Tensor, "b s"]  # ordinal of the document within its row: 0, 0, 1, 1, 1 …
    position: Int[Tensor, "b s"]  # position inside the row, or inside the document under data.document_mask
    index: Int[Tensor, "b s"]  # global position of the token in the step's batch, independent of ranks
