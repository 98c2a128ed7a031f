"""The map of threats: as rows of a table, as a picture, and as one page."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from raytrust.metrics.verdict import LEAKS, RESISTS, UNDECIDED
from raytrust.reports.frontier_figure import STYLES
from raytrust.reports.html import file_uri, render
from raytrust.reports.text import Lines, counted
from raytrust.studies.frontier.row import leakage
from raytrust.studies.frontier.verdicts import control_works
from raytrust.studies.threats.study import Mapped

NO_CONTROL = "the attack fails without a defence"


def headline(mapped: Sequence[Mapped]) -> str:
    """In how many threats the attack works without a defence, and of these how many cells leak, resist and are open."""
    works = [m for m in mapped if control_works(m.rows)]
    text = f"Of {counted(len(mapped), 'threat')}, the attack works without a defence in {len(works)}"
    if not works:
        return f"{text}; nothing can be said about any defence, but that what leaks, leaks."
    # The control fails only where it is too weak to judge by, and may leak all the same.
    rest = "" if len(works) == len(mapped) else " In the others nothing can be said, but that what leaks, leaks."
    verdicts = [r["verdict"] for m in works for r in m.rows[1:] if r["status"] == "finished"]
    if not verdicts:
        return f"{text}.{rest}"
    counts = [verdicts.count(v) for v in (LEAKS, RESISTS, UNDECIDED)]
    leak, resist = (f"{n} {verb}{'s' * (n == 1)}" for n, verb in zip(counts, ("leak", "resist"), strict=False))
    words = f"{leak}, {resist} the attacks tried, {counts[2]} undecided"
    return f"{text}; of {counted(len(verdicts), 'cell')} there, {words}.{rest}"


def map_table(mapped: Sequence[Mapped]) -> Lines:
    """A line a threat, a column a defence: its verdict, SSIM with 95 % interval, floor, and how many images were
    identified of how many."""
    head = ["threat", *(row["name"] for row in mapped[0].rows)]
    return [head, *([m.cell.name, *map(_cell, m.rows)] for m in mapped)]


def _cell(row: Any) -> str:
    if row["status"] == "failed":
        return f"no result: {row['reason']}"
    identified = (
        f", {row['identified']} of {row['n_images']} identified{_by_chance(row)}"
        if row.get("identified") is not None
        else ""
    )
    floor = "" if row.get("floor_ssim") is None else f", floor {row['floor_ssim']:.2f}"
    return f"{row['verdict']}: {leakage(row)}{floor}{identified}"


def _by_chance(row: Any) -> str:
    """How many guessing identifies, for which 13 of 64 may be few and 2 of 4 many."""
    candidates = row.get("candidates") or 1
    return "" if candidates < 2 else f" (by chance {row['n_images'] / candidates:.2g})"


def draw_map(mapped: Sequence[Mapped], path: Path) -> None:
    """A square for each threat and defence, coloured by verdict, with the leakage and the images identified in it."""
    # Wrapped and not turned: turned ones are hard to read, and leave the picture at its right.
    names = [textwrap.fill(_with_number(row["name"]), 13) for row in mapped[0].rows]
    labels = [m.cell.short for m in mapped]
    # Inches. Letters of 9 points are about 0.075 wide; the legend takes 5.4 however few columns there are.
    width = max(5.4, 0.3 + 0.075 * max(map(len, labels)) + 1.15 * len(names))
    height = 1.5 + 0.16 * max(name.count("\n") + 1 for name in names) + 0.44 * max(len(mapped), 1.5)
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    ax = figure.subplots()
    for y, m in enumerate(mapped):
        works = control_works(m.rows)
        for x, row in enumerate(m.rows):
            finished = row["status"] == "finished"
            verdict = row["verdict"] if finished else None
            colour = STYLES[verdict][0] if verdict else "white"
            # Where the attack fails without a defence only a leak is a finding.
            faint = not works and verdict != LEAKS
            ax.add_patch(
                Rectangle((x, y), 1, 1, facecolor=colour, alpha=0.12 if faint else 0.55, edgecolor="white", linewidth=2)
            )
            ink = "0.45" if faint else "black"
            if not finished:
                ax.text(x + 0.5, y + 0.5, "no result", ha="center", va="center", fontsize=7, color="0.45")
                continue
            ax.text(x + 0.5, y + 0.36, f"{row['leakage_ssim']:.2f}", ha="center", va="center", fontsize=9, color=ink)
            # Some leak below the floor: the images are told from others, though they look like none.
            if row.get("identified") is not None:
                count = f"{row['identified']} of {row['n_images']}"
                ax.text(x + 0.5, y + 0.74, count, ha="center", va="center", fontsize=6.5, color=ink)
    ax.set_xlim(0, len(names))
    ax.set_ylim(len(mapped), 0)
    ax.set_xticks(np.arange(len(names)) + 0.5, names, fontsize=9)
    ax.xaxis.tick_top()
    ax.set_yticks(np.arange(len(mapped)) + 0.5, labels, fontsize=9)
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    entries = [Patch(facecolor=STYLES[v][0], alpha=0.55, label=STYLES[v][2]) for v in (LEAKS, RESISTS, UNDECIDED)]
    entries.append(Patch(facecolor="0.93", label=f"pale: {NO_CONTROL}"))
    figure.suptitle(
        "Mean SSIM under the strongest attack,\nand how many images were identified among others",
        fontsize=10, x=0.02, ha="left",
    )  # fmt: skip
    figure.legend(handles=entries, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    figure.savefig(path)


def _with_number(name: str) -> str:
    """The name, of which a line ends before "rank 4" and not within it."""
    return re.sub(r"(?<=[a-z]) (?=\d)", "\N{NO-BREAK SPACE}", name)


def map_page(mapped: Sequence[Mapped], setting: str, picture: Path, settings: Mapping[str, Mapping[str, Any]]) -> str:
    """One page without network. setting: the data, the model and the attacker, in words."""
    return render(
        "threats",
        answer=headline(mapped),
        setting=setting,
        figure=file_uri(picture),
        lines=map_table(mapped),
        settings=settings,
    )
