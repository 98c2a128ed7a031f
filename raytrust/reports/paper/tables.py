"""The paper's tables, its section 3 and the search for its setting beside ours, as tables of text."""

from __future__ import annotations

from typing import Any

import numpy as np

from raytrust.metrics.statistics import Figure, bootstrap_interval
from raytrust.reports.text import Lines, human_bytes
from raytrust.studies.membership.row import messages_of
from raytrust.studies.paper.assemble import Report
from raytrust.studies.paper.plan import Setting, attack_name
from raytrust.studies.paper.row import RuleRow, SimilarityRow, TheoryRow, cell_of, figure_of, theory_values
from raytrust.studies.paper.rows import nearest_rules, rule_name
from raytrust.studies.paper.selection import AWARE, NAIVE, NOT_FINISHED, WORST
from raytrust.studies.published import CELLS, MEMBERSHIP_ATTACKS, TABLE_1, TABLE_2, TITLES, title_of


def table_1(report: Report, dataset: str) -> dict[str, Any]:
    """A data set's part of table 1: the lines, the setting behind each worst case, and what a note says of them."""
    lines: Lines = [["defence", "paper (std)", "ours, as in the paper", "knows the compressor", "worst case"]]
    lines[0] += ["% left, paper", "% left, ours", "% left, worst", "n", "bytes"]
    behind: Lines = [["defence", "worst case is"]]
    for cell in CELLS:
        paper = TABLE_1[dataset][cell]
        naive, aware, worst = (report.row(dataset, cell, kind) for kind in (NAIVE, AWARE, WORST))
        images = next((row["n"] for row in (naive, aware, worst) if row is not None and row["n"] is not None), None)
        lines.append(
            [
                title_of(cell),
                f"{paper.mean:.4f} ({paper.std:.4f})",
                *(_ssim(row) for row in (naive, aware, worst)),
                f"{paper.percent:g}",
                *(f"{Figure(row['ours_percent_of_original'] if row else None):.0f}" for row in (naive, worst)),
                str(images or "-"),
                human_bytes((naive and naive["bytes_per_step"]) or None),
            ]
        )
        behind.append([title_of(cell), (worst and worst["setting"]) or "-"])
    search = report.search[dataset].values()
    near = report.nearest.get(dataset)
    return {
        "dataset": TITLES[dataset],
        "lines": lines,
        "behind": behind,
        "floors": next((r for r in report.table_1 if r["dataset"] == dataset and r["status"] == "finished"), None),
        "nearest": near and near.name,
        "target": TABLE_1[dataset]["none", None].mean,
        "search_ended": "is not finished" if any(f.status == NOT_FINISHED for f in search) else "failed",
    }


def _ssim(row: SimilarityRow | None) -> str:
    if row is None:
        return "-"
    if row["status"] != "finished":
        return f"failed: {row['reason']}" if row["status"] == "failed" else row["status"]
    return f"{figure_of(row):.3f}"


def search(report: Report, dataset: str) -> dict[str, Any]:
    """The settings that were tried on a data set, nearest first."""
    tried, target = report.search[dataset], TABLE_1[dataset]["none", None].mean
    order = sorted(tried, key=lambda s: (tried[s].mean is None, abs((tried[s].mean or 0.0) - target)))
    head = ["", "victim", "attack", "mean SSIM [95 %]", "distance to the paper's"]
    return {
        "dataset": TITLES[dataset],
        "target": target,
        "lines": [head, *(_tried(setting, report, dataset) for setting in order)],
        "portfolio": report.portfolio.get(dataset),
    }


def _tried(setting: Setting, report: Report, dataset: str) -> list[str]:
    tried, mark = report.search[dataset][setting], "nearest" if setting == report.nearest.get(dataset) else ""
    names = [mark, setting.victim.name, attack_name(setting.attack)]
    if tried.mean is None:
        return [*names, f"failed: {tried.reason}" if tried.status == "failed" else tried.status, "-"]
    ssim = Figure.of(tried.mean, bootstrap_interval(tried.ssim or []))
    return [*names, f"{ssim:.3f}", f"{tried.mean - TABLE_1[dataset]['none', None].mean:+.3f}"]


def theory(report: Report) -> Lines:
    """All figures of section 3: means over images [least, greatest]."""
    lines: Lines = [["data set", "step", "defence", "attainable cosine", "naive reaches", "aware reaches"]]
    lines[0] += ["naive distance at the truth", "aware distance at the truth", "naive SSIM", "aware SSIM", "n"]
    for row in report.theory:
        truths = [f"{theory_values([row], name).mean():.1e}" for name in ("naive_at_truth", "aware_at_truth")]
        reached = [_range(row, name) for name in ("attainable", "naive_reached", "aware_reached")]
        ssim = [_range(row, name) for name in ("naive_ssim", "aware_ssim")]
        names = [TITLES[row["dataset"]], str(row["step"]), title_of(row["cell"])]
        lines.append([*names, *reached, *truths, *ssim, str(row["n"])])
    return lines


def _range(row: TheoryRow, name: str) -> str:
    values = theory_values([row], name)
    return f"{Figure(float(np.mean(values)), float(values.min()), float(values.max())):.3f}"


def table_2(report: Report, dataset: str) -> dict[str, Any]:
    """A data set's part of table 2: by the rules nearest to the paper's attacks, and by every rule."""
    audit = report.audits[dataset]
    rows = [row for row in report.table_2 if row["dataset"] == dataset]
    done = {(cell_of(r), (r["signal"], r["per_class"], r["origin"])): r for r in rows if r["status"] == "finished"}
    near = {rule.attack: rule.key for rule in nearest_rules(audit, dataset)}
    heads = [f"{a}: paper / ours" + (f" by {rule_name(near[a])}" if a in near else "") for a in MEMBERSHIP_ATTACKS]
    lines: Lines = [["defence", *heads, "accuracy %", "final model: loss AUC", "messages: AUC, first and last step"]]
    for cell, row in zip(CELLS, audit, strict=True):
        if row["status"] != "finished":
            text = f"failed: {row['reason']}" if row["status"] == "failed" else row["status"]
            lines.append([title_of(cell), text, *[""] * (len(lines[0]) - 2)])
            continue
        ours = [_rule(done.get((cell, near[a])) if a in near else None) for a in MEMBERSHIP_ATTACKS]
        pairs = [f"{paper:.2f} / {text}" for paper, text in zip(TABLE_2[dataset][cell], ours, strict=True)]
        messages = messages_of(row)
        ends = "; ".join(str(message) for message in messages[:1] + messages[1:][-1:]) or "-"
        lines.append([title_of(cell), *pairs, f"{row['accuracy']:.1%}", str(row["final"]["loss"].auc), ends])
    grid: Lines = [["rule", "null floor", *(title_of(cell) for cell in CELLS)]]
    for key in dict.fromkeys(key for _, key in done):
        rules = [done.get((cell, key)) for cell in CELLS]
        floor = next(rule["null_floor"] for rule in rules if rule is not None)
        values = ["-" if rule is None else f"{rule['ours']:.1f}" for rule in rules]
        grid.append([rule_name(key), f"{floor:.1f}", *values])
    # A row's setting names its rule first, and then the audit, which is the same for all.
    setting = rows[0]["setting"].split("; ")[-1] if rows else ""
    return {"dataset": TITLES[dataset], "lines": lines, "grid": grid, "setting": setting}


def _rule(row: RuleRow | None) -> str:
    return "-" if row is None else f"{figure_of(row):.1f}"
