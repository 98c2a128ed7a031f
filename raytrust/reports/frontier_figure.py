"""The frontier as one picture: what each defence costs in accuracy, and what it still leaks to the strongest attack.

It is to be read at a glance and on a small screen: few large marks, numbered, with a key below them. The faint mark
that a line joins to a defence's own is what an attack that ignores the compressor reaches: where the line is long, such
an attack would have shown a privacy that isn't there.
"""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from raytrust.jobs.files import write_file
from raytrust.metrics.verdict import LEAKS, RESISTS, UNDECIDED
from raytrust.reports.frontier_table import Row, control_works, human_bytes, judge_rows, provenance, reason_of, split
from raytrust.reports.judged import failure_words, starkest
from raytrust.reports.label_placement import place_labels
from raytrust.reports.reconstructions import to_png
from raytrust.reports.scale import bars, is_plain, naive_points, points, set_limits
from raytrust.reports.summary import seeming

Array = NDArray[np.float64]

STYLES = {  # verdict: colour (Okabe and Ito's), marker, name in the legend; form says the same as colour
    LEAKS: ("#D55E00", "o", "leaks"),
    RESISTS: ("#009E73", "s", "resists the attacks tried"),
    UNDECIDED: ("#6E6E6E", "D", "undecided"),
}
_NAIVE = "0.6"
_WIDTH, _LEFT, _PLOT, _DPI = 8.0, 0.95, 4.4, 175  # inches; 1400 pixels across, legible when shrunk to 400
_NOTE_WIDTH = 128  # characters of 8.5 points across the figure


def frontier_figure(
    rows: Sequence[Row], path: str | os.PathLike[str], title: str = "What a defence costs, and what it still leaks"
) -> None:
    """Draws accuracy against leakage as a PNG of 1400 pixels across, one mark a defence, and writes it atomically.

    Colour and form are the verdict, a star is training without compression, bars are 95 % intervals. The shaded part
    is the floor: what is reached without any attack. Where the attack fails without compression the figure says so in
    large letters and shows no Pareto set. Failed defences stand in a note and are never plotted.

    Raises:
        ValueError: as in `raytrust.reports.frontier_table.write_rows`.
    """
    write_file(path, frontier_png(rows, title))


def frontier_png(rows: Sequence[Row], title: str) -> bytes:
    """The same figure as the bytes of a PNG; without a heading where the title is empty."""
    rows = judge_rows(rows)
    finished, failed = split(rows)
    key = sorted(finished, key=_family)
    heading = textwrap.wrap(title, 62)[:2]
    point = textwrap.wrap((seeming(rows) or "") if control_works(rows) else "", 88)
    notes = textwrap.wrap(provenance(finished), _NOTE_WIDTH)
    if failed:
        reasons = [textwrap.shorten(f"{r['name']} ({reason_of(r)}", 90, placeholder=" ...") + ")" for r in failed]
        notes += textwrap.wrap(f"Failed, not plotted: {'; '.join(reasons)}.", _NOTE_WIDTH)
    legend = _legend_entries(finished, control_works(rows))
    head = 0.2 + 0.27 * len(heading) + 0.23 * len(point)
    below = 0.75 + 0.26 * math.ceil(len(legend) / 3), 0.25 * math.ceil(len(key) / 2), 0.16 * len(notes) + 0.2
    height = head + _PLOT + sum(below)
    fig = Figure(figsize=(_WIDTH, height), dpi=_DPI)
    ax = fig.add_axes((_LEFT / _WIDTH, sum(below) / height, (_WIDTH - _LEFT - 0.2) / _WIDTH, _PLOT / height))
    _write_words(fig, heading, point, notes)
    _style_axes(ax)
    if finished:
        set_limits(ax, finished, room=0.0 if control_works(rows) else 0.42)
        _draw_floor(ax, finished)
        stark = starkest(rows) if control_works(rows) else None
        _draw_points(ax, finished, stark)
        place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0.1 / _WIDTH, (sum(below) - 0.66) / height)}
        fig.legend(handles=legend, ncols=3, frameon=False, fontsize=11.5, borderaxespad=0, columnspacing=1.2, **place)
        _draw_key(fig, key, below[1] + below[2] - 0.02, height)
        _label_points(fig, ax, key, stark)
        if not control_works(rows):
            _draw_failure(ax, rows)
    else:
        ax.text(0.5, 0.5, "No defence finished.", ha="center", va="center", fontsize=15, transform=ax.transAxes)
        ax.set(xlim=(0, 1), ylim=(0, 100))
    return to_png(fig)


