"""YAML that means what it says: plain mappings, lists, strings, numbers, true, false and null, each with its line.

Beyond `yaml.safe_load` it refuses duplicate keys, tags, anchors, `.nan`, great depth and great size, reads 1e-3 as a
number, and leaves no, yes, on, off, 12:30:45 and dates what they look like: words.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from moe.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32

Places = dict[tuple[str | int, ...], str]  # path of a key or list entry → "file:line"

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_ODD_INT = re.compile(r"[-+]?0[0-9_]+|0[xob][0-9a-fA-F_]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*\.?[0-9]*)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NAN = {".nan", ".NaN", ".NAN"}


def read_file(path: Path) -> tuple[dict[str, Any], Places]:
    """The mapping in a file, and the place of each of its keys."""
    try:
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "not a file" if path.exists() else "absent"
            raise ConfigError(f"{path} is {kind}; give a YAML file, such as configs/debug.yaml")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a readable YAML file") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES:,} bytes, which no recipe is; give a YAML file of settings")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: byte {raw[error.start]:#04x} is not UTF-8 text; save the file as UTF-8") from None
    value, places = read_text(text, str(path))
    if value is None:
        return {}, places
    if not isinstance(value, dict):
        raise ConfigError(f"{path}:1: a recipe is a mapping of settings, such as `train: {{steps: 100}}`, not {value!r:.60}")
    return value, places


def read_text(text: str, where: str, *, lines: bool = True) -> tuple[Any, Places]:
    """The value that a text describes, and the place of each key in it: `where:line`, or `where` alone without `lines`."""
    try:
        loader = _Loader(text, where, lines)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        problem = " ".join(filter(None, (error.context, error.problem)))
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}" if lines and mark else where
        raise ConfigError(f"{place}: not readable as YAML: {problem}") from None
    except ReaderError as error:
        place = f"{where}:{text.count(chr(10), 0, error.position) + 1}" if lines else where
        raise ConfigError(f"{place}: character {text[error.position]!r} does not belong in YAML; remove it") from None
    places: Places = {}
    return (None if node is None else _value(node, (), loader, places)), places


def scalar(text: str) -> Any:
    """What a plain word of YAML means; ValueError, with the remedy, for one that people read in two ways."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if len(text) > 100:
        return text
    if _INT.fullmatch(text):
        if abs(number := int(text)) >= 1 << 63:
            raise ValueError(f"{text} is too large for a number; write a smaller one, or quote it")
        return number
    if _ODD_INT.fullmatch(text):
        raise ValueError(f"{text} is decimal to some readers and octal or text to others; write a decimal number, or quote it")
    if _FLOAT.fullmatch(text):
        number = float(text)
        if number in (float("inf"), float("-inf")):
            raise ValueError(f"{text} is too large for a number; write a smaller one, or quote it")
        return number
    if match := _INFINITY.fullmatch(text):
        return float(match[1] + "inf")
    if text in _NAN:
        raise ValueError(f"{text} is not a number; write one, or null")
    return text


class _Refused(yaml.MarkedYAMLError):
    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(problem=problem, problem_mark=mark)


class _Loader(Reader, Scanner, Parser, Composer, BaseResolver):
    """Composes nodes and constructs nothing: no tag can name a Python object."""

    def __init__(self, text: str, where: str, lines: bool) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self.where, self.lines, self.depth = where, lines, 0

    def place(self, mark: Any) -> str:
        return f"{self.where}:{mark.line + 1}" if self.lines else self.where

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _Refused("anchors (&) and aliases (*) are not used here; write the value out, or quote the text", event.start_mark)
        if getattr(event, "tag", None) not in (None, "!"):
            raise _Refused(f"the tag {event.tag} is not used here; write a plain value", event.start_mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Refused(f"nested more than {MAX_DEPTH} levels deep", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _value(node: yaml.Node, path: tuple[str | int, ...], loader: _Loader, places: Places) -> Any:
    places.setdefault(path, loader.place(node.start_mark))
    if isinstance(node, yaml.ScalarNode):
        try:
            node.value.encode()  # an escape can spell half of a character
            return node.value if node.style else scalar(node.value)
        except UnicodeEncodeError:
            raise ConfigError(f"{places[path]}: {node.value!r} is no text; write whole characters") from None
        except ValueError as error:
            raise ConfigError(f"{places[path]}: {dotted(path)}{': ' if path else ''}{error}") from None
    if isinstance(node, yaml.SequenceNode):
        return [_value(child, (*path, i), loader, places) for i, child in enumerate(node.value)]
    mapping: dict[str, Any] = {}
    for key, child in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{loader.place(key.start_mark)}: {dotted(path) or 'the file'} has a key that is no word; write name: value")
        here = (*path, key.value)
        if key.value in mapping:
            raise ConfigError(f"{loader.place(key.start_mark)}: {dotted(here)} is given twice, first at {places[here]}; keep one of them")
        places[here] = loader.place(key.start_mark)
        mapping[key.value] = _value(child, here, loader, places)
    return mapping


def dotted(path: tuple[str | int, ...]) -> str:
    """("data", "sources", 0) as a person types it: data.sources.0"""
    return ".".join(map(str, path))
