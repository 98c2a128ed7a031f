"""What all configurations share: checks, JSON and back, and the hash."""

from __future__ import annotations

import hashlib
import json
import types
from collections.abc import Callable, Collection
from dataclasses import fields, is_dataclass
from functools import cache, partial
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from raytrust.config.register import Registry

T = TypeVar("T")

# Metadata of a field that came after others had been hashed: it is left out where it has its default, so that the
# digests of configurations that do not use it stay what they were.
ADDED = {"left out by default": True}


def expect(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"Expected {name}={value!r} {expected}.")


def expect_choices(config: Any) -> None:
    """Raises ValueError for a field that is none of its Literal's values, or no name of its registry."""
    for name, hint in type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            expect_choice(name, getattr(config, name), get_args(hint))
        # A compressor's field has a registry as well, but holds a configuration of its own instead of a name.
        elif (registry := registry_of(hint)) is not None and hint.__origin__ is str:
            expect_choice(name, getattr(config, name), registry)


def expect_choice(name: str, value: object, choices: Collection[Any] | Registry) -> None:
    expect(value in choices, name, value, "to be one of " + ", ".join(map(repr, choices)))


# Of a dataclass's fields, with what is annotated. They are asked for whenever a configuration is made.
type_hints: Callable[[type], dict[str, Any]] = cache(partial(get_type_hints, include_extras=True))


def registry_of(hint: Any) -> Registry | None:
    """Whose names a field of type Annotated[..., registry] takes."""
    return hint.__metadata__[0] if get_origin(hint) is Annotated else None


def to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON-compatible builtins; a compressor carries its `method`. Inverse of `from_dict`."""

    def tagged(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            tag = {"method": value.method} if hasattr(value, "method") else {}
            kept = [f for f in fields(value) if f.metadata != ADDED or getattr(value, f.name) != f.default]
            return tag | {f.name: tagged(getattr(value, f.name)) for f in kept}
        return [tagged(item) for item in value] if isinstance(value, (tuple, list)) else value

    return tagged(config)


def from_dict(kind: type[T], values: Any, name: str = "") -> T:
    """Build a config of type `kind` from builtins; keys left out take their defaults.

    Raises ValueError for a key that `kind` does not have, a value of the wrong type, or one out of range.
    """
    name = name or kind.__name__
    if not isinstance(values, dict):
        raise ValueError(f"Expected {name}={values!r} to be a mapping.")
    # The tag that `to_dict` adds is no field.
    if "method" in values and values["method"] == getattr(kind, "method", None):
        values = {key: value for key, value in values.items() if key != "method"}
    hints = type_hints(kind)
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ValueError(f"Expected the keys of {name} to be among {', '.join(known)}, got {key!r}.")
    return kind(**{key: parse_value(hints[key], value, key) for key, value in values.items()})


def parse_value(hint: Any, value: Any, name: str) -> Any:
    """A field of this type from builtins. Raises ValueError for a value of the wrong type, or out of range."""
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return from_dict(hint, value, name)  # type: ignore[arg-type]
    if (registry := registry_of(hint)) is not None:
        return _parse_registered(registry, arguments[0], value, name)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        return parse_value(type(value) if type(value) in options else options[0], value, name)
    if origin is Literal:
        expect_choice(name, value, arguments)
        return value
    if origin is tuple:
        expect(isinstance(value, (list, tuple)), name, value, "to be a list")
        of_each = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
        expect(len(value) == len(of_each), name, value, f"to be a list of {len(of_each)}")
        return tuple(parse_value(hint, item, name) for hint, item in zip(of_each, value, strict=True))
    # JSON writes 1.0 as 1 in other languages, and people do.
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # Not by isinstance, for which True is an integer.
    expect(type(value) is hint, name, value, f"to be of type {hint.__name__}")
    return value


def _parse_registered(registry: Registry, base: Any, value: Any, name: str) -> Any:
    """A name of the registry, or the dataclass that its "method" names."""
    if base is str:
        expect_choice(name, value, registry)
        return value
    method = value.get("method") if isinstance(value, dict) else None
    if not isinstance(method, str) or method not in registry:
        raise ValueError(f"Expected {name}={value!r} to have a method among {', '.join(registry)}.")
    return from_dict(registry[method], value, name)


def digest(*parts: Any) -> str:
    """16 hexadecimal digits that identify the given configs and builtins: SHA-256 of their canonical JSON.

    Equal values have equal digests, 1 and 1.0 too.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        # Other languages, and people, write 1.0 as 1: the same configuration must keep its results.
        return int(value) if isinstance(value, float) and value.is_integer() else value

    values = [plain(to_dict(p)) for p in parts]
    # Sorted and without spaces, so that the order in which fields were written does not change the digest.
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
