"""How fast models generate, as `moe.studies.inference_speed` measured it: the file and its reader."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe.errors import DataError

SPEEDS = "speeds.json"  # in a study's folder
READ, WRITE = "read", "write "

Speeds = Mapping[str, Mapping[str, Sequence[float]]]  # tokens/s of each model: "read" (prefill), or "write N" (decode at batch size N)


def read(study: Path) -> tuple[dict[str, int], Speeds] | None:
    """Return the size family that was timed and the tokens/s of its models; None if nothing was timed yet."""
    path = study / SPEEDS
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text())
        found = {name: {kind: [float(rate) for rate in rates] for kind, rates in kinds.items()} for name, kinds in data["speeds"].items()}
        return data["family"], found
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path} holds no speeds of models; remove it") from None
