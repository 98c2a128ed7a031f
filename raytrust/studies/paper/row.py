"""The rows of the paper's two tables and of its section 3, as `results.json` and the CSV files have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from raytrust.metrics.statistics import Figure
from raytrust.studies.published import Cell

Status = Literal["finished", "failed", "not finished"]


class CellRow(TypedDict, total=False):
    """What names a cell of a table, and what became of it."""

    dataset: str
    compressor: str
    rank_or_level: int | None
    status: Status
    reason: str
    setting: str
    ours: float | None
    interval_low: float | None
    interval_high: float | None
    n: int | None


class SimilarityRow(CellRow, total=False):
    """Table 1: SSIM of one attack on one cell. ssim, identified and floor are image by image, for the report."""

    # The paper's three figures are copied into each row, so that a line of the CSV is a comparison by itself.
    ssim_mean: float
    ssim_std: float
    percent_of_original: float
    attack: str
    ours_std: float | None
    ours_percent_of_original: float | None
    bytes_per_step: int | None
    gradient_bytes: int | None
    ssim: list[float] | None
    mean_image_ssim: float | None
    other_image_ssim: float | None
    identified: list[bool] | None
    floor: list[float] | None


class RuleRow(CellRow, total=False):
    """Table 2: one rule of telling members on one cell, per cent. A cell that isn't finished has one row without."""

    prediction_pct: float  # of the paper, as are the next two
    loss_pct: float
    cross_entropy_pct: float
    signal: str
    per_class: bool
    origin: str
    null_floor: float | None
    may_stand_for: str  # which of the paper's attacks
    nearest: str


class TheoryRow(TypedDict):
    """Section 3 on one cell at one training step, and beside it the figures of `theory.examine`: a list over images."""

    dataset: str
    step: int
    cell: Cell
    n: int


def cell_of(row: CellRow) -> Cell:
    return row["compressor"], row["rank_or_level"]


def figure_of(row: CellRow) -> Figure:
    """Ours, with its interval."""
    return Figure(row["ours"], row.get("interval_low"), row.get("interval_high"), row.get("n"))


def theory_values(rows: Sequence[TheoryRow], name: str) -> NDArray[np.float64]:
    """A figure of section 3, of all images of the rows."""
    return np.array([value for row in rows for value in row[name]])  # type: ignore[literal-required]
