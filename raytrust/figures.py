"""From rows to pictures: the privacy frontier, and what the attacker got to see.

Figures are PNG at 150 dpi, drawn without pyplot and so without global state, and written atomically.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from io import BytesIO
from itertools import cycle, pairwise
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import NDArray

from raytrust.placement import place_labels
from raytrust.report import Row, human_bytes, mark_pareto, provenance, reason_of, replace_file, split

Array = NDArray[np.float64]

_NOTE_WIDTH = 190  # characters of 8 points across the figure
_LEGEND_COLUMNS = 10
_SHAPES = {  # compressor: marker, name in the legend
    "none": ("o", "no compression"),
    "powersgd": ("s", "PowerSGD"),
    "topk": ("^", "Top-K"),
    "randk": ("v", "Rand-K"),
    "sign": ("D", "sign"),
    "qsgd": ("P", "QSGD"),
}
_SPARE_MARKERS = "X<>ph8*d"
_UNKNOWN = "0.6"  # colour of a point whose bytes are unknown
_STAIRS = "#d1495b"  # colour of the Pareto set, which is told apart by its form too
_CMAP = ListedColormap(colormaps["viridis"](np.linspace(0.0, 0.9, 256)))  # without the yellow that fades on white


# --- frontier figure ---


def frontier_figure(
    rows: Sequence[Row], path: str | os.PathLike[str], title: str = "What a defence costs, and what it still leaks"
) -> None:
    """Draws accuracy against leakage as a PNG at 150 dpi, one point a defence, and writes it atomically.

    Bars are the 95 % intervals, the stepped line is the Pareto set, colour is bytes per step on a log scale, shape the
    compressor, filled means error feedback. Every point is labelled. Failed defences stand in a note and are never
    plotted; the figure is written even if all failed.

    Raises:
        ValueError: as in :func:`write_rows`.
    """
    finished, failed = split(mark_pareto(rows))
    notes = textwrap.wrap(provenance(finished), _NOTE_WIDTH)
    if failed:
        reasons = [
            textwrap.shorten(f"{row['name']} ({reason_of(row)}", 120, placeholder=" ...") + ")" for row in failed
        ]
        notes += textwrap.wrap(f"Failed, not plotted: {'; '.join(reasons)}.", _NOTE_WIDTH)
    legend = _legend_entries(finished)
    legend_lines = math.ceil(len(legend) / _LEGEND_COLUMNS)
    width, plot, foot = 12.0, 6.2, 0.82 + 0.2 * legend_lines + 0.16 * len(notes)  # inches
    height = foot + plot + 0.5
    fig = Figure(figsize=(width, height), dpi=150)
    ax = fig.add_axes((0.75 / width, foot / height, 9.75 / width, plot / height))
    ax.set_title(title, loc="left", fontsize=13, parse_math=False)
    ax.set_xlabel("leakage: attacker's SSIM, mean over images (lower is more private)")
    ax.set_ylabel("test accuracy, % (higher is better)")
    ax.grid(color="0.93", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    for i, line in enumerate(reversed(notes)):
        fig.text(0.75 / width, (0.1 + 0.16 * i) / height, line, fontsize=8, color="0.3", parse_math=False)
    if finished:
        norm = _bytes_norm(finished)
        if any(row.get("bytes_per_step") for row in finished):
            bar = fig.add_axes((10.85 / width, (foot + 0.1 * plot) / height, 0.18 / width, 0.8 * plot / height))
            _draw_bytes_bar(fig, bar, norm)
        _draw_points(ax, finished, norm)
        _set_limits(ax, finished)
        place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (-0.01, -0.52 / plot), "borderaxespad": 0}
        ax.legend(handles=legend, ncols=_LEGEND_COLUMNS, frameon=False, fontsize=8, columnspacing=1.4, **place)
        _label_points(fig, ax, finished)
    else:
        ax.text(0.5, 0.5, "No defence finished.", ha="center", va="center", fontsize=13, transform=ax.transAxes)
        ax.set(xlim=(0, 1), ylim=(0, 100))
    _save(fig, path)


def _points(rows: Sequence[Row]) -> Array:
    return np.array([[row["leakage_ssim"], 100 * row["accuracy"]] for row in rows])


def _bars(row: Row) -> list[Array]:
    """The row's intervals, each as two end points (2, 2) in data coordinates."""
    x, y = row["leakage_ssim"], 100 * row["accuracy"]
    across, up = row.get("leakage_interval"), row.get("accuracy_interval")
    bars = [] if across is None else [np.array([[across[0], y], [across[1], y]])]
    return bars if up is None else [*bars, np.array([[x, 100 * up[0]], [x, 100 * up[1]]])]


