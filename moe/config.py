"""Settings: YAML files and key=value words → strict pydantic objects → YAML again."""

from __future__ import annotations

import difflib
import inspect
import json
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from moe.choice import Choice, Entries
from moe.errors import ConfigError
from moe.tables import entry, nearest
from moe.yaml_reader import Places, dotted, read_file, read_text, scalar

__all__ = ["Choice", "Settings", "dump", "load", "refuse_idle", "schema", "wrong"]

FORMS = {"recipe": "moe.recipe:Recipe"}  # by name, because forms live on floors above this one
COMMAND_LINE = "command line"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
Key = tuple[str | int, ...]


class Settings(BaseModel):
    """A section of a form: unknown keys, values of another type, inf and nan are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True)

    def idle(self) -> dict[str, str]:
        """Settings, dotted, that have no effect beside the others, each with the reason: "with schedule.name=cosine".

        A whole form refuses to be given one (`refuse_idle`), so that it always has its default, and `dump` leaves it out.
        """
        return {}

    @classmethod
    def complete(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """A whole form's tree with what it takes from the files that it names."""
        return tree


def refuse_idle(form: Settings) -> None:
    """Raise, inside a validator of the whole form, for each setting that was given and has no effect."""
    problems = [_problem(key, "idle", f"has no effect {why}; leave it out", value) for key, value, why in _given_idle(form, {}, "")]
    if problems:
        raise ValidationError.from_exception_data("settings", problems)


def wrong(key: str, sentence: str) -> ValidationError:
    """What a validator raises about `key`, a dotted path below its own section; the sentence stands alone."""
    return ValidationError.from_exception_data("settings", [_problem(key, "wrong", sentence, None)])


def load(files: Sequence[str | Path], overrides: Sequence[str] = (), form: Any = "recipe") -> Any:
    """The `form` (a Settings class; a Recipe if none is named) that files, merged left to right, and then key=value words describe.

    A mapping merges with the mapping (or bare name) before it and everything else replaces; an override sets its key to the
    whole value.
    Raises ConfigError, with a sentence on a line of its own for each thing that is wrong.
    """
    form = entry(FORMS, form, "form") if isinstance(form, str) else form
    tree: dict[str, Any] = {}
    places: Places = {}
    for file in files:
        _merge(tree, (), *read_file(Path(file)), places)
    for word in overrides:
        _override(tree, word, places)
    if urls := list(_urls(tree, places)):
        raise ConfigError("\n".join(urls))
    try:
        # as JSON, where a list may fill a tuple and everything else stays strict
        return form.model_validate_json(json.dumps(form.complete(tree)))
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(_sentences(error, form, tree, places)))) from None


def dump(settings: Settings) -> str:
    """YAML, with every setting that has an effect, that loads back to the same object."""
    return yaml.dump(_effective(settings, {}), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20)


