"""The two tables: the paper's figures, and ours beside them, as plain rows and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from raytrust.metrics.statistics import bootstrap_interval
from raytrust.studies.membership.paper_cells import SIGNALS, nearest_cells
from raytrust.studies.paper.plan import Setting
from raytrust.studies.paper.selection import NOT_FINISHED, Found
from raytrust.studies.published import MEMBERSHIP_ATTACKS, TABLE_1, TABLE_2, Cell

Row = dict[str, Any]

KEYS = ("dataset", "compressor", "rank_or_level")
TABLE_1_COLUMNS = (
    *KEYS, "ssim_mean", "ssim_std", "percent_of_original", "attack", "ours", "ours_std", "ours_percent_of_original",
    "interval_low", "interval_high", "n", "bytes_per_step", "setting", "status", "reason",
)  # fmt: skip
TABLE_2_COLUMNS = (
    *KEYS, "prediction_pct", "loss_pct", "cross_entropy_pct", "may_stand_for", "nearest", "ours", "interval_low",
    "interval_high", "n", "null_floor", "setting", "status", "reason",
)  # fmt: skip


def similarity_row(dataset: str, cell: Cell, attack: str, setting: Setting | None, found: Found) -> Row:
    """A row of table 1. `ssim`, `identified` and `floor`, image by image, are kept for the report; the CSV leaves
    them out."""
    paper = TABLE_1[dataset][cell]
    row: Row = {
        "dataset": dataset,
        "compressor": cell[0],
        "rank_or_level": cell[1],
        "ssim_mean": paper.mean,
        "ssim_std": paper.std,
        "percent_of_original": paper.percent,
        "attack": attack,
        "bytes_per_step": found.bytes,
        "gradient_bytes": found.gradient_bytes,
        "setting": setting.name if setting else "",
        "ssim": found.ssim,
        "mean_image_ssim": found.mean_image_ssim,
        "other_image_ssim": found.other_image_ssim,
        "identified": found.identified,
        "floor": found.floor,
        "status": found.status,
        "reason": found.reason if found.status == "failed" else "",
    }
    names = ("ours", "ours_std", "interval_low", "interval_high", "n")
    if found.ssim is None:
        return row | dict.fromkeys(names)
    interval = bootstrap_interval(found.ssim) or (None, None)
    figures = (float(np.mean(found.ssim)), float(np.std(found.ssim, ddof=1)), *interval, len(found.ssim))
    return row | dict(zip(names, figures, strict=True))


def with_percent(rows: Sequence[Row]) -> list[Row]:
    """The rows with `ours_percent_of_original`: of the mean without compression under the same kind of attack."""
    plain = {(r["dataset"], r["attack"]): r["ours"] for r in rows if r["compressor"] == "none"}
    done = []
    for row in rows:
        of = plain.get((row["dataset"], row["attack"]))
        percent = None if of is None or row["ours"] is None or of <= 0 else 100 * row["ours"] / of
        done.append(row | {"ours_percent_of_original": percent})
    return done


def membership_rows(dataset: str, audit: Sequence[Row], cells: Sequence[Cell], setting: str) -> list[Row]:
    """The rows of table 2: for each defence every rule, a signal with its thresholds and their origin.

    audit: the rows of a membership audit, in the order of the cells. nearest: for which of the paper's columns the rule
    comes nearest, by `nearest_rules`.
    """
    best: dict[tuple[str, bool, str], list[str]] = {}
    for found in nearest_rules(audit, dataset):
        best.setdefault((found["signal"], found["per_class"], found["origin"]), []).append(found["attack"])
    stands = {s: [a for a in MEMBERSHIP_ATTACKS if s in SIGNALS[a]] for some in SIGNALS.values() for s in some}
    rows = []
    for cell, line in zip(cells, audit, strict=True):
        paper = TABLE_2[dataset][cell]
        base: Row = dict(zip(KEYS, (dataset, *cell), strict=True)) | {
            "prediction_pct": paper.prediction,
            "loss_pct": paper.loss,
            "cross_entropy_pct": paper.cross_entropy,
        }
        if line["status"] != "finished":
            reason = line["reason"] if line["status"] == "failed" else ""
            rows.append(base | {"status": line["status"], "reason": reason, "setting": setting})
            continue
        for rule in line["grid"]:
            key = rule["signal"], rule["per_class"], rule["origin"]
            thresholds = "a threshold a class" if rule["per_class"] else "one threshold"
            figures = {"ours": "value", "interval_low": "low", "interval_high": "high", "null_floor": "floor"}
            rows.append(
                base
                | {name: _percent(rule[of]) for name, of in figures.items()}
                | {
                    "signal": rule["signal"],
                    "per_class": rule["per_class"],
                    "origin": rule["origin"],
                    "may_stand_for": "; ".join(stands[rule["signal"]]),
                    "nearest": "; ".join(best.get(key, [])),
                    "n": line["models"],
                    "setting": f"{rule['signal']}, {thresholds}, {rule['origin']}; {setting}",
                    "status": "finished",
                    "reason": "",
                }
            )
    return rows


def nearest_rules(audit: Sequence[Row], dataset: str) -> list[Row]:
    """`nearest_cells` of an audit; none while a defence is not finished, as others might be nearer then."""
    return [] if any(r["status"] == NOT_FINISHED for r in audit) else nearest_cells(list(audit), dataset)


def to_csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Equal rows give equal bytes. Measured numbers have four decimals; what is missing is empty."""
    buffer = io.StringIO()
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
        return f"{value:g}" if published else f"{value:.4f}"
    return str(value)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
