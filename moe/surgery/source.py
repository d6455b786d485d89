"""Models that can be read a tensor at a time: a Hugging Face folder, or a run, weights or checkpoint of ours."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from moe.checkpoint import shelf
from moe.checkpoint.manifest import MANIFEST, Damaged, dtype_of, open_inside, read_manifest
from moe.checkpoint.reader import read_tensor
from moe.checkpoint.weights import MODEL, OPTIMIZER
from moe.config import load
from moe.errors import CheckpointError, ConfigError, DataError
from moe.surgery import shard
from moe.surgery.job import Source, Spec

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
RECIPE = "recipe.yaml"
TOKENIZER = "tokenizer.json"
_LARGEST_JSON = 256 << 20  # bytes of a config or an index
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TRAVELS = (
    *("generation_config.json", TOKENIZER, "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"),
)


class Folder(Source):
    """A folder of safetensors files."""

    def __init__(
        self, folder: Path, weights: Path, config: dict[str, Any], form: Literal["huggingface", "moe"], tokenizer: str | None = None
    ) -> None:
        self.folder, self.form, self.config = folder, form, config
        self.places = _places(weights)
        self.specs = {name: place.spec for name, place in self.places.items() if form != "moe" or not name.startswith(OPTIMIZER)}
        self.travels = [name for name in _TRAVELS if resolve(folder, name).is_file()]
        self.tokenizer = tokenizer
        if form == "moe":
            config["vocab"] = _vocabulary(folder, self.specs, "embed.weight")

    def read(self, name: str) -> Tensor:
        return shard.read(self.places[name])

    def chunks(self, name: str) -> Iterator[memoryview]:
        return shard.chunks(self.places[name])

    def identity(self) -> Any:
        files = {place.path for place in self.places.values()}
        return sorted([str(path), (status := path.stat()).st_size, status.st_mtime_ns] for path in files)


class Checkpoint(Source):
    """One committed step of a run."""

    form = "moe"

    def __init__(self, folder: Path, step: Path, config: dict[str, Any], tokenizer: str | None) -> None:
        self.folder, self.step, self.config, self.tokenizer = folder, step, config, tokenizer
        self.manifest = read_manifest(step)
        stored = {name.removeprefix(MODEL): entry for name, entry in self.manifest.tensors.items() if name.startswith(MODEL)}
        self.specs = {name: Spec(entry.shape, dtype_of(entry.dtype)) for name, entry in stored.items()}
        self.travels: list[str] = []
        config["vocab"] = _vocabulary(step, self.specs, "embed.weight")

    def read(self, name: str) -> Tensor:
        return read_tensor(self.step, self.manifest, MODEL + name)

    def chunks(self, name: str) -> Iterator[memoryview]:
        return iter(shard.raw(self.read(name)))

    def identity(self) -> Any:
        return [str(self.step), self.manifest.sha256]


def open_source(path: str | Path) -> Source:
    """Open whatever model a path holds; nothing but headers and settings is read."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder; give one with config.json and safetensors files, or a run of moe")
    if (path / MANIFEST).is_file():
        return Checkpoint(path, path, *_recipe(path.parent.parent, path))
    if (path / RECIPE).is_file():
        return _of_run(path)
    if (path / "config.json").is_file():
        return Folder(path, path, read_json(path, "config.json"), "huggingface")
    if (path.parent / RECIPE).is_file():
        return _of_run(path.parent) if shelf.committed(path) else _weights(path.parent, path)
    _refuse_pickles(path)
    raise ConfigError(f"{path} holds no model: there is neither config.json (Hugging Face) nor {RECIPE} (a run of moe)")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object in a file of the folder."""
    path = resolve(folder, name)
    with open_inside(path.parent, path.name) as file:
        if (size := os.fstat(file.fileno()).st_size) > _LARGEST_JSON:
            raise CheckpointError(f"{path} has {size:,} bytes, more than any {name} needs; copy it again")
        text = file.read()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({str(error)[:200]}); copy it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; copy it again")
    return value


def read_text(path: str | Path) -> str:
    """The whole of a text file; DataError if it is none."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read as text ({(error.strerror or 'no file').lower()}); give a text file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}); give a text file") from None


