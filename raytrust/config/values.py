"""What all configurations share: checks, JSON and back, and the hash."""

from __future__ import annotations

import hashlib
import json
import types
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def expect(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"Expected {name}={value!r} {expected}.")


def expect_choices(config: Any) -> None:
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            expect_choice(name, getattr(config, name), get_args(hint))


def expect_choice(name: str, value: object, choices: tuple[Any, ...]) -> None:
    expect(value in choices, name, value, "to be one of " + ", ".join(map(repr, choices)))


def to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON-compatible builtins; a compressor carries its `method`. Inverse of `from_dict`."""

    def tagged(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            tag = {"method": value.method} if hasattr(value, "method") else {}
            return tag | {f.name: tagged(getattr(value, f.name)) for f in fields(value)}
        return [tagged(item) for item in value] if isinstance(value, (tuple, list)) else value

    return tagged(config)


def from_dict(kind: type[T], values: Any, name: str = "") -> T:
    """Build a config of type `kind` from builtins; keys left out take their defaults.

    Raises ValueError for a key that `kind` does not have, a value of the wrong type, or one out of range.
    """
    name = name or kind.__name__
    if not isinstance(values, dict):
        raise ValueError(f"Expected {name}={values!r} to be a mapping.")
    if "method" in values and values["method"] == getattr(kind, "method", None):
        values = {key: value for key, value in values.items() if key != "method"}
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ValueError(f"Expected the keys of {name} to be among {', '.join(known)}, got {key!r}.")
    return kind(**{key: _parse(hints[key], value, key) for key, value in values.items()})


def _parse(hint: Any, value: Any, name: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return from_dict(hint, value, name)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        methods = {option.method: option for option in arguments if hasattr(option, "method")}
        if methods:
            return _parse_tagged(methods, value, name)
        if value is None:
            return None
        (hint,) = (option for option in arguments if option is not type(None))
        return _parse(hint, value, name)
    if origin is Literal:
        expect_choice(name, value, arguments)
        return value
    if origin is tuple:
        expect(isinstance(value, (list, tuple)), name, value, "to be a list")
        return tuple(_parse(arguments[0], item, name) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expect(type(value) is hint, name, value, f"to be of type {hint.__name__}")
    return value


def _parse_tagged(methods: dict[str, Any], value: Any, name: str) -> Any:
    if not isinstance(value, dict) or value.get("method") not in list(methods):
        raise ValueError(f"Expected {name}={value!r} to have a method among {', '.join(methods)}.")
    return from_dict(methods[value["method"]], value, name)


def digest(*parts: Any) -> str:
    """16 hexadecimal digits that identify the given configs and builtins: SHA-256 of their canonical JSON.

    Equal values have equal digests, 1 and 1.0 too.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    values = [plain(to_dict(p)) for p in parts]
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
