"""The report's pictures: figure 1 of the paper with our reconstructions, the frontier, and section 3 over training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raytrust.metrics import statistics
from raytrust.reports.drawing import BLUE, GREEN, GREY, ORANGE, Tile, plain_axes, save, tiles_figure
from raytrust.reports.text import human_bytes
from raytrust.studies.paper.assemble import Report
from raytrust.studies.paper.row import theory_values
from raytrust.studies.paper.selection import AWARE, NAIVE, WORST
from raytrust.studies.published import CELLS, TITLES, Cell, title_of

STYLES = {  # attack: colour, marker, name in the legend
    "paper": (GREY, "x", "the paper"),
    NAIVE: (BLUE, "o", "ours, attacker as in the paper"),
    AWARE: (ORANGE, "s", "ours, attacker knows the compressor"),
    WORST: (GREEN, "D", "ours, worst case over settings"),
}
ROWS = {NAIVE: "as in\nthe paper", AWARE: "knows the\ncompressor", WORST: "worst\ncase"}
MOST_SHOWN = 5  # images of figure 1


def reconstruction_grid(report: Report, dataset: str, path: Path) -> None:
    """Figure 1: a column the originals and each defence; for each image a row as in the paper, one by an attacker who
    knows the compressor, and one of the worst case. SSIM stands below each."""
    originals, images = report.originals[dataset], report.images[dataset]
    kinds = {kind: label for kind, label in ROWS.items() if any(of == kind for _, of in images)}

    def tile(cell: Cell, kind: str, i: int) -> Tile | None:
        if (cell, kind) not in images or (kind == AWARE and cell[0] == "none"):
            return None
        reconstructions, ssim = images[cell, kind]
        return Tile(reconstructions[i], str(statistics.Figure(ssim[i])))

    rows: list[tuple[str, list[Tile | None]]] = []
    for i, original in enumerate(originals[:MOST_SHOWN]):
        for kind, label in kinds.items():
            first = None if kind != next(iter(kinds)) else Tile(original)
            rows.append((label, [first, *(tile(cell, kind, i) for cell in CELLS)]))
    heads = [name.replace(" ", "\n") for name in ("original", *(title_of(cell) for cell in CELLS))]
    save(tiles_figure(rows, heads, left=0.95), path)


def frontier(report: Report, path: Path) -> None:
    """SSIM by defence and the bytes that it sends, a row a data set: the paper's and ours, with 95 % intervals."""
    done = {r["dataset"] for r in report.table_1 if r["status"] == "finished"}
    datasets = [d for d in report.datasets if d in done]
    fig = Figure(figsize=(11, 0.9 + 3.6 * len(datasets)), dpi=150)
    axes = fig.subplots(len(datasets), 2, sharey="row", squeeze=False)
    for line, dataset in zip(axes, datasets, strict=True):
        for ax, (method, name) in zip(line, (("powersgd", "PowerSGD"), ("topk", "Top-K")), strict=True):
            cells = [c for c in CELLS if c[0] == method]
            _curves(ax, report, dataset, [*cells, CELLS[0]])
            ax.set_title(f"{TITLES[dataset]}: {name}", loc="left", fontsize=11)
            word = "rank" if method == "powersgd" else "level"
            ax.set_xlabel(f"{word}, and bytes that a worker sends a step")
        line[0].set_ylabel("SSIM to the private image (1: a copy)")
    of = {name: h for ax in axes.flat for h, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(of.values(), of, loc="lower center", ncol=len(of), fontsize=9, frameon=False, columnspacing=1.2)
    fig.tight_layout(rect=(0, 0.42 / fig.get_figheight(), 1, 1))
    save(fig, path)


def _curves(ax: Axes, report: Report, dataset: str, cells: list[Cell]) -> None:
    """A place for each cell, the last without compression; in each the attacks side by side."""
    floor: float | None = None
    ticks: dict[int, str] = {}
    for shift, kind in enumerate(("paper", NAIVE, AWARE, WORST)):
        colour, marker, name = STYLES[kind]
        every = {c: report.row(dataset, c, NAIVE if kind == "paper" else kind) for c in cells}
        rows = {c: r for c, r in every.items() if r is not None and r["status"] == "finished"}
        if not rows:
            continue
        # Side by side, or their intervals would hide each other.
        x = np.array([cells.index(c) for c in rows]) + 0.16 * (shift - 1.5)
        y = np.array([r["ssim_mean" if kind == "paper" else "ours"] for r in rows.values()])
        ax.plot(x, y, color=colour, marker=marker, markersize=6, linewidth=0.7, alpha=0.95, label=name)
        for at, (cell, row) in zip(x, rows.items(), strict=True):
            label = "none" if cell[0] == "none" else str(cell[1])
            ticks.setdefault(cells.index(cell), f"{label}\n{human_bytes(row['bytes_per_step'])}")
            floor = row["other_image_ssim"] if kind == NAIVE else floor
            if kind != "paper" and row["interval_low"] is not None and row["interval_high"] is not None:
                ax.plot([at, at], [row["interval_low"], row["interval_high"]], color=colour, linewidth=1.4)
    if floor is not None:
        ax.axhline(floor, color="0.6", linestyle=":", linewidth=1, label="a random other image")
    ax.set_xticks(list(ticks), list(ticks.values()), fontsize=9)
    ax.set_xlim(-0.6, len(cells) - 0.4)
    low, high = ax.get_ylim()
    # At least to 0.5, or differences of nothing would look like some.
    ax.set_ylim(min(low, -0.02), max(high, 0.5))
    plain_axes(ax, "y")


def theory_figure(report: Report, path: Path) -> None:
    """The cosine that the true image has with the message, and those that both attacks reach, by training step."""
    datasets = list(dict.fromkeys(f["dataset"] for f in report.theory))
    steps = sorted({f["step"] for f in report.theory})
    fig = Figure(figsize=(4.0 * len(steps) + 0.8, 0.8 + 3.4 * len(datasets)), dpi=150)
    axes = fig.subplots(len(datasets), len(steps), sharey=True, squeeze=False)
    names = {
        "attainable": (GREY, "_", "true image: ||C(g)|| / ||g||"),
        "naive_reached": (BLUE, "o", "naive attack: cosine with C(g)"),
        "aware_reached": (ORANGE, "s", "aware attack: cosine with what was sent"),
    }
    for line, dataset in zip(axes, datasets, strict=True):
        for ax, step in zip(line, steps, strict=True):
            rows = {r["cell"]: r for r in report.theory if (r["dataset"], r["step"]) == (dataset, step)}
            cells = [cell for cell in CELLS if cell in rows]
            for i, (name, (colour, marker, label)) in enumerate(names.items()):
                y = [theory_values([rows[cell]], name).mean() for cell in cells]
                size = 14 if marker == "_" else 5
                x = np.arange(len(cells)) + (0 if i == 0 else 0.24 * (i - 1.5))
                ax.plot(
                    x, y, color=colour, marker=marker, markersize=size, markeredgewidth=2, linestyle="", label=label
                )
            ax.set_xticks(range(len(cells)), [title_of(c) for c in cells], rotation=60, ha="right", fontsize=8)
            ax.set_title(f"{TITLES[dataset]}, training step {step}", loc="left", fontsize=10)
            ax.set_ylim(-0.05, 1.08)
            plain_axes(ax, "y")
        line[0].set_ylabel("cosine (1: the same direction)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    columns = 3 if len(steps) > 1 else 1
    fig.legend(handles, labels, loc="lower center", ncol=columns, fontsize=9, frameon=False)
    fig.tight_layout(rect=(0, (0.4 if columns > 1 else 0.7) / fig.get_figheight(), 1, 1))
    save(fig, path)