def resolve(folder: Path, name: str) -> Path:
    """The plain file behind a name of the folder: itself, or where a link within the folder leads.

    The cache of Hugging Face's hub keeps files as links into the `blobs` beside its `snapshots`; those count as within.
    """
    path = folder / name
    if path.name != name or path.parent != folder:
        raise CheckpointError(f"{folder} names the file {name[:80]!r}, which is not a plain file name; copy the model's files again")
    if not path.is_symlink():
        return path
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    roots = [home] + ([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])
    if real.parent not in roots:
        raise CheckpointError(f"{path} is a link out of its folder, to {real}; put the file itself there")
    return real


def _of_run(folder: Path) -> Source:
    if (folder / "weights").is_dir():
        return _weights(folder, folder / "weights")
    damaged = ""
    for step in shelf.committed(folder / "checkpoints").values():
        try:
            return Checkpoint(folder, step, *_recipe(folder, folder))
        except Damaged as error:
            damaged = f" that is whole ({error})"
    raise ConfigError(f"{folder} holds neither weights nor a checkpoint{damaged}; train it first")


def _weights(run: Path, weights: Path) -> Source:
    config, tokenizer = _recipe(run, weights)
    return Folder(run, weights, config, "moe", tokenizer)


def _recipe(run: Path, asked: Path) -> tuple[dict[str, Any], str | None]:
    """The model section of a run's recipe, and the tokenizer that it names."""
    if not (run / RECIPE).is_file():
        raise ConfigError(f"{asked} lies in no run ({run / RECIPE} is missing), so that its model is not known; give the folder of a run")
    recipe = load([run / RECIPE], [])
    given = "tokenizer" in recipe.data.model_fields_set  # not where it came from a folder that had none
    return recipe.model.model_dump(mode="json"), _tokenizer(run, recipe.data.tokenizer) if given else None


def _tokenizer(run: Path, named: str) -> str:
    """The tokenizer that a run's recipe names, or the copy that the run keeps where that one has gone."""
    copy = run / "tokens" / TOKENIZER
    gone = named != "bytes" and not Path(named).expanduser().exists()
    return str(copy.resolve()) if gone and copy.is_file() else named


def check_tokenizer(source: Source) -> None:
    """CheckpointError where the tokenizer.json that would travel along is none."""
    from tokenizers import Tokenizer

    if TOKENIZER not in source.travels:
        return
    path = resolve(source.folder, TOKENIZER)
    try:
        with open_inside(path.parent, path.name) as file:
            Tokenizer.from_str(file.read().decode())
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"{source.folder / TOKENIZER} is no tokenizer of the `tokenizers` library ({str(error)[:200]}); copy it again, or move it "
            "elsewhere to go on without"
        ) from None


def _vocabulary(folder: Path, specs: dict[str, Spec], name: str) -> int:
    if name not in specs:
        raise CheckpointError(f"{folder} lacks {name}, so that it is no model of moe; give the folder of a run")
    return specs[name].shape[0]


def _places(folder: Path) -> dict[str, shard.Place]:
    """Where each tensor of a folder lies, once every file is checked against its own header and the index."""
    if (folder / INDEX).exists():
        index = read_json(folder, INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            raise CheckpointError(f"{folder / INDEX} has no weight_map of names to files; copy it again")
    elif (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        index = {}
    else:
        _refuse_pickles(folder)
        raise CheckpointError(f"{folder} holds neither {INDEX} nor {SINGLE}; copy the model's files again")
    places: dict[str, shard.Place] = {}
    for name in sorted(set(index.values())) or [SINGLE]:
        path = resolve(folder, name)
        if not path.exists():
            raise CheckpointError(f"{path} is missing; copy it again from where the other files of the model came from")
        with open_inside(path.parent, path.name) as file:
            found = shard.layout(path, file.fileno())
        if twice := places.keys() & found.keys():
            raise CheckpointError(f"{folder} holds {min(twice)} in {places[min(twice)].path.name} and in {name}; keep one of them")
        if lacking := [tensor for tensor, place in index.items() if place == name and tensor not in found]:
            raise CheckpointError(f"{folder / name} lacks {lacking[0]}, which {INDEX} promises; copy it again")
        places |= found
    return places


def _refuse_pickles(folder: Path) -> None:
    found = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if found:
        raise CheckpointError(
            f"{folder / found[0]} is a pickle, which can run any program when it is opened, so moe does not; convert it where nothing is "
            "at stake: transformers' from_pretrained(…, weights_only=True), then save_pretrained(…), which writes safetensors"
        )