def _write_words(fig: Figure, heading: Sequence[str], point: Sequence[str], notes: Sequence[str]) -> None:
    """Lines of text: the heading and the point in a sentence at the top, notes at the foot."""
    width, height = fig.get_size_inches()
    for i, line in enumerate([*heading, *point]):
        y = height - 0.12 - 0.27 * min(i, len(heading)) - 0.23 * max(0, i - len(heading))
        style: dict[str, Any] = {"fontsize": 15, "weight": "bold"} if i < len(heading) else {"fontsize": 11.5}
        fig.text(0.15 / width, y / height, line, va="top", parse_math=False, **style)
    for i, line in enumerate(reversed(notes)):
        fig.text(0.15 / width, (0.1 + 0.16 * i) / height, line, fontsize=8.5, color="0.3", parse_math=False)


def _style_axes(ax: Axes) -> None:
    ax.set_xlabel("leakage: attacker's mean SSIM (further left is more private)", fontsize=12.5)
    ax.set_ylabel("test accuracy, %", fontsize=12.5)
    ax.tick_params(labelsize=12)
    ax.grid(color="0.93", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _family(row: Row) -> tuple[bool, str, float, str]:
    """The order of the key: no compression, then by method, each from the fewest bytes on."""
    method = str(row.get("compressor"))
    return method != "none", method, row.get("bytes_per_step") or math.inf, row["name"]


def _draw_floor(ax: Axes, rows: Sequence[Row]) -> None:
    floors = [row["floor_ssim"] for row in rows if row.get("floor_ssim") is not None]
    if not floors:
        return
    floor = float(np.mean(floors))  # the same images for all, so the same floor
    ax.axvspan(ax.get_xlim()[0], floor, color="0.93", zorder=0)
    ax.axvline(floor, color="0.35", linewidth=1.4, linestyle=(0, (4, 3)), zorder=1)
    right = floor - ax.get_xlim()[0] < 0.08 * np.ptp(ax.get_xlim())  # no room on the left of the line
    words = ax.text(
        floor, 0.02, f" floor {floor:.2f}: reached without any attack ", transform=ax.get_xaxis_transform(),
        rotation=90, fontsize=10.5, color="0.3", ha="left" if right else "right", va="bottom", zorder=1.2,
    )  # fmt: skip
    words.set_path_effects([withStroke(linewidth=2.5, foreground="white" if right else "0.93")])


def _draw_points(ax: Axes, rows: Sequence[Row], stark: Row | None) -> None:
    halo = [withStroke(linewidth=3.2, foreground="white")]  # keeps marks apart that lie on each other
    for row, (x, y) in zip(rows, points(rows), strict=True):
        colour, marker, _ = STYLES[row["verdict"]]
        for ends in bars(row):
            ax.plot(*ends.T, color=colour, alpha=0.28, linewidth=1.2, zorder=1.5)
        if len(naive := naive_points([row])):
            line = (colour, 2.4) if row is stark else (_NAIVE, 0.9)
            ax.plot([naive[0, 0], x], [y, y], zorder=2, color=line[0], linewidth=line[1])
            ax.plot(*naive[0], "o", markersize=6, markerfacecolor="white", markeredgecolor=_NAIVE, zorder=2.2)
        size = 17 if is_plain(row) else 9
        ax.plot(
            x, y, "*" if is_plain(row) else marker, markersize=size, color=colour, path_effects=halo, zorder=3,
            markeredgecolor="black" if row["pareto"] else colour, markeredgewidth=1.3,
        )  # fmt: skip


def _draw_failure(ax: Axes, rows: Sequence[Row]) -> None:
    """The one thing to be seen where the control fails, in the room above the marks."""
    state, consequence = failure_words(rows)
    for y, text, size in ((0.91, state.upper(), 24), (0.8, consequence, 15)):
        words = ax.text(
            0.5, y, text, transform=ax.transAxes, fontsize=size, weight="bold", color="#a3002b", ha="center",
            va="center", zorder=9,
        )  # fmt: skip
        words.set_path_effects([withStroke(linewidth=6, foreground="white")])


def _legend_entries(rows: Sequence[Row], works: bool) -> list[Line2D]:
    def entry(label: str, marker: str, colour: str, size: float = 9, **style: Any) -> Line2D:
        return Line2D([], [], marker=marker, color=colour, markersize=size, linestyle="none", label=label, **style)

    present = {row["verdict"] for row in rows}
    entries = [entry(label, marker, colour) for v, (colour, marker, label) in STYLES.items() if v in present]
    if any(is_plain(row) for row in rows):
        entries.append(entry("no compression", "*", "0.2", 14))
    if len(naive_points(rows)):
        entries.append(entry("naive attack", "o", _NAIVE, 6, markerfacecolor="white"))
    if works and any(row["pareto"] for row in rows):
        entries.append(entry("black edge: Pareto set", "o", "white", markeredgecolor="black", markeredgewidth=1.3))
    return entries


def _draw_key(fig: Figure, key: Sequence[Row], top: float, height: float) -> None:
    """Number, name, accuracy and bytes of each defence in two columns, from `top` inches above the foot on."""
    half = math.ceil(len(key) / 2)
    for i, row in enumerate(key):
        x, y = 0.28 + (_WIDTH / 2 - 0.1) * (i // half), top - 0.12 - 0.25 * (i % half)
        colour, marker, _ = STYLES[row["verdict"]]
        marker, size = ("*", 13) if is_plain(row) else (marker, 8)
        fig.add_artist(
            Line2D([x / _WIDTH], [y / height], marker=marker, color=colour, markersize=size, linestyle="none")
        )
        name = textwrap.shorten(_brief(row), 26, placeholder="...")
        size_text = "" if row.get("bytes_per_step") is None else f", {human_bytes(row['bytes_per_step'])}"
        text = f"{i + 1}  {name}: {100 * row['accuracy']:.1f} %{size_text}"
        fig.text((x + 0.15) / _WIDTH, y / height, text, fontsize=11.5, va="center", parse_math=False)


def _brief(row: Row) -> str:
    """A row's name without what stands in brackets: the bytes stand beside it, which say the same."""
    return re.sub(r" \([^)]*\)", "", row["name"])


def _label_points(fig: Figure, ax: Axes, key: Sequence[Row], stark: Row | None) -> None:
    """Writes each row's number beside its mark, and the names of those that the figure is about."""
    anchors, labels = [*points(key)], []
    for i, row in enumerate(key):
        name = textwrap.shorten(_brief(row), 24, placeholder="...")
        named = row is stark or is_plain(row)
        labels.append(_label(ax, f"{i + 1} {name}" if named else f"{i + 1}", bool(named)))
    if stark is not None:
        anchors.append(naive_points([stark])[0])
        labels.append(_label(ax, "naive attack", False, color="0.35", style="italic"))
    fig.draw_without_rendering()  # limits, transforms and text sizes are final from here on
    extents = [label.get_window_extent() for label in labels]
    lines = [bar for row in key for bar in bars(row)]
    pairs = ((row, naive_points([row])) for row in key)
    lines += [np.array([naive[0], points([row])[0]]) for row, naive in pairs if len(naive)]
    places = ax.transData.transform(np.array(anchors))
    centres = place_labels(
        places,
        sizes=np.array([[extent.width, extent.height] for extent in extents]),
        radius=8 * fig.dpi / 72,
        bounds=np.array(ax.bbox.extents),
        clutter=ax.transData.transform(np.array(lines).reshape(-1, 2)).reshape(-1, 2, 2),
    )
    to_axes = ax.transAxes.inverted().transform
    for label, extent, anchor, centre in zip(labels, extents, places, centres, strict=True):
        label.set(position=to_axes(centre), transform=ax.transAxes)
        half = np.array([extent.width, extent.height]) / 2
        tip = np.clip(anchor, centre - half, centre + half)
        if np.hypot(*(tip - anchor)) > 11 * fig.dpi / 72:
            ax.plot(*to_axes([anchor, tip]).T, color="0.3", linewidth=0.7, transform=ax.transAxes, zorder=2)


def _label(ax: Axes, text: str, bold: bool, **style: Any) -> Any:
    weight = "bold" if bold else "normal"
    label = ax.text(
        0, 0, text, fontsize=12, weight=weight, ha="center", va="center", zorder=5, parse_math=False, **style
    )
    label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    return label
