"""Text from a trained run."""

from __future__ import annotations

from pathlib import Path

import torch

from moe.checkpoint.weights import load_weights
from moe.config import load
from moe.data.tokenizer import open_tokenizer
from moe.errors import ConfigError
from moe.model.transformer import Transformer
from moe.train.evaluate import continuation
from moe.train.loop import vocabulary


def open_model(folder: Path) -> tuple[Transformer, object]:
    """The model of a run with its final weights, and its tokenizer."""
    if not (folder / "recipe.yaml").is_file():
        raise ConfigError(f"{folder} holds no run (there is no recipe.yaml); give the folder that `moe train` named at its end")
    recipe = load([folder / "recipe.yaml"], [])
    tokenizer = open_tokenizer(recipe.data.tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        model = Transformer(recipe.model, vocabulary(recipe, tokenizer))
    model = model.to_empty(device=device).eval()
    model.load_state_dict(load_weights(folder / "weights"))
    return model, tokenizer


def generate(folder: Path, prompt: str, tokens: int, *, temperature: float, top_p: float, seed: int) -> str:
    """What the run's model writes after `prompt`, the prompt included."""
    model, tokenizer = open_model(folder)
    return prompt + continuation(model, tokenizer, prompt, tokens, temperature=temperature, top_p=top_p, seed=seed)
