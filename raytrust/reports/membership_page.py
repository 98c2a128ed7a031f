"""A whole membership audit on one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from raytrust.reports import membership_table as tables
from raytrust.reports.html import file_uri, render
from raytrust.studies.membership.paper_cells import floors, nearest_cells
from raytrust.studies.membership.row import Row
from raytrust.studies.published import MEMBERSHIP_ATTACKS, TABLE_2


def membership_page(
    rows: Sequence[Row], setting: str, figures: Sequence[Path], left_out: Mapping[str, str] | None = None
) -> str:
    """The whole audit on one page. setting: in words. figures: PNG files, which the page takes in. left_out: see
    `membership_table`."""
    nearest, paper = nearest_cells(rows), [value for row in TABLE_2["cifar10"].values() for value in row]
    return render(
        "membership",
        setting=setting,
        control=tables.control_lines(rows),
        failed=[(row["name"], row["reason"]) for row in rows if row["status"] == "failed"],
        figures=[(path.stem, file_uri(path)) for path in figures],
        side_by_side=tables.side_by_side_table(rows),
        attacks=tables.attack_table(rows),
        reference=tables.reference_table(rows),
        classes=tables.class_table(rows),
        messages=tables.message_table(rows),
        property=tables.property_table(rows),
        paper_attacks=MEMBERSHIP_ATTACKS,
        grid=tables.grid_table(rows),
        paper=tables.paper_table(rows),
        published=(min(paper), max(paper)),
        floors=floors(),
        shift=nearest[0].shift if nearest else None,
        left_out=left_out or {},
    )
