"""The answer of a sweep as one HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from raytrust.jobs.files import write_file
from raytrust.metrics.verdict import LEAKS, LONG, RESISTS, UNDECIDED
from raytrust.reports.frontier_figure import frontier_png
from raytrust.reports.frontier_table import (
    Row,
    accuracy_text,
    attack_text,
    control_works,
    human_bytes,
    judge_rows,
    leakage_text,
    provenance,
    reason_of,
    split,
    two_digits,
)
from raytrust.reports.judged import NEAR_CHANCE, control_sentence, remarks_of, starkest
from raytrust.reports.reconstructions import MOST_SHOWN, Drawn, check_drawn, picture
from raytrust.reports.summary import headline, seeming, threat_sentence, with_verdict

_MOST_PIXELS = 96  # a side of an embedded image: as large as it is shown, so that a page of photographs stays small
_WORDS = {"": "strongest attack", "naive": "ignores the compressor", "aware": "knows the compressor"}
_TEMPLATES = Environment(
    loader=PackageLoader("raytrust.reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


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


def write_page(path: str | os.PathLike[str], rows: Sequence[Row], context: FrontierContext) -> None:
    """Writes the page as HTML, atomically. Verdicts are computed anew from the rows' evidence.

    Raises:
        ValueError: as in `frontier_table.write_rows`, and as in `reconstructions.check_drawn`.
    """
    write_file(path, page(rows, context).encode())


def page(rows: Sequence[Row], context: FrontierContext) -> str:
    """The page as text. Raises ValueError as `write_page`."""
    rows = judge_rows(rows)
    finished, failed = split(rows)
    threats = [row["threat"] for row in finished if row.get("threat")]
    return _TEMPLATES.get_template("frontier.html.j2").render(
        context=context,
        works=control_works(rows),
        answer=headline(rows),
        seeming=seeming(rows) if control_works(rows) else None,
        control=control_sentence(rows),
        threat=context.threat or (threat_sentence(threats[0]) if threats else ""),
        warnings=_warnings(rows, context.classes),
        cards=[(verdict, LONG[verdict], _card(rows, verdict)) for verdict in (LEAKS, RESISTS, UNDECIDED)],
        figure=_uri(frontier_png(rows, "")),
        blocks=list(_blocks(rows, context)),
        shown=min(MOST_SHOWN, 0 if context.originals is None else len(context.originals)),
        lines=[_line(row, rows, context.classes) for row in finished],
        failed=[(row["name"], reason_of(row)) for row in failed],
        provenance=provenance(finished),
        settings=context.settings or {},
    )


def _warnings(rows: Sequence[Row], classes: int | None) -> list[str]:
    """What makes the whole sweep worth little: a model that has hardly learnt."""
    plain = [row for row in rows if row.get("compressor") == "none" and row["status"] == "finished"]
    near = [text for row in plain for text in remarks_of(row, rows, classes) if text.startswith(NEAR_CHANCE)]
    return [f"Without compression, {text}: the model has hardly learnt, so no cost in accuracy shows." for text in near]


def _card(rows: Sequence[Row], verdict: Any) -> list[str]:
    """A line for each defence of this verdict."""
    lines = []
    for row in with_verdict(rows, verdict):
        size = "" if row.get("bytes_per_step") is None else f", {human_bytes(row['bytes_per_step'])} a step"
        lines.append(f"{row['name']}: SSIM {leakage_text(row)}, accuracy {100 * row['accuracy']:.1f} %{size}")
    return lines


def _line(row: Row, rows: Sequence[Row], classes: int | None) -> dict[str, Any]:
    """The cells of a finished row, as text."""

    def number(key: str) -> str:
        return "-" if row.get(key) is None else two_digits(row[key])

    excess, interval, ratio = row.get("excess"), row.get("excess_interval"), row.get("compression_ratio")
    ends = "" if interval is None else f" [{interval[0]:+.2f}, {interval[1]:+.2f}]"
    return {
        "name": row["name"],
        "pareto": row["pareto"],
        "verdict": row["verdict"],
        "reason": row["verdict_reason"],
        "accuracy": accuracy_text(row),
        "leakage": leakage_text(row),
        "floor": number("floor_ssim"),
        "excess": "-" if excess is None else f"{excess:+.2f}{ends}",
        "identified": "-" if row.get("identified") is None else f"{row['identified']} of {row['n_images']}",
        "naive": number("naive_ssim"),
        "aware": number("aware_ssim"),
        "bytes": human_bytes(row.get("bytes_per_step")),
        "ratio": "-" if ratio is None else f"{ratio:.3g}x",
        "attack": attack_text(row.get("attack")),
        "tried": "-" if row.get("attacks_tried") is None else str(row["attacks_tried"]),
        "n": "-" if row.get("n_images") is None else str(row["n_images"]),
        "remarks": remarks_of(row, rows, classes),
    }


def _blocks(rows: Sequence[Row], context: FrontierContext) -> Iterator[dict[str, Any]]:
    """The pictures of each defence: without compression first, then the starkest case, then the others."""
    if context.originals is None or not context.drawn:
        return
    check_drawn(context.originals, context.drawn)
    by_name = {row["name"]: row for row in rows if row["status"] == "finished"}
    private = context.originals[:MOST_SHOWN]
    originals = [{"uri": _image_uri(image), "ssim": "", "identified": False} for image in private]
    stark = starkest(rows)
    groups = [(name, list(some)) for name, some in groupby(context.drawn, key=lambda drawn: drawn.name)]
    groups.sort(key=lambda group: (group[1][0].attack != "", stark is None or group[0] != stark["name"]))
    for name, some in groups:
        row = by_name.get(name)
        lines = [{"label": "original", "caption": "", "images": originals}]
        lines += [{"label": _WORDS[d.attack], "caption": d.caption, "images": _cells(d)} for d in some]
        yield {"name": name, "verdict": row and row["verdict"], "reason": row and row["verdict_reason"], "lines": lines}


def _cells(drawn: Drawn) -> list[dict[str, Any]]:
    marks = drawn.identified or [False] * len(drawn.ssim)
    cells = zip(drawn.images, drawn.ssim, marks, strict=True)
    return [{"uri": _image_uri(i), "ssim": two_digits(s), "identified": m} for i, s, m in list(cells)[:MOST_SHOWN]]


def _image_uri(image: NDArray[Any]) -> str:
    small = Image.fromarray(np.round(255 * picture(image)).astype(np.uint8))
    small.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    buffer = BytesIO()
    small.save(buffer, format="PNG")
    return _uri(buffer.getvalue())


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
