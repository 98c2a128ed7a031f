"""The answer of a sweep as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raytrust.metrics.verdict import LONG, VERDICTS
from raytrust.reports.drawing import Tile, picture, to_png
from raytrust.reports.frontier_figure import draw_frontier
from raytrust.reports.frontier_table import provenance, reason_of, row_texts
from raytrust.reports.html import png_uri, render
from raytrust.reports.protection import noise_or_compression
from raytrust.reports.reconstructions import MOST_SHOWN, Drawn, check_drawn
from raytrust.reports.summary import (
    NEAR_CHANCE,
    control_sentence,
    cost,
    headline,
    pareto_sentence,
    remarks_of,
    seeming,
    threat_sentence,
    with_verdict,
)
from raytrust.reports.text import Lines, capital
from raytrust.studies.frontier.row import Row, is_plain, leakage, split
from raytrust.studies.frontier.verdicts import control_works, judge_rows, starkest

# A side of an embedded image: as large as it is shown, so that a page of photographs stays small.
_MOST_PIXELS = 96
_WORDS = {"": "strongest attack", "naive": "ignores the compressor", "aware": "knows the compressor"}
_HEAD = "defence|verdict|accuracy %|leakage, SSIM|floor|excess|identified|naive attack|aware attack|n|bytes/step|ratio|"
_ACCURACY = _HEAD.split("|").index("accuracy %")
_HEAD += "strongest attack|attacks tried|why, and remarks"


@dataclass(frozen=True)
class FrontierContext:
    """What the page says besides the rows.

    title: its heading. data_summary: the data and the model in a line. threat: what the attacker sees and knows, in
    words; taken from the rows where it is empty. settings: by group ("Options", "Attack", "Versions", ...), names and
    values, shown as they are. originals: the private images (n, channels, height, width) in [0, 1], and drawn what the
    attacks made of them, a defence's one after the other; None and nothing where no attack has a result. commands: what
    to do next, pairs of what it does and the exact line. failures: what failed besides whole defences, pairs of what
    and why. timing: how long it took, on what. classes: of the data set, for the accuracy of guessing.
    """

    title: str
    data_summary: str = ""
    threat: str = ""
    settings: Mapping[str, Mapping[str, Any]] | None = None
    originals: NDArray[Any] | None = None
    drawn: Sequence[Drawn] = ()
    commands: Sequence[tuple[str, str]] = ()
    failures: Sequence[tuple[str, str]] = ()
    timing: str = ""
    classes: int | None = None


def page(rows: Sequence[Row], context: FrontierContext) -> str:
    """The page as text. Verdicts are computed anew from the rows' evidence.

    Raises:
        ValueError: as in `raytrust.studies.frontier.row.write_rows`, and as in `reconstructions.check_drawn`.
    """
    rows = judge_rows(rows)
    finished, failed = split(rows)
    works = control_works(rows)
    threats = [row["threat"] for row in finished if row.get("threat")]
    reasons = [(row["name"], reason_of(row)) for row in failed]
    lines: Lines = [_HEAD.split("|"), *(_line(row, rows, context.classes) for row in finished)]
    lines += [[name, "failed", *["-"] * (len(lines[0]) - 3), reason] for name, reason in reasons]
    trained = any("accuracy" in row for row in finished)
    choosable = any("accuracy" in row and not row.get("untrained") for row in finished)
    if finished and not trained:
        lines = [[cell for place, cell in enumerate(line) if place != _ACCURACY] for line in lines]
    return render(
        "frontier",
        context=context,
        works=works,
        pareto=pareto_sentence(rows) if works and choosable else "",
        answer=headline(rows),
        seeming=seeming(rows) if works else None,
        control=control_sentence(rows),
        threat=context.threat or (threat_sentence(threats[0]) if threats else ""),
        warnings=_warnings(rows, context.classes),
        cards=_cards(rows),
        figure=png_uri(to_png(draw_frontier(rows, ""))),
        protection=noise_or_compression(rows),
        blocks=list(_blocks(rows, context)),
        shown=min(MOST_SHOWN, 0 if context.originals is None else len(context.originals)),
        lines=lines,
        failed=reasons,
        provenance=provenance(finished),
        settings=context.settings or {},
    )


def _warnings(rows: Sequence[Row], classes: int | None) -> list[str]:
    """What makes the whole sweep worth little: a model that has hardly learnt."""
    plain = [row for row in rows if is_plain(row) and row["status"] == "finished"]
    near = [text for row in plain for text in remarks_of(row, rows, classes) if text.startswith(NEAR_CHANCE)]
    return [f"Without compression, {text}: the model has hardly learnt, so no cost in accuracy shows." for text in near]


def _cards(rows: Sequence[Row]) -> list[tuple[str, str, list[str]]]:
    """(class, heading, a line a row): the control by itself, as it is no defence, and the defences of each verdict."""
    plain, others = [r for r in rows if is_plain(r)], [r for r in rows if not is_plain(r)]
    control = [f"{LONG[row['verdict']]}, {_line_of(row)}" for row in plain if row["verdict"]]
    cards = [("", "without compression, the control", control)]
    for verdict in VERDICTS:
        lines = [f"{row['name']}: {_line_of(row)}" for row in with_verdict(others, verdict)]
        cards.append((verdict, f"{LONG[verdict]}: {len(lines)}", lines))
    return cards


def _line_of(row: Row) -> str:
    return f"SSIM {leakage(row)}, {'accuracy ' * ('accuracy' in row)}{cost(row)}"


def _line(row: Row, rows: Sequence[Row], classes: int | None) -> list[str]:
    """The cells of a finished row."""
    why = [
        f"{row['verdict_reason']}.",
        *(f"{capital(remark.rstrip('.'))}." for remark in remarks_of(row, rows, classes)),
    ]
    return [f"{'* ' * row['pareto']}{row['name']}", *row_texts(row).values(), " ".join(why)]


def _blocks(rows: Sequence[Row], context: FrontierContext) -> Iterator[dict[str, Any]]:
    """The pictures of each defence: without compression first, then the starkest case, then the others."""
    if context.originals is None or not context.drawn:
        return
    check_drawn(context.originals, context.drawn)
    verdicts = {row["name"]: row["verdict"] for row in rows if row["status"] == "finished"}
    originals = _embedded([Tile(image) for image in context.originals[:MOST_SHOWN]])
    stark = starkest(rows)
    groups = [(name, list(drawn)) for name, drawn in groupby(context.drawn, key=lambda one: one.name)]
    # What the attack can do comes first; then what a defence hides from some attackers alone.
    groups.sort(key=lambda group: (group[1][0].attack != "", stark is None or group[0] != stark["name"]))
    for name, drawn in groups:
        lines = [{"label": "original", "caption": "", "tiles": originals}]
        lines += [{"label": _WORDS[d.attack], "caption": d.caption, "tiles": _embedded(d.tiles)} for d in drawn]
        yield {"name": name, "verdict": verdicts.get(name), "lines": lines}


def _embedded(tiles: Sequence[Tile]) -> list[tuple[str, Tile]]:
    """Each with its image as an address."""

    def uri(image: NDArray[Any]) -> str:
        small = Image.fromarray(np.round(255 * picture(image)).astype(np.uint8))
        # It shrinks what is larger and leaves alone what is smaller: the pixels of digits stay as they are.
        small.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
        buffer = BytesIO()
        small.save(buffer, format="PNG")
        return png_uri(buffer.getvalue())

    return [(uri(tile.image), tile) for tile in tiles]
