"""What all pictures share: colours, axes, tiles of private images, and PNG without pyplot and its global state."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from io import BytesIO
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from raytrust.jobs.files import write_file

Array = NDArray[np.float64]

# Okabe and Ito's, which people see alike who don't see red and green alike; form or place says the same besides.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"


def to_png(fig: Figure) -> bytes:
    buffer = BytesIO()
    # Not transparent: whoever shows it may do so on black.
    fig.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def save(fig: Figure, path: str | os.PathLike[str]) -> None:
    """The picture as a PNG, whole or not at all."""
    write_file(path, to_png(fig))


def plain_axes(ax: Axes, grid: Literal["x", "y", "both"] = "both") -> None:
    """A faint grid and no frame."""
    ax.grid(axis=grid, color="0.93", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def picture(image: Array) -> Array:
    """An image (1 or 3 channels, height, width) as (height, width, 3) in [0, 1]."""
    clipped = np.clip(np.moveaxis(image, 0, -1), 0, 1)
    return np.repeat(clipped, 3, axis=-1) if clipped.shape[-1] == 1 else clipped


class Tile(NamedTuple):
    """An image with what stands below it; framed and in colour if it is marked."""

    image: Array
    caption: str = ""
    marked: bool = False


def tiles_figure(
    rows: Sequence[tuple[str, Sequence[Tile | None]]], heads: Sequence[str] = (), note: str = "", left: float = 2.35
) -> Figure:
    """Rows of images, each behind its label, under heads of their columns and above a note.

    All images have one shape; None leaves a place empty. left: inches for the labels.
    """
    side, gap, margin, foot = 1.18, 0.1, 0.12, 0.26  # inches
    _, high, wide = next(tile for _, tiles in rows for tile in tiles if tile is not None).image.shape
    tall = side * high / wide
    pitch, top = max(tall, 0.8) + foot, margin + 0.4 * bool(heads)
    width = left + max(len(tiles) for _, tiles in rows) * (side + gap) + margin
    # Letters of 8 points are about 0.075 inches wide.
    lines = textwrap.wrap(note, int(width / 0.075))
    height = top + margin + len(rows) * pitch + 0.16 * len(lines)
    fig = Figure(figsize=(width, height), dpi=120)
    ax = fig.add_axes((0, 0, 1, 1))
    ax.axis("off")
    for column, head in enumerate(heads):
        x = left + column * (side + gap) + side / 2
        ax.text(x, top - 0.05, head, fontsize=10, ha="center", va="bottom", parse_math=False)
    for row, (label, tiles) in enumerate(rows):
        y = top + row * pitch
        ax.text(margin, y + (pitch - foot) / 2, label, fontsize=9, ha="left", va="center", parse_math=False)
        y += (pitch - foot - tall) / 2
        for column, tile in enumerate(tiles):
            if tile is not None:
                _draw_tile(ax, tile, left + column * (side + gap), y, side, tall)
    ax.text(margin, height - 0.08, "\n".join(lines), fontsize=8, color=ORANGE, va="bottom")
    # One unit is one inch, from the top left.
    ax.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    return fig


def _draw_tile(ax: Axes, tile: Tile, x: float, y: float, side: float, tall: float) -> None:
    style: dict[str, Any] = {"color": ORANGE, "weight": "bold"} if tile.marked else {"color": "0.3"}
    # Pixel by pixel: smoothed, a reconstruction would look like more than it is.
    ax.imshow(picture(tile.image), extent=(x, x + side, y + tall, y), interpolation="nearest")
    ax.text(x + side / 2, y + tall + 0.03, tile.caption, fontsize=8, ha="center", va="top", **style)
    if tile.marked:
        box = [[x, x + side, x + side, x, x], [y, y, y + tall, y + tall, y]]
        ax.plot(*box, color=ORANGE, linewidth=2, solid_joinstyle="miter")
