"""The two tables: the paper's figures, and ours beside them, as plain rows and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from raytrust.metrics.statistics import Figure, bootstrap_interval, mean_figure
from raytrust.studies.membership.paper_cells import SIGNALS, Nearest, nearest_cells
from raytrust.studies.membership.row import Row
from raytrust.studies.paper.plan import Setting
from raytrust.studies.paper.row import CellRow, RuleRow, SimilarityRow
from raytrust.studies.paper.selection import NOT_FINISHED, Found
from raytrust.studies.published import MEMBERSHIP_ATTACKS, TABLE_1, TABLE_2, Cell

KEYS = ("dataset", "compressor", "rank_or_level")
TABLE_1_COLUMNS = (
    *KEYS, "ssim_mean", "ssim_std", "percent_of_original", "attack", "ours", "ours_std", "ours_percent_of_original",
    "interval_low", "interval_high", "n", "bytes_per_step", "setting", "status", "reason",
)  # fmt: skip
TABLE_2_COLUMNS = (
    *KEYS, "prediction_pct", "loss_pct", "cross_entropy_pct", "may_stand_for", "nearest", "ours", "interval_low",
    "interval_high", "n", "null_floor", "setting", "status", "reason",
)  # fmt: skip


def similarity_row(dataset: str, cell: Cell, attack: str, setting: Setting | None, found: Found) -> SimilarityRow:
    """A row of table 1. The CSV leaves out what is image by image."""
    paper = TABLE_1[dataset][cell]
    # The images are few and their SSIM skewed and bounded: the bootstrap stays within the values' range.
    ours = mean_figure(found.ssim, bootstrap_interval) if found.ssim is not None else Figure(None)
    row: SimilarityRow = {
        "dataset": dataset,
        "compressor": cell[0],
        "rank_or_level": cell[1],
        "ssim_mean": paper.mean,
        "ssim_std": paper.std,
        "percent_of_original": paper.percent,
        "attack": attack,
        "setting": setting.name if setting else "",
        "status": found.status,
        "ours": ours.value,
        "ours_std": None if found.ssim is None else float(np.std(found.ssim, ddof=1)),
        "interval_low": ours.low,
        "interval_high": ours.high,
        "n": ours.n,
    }
    figures = {**vars(found), "reason": found.reason if found.status == "failed" else ""}
    return row | cast(SimilarityRow, figures)


def with_percent(rows: Sequence[SimilarityRow]) -> list[SimilarityRow]:
    """The rows with `ours_percent_of_original`: of the mean without compression under the same kind of attack."""
    plain = {(r["dataset"], r["attack"]): r["ours"] for r in rows if r["compressor"] == "none"}

    def percent(row: SimilarityRow) -> float | None:
        whole, ours = plain.get((row["dataset"], row["attack"])), row["ours"]
        # SSIM can be negative, and a share of a negative number means nothing.
        return None if whole is None or ours is None or whole <= 0 else 100 * ours / whole

    return [row | {"ours_percent_of_original": percent(row)} for row in rows]


def membership_rows(dataset: str, audit: Sequence[Row], cells: Sequence[Cell], setting: str) -> list[RuleRow]:
    """The rows of table 2: for each defence every rule, a signal with its thresholds and their origin.

    audit: the rows of a membership audit, in the order of the cells. nearest: for which of the paper's columns the rule
    comes nearest, by `nearest_rules`.
    """
    best: dict[tuple[str, bool, str], list[str]] = {}
    for nearest in nearest_rules(audit, dataset):
        best.setdefault(nearest.key, []).append(nearest.attack)
    rows: list[RuleRow] = []
    for cell, line in zip(cells, audit, strict=True):
        paper = TABLE_2[dataset][cell]
        base: RuleRow = {
            "dataset": dataset,
            "compressor": cell[0],
            "rank_or_level": cell[1],
            "prediction_pct": paper.prediction,
            "loss_pct": paper.loss,
            "cross_entropy_pct": paper.cross_entropy,
            "setting": setting,
            "status": line["status"],
            "reason": line["reason"] if line["status"] == "failed" else "",
        }
        if line["status"] != "finished":
            rows.append(base)
            continue
        for rule in line["grid"]:
            value, low, high = (None if v is None else 100 * v for v in (rule.value, rule.low, rule.high))
            rows.append(
                base
                | {
                    "ours": value,
                    "interval_low": low,
                    "interval_high": high,
                    "null_floor": 100 * rule.floor,
                    "signal": rule.signal,
                    "per_class": rule.per_class,
                    "origin": rule.origin,
                    "may_stand_for": "; ".join(a for a in MEMBERSHIP_ATTACKS if rule.signal in SIGNALS[a]),
                    "nearest": "; ".join(best.get(rule.key, [])),
                    "n": line["models"],
                    "setting": f"{rule_name(rule.key)}; {setting}",
                }
            )
    return rows


def rule_name(key: tuple[str, bool, str]) -> str:
    """A signal, how many thresholds it has, and their origin, in words."""
    return f"{key[0]}, {'a threshold a class' if key[1] else 'one threshold'}, {key[2]}"


def nearest_rules(audit: Sequence[Row], dataset: str) -> list[Nearest]:
    """`nearest_cells` of an audit; none while a defence is not finished, as others might be nearer then."""
    return [] if any(r["status"] == NOT_FINISHED for r in audit) else nearest_cells(audit, dataset)


def to_csv(rows: Sequence[CellRow], columns: Sequence[str]) -> str:
    """Equal rows give equal bytes. Measured numbers have four decimals; what is missing is empty."""
    buffer = io.StringIO()
    # The same bytes everywhere: by default csv ends lines as Windows does.
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    published = {"ssim_mean", "ssim_std", "percent_of_original", "prediction_pct", "loss_pct", "cross_entropy_pct"}
    for row in rows:
        writer.writerow([_cell(row.get(name), name in published) for name in columns])
    return buffer.getvalue()


def _cell(value: Any, published: bool) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        # A published figure keeps the digits that the paper prints; four of ours are already more than the images
        # settle.
        return f"{value:g}" if published else f"{value:.4f}"
    return str(value)
