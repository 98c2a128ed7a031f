"""Defences as text, for command lines: "powersgd:4:ef", "topk:rank4:scope=layer", "qsgd:8:norm=max"."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args, get_type_hints

from raytrust.config.compressors import CompressorConfig, Defence
from raytrust.config.values import from_dict

# What may follow the name without saying what it is: the option, and its name in the help.
_MAIN = {
    "powersgd": ("rank", "RANK"),
    "topk": ("level", "LEVEL or rankN"),
    "randk": ("level", "LEVEL"),
    "threshold": ("level", "LEVEL"),
    "dgc": ("level", "LEVEL"),
    "signsgd": ("momentum", "MOMENTUM"),
    "qsgd": ("bits", "BITS"),
    "vqsgd": ("samples", "SAMPLES"),
    "atomo": ("rank", "RANK"),
}
_SHORT = {"fp16": "half:dtype=float16", "bf16": "half:dtype=bfloat16", "ef-signsgd": "scaledsign:ef"}
_METHODS = {config.method: config for config in get_args(CompressorConfig)}

SYNTAX = "METHOD[:VALUE][:NAME=VALUE ...][:ef] with METHOD among " + ", ".join(
    sorted([*_SHORT, *(f"{m} ({_MAIN[m][1]})" if m in _MAIN else m for m in _METHODS)])
)


def parse_defence(text: str) -> Defence:
    """METHOD[:VALUE][:NAME=VALUE ...][:ef]: a method, its main option, further options, and error feedback.

    Raises ValueError for what is no defence.
    """
    method, *rest = _SHORT.get(text.split(":")[0], text.split(":")[0]).split(":") + text.split(":")[1:]
    if method not in _METHODS or rest.count("ef") > 1:
        raise ValueError(f"Expected defence={text!r} to be {SYNTAX}.")
    values: dict[str, Any] = {"method": method}
    for part in rest:
        name, equals, value = part.partition("=")
        if part == "ef":
            continue
        if not equals:
            if method not in _MAIN or part != rest[0]:
                raise ValueError(f"Expected defence={text!r} to be {SYNTAX}.")
            name, value = _MAIN[method][0], part
            if method == "topk" and part.startswith("rank"):
                name, value = "equal_to_rank", part.removeprefix("rank")
        if name in values:
            raise ValueError(f"Expected defence={text!r} to give {name} once.")
        values[name] = _value(_METHODS[method], name, value)
    try:
        return from_dict(Defence, {"compressor": values, "error_feedback": "ef" in rest})
    except ValueError as error:
        raise ValueError(f"In defence={text!r}: {error}") from None


def _value(config: type, name: str, text: str) -> Any:
    """The text as what the option takes, or as it is: `from_dict` then says what is wrong."""
    kinds = get_type_hints(config).get(name) if name in {f.name for f in fields(config)} else str
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        options = (kinds, *get_args(kinds))
        if kind in options or any(type(option) is kind for option in options):
            try:
                return kind(text)
            except ValueError:
                return text
    return text