def schema(form: type[Settings]) -> dict[str, Any]:
    """JSON schema of a form, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | _untitled(form.model_json_schema())


def _merge(tree: dict[str, Any], path: Key, new: dict[str, Any], new_places: Places, places: Places) -> None:
    for key, value in new.items():
        here = (*path, key)
        if isinstance(value, dict) and isinstance(tree.get(key), (dict, str)):
            tree[key] = _named(tree[key])
            places[here] = new_places[here]
            _merge(tree[key], here, value, new_places, places)
        else:
            tree[key] = value
            _forget(places, here)
            places |= {there: place for there, place in new_places.items() if there[: len(here)] == here}


def _forget(places: Places, path: Key) -> None:
    for there in [there for there in places if there[: len(path)] == path]:
        del places[there]


def _override(tree: dict[str, Any], word: str, places: Places) -> None:
    key, equals, text = word.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
        raise ConfigError(f"{COMMAND_LINE}: {word!r} is no setting; write key=value, such as train.steps=100")
    if not text.strip():
        raise ConfigError(f"{COMMAND_LINE}: {key} is given no value; write {key}=null for none, or {key}='\"\"' for empty text")
    value, _ = read_text(text, f"{COMMAND_LINE}: {key}", lines=False)
    holder: Any = tree
    path: Key = ()
    *sections, name = key.split(".")
    for section in sections:
        at = _index(holder, section, path)
        path = (*path, at)
        if isinstance(holder, dict) and holder.get(section) is None:
            holder[section] = {}
            places[path] = COMMAND_LINE
        holder[at] = holder = _named(holder[at])
    at = _index(holder, name, path)
    holder[at] = value
    _forget(places, (*path, at))
    places[(*path, at)] = COMMAND_LINE


def _named(value: Any) -> Any:
    """A bare name as the mapping that it stands for where options are added to it."""
    return {"name": value} if isinstance(value, str) else value


def _index(holder: Any, part: str, path: Key) -> str | int:
    key = dotted(path)
    if isinstance(holder, dict):
        if part.isdecimal():
            raise ConfigError(f"{COMMAND_LINE}: {key} is no list in the files, so that it has no entry {part}; set all of it: {key}='[…]'")
        return part
    if not isinstance(holder, list):
        raise ConfigError(f"{COMMAND_LINE}: {key} is {_shown(holder)}, which has no {part}; set all of it, as in {key}='{{{part}: …}}'")
    if not part.isdecimal() or int(part) >= len(holder):
        raise ConfigError(f"{COMMAND_LINE}: {key} is a list of {len(holder)}; write {key}.0 for its first, or {key}='[…]' for all of it")
    return int(part)


_NOUNS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list, such as [a, b]",
    "tuple": "a list, such as [0.9, 0.95]",
    "dict": "a mapping, such as {name: value}",
    "model": "a mapping, such as {name: value}",
}


def _sentences(error: ValidationError, form: type[Settings], tree: dict[str, Any], places: Places) -> Iterator[str]:
    for problem in error.errors(include_url=False):
        path = problem["loc"] if problem["type"] == "missing" else _path(problem["loc"], tree)
        known = [path[:n] for n in range(len(path), 0, -1) if path[:n] in places]
        place = f"{places[known[0]]}: " if known else ""
        yield place + _sentence(problem, path, form, tree)


def _urls(node: Any, places: Places, path: Key = ()) -> Iterator[str]:
    """A sentence for each value that names a place which is not in this machine's file system: s3://bucket/run is no local folder."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _urls(value, places, (*path, key))
    elif isinstance(node, str) and _URL.match(node):
        known = [path[:n] for n in range(len(path), 0, -1) if path[:n] in places]
        place = f"{places[known[0]]}: " if known else ""
        yield f"{place}{dotted(path)}={_shown(node)} is a URL, and only local paths can be read and written; give a path, such as /mnt/run"


def _path(loc: Key, tree: Any) -> Key:
    """`loc` without what pydantic adds behind a value: the member of a union that it tried."""
    path: Key = ()
    for part in loc:
        path = (*path, part)
        try:
            tree = tree[part]  # pyright: ignore
        except (KeyError, IndexError):
            tree = {}  # absent: a default, or a setting that is missing
        if not isinstance(tree, (dict, list)):
            break
    return path


def _sentence(problem: Any, path: Key, form: type[Settings], tree: dict[str, Any]) -> str:
    kind, value, message = problem["type"], problem["input"], problem["msg"]
    key = dotted(path) or "the recipe"
    if kind == "wrong":
        return message
    if kind == "extra_forbidden":
        return f"{key} is not a setting; {_remedy(form, path, tree)}"
    if kind == "missing":
        return f"{key} is missing; add it"
    if kind == "literal_error":
        words = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        remedy = nearest(str(value), words) if words else f"choose from {problem['ctx']['expected']}"
        return f"{key}={_shown(value)} is not a choice; {remedy}"
    noun, _, what = kind.rpartition("_")
    if what == "type" and noun in _NOUNS:
        return f"{key}={_shown(value)} is not {_NOUNS[noun]}{_hint(noun, value)}"
    if kind == "idle" or kind.startswith("choice_"):
        return f"{key}={_shown(value)} {message}"
    return f"{key}={_shown(value)} {re.sub('^[A-Z][a-z]+ ', '', message)}"


