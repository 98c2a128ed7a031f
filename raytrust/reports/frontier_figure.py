"""The frontier as one picture: what each defence still leaks to the strongest attack, and what it costs in accuracy.

A line a defence, with its name before it, so that no label has to be placed. The hollow mark that a line joins to a
defence's own is what an attack that ignores the compressor reaches: where the line is long, such an attack would have
shown a privacy that isn't there.
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
from matplotlib.ticker import MaxNLocator

from raytrust.metrics import statistics
from raytrust.metrics.verdict import LEAKS, RESISTS, UNDECIDED
from raytrust.reports.drawing import GREEN, GREY, ORANGE, plain_axes, save
from raytrust.reports.frontier_table import provenance, reason_of
from raytrust.reports.summary import failure_words, seeming
from raytrust.reports.text import human_bytes
from raytrust.studies.frontier.row import Row, accuracy, is_plain, leakage, split
from raytrust.studies.frontier.verdicts import control_works, judge_rows, starkest

STYLES = {  # verdict: colour, marker, name in the legend
    LEAKS: (ORANGE, "o", "leaks"),
    RESISTS: (GREEN, "s", "resists the attacks tried"),
    UNDECIDED: (GREY, "D", "undecided"),
}
ALARM = "#a3002b"
_NAIVE = "0.45"
# Inches, that are 1400 pixels across and legible when shrunk to the 400 of a phone. Both panels: left end and width.
# The gap between them is that of the numbers at their ends.
_WIDTH, _DPI, _LEAKAGE, _ACCURACY, _ALONE, _LINE = 8.0, 175, (2.25, 2.7), (5.35, 0.95), (2.25, 4.65), 0.33
_LETTERS, _NOTE = 24, 122  # in a line of a name, and of a note


def frontier_figure(
    rows: Sequence[Row], path: str | os.PathLike[str], title: str = "What a defence still leaks, and what it costs"
) -> None:
    """Draws leakage and accuracy as a PNG of 1400 pixels across, a line a defence, and writes it atomically.

    Colour and form are the verdict, a star is training without compression, bands are 95 % intervals. The shaded part
    is the floor: what is reached without any attack. Where the attack fails without compression the figure says so in
    large letters and shows no Pareto set. Failed defences stand in a note and are never plotted.

    Raises:
        ValueError: as in `raytrust.studies.frontier.row.write_rows`.
    """
    save(draw_frontier(rows, title), path)


def draw_frontier(rows: Sequence[Row], title: str) -> Figure:
    """The same figure, not yet written; without a heading where the title is empty."""
    rows = judge_rows(rows)
    finished, failed = split(rows)
    works = control_works(rows)
    words = _words(rows, title, bool(finished) and not works)
    notes = textwrap.wrap(provenance(finished), _NOTE)
    if failed:
        reasons = [textwrap.shorten(f"{r['name']} ({reason_of(r)}", 90, placeholder=" ...") + ")" for r in failed]
        notes += textwrap.wrap(f"Failed, not plotted: {'; '.join(reasons)}.", _NOTE)
    legend = _legend(finished, works)
    head = 0.15 + sum(size / 50 for _, size, _ in words) + 0.3
    names = [_name(row) for row in finished]
    places, lines = _places(names)
    plot = _LINE * lines
    foot = 0.16 * len(notes) + 0.15
    below = foot + 0.24 * math.ceil(len(legend) / 3) + 0.72
    height = head + plot + below
    fig = Figure(figsize=(_WIDTH, height), dpi=_DPI)
    y = height - 0.12
    for text, size, style in words:
        fig.text(0.15 / _WIDTH, y / height, text, va="top", parse_math=False, fontsize=size, **style)
        y -= size / 50
    for i, line in enumerate(reversed(notes)):
        fig.text(0.15 / _WIDTH, (0.1 + 0.16 * i) / height, line, fontsize=8.5, color="0.3", parse_math=False)
    # Where nothing was trained there is no accuracy, and the one panel takes the place of both.
    trained = not finished or any("accuracy" in row for row in finished)
    labels = ("leakage, mean SSIM (left is better)", "accuracy, %")
    panels = [
        fig.add_axes((left / _WIDTH, below / height, width / _WIDTH, plot / height))
        for left, width in ((_LEAKAGE, _ACCURACY) if trained else (_ALONE,))
    ]
    for ax, label in zip(panels, labels, strict=False):
        _style_axes(ax, label, lines, bool(finished))
    if finished:
        _draw(panels, list(zip(places, names, finished, strict=True)), starkest(rows) if works else None)
        place = (0.1 / _WIDTH, (below - 0.62) / height)
        fig.legend(
            handles=legend, ncols=3, frameon=False, fontsize=11, borderaxespad=0, columnspacing=1.5, handlelength=1.0,
            handletextpad=0.6, loc="upper left", bbox_to_anchor=place,
        )  # fmt: skip
    return fig


def _words(rows: Sequence[Row], title: str, alarm: bool) -> list[tuple[str, float, dict[str, Any]]]:
    """The lines above the panels, each with its size and style: the heading, and the figure's point in a sentence."""
    bold: dict[str, Any] = {"weight": "bold"}
    words = [(line, 15.0, bold) for line in textwrap.wrap(title, 62)[:2]]
    if alarm:
        state, consequence = failure_words(rows)
        words.append((state.upper(), 24.0, bold | {"color": ALARM}))
        return words + [(line, 14.0, bold | {"color": ALARM}) for line in textwrap.wrap(consequence, 60)]
    # By an attack that does not work, nothing can seem.
    point = seeming(rows) if control_works(rows) else None
    return words + [(line, 11.5, {}) for line in textwrap.wrap(point or "", 88)]


