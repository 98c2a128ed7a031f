"""The report's sections with the paper's tables, its figure 1 and its section 3 beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raytrust.reports.frontier_table import human_bytes
from raytrust.reports.paper.markup import Lines, escape, image, table
from raytrust.studies.membership.paper_cells import floors
from raytrust.studies.paper.assemble import Report
from raytrust.studies.paper.rows import nearest_rules
from raytrust.studies.paper.selection import AWARE, NAIVE, NOT_FINISHED, WORST
from raytrust.studies.published import CELLS, MEMBERSHIP_ATTACKS, TABLE_1, TABLE_2, TITLES, Cell, title_of

# --- table 1, figure 1, the frontier ---


def frontier_section(root: Path) -> str:
    return (
        "<h2>What is left of the images, and what it costs</h2><p>Each point is a mean over images, bars are 95 % "
        "intervals. The paper's points stand at our bytes, as it gives none.</p>"
        f"{image(root / 'frontier.png', 'SSIM against bytes a step')}"
    )


def table_1_section(report: Report, dataset: str, root: Path) -> str:
    lines: Lines = [["defence", "paper (std)", "ours, as in the paper", "knows the compressor", "worst case"]]
    lines[0] += ["% left, paper", "% left, ours", "% left, worst", "n", "bytes"]
    behind: Lines = [["defence", "worst case is"]]
    for cell in CELLS:
        paper = TABLE_1[dataset][cell]
        rows = [report.row(dataset, cell, kind) for kind in (NAIVE, AWARE, WORST)]
        percents = [None if row is None else row["ours_percent_of_original"] for row in (rows[0], rows[2])]
        known = [row["n"] for row in rows if row is not None and row["n"] is not None]
        lines.append(
            [
                title_of(cell),
                f"{paper.mean:.4f} ({paper.std:.4f})",
                *(_ssim(row) for row in rows),
                f"{paper.percent:g}",
                *("-" if percent is None else f"{percent:.0f}" for percent in percents),
                str(known[0]) if known else "-",
                human_bytes(rows[0]["bytes_per_step"]) if rows[0] and rows[0]["bytes_per_step"] else "-",
            ]
        )
        behind.append([title_of(cell), rows[2]["setting"] if rows[2] and rows[2]["setting"] else "-"])
    floor = next((r for r in report.table_1 if r["dataset"] == dataset and r["status"] == "finished"), None)
    floors_ = (
        f" Floors: the data set's mean image reaches {floor['mean_image_ssim']:.2f}, a random other image "
        f"{floor['other_image_ssim']:.2f}."
        if floor
        else ""
    )
    grid = root / f"figure1_{dataset}.png"
    figure = (
        f"<h3>Figure 1, {TITLES[dataset]}</h3><p>Below each image its SSIM to the original. The worst case may "
        "be one of another victim.</p>"
        f"{image(grid, f'reconstructions, {TITLES[dataset]}')}"
        if grid.exists()
        else ""
    )
    near = report.nearest.get(dataset)
    setting = (
        f"Ours at {near.name}, the setting that came nearest to the paper's "
        f"{TABLE_1[dataset]['none', None].mean:.4f} without compression."
        if near
        else f"The search for the paper's setting {_search_ended(report, dataset)}."
    )
    note = (
        f"Mean SSIM [95 % interval, bootstrap] over n images; per cent left of the SSIM without compression; "
        f"bytes that a worker sends a step. {setting} Worst case: the greatest of "
        f"these two and of the attack that was the strongest on other images, on the victim that leaks most there "
        f"without compression. That choice among three "
        f"is made on the n images themselves, which the interval leaves out: slightly optimistic for the attacker."
        f"{floors_}"
    )
    more = f"<details><summary>The setting behind each worst case</summary>{table(behind)}</details>"
    return f"<h2>Table 1, {TITLES[dataset]}</h2><p>{escape(note)}</p>{table(lines)}{more}{figure}"


def _search_ended(report: Report, dataset: str) -> str:
    unfinished = any(found.status == NOT_FINISHED for found in report.search[dataset].values())
    return "is not finished" if unfinished else "failed"


def _ssim(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if row["status"] != "finished":
        return f"failed: {row['reason']}" if row["status"] == "failed" else row["status"]
    interval = "" if row["interval_low"] is None else f" [{row['interval_low']:.3f}, {row['interval_high']:.3f}]"
    return f"{row['ours']:.3f}{interval}"


# --- section 3 ---


def _range(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def theory_section(report: Report, root: Path) -> str:
    lines: Lines = [["data set", "step", "defence", "attainable cosine", "naive reaches", "aware reaches"]]
    lines[0] += ["naive distance at the truth", "aware distance at the truth", "naive SSIM", "aware SSIM", "n"]
    for f in report.theory:
        names = ("attainable", "naive_reached", "aware_reached")
        truths = ("naive_at_truth", "aware_at_truth")
        lines.append(
            [
                TITLES[f["dataset"]],
                str(f["step"]),
                title_of(f["cell"]),
                *(_range(f[name]) for name in names),
                *(f"{np.mean(f[name]):.1e}" for name in truths),
                *(_range(f[name]) for name in ("naive_ssim", "aware_ssim")),
                str(f["n"]),
            ]
        )
    return (
        "<h2>Section 3: what the bound says, and what it does not</h2>"
        "<p>The discarded part of the gradient bounds the cosine between the <em>true</em> gradient and what the "
        "message decodes to: ||C(g)|| / ||g||, below 1. That much is a theorem about projections, and it holds on "
        "every gradient that we tested. It bounds the score of the true image under an attacker who takes the decoded "
        "gradient for whole. It does not bound the attack: another image may score higher, and how near the "
        "best-scoring image is to the true one, the bound does not say. And it does not touch an attacker who compares "
        "only what was sent: at the true image that distance is 0, as without compression. What then protects is only "
        "that fewer numbers were sent, of which the bound says nothing.</p>"
        f"{image(root / 'theory.png', 'cosines over training')}"
        "<details><summary>All figures of section 3: means over n images [least, greatest]</summary>"
        f"{table(lines)}</details>"
    )


# --- table 2 ---


def table_2_section(report: Report, dataset: str) -> str:
    rows, audit = [r for r in report.table_2 if r["dataset"] == dataset], report.audits[dataset]
    near = {n["attack"]: n for n in nearest_rules(audit, dataset)}
    heads = [
        f"{a}: paper / ours by {near[a]['signal']}, {_thresholds(near[a])}, {near[a]['origin']}"
        if a in near
        else f"{a}: paper / ours"
        for a in MEMBERSHIP_ATTACKS
    ]
    lines: Lines = [["defence", *heads, "accuracy %", "final model: loss AUC", "messages: AUC, first and last step"]]
    for i, cell in enumerate(CELLS):
        row = report.audit(dataset, cell)
        if row is None:
            text = f"failed: {audit[i]['reason']}" if audit[i]["status"] == "failed" else audit[i]["status"]
            lines.append([title_of(cell), text, *[""] * (len(heads) + 2)][: len(lines[0])])
            continue
        own = [_rule(rows, cell, near[a]) if a in near else "-" for a in MEMBERSHIP_ATTACKS]
        cells = [f"{paper:.2f} / {text}" for paper, text in zip(TABLE_2[dataset][cell], own, strict=True)]
        accuracy, loss = audit[i]["accuracy"], audit[i]["final"]["loss"]["auc"]
        lines.append([title_of(cell), *cells, _figure(accuracy, 100, 1), _figure(loss), _messages(row)])
    grid: Lines = [["rule", "null floor", *(title_of(c) for c in CELLS)]]
    for key in dict.fromkeys((r["signal"], r["per_class"], r["origin"]) for r in rows if r["status"] == "finished"):
        own_rows = [_find(rows, cell, key) for cell in CELLS]
        known = next(r for r in own_rows if r is not None)
        kind = "a threshold a class" if key[1] else "one threshold"
        values = ["-" if r is None else f"{r['ours']:.1f}" for r in own_rows]
        grid.append([f"{key[0]}, {kind}, {key[2]}", f"{known['null_floor']:.1f}", *values])
    floor = floors()
    note = (
        "Per cent of right guesses, balanced. The paper names three attacks without their rules: each column shows "
        "that of our rules that comes nearest to it, after the mean difference over all defences is taken out. "
        f"In-sample thresholds have a floor above 50 %: {floor[1]:.1f} % at 10,000 members and as many others with one "
        f"threshold, {floor[10]:.1f} % with ten, {floor[100]:.1f} % with a hundred; ours, at our number of "
        "points, stand in the grid."
    )
    setting = rows[0]["setting"].split("; ")[-1] if rows else ""
    return (
        f"<h2>Table 2, {TITLES[dataset]}: membership inference</h2><p>{escape(note)} Audited: {escape(setting)}.</p>"
        f"{table(lines)}<details><summary>Every rule</summary>{table(grid)}</details>"
    )


def _thresholds(rule: dict[str, Any]) -> str:
    return "a threshold a class" if rule["per_class"] else "one threshold"


def _find(rows: Sequence[dict[str, Any]], cell: Cell, key: tuple[str, bool, str]) -> dict[str, Any] | None:
    for r in rows:
        own = (r["compressor"], r["rank_or_level"]) == cell and r["status"] == "finished"
        if own and (r["signal"], r["per_class"], r["origin"]) == key:
            return r
    return None


def _rule(rows: Sequence[dict[str, Any]], cell: Cell, rule: dict[str, Any]) -> str:
    found = _find(rows, cell, (rule["signal"], rule["per_class"], rule["origin"]))
    if found is None:
        return "-"
    return _figure({"value": found["ours"], "low": found["interval_low"], "high": found["interval_high"]}, 1, 1)


def _messages(row: dict[str, Any]) -> str:
    wanted = [m for m in row["messages"] if m["control"] == "held-out points" and m["score"] == "gradient difference"]
    ends = wanted[:1] + wanted[1:][-1:]
    return "; ".join(_figure(m) for m in ends) or "-"


def _figure(found: dict[str, Any], scale: float = 1.0, digits: int = 2) -> str:
    if found["value"] is None:
        return "-"
    text = f"{scale * found['value']:.{digits}f}"
    if found["low"] is None:
        return text
    return f"{text} [{scale * found['low']:.{digits}f}, {scale * found['high']:.{digits}f}]"
