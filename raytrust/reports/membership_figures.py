"""From an audit's rows to pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raytrust.reports.drawing import plain_axes, save
from raytrust.reports.membership_table import side_by_side
from raytrust.studies.membership.row import Row, finished


def roc_figure(rows: Sequence[Row], path: Path) -> None:
    """Log-log ROC curves of the finished defences: LiRA on final models, and gradient difference on messages.

    Each curve is the mean TPR, over models or over messages, and is drawn from the FPR that one of them resolves.
    """
    fig = Figure(figsize=(11, 5.4), dpi=150)
    panels: list[Axes] = list(fig.subplots(1, 2, sharey=True))
    kinds: dict[Literal["final", "messages"], str] = {
        "final": "final model: LiRA online",
        "messages": "messages of the last captured step: gradient difference",
    }
    for ax, (kind, title) in zip(panels, kinds.items(), strict=True):
        # What matters is who is told with few false alarms, which a linear scale hides (Carlini et al. 2022).
        ax.set(xscale="log", yscale="log", xlim=(1e-3, 1), ylim=(1e-3, 1.05), xlabel="false positive rate")
        ax.plot([1e-3, 1], [1e-3, 1], color="0.6", linestyle=":", linewidth=1, label="chance")
        for i, row in enumerate(finished(rows)):
            curves = row["curves"]
            if (rates := curves[kind]) is None:
                continue
            fpr, tpr = np.array(curves["fpr"]), np.array(rates)
            resolved = fpr >= curves["least"][kind] * (1 - 1e-9)
            # A logarithmic scale has no 0.
            ax.plot(fpr[resolved], np.maximum(tpr[resolved], 1e-4), color=_colour(i), linewidth=1.6, label=row["name"])
        ax.set_title(title, loc="left", fontsize=11, parse_math=False)
        plain_axes(ax)
    panels[0].set_ylabel("true positive rate")
    panels[0].legend(loc="upper left", fontsize=8, frameon=False)
    fig.tight_layout()
    save(fig, path)


def side_by_side_figure(rows: Sequence[Row], path: Path) -> None:
    """What the final model and what the messages give away of each finished defence: AUC with 95 % intervals."""
    done = finished(rows)
    fig = Figure(figsize=(9, 1.6 + 0.62 * len(done)), dpi=150)
    ax = fig.subplots()
    for place, row in enumerate(done):
        for i, (name, auc) in enumerate(side_by_side(row).items()):
            if auc.value is None:
                continue
            # One below the other, or their intervals would hide each other.
            y = place + 0.15 * (i - 1.5)
            ax.plot(auc.value, y, "os^D"[i], color=_colour(i), markersize=6, label=name if place == 0 else None)
            if auc.low is not None and auc.high is not None:
                ax.plot([auc.low, auc.high], [y, y], color=_colour(i), linewidth=1.6)
    ax.axvline(0.5, color="0.6", linestyle=":", linewidth=1)
    ax.set_yticks(range(len(done)), [row["name"] for row in done])
    ax.set_ylim(len(done) - 0.5, -0.5)
    ax.set_xlabel("AUC of telling members from others (0.5: chance); bars: 95 % over models")
    plain_axes(ax, "x")
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.9 / (1.2 + 0.62 * len(done))), ncol=2, fontsize=8)
    fig.tight_layout()
    save(fig, path)


def _colour(i: int) -> Any:
    return colormaps["tab10"](i % 10)