def _name(row: Row) -> str:
    """Before a line of the figure, in up to three lines; what is in brackets, the bytes on the same line say."""
    # A method keeps its number, and a plus what it adds: "clip 1" and "+ EF" are not torn apart.
    text = re.sub(
        r"(?<=[a-z]) (?=[\d%])|(?<=\d) (?=%)|(?<= \+) ", "\N{NO-BREAK SPACE}", re.sub(r" \([^)]*\)", "", row["name"])
    )
    lines = [line.replace("\N{NO-BREAK SPACE}", " ") for line in textwrap.wrap(text, _LETTERS, break_on_hyphens=False)]
    # Two defences often differ at the end of their names alone, which is therefore cut last.
    return "\n".join([*lines[:2], *([f"{lines[2]}..."] if len(lines) > 3 else lines[2:])])


def _places(names: Sequence[str]) -> tuple[list[float], float]:
    """Where each row's line is, from 0 downwards, and how many lines of one-line names all take, at least 3."""
    heights = [max(1.0, 0.56 * (name.count("\n") + 1)) for name in names]
    ends = np.cumsum(heights)
    return [float(end - height / 2 - 0.5) for end, height in zip(ends, heights, strict=True)], max(3.0, sum(heights))


def _style_axes(ax: Axes, label: str, lines: float, filled: bool) -> None:
    plain_axes(ax, "x")
    ax.set_xlabel(label, fontsize=11.5)
    ax.tick_params(labelsize=11, left=False, labelleft=False)
    ax.set_ylim(lines - 0.5, -0.5)
    ax.xaxis.set_major_locator(MaxNLocator(6 if "SSIM" in label else 2, steps=[1, 2, 5, 10]))
    if not filled:
        ax.set_xticks([])
        ax.text(0.5, 0.5, "No defence finished." * ("SSIM" in label), ha="center", fontsize=13, transform=ax.transAxes)


