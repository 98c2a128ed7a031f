"""The report's files: two tables as CSV, the figures, one HTML page that takes them in, and all figures as JSON."""

from __future__ import annotations

import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raytrust.config import to_dict
from raytrust.jobs.files import write_file, write_json
from raytrust.reports.html import png_uri, render
from raytrust.reports.paper import tables
from raytrust.reports.paper.answer import first_screen
from raytrust.reports.paper.figures import frontier, reconstruction_grid, theory_figure
from raytrust.studies.membership.paper_cells import floors
from raytrust.studies.membership.row import plain
from raytrust.studies.paper.assemble import Report
from raytrust.studies.paper.rows import TABLE_1_COLUMNS, TABLE_2_COLUMNS, to_csv
from raytrust.studies.paper.verdicts import REPRODUCED
from raytrust.studies.published import CITATION, DATASETS

Picture = tuple[str, int]  # its address, and the pixels across at which its text is the page's size

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


def page(report: Report, root: Path) -> str:
    """The whole report. The figures are taken in from `root`."""
    return render(
        "paper",
        first=first_screen(report),
        citation=CITATION,
        claims=report.claims,
        reproduced=sum(claim.verdict == REPRODUCED for claim in report.claims),
        frontier=_picture(root / "frontier.png"),
        table_1=[
            tables.table_1(report, dataset) | {"figure": _picture(root / f"figure1_{dataset}.png")}
            for dataset in (report.datasets if report.table_1 else ())
        ],
        theory=tables.theory(report) if report.theory else [],
        theory_figure=_picture(root / "theory.png"),
        table_2=[tables.table_2(report, dataset) for dataset in report.datasets] if report.audits else [],
        floors=floors(),
        search=[tables.search(report, dataset) for dataset in report.search],
        budget=report.budget,
        common=report.common if len(report.search) > 1 else None,
    )


def _picture(path: Path) -> Picture | None:
    if not path.exists():
        return None
    content = path.read_bytes()
    # Of a PNG at 150 dpi: a screen has about 100.
    return png_uri(content), struct.unpack(">I", content[16:20])[0] * 2 // 3
