"""Where the marks of the frontier's figure stand, and the scales that show them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from raytrust.reports.frontier_table import Row

Array = NDArray[np.float64]


def is_plain(row: Row) -> bool:
    return row.get("compressor") == "none"


def points(rows: Sequence[Row]) -> Array:
    return np.array([[row["leakage_ssim"], 100 * row["accuracy"]] for row in rows]).reshape(-1, 2)


def naive_points(rows: Sequence[Row]) -> Array:
    """Where a compressed defence would stand if only attacks were made that ignore its compressor."""
    known = [row for row in rows if row.get("naive_ssim") is not None and not is_plain(row)]
    return np.array([[row["naive_ssim"], 100 * row["accuracy"]] for row in known]).reshape(-1, 2)


def bars(row: Row) -> list[Array]:
    """The row's intervals, each as two end points (2, 2) in data coordinates."""
    x, y = row["leakage_ssim"], 100 * row["accuracy"]
    across, up = row.get("leakage_interval"), row.get("accuracy_interval")
    bars = [] if across is None else [np.array([[across[0], y], [across[1], y]])]
    return bars if up is None else [*bars, np.array([[x, 100 * up[0]], [x, 100 * up[1]]])]


class _UpTo100(MaxNLocator):
    """No tick stands above 100 %, where there may be room for words."""

    def tick_values(self, low: float, high: float) -> Any:
        ticks: Array = np.asarray(super().tick_values(low, high))
        return ticks[ticks <= 100]


def set_limits(ax: Axes, rows: Sequence[Row], room: float) -> None:
    """Limits that show every point, and every bar as far as its metric can go; `room` is the part left free above.

    A defence that ruined the model must not squash all the others into a line: if the lowest accuracies lie far off
    (Tukey's fence), the scale is compressed from there down, shaded, and said to be so.
    """
    marks = np.concatenate([points(rows), naive_points(rows)])
    ends = np.concatenate([marks, *(bar for row in rows for bar in bars(row))])
    ends = np.maximum(np.minimum(ends, np.maximum([1.0, 100.0], marks.max(0))), np.minimum(0.0, marks.min(0)))
    (left, bottom), (right, top) = ends.min(0), ends.max(0)
    floors = [row["floor_ssim"] for row in rows if row.get("floor_ssim") is not None]
    left, right = min([left, *floors]), max([right, *floors])
    pad_x, pad_y = max(0.05 * (right - left), 0.02), max(0.05 * (top - bottom), 0.5)
    ax.set(xlim=(left - pad_x, right + pad_x))
    ax.yaxis.set_major_locator(_UpTo100(6, steps=[1, 2, 5, 10]))

    accuracy = points(rows)[:, 1]
    low, high = np.percentile(accuracy, [25, 75])
    usual = [row for row in rows if 100 * row["accuracy"] >= low - 1.5 * (high - low) - 2.0]
    fence = np.concatenate([points(usual), *(bar for row in usual for bar in bars(row))])[:, 1].min()
    if top - fence >= fence - bottom:
        ax.set_ylim(bottom - pad_y, top + pad_y + room * (top - bottom + 2 * pad_y))
        return
    _compress(ax, bottom, fence, top, room)


def _compress(ax: Axes, bottom: float, fence: float, top: float, room: float) -> None:
    """A scale of which the part below `fence` takes a fifth of the height."""
    pad = max(0.05 * (top - fence), 0.5)
    fence -= pad
    squeeze = 0.25 * (top - fence) / (fence - bottom)

    def forward(y: Array) -> Array:
        return np.where(y < fence, fence + (y - fence) * squeeze, y)

    def inverse(y: Array) -> Array:
        return np.where(y < fence, fence + (y - fence) / squeeze, y)

    ax.set_yscale("function", functions=(forward, inverse))
    upper, lower = (
        np.asarray(_UpTo100(bins, steps=[1, 2, 5, 10]).tick_values(*ends))
        for bins, ends in ((6, (fence, top)), (3, (bottom, fence)))
    )
    ax.set_yticks([*lower[lower < fence - pad / squeeze], *upper[upper >= fence]])
    ax.set_ylim(bottom - pad / squeeze, top + pad + room * 1.25 * (top + pad - fence))
    ax.axhspan(ax.get_ylim()[0], fence, color="0.96", zorder=0)
    text = ax.text(
        1.0, fence, f"scale compressed below {fence:.0f} % ", transform=ax.get_yaxis_transform(), fontsize=10,
        color="0.4", ha="right", va="top",
    )  # fmt: skip
    text.set_path_effects([withStroke(linewidth=2, foreground="0.96")])