def _hint(noun: str, value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if noun == "string":
        return "; put it in quotes to read it as text"
    if not isinstance(value, str):
        return ""
    if noun == "bool" and value.lower() in ("yes", "no", "on", "off", "y", "n"):
        return f"; write {'true' if value.lower() in ('yes', 'on', 'y') else 'false'}"
    return "; remove the quotes" if _shown(value) != value else ""


def _shown(value: Any) -> str:
    """A value as it is written in YAML, shortened."""
    if isinstance(value, str):
        text = value if _is_text(value) and value.isprintable() else json.dumps(value)
    else:
        text = json.dumps(value, default=str, ensure_ascii=False).replace("Infinity", ".inf")
    return text if len(text) <= 60 else text[:57] + "…"


def _is_text(text: str) -> bool:
    try:
        return scalar(text) == text
    except ValueError:
        return False


def _remedy(form: type[Settings], path: Key, tree: dict[str, Any]) -> str:
    *sections, name = path
    siblings, prefix = _keys(form, tuple(sections), tree), dotted((*sections, ""))
    close = [prefix + key for key in difflib.get_close_matches(str(name), siblings, n=2, cutoff=0.65)]
    leaves = list(_leaves(form))
    close = close or [leaf for leaf in leaves if leaf.endswith(f".{name}")][:3]
    close = close or difflib.get_close_matches(dotted(path), leaves, n=1, cutoff=0.8)
    return f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(siblings)}"


def _keys(form: type[Settings], path: Key, tree: Any) -> list[str]:
    """Names that may stand below `path`."""
    target: Any = form
    for part in path:
        if isinstance(part, str) and isinstance(target, Entries):
            target = _target(target.options_of(tree)[part][0])
        elif isinstance(part, str) and target is not None:
            field = target.model_fields[part]
            target = _target(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation)
        tree = tree[part]  # a number leaves the target, because that of a list is that of its entries
    if isinstance(target, Entries):
        return ["name", *target.options_of(tree)]
    return list(target.model_fields) if target else []


def _target(annotation: Any) -> type[Settings] | Entries | None:
    """The section or table behind an annotation, be it optional or a list."""
    if inspect.isclass(annotation) and issubclass(annotation, Settings):
        return annotation
    if get_origin(annotation) is Annotated:
        return next((part for part in get_args(annotation) if isinstance(part, Entries)), _target(get_args(annotation)[0]))
    if get_origin(annotation) in (Union, types.UnionType, list, tuple):
        return next(filter(None, map(_target, get_args(annotation))), None)
    return None


def _leaves(form: type[Settings], prefix: str = "") -> Iterator[str]:
    for name, field in form.model_fields.items():
        target = _target(field.annotation)
        if inspect.isclass(target) and issubclass(target, Settings):
            yield from _leaves(target, f"{prefix}{name}.")
        else:
            yield prefix + name


def _problem(key: str, kind: Any, sentence: str, value: Any) -> InitErrorDetails:
    # through a template, because pydantic would take braces in the sentence for its own
    path = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
    return InitErrorDetails(type=PydanticCustomError(kind, "{sentence}", {"sentence": sentence}), loc=path, input=value)


def _below(idle: dict[str, str], section: str) -> dict[str, str]:
    return {key.removeprefix(f"{section}."): why for key, why in idle.items() if key.startswith(f"{section}.")}


def _given_idle(settings: Settings, outside: dict[str, str], prefix: str) -> Iterator[tuple[str, Any, str]]:
    idle = settings.idle() | outside
    for name in sorted(settings.model_fields_set):
        value = getattr(settings, name)
        if name in idle:
            yield prefix + name, value, idle[name]
        elif isinstance(value, Settings):
            yield from _given_idle(value, _below(idle, name), f"{prefix}{name}.")


def _effective(settings: Settings, outside: dict[str, str]) -> dict[str, Any]:
    idle = settings.idle() | outside
    values = {name: getattr(settings, name) for name in type(settings).model_fields if name not in idle}
    return {name: _effective(value, _below(idle, name)) if isinstance(value, Settings) else value for name, value in values.items()}


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # quoted where our reader, unlike PyYAML's, would see a number, and escaped where a line break could be lost
    plain = _is_text(text) and text.isprintable()
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _text_node)
_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)


def _untitled(node: Any) -> Any:
    """A schema without the titles that repeat each field's name."""
    if isinstance(node, list):
        return [_untitled(part) for part in node]
    if not isinstance(node, dict):
        return node
    return {key: _untitled(part) for key, part in node.items() if not (key == "title" and isinstance(part, str))}