def _draw(panels: Sequence[Axes], rows: Sequence[tuple[float, str, Row]], stark: Row | None) -> None:
    """Each row's marks at its place, its name before them, and what it costs behind them."""
    leaks, last = panels[0], panels[-1]
    before: dict[str, Any] = {"transform": leaks.get_yaxis_transform(), "va": "center", "ha": "right"}
    behind = before | {"transform": last.get_yaxis_transform()}
    edge = 2.58 if last is not leaks else 1.2
    last.text(edge, -0.75, "bytes a step", fontsize=10, color="0.3", **behind)
    for y, name, row in rows:
        _draw_marks(leaks, leakage(row), y, row)
        if last is not leaks and "accuracy" in row:
            last.xaxis.set_major_formatter(lambda tick, _: f"{100 * tick:g}")
            _draw_marks(last, accuracy(row), y, row)
            last.text(1.7, y, f"{100 * row['accuracy']:.1f} %", fontsize=11, **behind)
        if (ignorant := row.get("naive_ssim")) is not None and not is_plain(row):
            colour, width = (STYLES[row["verdict"] or UNDECIDED][0], 2.6) if row is stark else (_NAIVE, 1.0)
            leaks.plot([ignorant, row["leakage_ssim"]], [y, y], zorder=2, color=colour, linewidth=width)
            leaks.plot(ignorant, y, "o", markersize=6, markerfacecolor="white", markeredgecolor=_NAIVE, zorder=2.2)
        weight = "bold" if row is stark or is_plain(row) else "normal"
        size = 10 if "\n" in name or (weight == "bold" and len(name) > 20) else 11
        leaks.text(-0.03, y, name, fontsize=size, linespacing=1.1, weight=weight, parse_math=False, **before)
        last.text(edge, y, human_bytes(row.get("bytes_per_step")), fontsize=11, **behind)
    # No tick stands above what can be reached, 100 % or a copy.
    for ax in panels:
        ax.set_xlim(right=min(1.0, ax.get_xlim()[1]))
    # The same images for all, so the same floor.
    if floors := [row["floor_ssim"] for *_, row in rows if row.get("floor_ssim") is not None]:
        _draw_floor(leaks, float(np.mean(np.array(floors, dtype=float))))


def _draw_marks(ax: Axes, figure: statistics.Figure, y: float, row: Row) -> None:
    """A figure with its interval."""
    colour, marker, _ = STYLES[row["verdict"] or UNDECIDED]
    if figure.low is not None and figure.high is not None:
        # Round ends would make an interval look longer than it is.
        ax.plot([figure.low, figure.high], [y, y], color=colour, alpha=0.25, linewidth=6, solid_capstyle="butt")
    marker, size = ("*", 16) if is_plain(row) else (marker, 9)
    edge = "black" if row["pareto"] else colour
    style: dict[str, Any] = {"markersize": size, "color": colour, "markeredgecolor": edge, "markeredgewidth": 1.3}
    assert figure.value is not None
    # A mark at the end of an axis, at 100 %, is drawn whole.
    ax.plot(figure.value, y, marker, clip_on=False, zorder=3, **style)


def _draw_floor(ax: Axes, floor: float) -> None:
    ax.axvline(floor, color="0.35", linewidth=1.4, linestyle=(0, (4, 3)), zorder=1)
    left, right = ax.get_xlim()
    ax.axvspan(left, floor, color="0.93", zorder=0)
    ax.set_xlim(left, right)
    words = f"floor {floor:.2f}: reached without any attack"
    # Begins at the line, or as far left of it as the panel's end asks for: beyond that it would run into its neighbour.
    text = ax.text(left, -0.75, words, fontsize=10, color="0.3", va="center")
    width = ax.transAxes.inverted().transform_bbox(text.get_window_extent()).width
    start = max(0.0, min((floor - left) / (right - left), 1 - width))
    text.set_x(left + start * (right - left))


def _legend(rows: Sequence[Row], works: bool) -> list[Line2D]:
    def entry(label: str, marker: str, colour: str, size: float = 9, **style: Any) -> Line2D:
        return Line2D([], [], marker=marker, color=colour, markersize=size, linestyle="none", label=label, **style)

    present = {row["verdict"] for row in rows}
    entries = [entry(label, marker, colour) for v, (colour, marker, label) in STYLES.items() if v in present]
    if any(is_plain(row) for row in rows):
        entries.append(entry("no compression", "*", "0.2", 14))
    if any(row.get("naive_ssim") is not None and not is_plain(row) for row in rows):
        entries.append(entry("attacker ignores the compressor", "o", _NAIVE, 6, markerfacecolor="white"))
    if works and any(row["pareto"] for row in rows):
        entries.append(entry("black edge: Pareto set", "o", "white", markeredgecolor="black", markeredgewidth=1.3))
    return entries
