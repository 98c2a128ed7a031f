"""Configurations as text, for command lines: "powersgd:4:ef", "clip:1+noise:0.01+topk:rank4"."""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from raytrust.config.compressors import DenseConfig, TopKConfig
from raytrust.config.defence import Defence
from raytrust.config.register import COMPRESSORS, TRANSFORMS, Registry
from raytrust.config.values import from_dict, type_hints

_SHORT = {"fp16": "half:dtype=float16", "bf16": "half:dtype=bfloat16", "ef-signsgd": "scaledsign:ef"}


def syntax() -> str:
    """What `parse_defence` takes, with every method and what may follow its name."""
    transforms, methods = ", ".join(_named(TRANSFORMS)), ", ".join(sorted([*_SHORT, *_named(COMPRESSORS)]))
    return (
        f"METHOD[:VALUE][:NAME=VALUE ...][:ef][:start_step=N] with METHOD among {methods}; before it may stand, each "
        f"with a plus behind it, TRANSFORM[:VALUE][:NAME=VALUE ...] with TRANSFORM among {transforms}"
    )


def _named(registry: Registry) -> list[str]:
    mains = {method: _main(registry[method]) for method in registry}
    words = {method: main.upper() for method, main in mains.items() if main} | {"topk": "LEVEL or rankN"}
    return [f"{method} ({words[method]})" if method in words else method for method in mains]


def parse_defence(text: str) -> Defence:
    """[TRANSFORM+ ...]METHOD[:VALUE][:NAME=VALUE ...][:ef][:start_step=N]: what is done to the gradient before, each
    with its first option and further ones; a method, which may be left out behind a transform, its first option,
    further options, error feedback, and how many steps send the whole gradient before.

    Raises ValueError for what is no defence.
    """
    # A number may have a plus in it, as 1e+3 has, which no letter follows.
    parts = re.split(r"\+(?=[^\W\d])", text)
    head = parts[-1].split(":")[0]
    # What is known comes first: only after an unknown name entry points are looked into, which takes time.
    if head in {*TRANSFORMS} or (head not in _SHORT and head not in COMPRESSORS and head in TRANSFORMS):
        parts.append(DenseConfig.method)
    transforms = [_options(text, part, TRANSFORMS) for part in parts[:-1]]
    head, *rest = parts[-1].split(":")
    last = ":".join([_SHORT.get(head, head), *rest])
    compressor = _options(text, last, COMPRESSORS, ("ef", "start_step"))
    own = {name: compressor.pop(name) for name in ("start_step",) if name in compressor}
    values = {"compressor": compressor, "error_feedback": compressor.pop("ef", False), "transforms": transforms}
    try:
        return from_dict(Defence, values | own)
    except ValueError as error:
        raise ValueError(f"In defence={text!r}: {error}") from None


def _options(text: str, part: str, registry: Registry, besides: Sequence[str] = ()) -> dict[str, Any]:
    """The options of one method as builtins, with its name. besides: options of the defence that may stand here."""
    method, *rest = part.split(":")
    if method not in registry:
        raise ValueError(f"Expected defence={text!r} to be {syntax()}.")
    kind = registry[method]
    values: dict[str, Any] = {"method": method}
    for i, given in enumerate(rest):
        name, equals, value = given.partition("=")
        flag = given == "ef" and given in besides
        if not equals and not flag:
            main = _main(kind)
            if main is None or i > 0:
                raise ValueError(f"Expected defence={text!r} to be {syntax()}.")
            name, value = main, given
            # Top-K has two levels, of which exactly one is given: a prefix tells which of them a bare value means.
            if kind is TopKConfig and given.startswith("rank"):
                name, value = "equal_to_rank", given.removeprefix("rank")
        if name in values:
            raise ValueError(f"Expected defence={text!r} to give {name} once.")
        try:
            hints = type_hints(Defence if name in besides else kind)
            values[name] = flag or parse_text(hints.get(name, str), value)
        except ValueError:
            # Left as it is, since `from_dict` says in the field's own terms what is wrong with it.
            values[name] = value
    return values


def parse_text(hint: Any, text: str) -> Any:
    """The text as a value of a field's type, whose range is not checked. Raises ValueError where it is none.

    Items of a tuple stand between commas; those of a pair, NAME=VALUE, beside a sign of equality.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        # In their order, from the narrowest: "3" is a number before it is text.
        for of in (h for h in arguments if h is not type(None)):
            with suppress(ValueError):
                return parse_text(of, text)
        raise ValueError(f"Expected {text!r} to be of one of {len(arguments)} types.")
    if origin is Annotated:
        return parse_text(arguments[0], text)
    if origin is Literal:
        return type(arguments[0])(text)
    if origin is tuple and arguments[-1] is ...:
        return tuple(parse_text(arguments[0], item) for item in text.split(",") if item)
    if origin is tuple:
        return tuple(parse_text(of, item) for of, item in zip(arguments, text.split("=", 1), strict=True))
    # bool() takes every text that is not empty for True, "False" as well.
    if hint is bool:
        if text not in ("True", "False"):
            raise ValueError(f"Expected {text!r} to be True or False.")
        return text == "True"
    return hint(text)


def _main(kind: type) -> str | None:
    """The option whose name may be left out: the first."""
    return next((f.name for f in fields(kind)), None)
