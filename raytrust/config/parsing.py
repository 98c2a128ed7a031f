"""Configurations as text, for command lines: "powersgd:4:ef", "topk:rank4:scope=layer", "qsgd:8:norm=max"."""

from __future__ import annotations

import types
from contextlib import suppress
from dataclasses import fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from raytrust.config.compressors import Defence, TopKConfig
from raytrust.config.register import COMPRESSORS
from raytrust.config.values import from_dict, type_hints

_SHORT = {"fp16": "half:dtype=float16", "bf16": "half:dtype=bfloat16", "ef-signsgd": "scaledsign:ef"}


def syntax() -> str:
    """What `parse_defence` takes, with every method and what may follow its name."""
    mains = {method: _main(COMPRESSORS[method]) for method in COMPRESSORS}
    words = {method: main.upper() for method, main in mains.items() if main} | {"topk": "LEVEL or rankN"}
    names = [f"{method} ({words[method]})" if method in words else method for method in mains]
    among = ", ".join(sorted([*_SHORT, *names]))
    return f"METHOD[:VALUE][:NAME=VALUE ...][:ef][:start_step=N] with METHOD among {among}"


def parse_defence(text: str) -> Defence:
    """METHOD[:VALUE][:NAME=VALUE ...][:ef][:start_step=N]: a method, its first option, further options, error feedback,
    and how many steps send the whole gradient before.

    Raises ValueError for what is no defence.
    """
    method, *rest = _SHORT.get(text.split(":")[0], text.split(":")[0]).split(":") + text.split(":")[1:]
    if method not in COMPRESSORS or rest.count("ef") > 1:
        raise ValueError(f"Expected defence={text!r} to be {syntax()}.")
    kind = COMPRESSORS[method]
    values: dict[str, Any] = {"method": method}
    for part in rest:
        name, equals, value = part.partition("=")
        if part == "ef":
            continue
        if not equals:
            main = _main(kind)
            if main is None or part != rest[0]:
                raise ValueError(f"Expected defence={text!r} to be {syntax()}.")
            name, value = main, part
            # Top-K has two levels, of which exactly one is given: a prefix tells which of them a bare value means.
            if kind is TopKConfig and part.startswith("rank"):
                name, value = "equal_to_rank", part.removeprefix("rank")
        if name in values:
            raise ValueError(f"Expected defence={text!r} to give {name} once.")
        try:
            hints = type_hints(Defence if name == "start_step" else kind)
            values[name] = parse_text(hints.get(name, str), value)
        except ValueError:
            # Left as it is, since `from_dict` says in the field's own terms what is wrong with it.
            values[name] = value
    try:
        start = {name: values.pop(name) for name in ("start_step",) if name in values}
        return from_dict(Defence, {"compressor": values, "error_feedback": "ef" in rest} | start)
    except ValueError as error:
        raise ValueError(f"In defence={text!r}: {error}") from None


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
