"""Plain text for a terminal: tables, and numbers in short."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

Lines = list[list[str]]  # of a table, the first its head


def text_table(lines: Sequence[Sequence[str]], width: int = 0, wrapped: Mapping[int, int] | None = None) -> str:
    """Columns of text, with a rule under the first line.

    width: of the terminal. wrapped: the columns that are narrowed to fit it, each with a width that it should keep.
    """
    widths = [max(len(part) for cell in column for part in cell.split("\n")) for column in zip(*lines, strict=True)]
    # Column by column and letter by letter, from the one that exceeds its width most: few lines wrap twice.
    least = wrapped or {}
    while least and sum(widths) + 2 * (len(widths) - 1) > width:
        widths[max(least, key=lambda column: widths[column] - least[column])] -= 1
    rule = ["-" * width for width in widths]
    texts = []
    for line in (lines[0], rule, *lines[1:]):
        columns = [_wrapped(cell, width) for cell, width in zip(line, widths, strict=True)]
        for parts in zip_longest(*columns, fillvalue=""):
            texts.append("  ".join(f"{part:<{width}}" for part, width in zip(parts, widths, strict=True)).rstrip())
    return "\n".join(texts)


def _wrapped(cell: str, width: int) -> list[str]:
    # What follows is set in further than a name behind its mark, or it would look like the next name.
    indent = " " * 2 * (len(cell) - len(cell.lstrip("* ")))
    return [part for line in cell.split("\n") for part in textwrap.wrap(line, width, subsequent_indent=indent)]


def human_bytes(count: float | None) -> str:
    """Decimal units: 512 B, 1.2 kB, 44.7 MB."""
    if count is None:
        return "-"
    value, units = float(count), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.95 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def short(value: object) -> str:
    """Two significant digits of a float, in the shorter notation: 0.01, 1e-4, 2.1e-5."""
    if not isinstance(value, float):
        return str(value)
    mantissa, exponent = f"{value:.1e}".split("e")
    return min(f"{value:.2g}", f"{mantissa.removesuffix('.0')}e{int(exponent)}", key=len)


def span(values: Iterable[int | None]) -> str:
    """The number that holds for all, or their range: "4", "4 to 8", "?"."""
    known = sorted({value for value in values if value is not None})
    return "?" if not known else f"{known[0]}" if len(known) == 1 else f"{known[0]} to {known[-1]}"


def counted(number: int | str, noun: str) -> str:
    """The number with its noun, which is in the plural but for one: "1 attack", "4 to 8 attacks"."""
    return f"{number} {noun}{'s' * (str(number) != '1')}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
