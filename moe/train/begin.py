"""Begin with the weights of another model: a run's, or what surgery made, which may bring its optimizer's moments along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from moe.checkpoint.manifest import describe
from moe.checkpoint.store import Store
from moe.checkpoint.weights import MODEL, OPTIMIZER, load_moments, load_weights
from moe.errors import CheckpointError
from moe.parallel.mesh import Mesh

ROUTER = ".moe.router."


def begin(folder: Path, engine: Any, mesh: Mesh | None) -> str:
    """Give the engine's model the weights in a folder, and say so.

    State of a router that the folder lacks stays as a fresh model has it; any other difference of names is a CheckpointError.
    Moments that surgery wrote beside the weights are gone on with; otherwise the optimizer begins fresh.
    """
    state = engine.canonical_state()
    model = {name: tensor for name, tensor in state.items() if name.startswith(MODEL)}
    if not (folder / "weights").is_dir():
        Store(folder / "checkpoints", mesh).load(model, prefix=MODEL)
        engine.load_canonical(state | model)
        return f"beginning with the newest checkpoint of {folder}"
    weights = {MODEL + name: tensor for name, tensor in load_weights(folder / "weights").items()}
    fresh = [name for name in model.keys() - weights.keys() if ROUTER in name and not name.endswith(".weight")]
    if wrong := sorted((model.keys() ^ weights.keys()) - set(fresh)):
        where = "is not in" if wrong[0] in model else "is only in"
        raise CheckpointError(
            f"init.from={folder} is of another model: {wrong[0].removeprefix(MODEL)} {where} its weights ({len(wrong)} names differ); "
            "leave the section model out of the recipe to have the one they are of"
        )
    moments = load_moments(folder / "weights")
    own = {name for name in state if name.startswith(OPTIMIZER)}
    if moments and (wrong := sorted(name for name in own ^ moments.keys() if ROUTER not in name or name not in own)):
        raise CheckpointError(
            f"init.from={folder} brings the moments of another optimizer ({wrong[0]} is in one of the two alone); "
            "choose the optimizer.name that it was trained with, or write it again with --optimizer reset"
        )
    _check_shapes(folder, weights | moments, state)
    engine.draw({name: state[name] for name in fresh})
    engine.load_canonical(state | weights | moments)
    also = " and its optimizer's moments" if moments else ""
    left = f"; {min(fresh).removeprefix(MODEL)} and its like begin fresh" if fresh else ""
    return f"beginning with the weights of {folder}{also}{left}"


def _check_shapes(folder: Path, given: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    here = describe(state)
    for name, tensor in given.items():
        if tuple(tensor.shape) != here[name][1]:
            raise CheckpointError(
                f"init.from={folder} has {name.removeprefix(MODEL)} of shape {list(tensor.shape)}, and the recipe's model "
                f"{list(here[name][1])}; leave the section model out of the recipe"
            )
