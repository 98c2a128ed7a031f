"""The options of a command line that follow from a configuration's dataclass, nested ones included.

Every field is an option, unless a program says why it is none; its type, choices, default and help are the field's own.
Written on argparse, because presets and `--resume` need to know what was *given*, and an error is one line: tyro,
jsonargparse and pydantic make a whole configuration at once, and take 0.1 s and more to import.
"""

from __future__ import annotations

import argparse
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin

from raytrust.config.parsing import parse_text
from raytrust.config.values import parse_value, registry_of, type_hints


@dataclass(frozen=True)
class Field:
    """A field that is an option: `name`, with underscores. path: where it is, such as "threat.batch_size"."""

    path: str
    name: str
    hint: Any
    help: str


class Fields:
    """The options of one configuration.

    kind: its dataclass. title: of the group of its own fields; that of a nested one bears its name. names: of options
    that are called otherwise than their field, by its path. without: by path, fields that are no options, and why.
    notes: by path, what the help adds to the field's own.
    """

    def __init__(
        self,
        kind: type,
        title: str,
        names: Mapping[str, str],
        without: Mapping[str, str],
        notes: Mapping[str, str] | None = None,
    ):
        self.kind, self.without, self._title, self._names, self._notes = kind, without, title, names, notes or {}
        every = tuple(_leaves(kind, "", names))
        for path in (*names, *without, *self._notes):
            # A field that is renamed would else become an option again that nobody knows.
            if not any(_is_at(field.path, path) for field in every):
                raise ValueError(f"Expected {path!r} to be a field of {kind.__name__}.")
        self.options = tuple(f for f in every if not any(_is_at(f.path, path) for path in without))
        self.names = tuple(field.name for field in self.options)

    def add_to(
        self, parser: argparse.ArgumentParser, defaults: Mapping[str, Any], also: Mapping[str, str] | None = None
    ) -> None:
        """One group for each dataclass. defaults: of each option, or what the help says in its place. also: a second
        name for some of them."""
        groups: dict[str, Any] = {}
        for field in self.options:
            node = field.path.rpartition(".")[0]
            if node not in groups:
                groups[node] = parser.add_argument_group(node.rpartition(".")[2] or self._title)
            # argparse formats help with "%", of which there may be one in a docstring.
            said = "; ".join([field.help, *([self._notes[field.path]] if field.path in self._notes else [])])
            text = f"{said} (default: {_shown(defaults[field.name])})".replace("%", "%%")
            flags = [f"--{name.replace('_', '-')}" for name in (field.name, (also or {}).get(field.name)) if name]
            groups[node].add_argument(*flags, help=text, **_argument(field.hint))

    def values(self, config: Any) -> dict[str, Any]:
        """The options that make this configuration."""
        found = {}
        for field in self.options:
            value = config
            for name in field.path.split("."):
                value = getattr(value, name)
            found[field.name] = value
        return found

    def make(self, values: Mapping[str, Any], fixed: Mapping[str, Any] | None = None) -> Any:
        """The configuration that the options make. fixed: further fields, by path.

        Raises ValueError, in the names of the options, for what a configuration refuses.
        """
        leaves = {field.path: parse_value(field.hint, values[field.name], field.name) for field in self.options}
        return self._make(self.kind, "", {**leaves, **(fixed or {})})

    def _make(self, kind: type, prefix: str, leaves: Mapping[str, Any]) -> Any:
        arguments: dict[str, Any] = {}
        for name, hint in type_hints(kind).items():
            path = prefix + name
            if path in leaves:
                arguments[name] = leaves[path]
            elif any(_is_at(leaf, path) for leaf in leaves):
                arguments[name] = self._make(hint, f"{path}.", leaves)
        try:
            return kind(**arguments)
        except ValueError as error:
            # A configuration names its field, "batch_size=0", which may be of any of several options' configurations.
            field, _, rest = str(error).removeprefix("Expected ").partition("=")
            called = self._names.get(prefix + field)
            raise ValueError(f"Expected {called}={rest}" if called else str(error)) from None


def by_preset(defaults: Mapping[str, Any], presets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the help says of defaults, some of which depend on the preset."""
    names = next(iter(presets.values()))
    of = {name: ", ".join(f"{preset}: {_shown(values[name])}" for preset, values in presets.items()) for name in names}
    return {**defaults, **of}


def _leaves(kind: type, prefix: str, names: Mapping[str, str]) -> Iterator[Field]:
    """Every field, with those of nested dataclasses in the place of these."""
    help_of = field_help(kind)
    for field in fields(kind):
        hint, path = type_hints(kind)[field.name], prefix + field.name
        if is_dataclass(hint):
            yield from _leaves(hint, f"{path}.", names)  # type: ignore[arg-type]
        else:
            yield Field(path, names.get(path, field.name), hint, help_of.get(field.name, ""))


def _is_at(path: str, node: str) -> bool:
    return path == node or path.startswith(f"{node}.")


def field_help(kind: type) -> dict[str, str]:
    """The first sentence of what a dataclass's docstring says of each field, in lines that begin with "name: "."""
    # Only names of fields begin an entry: a line of prose may have a word and a colon, too.
    names = "|".join(field.name for field in fields(kind))
    parts = re.split(rf"^({names}): ", inspect.getdoc(kind) or "", flags=re.MULTILINE)
    entries = {
        name: " ".join(text.split("\n\n")[0].split()) for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    return {name: re.split(r"\.(?: (?=[A-Z])|$)", text)[0] for name, text in entries.items()}


def _argument(hint: Any) -> dict[str, Any]:
    """What argparse has to know of a field's type."""
    origin, arguments = get_origin(hint), get_args(hint)
    # Such a field is of one type or None, which a command line says by leaving the option out.
    if origin in (Union, types.UnionType):
        return _argument(arguments[0])
    if hint is bool:
        # With its --no- form, as a preset may have set what is to be off.
        return {"action": argparse.BooleanOptionalAction}
    if origin is Literal:
        return {"choices": arguments}
    if origin is tuple:
        return {"type": _list_of(hint), "metavar": "LIST"}
    if (registry := registry_of(hint)) is not None:
        # No choices: plugins are loaded once the command line is read, and a path is a name, too.
        return {"metavar": f"{{{','.join(registry)}}}"}
    return {"type": hint, "metavar": {int: "N", float: "X"}.get(hint, "TEXT")}


def _list_of(hint: Any) -> Callable[[str], Any]:
    def items(text: str) -> Any:
        return parse_text(hint, text)

    # argparse calls a type by its name: "invalid list value".
    items.__name__ = "list"
    return items


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join("=".join(map(str, x)) if isinstance(x, tuple) else str(x) for x in value) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
