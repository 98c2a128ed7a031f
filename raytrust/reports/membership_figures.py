"""From an audit's rows to pictures: PNG at 150 dpi, drawn without pyplot's global state and written atomically."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raytrust.jobs.files import write_file

Row = dict[str, Any]


def roc_figure(rows: list[Row], path: Path) -> None:
    """Log-log ROC curves of the finished defences: LiRA on final models, and gradient difference on messages.

    Each curve is the mean TPR, over models or over messages, and is drawn from the FPR that one of them resolves.
    """
    finished = [r for r in rows if r["status"] == "finished"]
    fig = Figure(figsize=(11, 5.4), dpi=150)
    panels: list[Axes] = list(fig.subplots(1, 2, sharey=True))
    titles = {
        "final": "final model: LiRA online",
        "messages": "messages of the last captured step: gradient difference",
    }
    for ax, (kind, title) in zip(panels, titles.items(), strict=True):
        ax.set(xscale="log", yscale="log", xlim=(1e-3, 1), ylim=(1e-3, 1.05), xlabel="false positive rate")
        ax.plot([1e-3, 1], [1e-3, 1], color="0.6", linestyle=":", linewidth=1, label="chance")
        for i, row in enumerate(finished):
            if row["curves"][kind] is None:
                continue
            fpr, tpr = np.array(row["curves"]["fpr"]), np.array(row["curves"][kind])
            resolved = fpr >= row["curves"]["least"][kind] * (1 - 1e-9)
            ax.plot(fpr[resolved], np.maximum(tpr[resolved], 1e-4), color=_colour(i), linewidth=1.6, label=row["name"])
        ax.set_title(title, loc="left", fontsize=11, parse_math=False)
        ax.grid(color="0.93", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("true positive rate")
    panels[0].legend(loc="upper left", fontsize=8, frameon=False)
    fig.tight_layout()
    _save(fig, path)


def side_by_side_figure(rows: list[Row], path: Path) -> None:
    """What the final model and what the messages give away of each finished defence: AUC with 95 % intervals."""
    finished = [r for r in rows if r["status"] == "finished"]
    fig = Figure(figsize=(9, 1.6 + 0.62 * len(finished)), dpi=150)
    ax = fig.subplots()
    for place, row in enumerate(finished):
        for i, (name, found) in enumerate(side_by_side(row).items()):
            if found["value"] is None:
                continue
            y = place + 0.15 * (i - 1.5)
            label = name if place == 0 else None
            ax.plot(found["value"], y, "os^D"[i], color=_colour(i), markersize=6, label=label)
            if found["low"] is not None:
                ax.plot([found["low"], found["high"]], [y, y], color=_colour(i), linewidth=1.6)
    ax.axvline(0.5, color="0.6", linestyle=":", linewidth=1)
    ax.set_yticks(range(len(finished)), [r["name"] for r in finished])
    ax.set_ylim(len(finished) - 0.5, -0.5)
    ax.set_xlabel("AUC of telling members from others (0.5: chance); bars: 95 % over models")
    ax.grid(axis="x", color="0.93", linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.9 / (1.2 + 0.62 * len(finished))), ncol=2, fontsize=8)
    fig.tight_layout()
    _save(fig, path)


def side_by_side(row: Row) -> dict[str, dict[str, Any]]:
    """The four figures of a finished row that stand beside each other; those of messages only where there are any."""
    found = {
        "final model, loss": row["final"]["loss"]["auc"],
        "final model, LiRA online": row["final"]["LiRA online"]["auc"],
    }
    steps = sorted({m["step"] for m in row["messages"]})
    for step in dict.fromkeys(steps[:1] + steps[-1:]):
        name = "untrained model" if step == 0 else "last captured step"
        found[f"messages, {name}"] = message_figure(row, step, "held-out points", "gradient difference")
    return found


def message_figure(row: Row, step: int, control: str, score: str) -> dict[str, Any]:
    """The one message figure of a row with this step, control and score."""
    return next(m for m in row["messages"] if (m["step"], m["control"], m["score"]) == (step, control, score))


def _colour(i: int) -> Any:
    return colormaps["tab10"](i % 10)


def _save(fig: Figure, path: Path) -> None:
    buffer = BytesIO()
    fig.savefig(buffer, format="png")
    write_file(path, buffer.getvalue())
