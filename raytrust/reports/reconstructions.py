"""What the attacker got to see: the private images beside what each attack made of them.

Figures are PNG, drawn without pyplot and so without global state, and written atomically.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from raytrust.jobs.files import write_file
from raytrust.reports.frontier_table import two_digits

Array = NDArray[np.float64]

MOST_SHOWN = 8  # images across, so that each is large enough to be seen
ATTACKERS = {  # an attack's objective, in words
    "naive": "attacker ignores the compressor",
    "aware": "attacker knows the compressor",
}
IDENTIFIED = "#D55E00"  # frame of an image that the attack gives away
_SIDE, _GAP, _MARGIN, _LEFT, _FOOT = 1.18, 0.1, 0.12, 2.35, 0.26  # inches


class Drawn(NamedTuple):
    """What one attack on a defence made of the private images.

    name: of the defence. images: (n, channels, height, width) in [0, 1]. ssim: n numbers, to the originals.
    identified: whether each is nearer to its original than to all other candidates, None where it wasn't measured.
    attack: "naive" or "aware"; empty where there is no compressor.
    """

    name: str
    images: Array
    ssim: Sequence[float]
    identified: Sequence[bool] | None = None
    attack: str = ""

    @property
    def caption(self) -> str:
        """Mean SSIM, how many are identified, and their n."""
        n = len(self.ssim)
        known = "" if self.identified is None else f", {sum(self.identified)} of {n} identified"
        return f"mean SSIM {two_digits(float(np.mean(self.ssim)))} (n = {n}){known}"


def reconstructions_figure(
    truth: Array, rows: Sequence[Drawn | tuple[str, Array, Sequence[float]]], path: str | os.PathLike[str]
) -> None:
    """Draws the private images above what each attack made of them, as a PNG at 120 dpi, written atomically.

    Of more than eight images the first eight are drawn. Under each stands its SSIM; identified ones are framed.

    Args:
        truth: (n, channels, height, width) in [0, 1], 1 channel (grey) or 3 (RGB).
        rows: from the top; their images are shaped like ``truth``. A bare (name, images, ssim) will do.

    Raises:
        ValueError: a shape, a length, a channel count or a value is not as above.
    """
    drawn = [Drawn(*row) for row in rows]
    check_drawn(truth, drawn)
    n, _, pixels_high, pixels_wide = np.shape(truth)
    shown = min(n, MOST_SHOWN)
    tall = _SIDE * pixels_high / pixels_wide
    pitch = max(tall, 0.8) + _FOOT
    note = f"The first {shown} of {n} images. " if n > shown else ""
    if any(row.identified is not None for row in drawn):
        note += "Framed: identified, nearer to its original than to all other candidates."
    width = _LEFT + shown * (_SIDE + _GAP) + _MARGIN
    lines = textwrap.wrap(note, int(width / 0.075))
    height = 2 * _MARGIN + (len(drawn) + 1) * pitch + 0.16 * len(lines)
    fig = Figure(figsize=(width, height), dpi=120)
    ax = fig.add_axes((0, 0, 1, 1))
    ax.axis("off")
    _draw_row(ax, 0, "original", truth[:shown], [""] * shown, [False] * shown, pitch)
    for k, row in enumerate(drawn, start=1):
        name = textwrap.fill(row.name, 24, max_lines=2, placeholder=" ...")
        words = [name, *textwrap.wrap(ATTACKERS.get(row.attack, ""), 34), *textwrap.wrap(row.caption, 30)]
        captions = [two_digits(value) for value in row.ssim[:shown]]
        marks = [False] * shown if row.identified is None else list(row.identified[:shown])
        _draw_row(ax, k, "\n".join(words), row.images[:shown], captions, marks, pitch)
    ax.text(_MARGIN, height - 0.08, "\n".join(lines), fontsize=8, color=IDENTIFIED, va="bottom")
    ax.set(xlim=(0, width), ylim=(height, 0), aspect="auto")  # one unit is one inch, from the top left
    write_file(path, to_png(fig))


def strip_figure(
    truth: Array, rows: Sequence[Drawn], path: str | os.PathLike[str], names: Sequence[str] | None = None
) -> None:
    """As `reconstructions_figure`, of a few rows that tell the story, in the order in which they tell it.

    First what is reconstructed without compression. Then, of each defence, what an attacker makes of it who ignores the
    compressor, and one who knows it. names: those defences; if not given, of up to two methods the one on which
    knowing the compressor gains most.
    """
    plain = [row for row in rows if row.attack == ""][:1]
    pairs = _pairs(rows)
    if names is None:
        pairs.sort(key=lambda pair: float(np.mean(pair[0].ssim) - np.mean(pair[1].ssim)))
        of_method: dict[str, tuple[Drawn, Drawn]] = {}
        for pair in pairs:
            of_method.setdefault(pair[0].name.split()[0], pair)
        pairs = list(of_method.values())[:2]
    else:
        pairs = [pair for name in names for pair in pairs if pair[0].name == name]
    reconstructions_figure(truth, [*plain, *(row for pair in pairs for row in pair)], path)


def _pairs(rows: Sequence[Drawn]) -> list[tuple[Drawn, Drawn]]:
    """(naive, aware) of each defence that has both."""
    by_key = {(row.name, row.attack): row for row in rows}
    return [(row, by_key[row.name, "aware"]) for row in rows if row.attack == "naive" and (row.name, "aware") in by_key]


def check_drawn(truth: Array, rows: Sequence[Drawn]) -> None:
    """Raises ValueError unless truth and rows are as `reconstructions_figure` expects them."""
    shape = np.shape(truth)
    if len(shape) != 4 or 0 in shape or shape[1] not in (1, 3):
        raise ValueError(f"Expected truth of shape (n, 1 or 3, height, width), got {shape}.")
    for row in [Drawn("original", truth, [1.0] * shape[0]), *rows]:
        lengths = {len(values) for values in (row.ssim, row.identified) if values is not None}
        if np.shape(row.images) != shape or lengths != {shape[0]}:
            raise ValueError(f"Expected {row.name!r} with {shape} images, got {np.shape(row.images)} and {lengths}.")
        if not (np.min(row.images) >= -1e-6 and np.max(row.images) <= 1 + 1e-6):
            raise ValueError(f"Expected images of {row.name!r} in [0, 1].")


def picture(image: Array) -> Array:
    """An image (1 or 3 channels, height, width) as (height, width, 3) in [0, 1]."""
    found = np.clip(np.moveaxis(image, 0, -1), 0, 1)
    return np.repeat(found, 3, axis=-1) if found.shape[-1] == 1 else found


def _draw_row(
    ax: Axes, row: int, label: str, images: Array, captions: Sequence[str], marks: Sequence[bool], pitch: float
) -> None:
    tall = _SIDE * images.shape[2] / images.shape[3]
    top = _MARGIN + row * pitch
    ax.text(_MARGIN, top + (pitch - _FOOT) / 2, label, fontsize=9, ha="left", va="center", parse_math=False)
    top += (pitch - _FOOT - tall) / 2
    for i, (image, caption, marked) in enumerate(zip(images, captions, marks, strict=True)):
        x = _LEFT + i * (_SIDE + _GAP)
        extent = (x, x + _SIDE, top + tall, top)
        style: dict[str, Any] = {"color": IDENTIFIED, "weight": "bold"} if marked else {"color": "0.3"}
        ax.imshow(picture(image), extent=extent, interpolation="nearest")
        ax.text(x + _SIDE / 2, top + tall + 0.03, caption, fontsize=8, ha="center", va="top", **style)
        if marked:
            box = [[x, x + _SIDE, x + _SIDE, x, x], [top, top, top + tall, top + tall, top]]
            ax.plot(*box, color=IDENTIFIED, linewidth=2, solid_joinstyle="miter")


def to_png(fig: Figure) -> bytes:
    buffer = BytesIO()
    fig.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()
