"""Where text and tokens come from. One class a source, whose constructor is its schema in YAML.

To add one: a class with `documents()`, a line in SOURCES, and a test.
"""

from __future__ import annotations

import glob
import importlib.util
import inspect
import json
import os
import platform
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from moe.data.formats import Format, Integer, detect
from moe.errors import ConfigError, DataError
from moe.tables import entry, nearest

SOURCES = {
    "stdlib": "moe.data.sources:Stdlib",
    "text": "moe.data.sources:Text",
    "jsonl": "moe.data.sources:JsonLines",
    "huggingface": "moe.data.sources:HuggingFace",
    "tokens": "moe.data.sources:TokenFiles",
}

HoldOut = Literal["share", "all", "none"]
_NOT_CORPUS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Source(ABC):
    """A share of the training mixture.

    `weight` is relative to the other sources; `hold_out` says which of its documents are held out for validation: the share
    data.validation of them, by the hash of their text, or all, or none.
    """

    name: str

    def __init__(self, *, weight: float = 1.0, hold_out: HoldOut = "share") -> None:
        if not 0 < weight < float("inf"):
            raise ConfigError(f"source {self.name} has weight {weight}; give a positive number")
        self.weight, self.hold_out = weight, hold_out

    @abstractmethod
    def describe(self) -> str:
        """A few words on what this is, for the log."""


class TextSource(Source):
    """Documents of text, always in the same order."""

    size: int | None = None  # bytes to expect, for a progress bar; None where nobody knows

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """The documents, empty ones included."""


class Stdlib(TextSource):
    """The running Python's own standard library: real text on any machine, about 11 MB, without tests and encoding tables."""

    name = "stdlib"

    def __init__(self, *, weight: float = 1.0, hold_out: HoldOut = "share") -> None:
        super().__init__(weight=weight, hold_out=hold_out)
        self.root = Path(sysconfig.get_path("stdlib"))
        self.files = sorted(self._walk())
        if not self.files:
            raise DataError(f"this Python has no standard-library source text in {self.root}; add a source `text` with paths")
        self.size = sum((self.root / file).stat().st_size for file in self.files)

    def documents(self) -> Iterator[str]:
        for file in self.files:
            try:
                yield (self.root / file).read_bytes().decode()
            except UnicodeDecodeError:
                continue
            except OSError as error:
                raise DataError(f"cannot read {self.root / file}: {error.strerror}") from error

    def describe(self) -> str:
        return f"standard library of {platform.python_implementation()} {platform.python_version()}"

    def _walk(self) -> Iterator[str]:
        for folder, folders, files in os.walk(self.root):
            relative = Path(folder).relative_to(self.root)
            folders[:] = [f for f in folders if f not in _NOT_CORPUS and not f.startswith("config-")]
            for file in files:
                # Data tables, and what a build says of itself, are dull text; the latter also differs between machines.
                dull = (relative.as_posix() == "encodings" and file != "__init__.py") or file.startswith("_sysconfigdata")
                if file.endswith(".py") and not dull:
                    yield (relative / file).as_posix()


class Text(TextSource):
    """Files of UTF-8 text by path or glob; a document is a file, a paragraph (between blank lines) or a line."""

    name = "text"

    def __init__(
        self,
        *,
        paths: list[str],
        document: Literal["file", "paragraph", "line"] = "file",
        weight: float = 1.0,
        hold_out: HoldOut = "share",
    ) -> None:
        super().__init__(weight=weight, hold_out=hold_out)
        self.files, self.document = expand(paths, self.name), document
        self.size = sum(file.stat().st_size for file in self.files)

    def documents(self) -> Iterator[str]:
        for file in self.files:
            if self.document == "file":
                yield "".join(_lines(file))
            elif self.document == "line":
                yield from (line.rstrip("\n") for line in _lines(file))
            else:
                yield from _paragraphs(_lines(file))

    def describe(self) -> str:
        return f"{_first(self.files)}, a document a {self.document}"


class JsonLines(TextSource):
    """Files with one JSON object a line, whose `field` is a document."""

    name = "jsonl"

    def __init__(self, *, paths: list[str], field: str = "text", weight: float = 1.0, hold_out: HoldOut = "share") -> None:
        super().__init__(weight=weight, hold_out=hold_out)
        self.files, self.field = expand(paths, self.name), field
        self.size = sum(file.stat().st_size for file in self.files)

    def documents(self) -> Iterator[str]:
        for file in self.files:
            for number, line in enumerate(_lines(file), 1):
                if line.strip():
                    yield self._text(line, f"{file}:{number}")

    def _text(self, line: str, where: str) -> str:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get(self.field), str):
            keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise DataError(f"{where} has no text in field {self.field!r} (it has: {keys}); add field: with the right name")
        return row[self.field]

    def describe(self) -> str:
        return f"field {self.field!r} of {_first(self.files)}"


