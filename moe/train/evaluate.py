"""Held-out loss, routing churn and samples."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.data.corpus import Corpus
from moe.data.loader import Validation
from moe.model.generate import generate
from moe.model.transformer import Transformer
from moe.parallel.mesh import Mesh
from moe.recipe import Recipe
from moe.routers.base import Routing
from moe.train.folder import write_whole


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
        self.probe: list[Tensor] | None = None

    def run(self, step: int) -> dict[str, Any]:
        """The validation row: mean loss a token, perplexity, bits per byte, churn.

        Churn is the share of a fixed probe batch's assignments that changed since the last evaluation.
        """
        nats, targets, churn = 0.0, 0, None
        for number, batch in enumerate(self.validation):
            if number == 0:
                with Recorder(self.engine.model) as recorder:
                    sums = self.engine.evaluate(batch, step)
                churn = self.churn(recorder.experts)
            else:
                sums = self.engine.evaluate(batch, step)
            nats, targets = nats + float(sums.loss), targets + int(sums.targets)
        loss = nats / targets
        row = {
            "step": step,
            "validation_loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": nats / math.log(2) / self.validation.bytes,
        }
        return row if churn is None else row | {"churn": round(churn, 6)}

    def churn(self, experts: list[Tensor]) -> float | None:
        before, self.probe = self.probe, experts
        if before is None or not experts:
            return None
        changed = sum(float((a != b).sum()) for a, b in zip(before, experts, strict=True))
        total = self.mesh.sum(torch.tensor([changed, sum(len(a) for a in experts)], dtype=torch.float64))
        return (total[0] / total[1]).item()

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
    return tokenizer.decode(out[0, ids.shape[1] :].tolist())


class Recorder:
    """Keeps which experts each router chose while it is entered."""

    def __init__(self, model: Transformer) -> None:
        self.routers = model.routers()
        self.experts: list[Tensor] = []

    def __enter__(self) -> Recorder:
        self.stack = ExitStack()
        for router in self.routers.values():
            self.stack.callback(router.register_forward_hook(self.keep).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def keep(self, router: Any, inputs: Any, routing: Routing) -> None:
        self.experts.append(routing.expert.detach().cpu())
