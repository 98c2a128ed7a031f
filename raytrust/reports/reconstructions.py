"""What the attacker got to see: the private images beside what each attack made of them."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from raytrust.config import InversionConfig, SweepConfig, from_dict
from raytrust.metrics.statistics import Figure
from raytrust.reports.drawing import Array, Tile, save, tiles_figure
from raytrust.studies.frontier.row import Row
from raytrust.studies.frontier.rows import best, train_of
from raytrust.studies.frontier.store import Store

# Images across, so that each is large enough to be seen.
MOST_SHOWN = 8
ATTACKERS = {  # an attack's objective, in words
    "naive": "attacker ignores the compressor",
    "aware": "attacker knows the compressor",
}


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
        return f"mean SSIM {Figure(float(np.mean(self.ssim)), n=n):n}{known}"

    @property
    def tiles(self) -> list[Tile]:
        """The first images with their SSIM; marked where they are identified."""
        marks = self.identified or [False] * len(self.ssim)
        every = zip(self.images, self.ssim, marks, strict=True)
        return [Tile(image, str(Figure(ssim)), mark) for image, ssim, mark in every][:MOST_SHOWN]


def drawn_attacks(store: Store, sweep: SweepConfig, finished: Row) -> tuple[list[Drawn], Array]:
    """What the best attack that ignores the compressor made of the private images, and the strongest if that is
    another; and the originals, (n, channels, height, width) in [0, 1]."""
    naive, strongest = best(store.attacks(train_of(store, sweep, finished), "evaluation"), "naive"), finished["attack"]
    attacks = [naive["attack"]] if naive is not None and naive["attack"] != strongest else []
    drawn = [_drawn(store, sweep, finished, attack) for attack in [*attacks, strongest]]
    return [one for one, _ in drawn], drawn[0][1]


def _drawn(store: Store, sweep: SweepConfig, finished: Row, attack: dict[str, Any]) -> tuple[Drawn, Array]:
    train, config = train_of(store, sweep, finished), from_dict(InversionConfig, attack)
    images, originals = store.reconstructions(train, config, "evaluation")
    figures = store.attack(train, config, "evaluation")
    assert figures is not None
    # Without a compressor there is nothing to know or to ignore.
    objective = "" if train.defence.shows_all else attack["objective"]
    objective = "naive" if objective and finished.get("understood") is False else objective
    drawn = Drawn(finished["name"], images.numpy(), figures["ssim"], figures["identified_ssim"], objective)
    return drawn, originals.numpy()


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
    note = f"The first {MOST_SHOWN} of {len(truth)} images. " if len(truth) > MOST_SHOWN else ""
    if any(row.identified is not None for row in drawn):
        note += "Framed: identified, nearer to its original than to all other candidates."
    labelled: list[tuple[str, Sequence[Tile]]] = [("original", [Tile(image) for image in truth[:MOST_SHOWN]])]
    for row in drawn:
        name = textwrap.fill(row.name, 24, max_lines=2, placeholder=" ...")
        words = [name, *textwrap.wrap(ATTACKERS.get(row.attack, ""), 34), *textwrap.wrap(row.caption, 30)]
        labelled.append(("\n".join(words), row.tiles))
    save(tiles_figure(labelled, note=note), path)


def strip_figure(
    truth: Array, rows: Sequence[Drawn], path: str | os.PathLike[str], names: Sequence[str] | None = None
) -> None:
    """As `reconstructions_figure`, of a few rows that tell the story, in the order in which they tell it.

    First what is reconstructed without compression. Then, of each defence, what an attacker makes of it who ignores the
    compressor, and one who knows it. names: those defences; if not given, of up to two methods the one on which
    knowing the compressor gains most.
    """
    plain = [row for row in rows if row.attack == ""][:1]
    aware = {row.name: row for row in rows if row.attack == "aware"}
    pairs = {row.name: (row, aware[row.name]) for row in rows if row.attack == "naive" and row.name in aware}
    if names is None:
        gains = {name: float(np.mean(b.ssim) - np.mean(a.ssim)) for name, (a, b) in pairs.items()}
        by_method: dict[str, str] = {}
        # A method that stands there at several ranks would tell the same story twice.
        for name in sorted(pairs, key=lambda name: -gains[name]):
            by_method.setdefault(name.split()[0], name)
        names = list(by_method.values())[:2]
    reconstructions_figure(truth, [*plain, *(row for name in names for row in pairs.get(name, ()))], path)


def check_drawn(truth: Array, rows: Sequence[Drawn]) -> None:
    """Raises ValueError unless truth and rows are as `reconstructions_figure` expects them."""
    shape = np.shape(truth)
    if len(shape) != 4 or 0 in shape or shape[1] not in (1, 3):
        raise ValueError(f"Expected truth of shape (n, 1 or 3, height, width), got {shape}.")
    for row in [Drawn("original", truth, [1.0] * shape[0]), *rows]:
        lengths = {len(values) for values in (row.ssim, row.identified) if values is not None}
        if np.shape(row.images) != shape or lengths != {shape[0]}:
            raise ValueError(f"Expected {row.name!r} with {shape} images, got {np.shape(row.images)} and {lengths}.")
        # A slack for float32, and NaN is refused, too.
        if not (np.min(row.images) >= -1e-6 and np.max(row.images) <= 1 + 1e-6):
            raise ValueError(f"Expected images of {row.name!r} in [0, 1].")