class HuggingFace(TextSource):
    """A data set by its name on the Hugging Face hub, or a local folder of files that `datasets` can read."""

    name = "huggingface"

    def __init__(
        self,
        *,
        dataset: str,
        subset: str | None = None,
        split: str = "train",
        field: str = "text",
        revision: str | None = None,
        weight: float = 1.0,
        hold_out: HoldOut = "share",
    ) -> None:
        super().__init__(weight=weight, hold_out=hold_out)
        if importlib.util.find_spec("datasets") is None:
            raise ConfigError("source huggingface needs the package `datasets`; install the extra: pip install 'moe[hf]'")
        self.dataset, self.subset, self.split, self.field, self.revision = dataset, subset, split, field, revision

    def documents(self) -> Iterator[str]:
        import datasets  # pyright: ignore[reportMissingImports]

        try:
            rows = datasets.load_dataset(self.dataset, self.subset, split=self.split, revision=self.revision, streaming=True)
            for row in rows:
                if not isinstance(row.get(self.field), str):
                    raise DataError(f"{self.dataset} has no text in field {self.field!r} (it has: {', '.join(row)}); add field:")
                yield row[self.field]
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read the data set {self.dataset}: {error}") from error

    def describe(self) -> str:
        parts = [self.dataset, self.subset, self.split, self.revision]
        return " ".join(part for part in parts if part)


class TokenFiles(Source):
    """Token files made before: folders of `moe tokenize`, or shards of nanoGPT, modded-nanogpt, Megatron, OLMo, NumPy.

    They stay where they are. `dtype` is for nanogpt and olmo, which do not say it: by default the smallest of uint16 and uint32
    that holds the vocabulary. `end` is the id after which a document ends, by default the tokenizer's.
    """

    name = "tokens"

    def __init__(
        self,
        *,
        paths: list[str],
        format: Format = "auto",
        dtype: Integer | None = None,
        end: int | None = None,
        weight: float = 1.0,
        hold_out: HoldOut = "share",
    ) -> None:
        super().__init__(weight=weight, hold_out=hold_out)
        self.dtype: Integer | None = dtype
        self.end = end
        found = expand([f"{p}.bin" if Path(f"{p}.idx").is_file() else p for p in paths], self.name, folders=True)
        files = dict.fromkeys(file.with_suffix(".bin") if file.suffix == ".idx" else file for file in found)
        self.files: list[tuple[Path, Format]] = [(file, detect(file) if format == "auto" else format) for file in files]
        if len(self.files) > 1 and (folder := next((file for file, form in self.files if form == "moe"), None)):
            raise ConfigError(f"{folder} is a folder of tokens among other paths; make it a source of its own, with its weight")

    def describe(self) -> str:
        forms = ", ".join(dict.fromkeys(form for _, form in self.files))
        return f"{_first([file for file, _ in self.files])} ({forms})"


def build(source: Source | str | Mapping[str, Any]) -> Source:
    """The source that a name, or a dictionary {name, options…} as in a recipe, describes."""
    if isinstance(source, Source):
        return source
    options = {"name": source} if isinstance(source, str) else dict(source)
    name = options.pop("name", None)
    make = entry(SOURCES, str(name), "source")
    allowed = inspect.signature(make).parameters
    for option in options:
        if option not in allowed:
            raise ConfigError(f"source {name} has no option {option!r}; {nearest(option, allowed)}")
    missing = [p.name for p in allowed.values() if p.default is inspect.Parameter.empty and p.name not in options]
    if missing:
        raise ConfigError(f"source {name} needs {', '.join(missing)}; add {missing[0]}: to it")
    return make(**options)


def expand(paths: list[str], name: str, *, folders: bool = False) -> list[Path]:
    """The files that paths and globs name, sorted within each; every one must name something."""
    if not paths:
        raise ConfigError(f"source {name} has an empty list of paths; name files or globs")
    found: dict[Path, None] = {}
    for pattern in paths:
        here = Path(pattern).expanduser()
        matches = [here] if here.exists() else sorted(Path(match) for match in glob.glob(str(here), recursive=True))
        if not folders and here.is_dir():
            raise DataError(f"{pattern} is a folder; name its files, for example {here / '**' / '*'}")
        matches = [match for match in matches if folders or match.is_file()]
        if not matches:
            raise DataError(f"no file matches {pattern!r} of source {name} (looked from {Path.cwd()})")
        found |= dict.fromkeys(match.absolute() for match in matches)
    return list(found)


def _lines(file: Path) -> Iterator[str]:
    try:
        with open(file, encoding="utf-8", newline="\n") as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 ({error.reason}, byte 0x{error.object[error.start]:02x}); convert it first") from error
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph)
            paragraph = []
    if paragraph:
        yield "".join(paragraph)


def _first(files: list[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
