"""The report as one HTML page."""

from __future__ import annotations

import struct
from pathlib import Path

from raytrust.reports.html import png_uri, render
from raytrust.reports.paper import tables
from raytrust.reports.paper.answer import first_screen
from raytrust.studies.membership.paper_cells import floors
from raytrust.studies.paper.assemble import Report
from raytrust.studies.paper.verdicts import REPRODUCED
from raytrust.studies.published import CITATION

Picture = tuple[str, int]  # its address, and the pixels across at which its text is the page's size


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
