"""A setting that names one entry of a table, beside the options of that entry's constructor.

Importing this needs the standard library alone, so that a router that wraps another can annotate a parameter with a choice.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from typing import Annotated, Any, Required, get_type_hints

from moe.tables import nearest


def Choice(table: Mapping[str, str], what: str = "entry", *, given: tuple[str, ...] = (), default: str | None = None) -> Any:
    """The type of a field that takes a name, or a mapping {name: …, options…}, and becomes the mapping with every option.

    Options are the keyword parameters of the entry's constructor, with its annotations and defaults, but for those in
    `given`, which whoever builds the entry supplies. A mapping without a name means `default`. `what` is the
    word for an entry in errors.
    """
    return Annotated[dict[str, Any], Entries(table, what, given, default)]


_OPEN: set[int] = set()  # tables whose JSON schema is being written


class Entries:
    """What pydantic needs to know of a `Choice`."""

    def __init__(self, table: Mapping[str, str], what: str, given: tuple[str, ...], default: str | None) -> None:
        self.table, self.what, self.given, self.default = table, what, given, default
        self._adapters: dict[str, Any] = {}

    def options(self, name: str) -> dict[str, tuple[Any, Any]]:
        """Every option of an entry: (annotation, default), the default being `inspect.Parameter.empty` if there is none."""
        module, _, attribute = self.table[name].partition(":")
        make = getattr(importlib.import_module(module), attribute)
        hints = get_type_hints(make.__init__ if inspect.isclass(make) else make, include_extras=True)
        return {
            p.name: (hints.get(p.name, Any), p.default)
            for p in inspect.signature(make).parameters.values()
            if p.name not in self.given and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
        }

    def options_of(self, value: Any) -> dict[str, tuple[Any, Any]]:
        """The options of the entry that a valid or half-valid setting names."""
        return self.options(value if isinstance(value, str) else value.get("name", self.default))

    def resolve(self, value: Any, mode: str = "python") -> dict[str, Any]:
        """The mapping with every option, from a name or from a mapping with some."""
        from pydantic_core import PydanticCustomError

        given = {"name": value} if isinstance(value, str) else value
        if not isinstance(given, dict):
            raise PydanticCustomError("choice_type", "must be the name of a {what}, or a mapping with its name", {"what": self.what})
        name = given.get("name", self.default)
        if name is None:
            known = ", ".join(self.table)
            raise PydanticCustomError("choice_name", "has no name; add name: with one of {known}", {"known": known})
        if not isinstance(name, str) or name not in self.table:
            context = {"what": self.what, "name": str(name), "remedy": nearest(str(name), self.table)}
            raise PydanticCustomError("choice_unknown", "names no {what}: there is no {name}; {remedy}", context)
        try:
            adapter = self._adapter(name)
        except ImportError as error:
            raise PydanticCustomError("choice_absent", "cannot be used here: {why}", {"why": str(error)}) from None
        defaults = {key: default for key, (_, default) in self.options(name).items() if default is not inspect.Parameter.empty}
        options = defaults | {key: option for key, option in given.items() if key != "name"}
        checked = adapter.validate_json(json.dumps(options)) if mode == "json" else adapter.validate_python(options)
        return {"name": name} | checked

    def _adapter(self, name: str) -> Any:
        if name not in self._adapters:
            from pydantic import ConfigDict, TypeAdapter
            from typing_extensions import TypedDict

            # a TypedDict, because options may be called what a model's methods are called: copy, json, schema
            form = TypedDict(name, {key: Required[hint] for key, (hint, _) in self.options(name).items()})  # pyright: ignore
            form.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # pyright: ignore
            self._adapters[name] = TypeAdapter(form)
        return self._adapters[name]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.with_info_plain_validator_function(lambda value, info: self.resolve(value, info.mode))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        if id(self.table) in _OPEN:  # an entry that wraps one of its own table
            return {"type": ["object", "string"]}
        _OPEN.add(id(self.table))
        try:
            branches = [self._branch(name, handler) for name in self.table]
        finally:
            _OPEN.remove(id(self.table))
        return {"oneOf": [*branches, {"type": "string", "enum": list(self.table)}]}

    def _branch(self, name: str, handler: Any) -> dict[str, Any]:
        try:
            branch = dict(handler(self._adapter(name).core_schema))
        except ImportError:  # its options cannot be known on this machine
            return {"type": "object", "properties": {"name": {"const": name}}, "required": ["name"]}
        properties = {"name": {"const": name}} | branch.get("properties", {})
        required = ["name"]
        for option, (_, default) in self.options(name).items():
            if default is inspect.Parameter.empty:
                required.append(option)
            else:
                properties[option] = properties[option] | {"default": default}
        return branch | {"properties": properties, "required": required, "additionalProperties": False}
