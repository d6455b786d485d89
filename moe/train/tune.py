"""Configurations of the Triton kernels for a recipe: which shapes to measure, and one table for all ranks of a job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from moe.errors import ConfigError
from moe.kernels import triton_configs
from moe.kernels.triton_configs import Shape
from moe.parallel.mesh import Mesh
from moe.recipe import Recipe
from moe.routers import build
from moe.tables import nearest

SIZES = ("d", "f", "experts", "k", "tokens")
EXAMPLE = "d=2048,f=768,experts=128,k=8,tokens=8192"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def share_table(mesh: Mesh) -> None:
    """Let all ranks choose from the first rank's table: ranks with configurations of their own would round differently."""
    table = bytearray()
    mesh.first_does(lambda: table.extend(triton_configs.own_table()))
    triton_configs.use(mesh.gather(bytes(table))[0])


def tune(shape: Shape, out: Path | None, say: Callable[[str], None]) -> None:
    """Measure the kernels for a shape on the current GPU, and write the fastest configurations into a table."""
    if not torch.cuda.is_available():
        raise ConfigError("moe tune measures on a GPU, and torch sees none here; run it on the machine that is to train")
    try:
        from moe.kernels import tune
    except ImportError as error:
        raise ConfigError(f"moe tune needs Triton, which cannot be imported here: {error}; type pip install triton") from None
    device, path = torch.device("cuda", torch.cuda.current_device()), out or triton_configs.table_path()
    triton_configs.read(path.read_bytes() if path.exists() else b"", str(path))
    say(f"measuring for {shape.experts} experts of {shape.d} x {shape.f}, {shape.tokens} tokens of {shape.k} each")
    tune.write(tune.tune(shape, device, tune.seconds, say), path, device)
    say(f"written to {path}; runs read it" + ("" if path == triton_configs.table_path() else f" where {triton_configs.TABLE} names it"))


def shape_of(recipe: Recipe, ranks: int | None) -> Shape:
    """The experts that one of `ranks` ranks holds (None: as the recipe says, or one), and the tokens that reach them at a time."""
    moe, ranks = recipe.model.moe, ranks or recipe.parallel.ranks or 1
    if moe is None:
        raise ConfigError("the recipe's model is dense (model.moe=null), and only experts have kernels to tune")
    recipe.check_ranks(ranks)
    with torch.device("meta"):
        k = getattr(build(moe.router, recipe.model.d_model, moe.experts), "k", None)
    if not isinstance(k, int):
        raise ConfigError("the recipe's router gives tokens no fixed number of experts; use --shape, with their mean number as k")
    here = moe.experts // recipe.parallel.expert_ranks
    rows, reach = recipe.train.batch // recipe.train.accumulate // ranks * recipe.data.sequence * k, min(k, here)
    return Shape(recipe.model.d_model, moe.d_expert, here, reach, rows // reach, _dtype(recipe.train.dtype))


def read_shape(text: str) -> Shape:
    """A shape as typed: d=2048,f=768,experts=128,k=8,tokens=8192 and perhaps dtype=float16."""
    words = dict.fromkeys(SIZES, "") | {"dtype": "bfloat16"}
    for word in text.split(","):
        key, _, value = word.strip().partition("=")
        if key not in words:
            raise ConfigError(f"--shape has no {key!r}; {nearest(key, words)}")
        words[key] = value
    for key in SIZES:
        if not (words[key].isdecimal() and int(words[key])):
            raise ConfigError(f"--shape needs {key}, a number of at least 1, not {words[key]!r}; write {EXAMPLE}")
    d, f, experts, k, tokens = (int(words[key]) for key in SIZES)
    if k > experts:
        raise ConfigError(f"--shape has k={k}, more than experts={experts}; choose at most that")
    return Shape(d, f, experts, k, tokens, _dtype(words["dtype"]))


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ConfigError(f"the Triton kernels have no {name}; choose from {', '.join(DTYPES)}")
    return DTYPES[name]