def _stairs(rows: Sequence[Row]) -> Array:
    """Corners (k, 2) of the line through the Pareto set: the accuracy that each leakage buys."""
    corners = _points([row for row in rows if row["pareto"]])  # sorted by leakage, so by accuracy too
    return np.column_stack([np.repeat(corners[:, 0], 2)[1:], np.repeat(corners[:, 1], 2)[:-1]])


def _shapes(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """(marker, legend name) of every compressor in the rows; those outside _SHAPES take the spare markers in turn."""
    names = {str(row.get("compressor")) for row in rows}
    spare = zip(sorted(names - set(_SHAPES)), cycle(_SPARE_MARKERS), strict=False)
    return {name: shape for name, shape in _SHAPES.items() if name in names} | {n: (m, n) for n, m in spare}


def _draw_points(ax: Axes, rows: Sequence[Row], norm: LogNorm) -> None:
    shapes = _shapes(rows)
    ax.plot(*_stairs(rows).T, color=_STAIRS, linewidth=1.5, zorder=2)
    for row, (x, y) in zip(rows, _points(rows), strict=True):
        for ends in _bars(row):
            ax.plot(*ends.T, color="0.65" if row["pareto"] else "0.85", linewidth=1.0, zorder=1 + 0.5 * row["pareto"])
        colour = _CMAP(norm(row["bytes_per_step"])) if row.get("bytes_per_step") else _UNKNOWN
        face = colour if row.get("error_feedback") else "white"
        marker, _ = shapes[str(row.get("compressor"))]
        halo = [withStroke(linewidth=3.2, foreground="white")]  # keeps points apart that lie on each other
        style: dict[str, Any] = {"markersize": 8, "markeredgewidth": 1.8, "markerfacecolor": face}
        ax.plot(x, y, marker, color=colour, path_effects=halo, zorder=3, **style)


def _bytes_norm(rows: Sequence[Row]) -> LogNorm:
    counts = [row["bytes_per_step"] for row in rows if row.get("bytes_per_step")] or [1]
    low, high = min(counts), max(counts)
    return LogNorm(low, high) if high > 2 * low else LogNorm(low / 2, high * 2)


def _draw_bytes_bar(fig: Figure, bar: Axes, norm: LogNorm) -> None:
    fig.colorbar(ScalarMappable(norm, _CMAP), cax=bar)
    bar.set_ylabel("bytes on the wire per training step", labelpad=8)
    low, high = norm.vmin or 1, norm.vmax or 1
    ticks = [m * 10.0**e for e in range(16) for m in ((1, 2, 5) if high < 200 * low else (1,))]
    ticks = [tick for tick in ticks if low <= tick <= high]
    bar.yaxis.set_minor_locator(NullLocator())
    bar.set_yticks(ticks, [human_bytes(tick).replace(".0 ", " ") for tick in ticks])


def _set_limits(ax: Axes, rows: Sequence[Row]) -> None:
    """Limits that show every point, and every bar as far as its metric can go.

    A defence that ruined the model must not squash all the others into a line: if the lowest accuracies lie far off
    (Tukey's fence), the scale is compressed from there down, shaded, and said to be so.
    """
    points = _points(rows)
    ends = np.concatenate([points, *(bar for row in rows for bar in _bars(row))])
    ends = np.maximum(np.minimum(ends, np.maximum([1.0, 100.0], points.max(0))), np.minimum(0.0, points.min(0)))
    (left, bottom), (right, top) = ends.min(0), ends.max(0)
    pad_x, pad_y = max(0.05 * (right - left), 0.02), max(0.05 * (top - bottom), 0.5)
    ax.set(xlim=(left - pad_x, right + pad_x))

    low, high = np.percentile(points[:, 1], [25, 75])
    usual = [row for row in rows if 100 * row["accuracy"] >= low - 1.5 * (high - low) - 2.0]
    floor = np.concatenate([_points(usual), *(bar for row in usual for bar in _bars(row))])[:, 1].min()
    if top - floor >= floor - bottom:
        ax.set_ylim(bottom - pad_y, top + pad_y)
        return
    pad_y = max(0.05 * (top - floor), 0.5)
    floor -= pad_y
    squeeze = 0.25 * (top - floor) / (floor - bottom)  # the lower part takes a fifth of the height

    def forward(y: Array) -> Array:
        return np.where(y < floor, floor + (y - floor) * squeeze, y)

    def inverse(y: Array) -> Array:
        return np.where(y < floor, floor + (y - floor) / squeeze, y)

    ax.set_yscale("function", functions=(forward, inverse))
    upper, lower = (
        MaxNLocator(bins, steps=[1, 2, 5, 10]).tick_values(*ends)
        for bins, ends in ((6, (floor, top)), (3, (bottom, floor)))
    )
    ax.set_yticks([*lower[lower < floor - pad_y / squeeze], *upper[upper >= floor]])
    ax.set_ylim(bottom - pad_y / squeeze, top + pad_y)
    ax.axhspan(ax.get_ylim()[0], floor, color="0.96", zorder=0)
    note = f"scale compressed below {floor:.0f} % "
    text = ax.text(
        1.0, floor, note, transform=ax.get_yaxis_transform(), fontsize=7.5, color="0.45", ha="right", va="top"
    )
    text.set_path_effects([withStroke(linewidth=2, foreground="0.96")])


def _legend_entries(rows: Sequence[Row]) -> list[Line2D]:
    def entry(label: str, marker: str, face: str = "white", edge: str = "0.35") -> Line2D:
        return Line2D([], [], marker=marker, color=edge, markerfacecolor=face, linestyle="none", label=label)

    entries = [entry(label, marker) for marker, label in _shapes(rows).values()]
    entries += [entry("filled: error feedback", "o", "0.35"), entry("open: none", "o")]
    if not all(row.get("bytes_per_step") for row in rows):
        entries.append(entry("grey: bytes unknown", "o", _UNKNOWN, _UNKNOWN))
    return [
        *entries,
        Line2D([], [], color=_STAIRS, label="Pareto set"),
        Line2D([], [], color="0.75", label="95 % interval"),
    ]


def _label_points(fig: Figure, ax: Axes, rows: Sequence[Row]) -> None:
    """Writes each row's name beside its point, or further off with a thin line to it where points are crowded."""
    labels = []
    for row in rows:
        text = textwrap.fill(row["name"], 24, max_lines=3, placeholder=" ...")
        weight = "bold" if row["pareto"] else "normal"
        label = ax.text(0, 0, text, fontsize=7.5, weight=weight, ha="center", va="center", zorder=5, parse_math=False)
        label.set_path_effects([withStroke(linewidth=2, foreground="white")])
        labels.append(label)
    fig.draw_without_rendering()  # limits, transforms and text sizes are final from here on
    extents = [label.get_window_extent() for label in labels]
    stairs = _stairs(rows)
    lines = [*(np.stack(pair) for pair in pairwise(stairs)), *(bar for row in rows for bar in _bars(row))]
    anchors = ax.transData.transform(_points(rows))
    centres = place_labels(
        anchors,
        sizes=np.array([[extent.width, extent.height] for extent in extents]),
        radius=6.5 * fig.dpi / 72,
        bounds=np.array(ax.bbox.extents),
        clutter=ax.transData.transform(np.array(lines).reshape(-1, 2)).reshape(-1, 2, 2),
    )
    to_axes = ax.transAxes.inverted().transform
    for label, extent, anchor, centre in zip(labels, extents, anchors, centres, strict=True):
        label.set(position=to_axes(centre), transform=ax.transAxes)
        half = np.array([extent.width, extent.height]) / 2
        tip = np.clip(anchor, centre - half, centre + half)
        if np.hypot(*(tip - anchor)) > 9 * fig.dpi / 72:
            ax.plot(*to_axes([anchor, tip]).T, color="0.3", linewidth=0.6, transform=ax.transAxes, zorder=2)


# --- reconstructions ---


def reconstructions_figure(
    truth: Array, rows: Sequence[tuple[str, Array, Sequence[float]]], path: str | os.PathLike[str]
) -> None:
    """Draws the private images above what each attack made of them, as a PNG at 150 dpi, written atomically.

    Args:
        truth: (n, channels, height, width) in [0, 1], 1 channel (grey) or 3 (RGB).
        rows: one (label, images shaped like ``truth`` and in [0, 1], n numbers) a defence, from the top. The numbers
            are each image's SSIM to the original: they stand under the images, and their mean under the label.

    Raises:
        ValueError: a shape, a length, a channel count or a value is not as above.
    """
    shape = np.shape(truth)
    if len(shape) != 4 or 0 in shape or shape[1] not in (1, 3):
        raise ValueError(f"Expected truth of shape (n, 1 or 3, height, width), got {shape}.")
    for label, images, ssim in [("original", truth, [1.0] * shape[0]), *rows]:
        if np.shape(images) != shape or len(ssim) != shape[0]:
            raise ValueError(f"Expected {label!r} with {shape} images, got {np.shape(images)} and {len(ssim)} SSIM.")
        if not (np.min(images) >= -1e-6 and np.max(images) <= 1 + 1e-6):
            raise ValueError(f"Expected images of {label!r} in [0, 1].")

    n, _, pixels_high, pixels_wide = shape
    side, gap, margin, left = 0.8, 0.08, 0.12, 2.1  # inches
    tall = side * pixels_high / pixels_wide
    pitch = max(tall, 0.6) + 0.24
    width, height = left + n * (side + gap) + margin, 2 * margin + (len(rows) + 1) * pitch
    fig = Figure(figsize=(width, height), dpi=150)
    ax = fig.add_axes((0, 0, 1, 1))
    ax.axis("off")

    def draw(row: int, label: str, images: Array, captions: Sequence[str]) -> None:
        top = margin + row * pitch
        ax.text(margin, top + pitch / 2 - 0.1, label, fontsize=8, ha="left", va="center", parse_math=False)
        top += (pitch - 0.24 - tall) / 2
        for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
            x = left + i * (side + gap)
            picture = np.clip(np.moveaxis(image, 0, -1), 0, 1)
            picture = np.repeat(picture, 3, axis=-1) if picture.shape[-1] == 1 else picture
            ax.imshow(picture, extent=(x, x + side, top + tall, top), interpolation="nearest")
            ax.text(x + side / 2, top + tall + 0.03, caption, fontsize=7, color="0.3", ha="center", va="top")

    draw(0, "original", truth, [""] * n)
    for k, (label, images, ssim) in enumerate(rows, start=1):
        mean = f"mean SSIM {np.mean(ssim):.2f} (n = {n})"
        name = textwrap.fill(label, 30, max_lines=4, placeholder=" ...")
        draw(k, f"{name}\n{mean}", images, [f"{value:.2f}" for value in ssim])
    ax.set(xlim=(0, width), ylim=(height, 0), aspect="auto")  # one unit is one inch, from the top left
    _save(fig, path)


def _save(fig: Figure, path: str | os.PathLike[str]) -> None:
    buffer = BytesIO()
    fig.savefig(buffer, format="png", facecolor="white")
    replace_file(path, buffer.getvalue())
