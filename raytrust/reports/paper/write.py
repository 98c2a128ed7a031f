"""The report's files: two tables as CSV, the figures, one HTML page, and all figures as JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from raytrust.config import to_dict
from raytrust.jobs.files import write_file, write_json
from raytrust.reports.paper.figures import frontier, reconstruction_grid, theory_figure
from raytrust.reports.paper.page import page
from raytrust.studies.membership.row import plain
from raytrust.studies.paper.assemble import Report
from raytrust.studies.paper.rows import TABLE_1_COLUMNS, TABLE_2_COLUMNS, to_csv
from raytrust.studies.published import DATASETS

ARTIFACTS = (
    "table1.csv",
    "table2.csv",
    "report.html",
    "results.json",
    "frontier.png",
    "theory.png",
    *(f"figure1_{name}.png" for name in DATASETS),
)


def write_report(report: Report, root: Path) -> None:
    """Write everything that there are figures for; each file whole or not at all."""
    if report.table_1:
        write_file(root / "table1.csv", to_csv(report.table_1, TABLE_1_COLUMNS).encode())
        if any(row["status"] == "finished" for row in report.table_1):
            frontier(report, root / "frontier.png")
        for dataset in report.originals:
            reconstruction_grid(report, dataset, root / f"figure1_{dataset}.png")
    if report.table_2:
        write_file(root / "table2.csv", to_csv(report.table_2, TABLE_2_COLUMNS).encode())
    if report.theory:
        theory_figure(report, root / "theory.png")
    write_json(root / "results.json", results(report))
    # The page comes last, as it takes in the figures.
    write_file(root / "report.html", page(report, root).encode())


def results(report: Report) -> dict[str, Any]:
    """All figures as plain values."""
    return {
        "budget": to_dict(report.budget),
        "seed": report.seed,
        "table_1": report.table_1,
        "table_2": report.table_2,
        "search": {
            name: [{"setting": to_dict(s), "ssim": f.ssim, "reason": f.reason} for s, f in tried.items()]
            for name, tried in report.search.items()
        },
        "nearest": {name: to_dict(s) for name, s in report.nearest.items()},
        "common_nearest": None if report.common is None else to_dict(report.common[0]),
        "theory": report.theory,
        "audits": plain(report.audits),
        "claims": [asdict(claim) for claim in report.claims],
    }
