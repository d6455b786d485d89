"""One run of the upcycling comparison: an ordinary `moe train`, watched for how alike its experts are, and its result as a file.

A process of its own: `python -m benchmarks.upcycling_cell FOLDER PIECES WORDS…`.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe.checkpoint.weights import load_weights
from moe.config import load
from moe.data.corpus import open_corpus
from moe.data.loader import Validation
from moe.model.transformer import Transformer
from moe.surgery.resize import output_likeness
from moe.surgery.routers import hidden_states
from moe.train.loop import build_model, train
from moe.train.metrics import read

RESULT = "result.json"
PROBE = 256  # tokens whose outputs are compared


class Watch:
    """At the beginning of each evaluation: the mean cosine between what two experts make of the same held-out vectors.

    pieces: experts of one piece of the dense layer alone are compared, which are every so many.
    """

    def __init__(self, pieces: int) -> None:
        self.pieces, self.step, self.looked, self.rows = pieces, 0, False, []

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(module, Transformer):
            return
        if module.training:
            self.step, self.looked = self.step + 1, False
        elif not self.looked and module.settings.moe is not None:
            self.looked = True
            self.rows.append({"step": self.step, "likeness": likeness(module, inputs[0], self.pieces)})


@torch.no_grad()
def likeness(model: Transformer, ids: torch.Tensor, pieces: int) -> float:
    """Mean over layers and pairs of different experts of the same piece."""
    values = []
    for layer, hidden in hidden_states(model, ids).items():
        experts = model.layers[layer].get_submodule("moe.experts")
        alike = output_likeness(zip(experts.get_parameter("up"), experts.get_parameter("down"), strict=True), hidden[:PROBE], "silu")
        place = torch.arange(len(alike))
        pairs = (place[:, None] % pieces == place % pieces) & (place[:, None] != place)
        values.append(alike[pairs].mean().item())
    return sum(values) / len(values)


@torch.no_grad()
def first_figures(folder: Path, words: list[str], pieces: int) -> dict[str, float]:
    """Held-out loss and likeness of a model before any step of the run that these words describe."""
    settings = load([], words)
    corpus = open_corpus(Path(settings.run.folder) / "tokens")
    model = build_model(settings, corpus.tokenizer).to_empty(device="cpu").eval()
    model.load_state_dict(load_weights(folder / "weights"))
    batches = Validation(corpus, sequence=settings.data.sequence, sequences=settings.evaluate.sequences, batch=settings.train.batch)
    nats = targets = 0
    for batch in batches:
        nats, targets = nats + float(model(*batch, step=0).loss), targets + int((batch.targets >= 0).sum())
    found = {"validation_loss": nats / targets, "bits_per_byte": nats / math.log(2) / batches.bytes}
    return found if model.settings.moe is None else found | {"likeness": likeness(model, next(iter(batches)).ids, pieces)}


def run_cell(folder: Path, pieces: int, words: list[str]) -> dict[str, Any]:
    """Train from the beginning, and write what came of it."""
    shutil.rmtree(folder, ignore_errors=True)  # what a stop left half done
    folder.parent.mkdir(parents=True, exist_ok=True)
    watch, start = Watch(pieces), time.process_time()
    hook = nn.modules.module.register_module_forward_hook(watch)
    try:
        with folder.with_suffix(".log").open("w") as log, contextlib.redirect_stdout(log):
            train(load([], words))
    finally:
        hook.remove()
    rows = [row for row in read(folder / "metrics.jsonl") if "validation_loss" in row]
    price = json.loads((folder / "model.json").read_text())
    commit = json.loads((folder / "environment.json").read_text())["commit"] or "unknown"
    shutil.rmtree(folder / "checkpoints")
    result = {
        "words": words,
        "commit": commit,
        "seconds": round(time.process_time() - start, 1),
        "parameters": price["parameters"],
        "active": price["active"],
        "training_flops": price["training_flops"],
        "held_out": [{name: row[name] for name in ("step", "validation_loss", "bits_per_byte")} for row in rows],
        "likeness": watch.rows,
    }
    (folder / RESULT).write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_cell(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
