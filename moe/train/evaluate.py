"""Held-out loss, routing churn and samples."""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.data.corpus import Corpus
from moe.data.loader import Validation
from moe.model.generate import generate
from moe.model.transformer import Transformer
from moe.parallel.host_copy import to_host
from moe.parallel.mesh import Mesh
from moe.recipe import Recipe
from moe.routers.base import Routing
from moe.shapes import Bool, Float
from moe.train.folder import write_whole

PROBE_TOKENS = 4096  # of each rank, whose assignments are compared from one evaluation to the next


class Evaluation:
    """Evaluates an engine's model on the same held-out sequences each time."""

    def __init__(self, recipe: Recipe, corpus: Corpus, engine: Any, mesh: Mesh, folder: Path) -> None:
        self.recipe, self.corpus, self.engine, self.mesh, self.folder = recipe, corpus, engine, mesh, folder
        self.validation = Validation(
            corpus,
            sequence=recipe.data.sequence,
            sequences=recipe.evaluate.sequences,
            batch=recipe.train.batch,
            rank=mesh.rank,
            world=mesh.world,
            document_mask=recipe.data.document_mask,
        )
        self.probe: dict[int, Tensor] = {}  # what each layer chose for the first batch at the last evaluation

    def run(self, step: int) -> dict[str, Any]:
        """The validation row: mean loss a token, perplexity, bits per byte, and churn of each layer.

        Churn is the share of a fixed probe batch's assignments that the last evaluation did not have.
        """
        nats, targets, churn = 0.0, 0, {}
        for number, batch in enumerate(self.validation):
            with Recorder(self.engine.model if number == 0 else None) as recorder:
                sums = self.engine.evaluate(batch, step)
            if number == 0:
                churn = self.churn(recorder.chosen)
            nats, targets = nats + float(sums.loss), targets + int(sums.targets)
        loss = nats / targets
        row = {
            "step": step,
            "validation_loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": nats / math.log(2) / self.validation.bytes,
        }
        return row | churn

    def churn(self, chosen: dict[int, Tensor]) -> dict[str, Any]:
        """Churn over all layers and of each, in the form of a row; empty the first time."""
        before, self.probe = self.probe, chosen
        if not before:
            return {}
        counts = self.mesh.sum(torch.stack([changes(before[layer], now) for layer, now in chosen.items()]))
        share = [round(changed / max(total, 1), 6) for changed, total in [*counts.tolist(), counts.sum(0).tolist()]]
        return {"churn": share[-1], "layers": {str(layer): {"churn": value} for layer, value in zip(chosen, share, strict=False)}}

    def sample(self, step: int) -> str:
        """Text from the model after the recipe's prompt, kept in samples/; every rank takes part, the first writes.

        Empty if the recipe asks for no sample.
        """
        settings = self.recipe.evaluate
        if not settings.sample_tokens:
            return ""
        text = settings.prompt + continuation(
            self.engine.model, self.corpus.tokenizer, settings.prompt, settings.sample_tokens, seed=self.recipe.train.seed
        )
        self.mesh.first_does(lambda: write_whole(self.folder / "samples" / f"step-{step:08d}.txt", text))
        return text


def continuation(
    model: Transformer, tokenizer: Any, prompt: str, tokens: int, *, temperature: float = 0.8, top_p: float = 0.95, seed: int = 0
) -> str:
    """What the model writes after `prompt`."""
    device = next(model.parameters()).device
    ids = torch.tensor([tokenizer.encode(prompt).tolist() or [tokenizer.end]], device=device)
    generator = torch.Generator().manual_seed(seed)
    out = generate(model, ids, tokens, temperature=temperature, top_p=top_p, generator=generator)
    return tokenizer.decode(to_host(out[0, ids.shape[1] :]).tolist())


def changes(before: Bool[Tensor, "t E"], now: Bool[Tensor, "t E"]) -> Float[Tensor, "2"]:
    """How many of the assignments were not there before, and how many there are."""
    return torch.stack([(now & ~before).sum(), now.sum()]).double()


class Recorder:
    """Keeps which experts each layer chose for the first tokens of a batch while it is entered; without a model, nothing."""

    def __init__(self, model: Transformer | None) -> None:
        self.routers = {} if model is None else model.routers()
        self.chosen: dict[int, Bool[Tensor, "t E"]] = {}

    def __enter__(self) -> Recorder:
        self.stack = ExitStack()
        for layer, router in self.routers.items():
            self.stack.callback(router.register_forward_hook(partial(self.keep, layer)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def keep(self, layer: int, router: Any, inputs: Any, routing: Routing) -> None:
        # a table and not a list: some routers give each token as many experts as they like
        chosen = torch.zeros(PROBE_TOKENS, router.num_experts + 1, dtype=torch.bool)
        token, expert = to_host(torch.stack([routing.token, routing.expert]))
        chosen[token[token < PROBE_TOKENS], expert[token < PROBE_TOKENS]] = True
        self.chosen[layer] = chosen[:, :-1]
