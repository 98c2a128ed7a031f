"""The report as one HTML page that needs no other file and no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np

from raytrust.metrics.statistics import bootstrap_interval
from raytrust.reports.frontier_table import human_bytes
from raytrust.reports.paper.markup import STYLE, Lines, escape, table
from raytrust.reports.paper.sections import frontier_section, table_1_section, table_2_section, theory_section
from raytrust.studies.paper.assemble import Report, distance_to_paper
from raytrust.studies.paper.plan import Setting, attack_name
from raytrust.studies.paper.selection import AWARE, NAIVE, NOT_FINISHED, WORST
from raytrust.studies.paper.verdicts import NO_CONTROL, REPRODUCED, Table
from raytrust.studies.published import CELLS, CITATION, TABLE_1, TITLES, title_of


def page(report: Report, root: Path) -> str:
    """The whole report. The figures are taken in from `root`."""
    parts = [_first_screen(report), _claims(report)]
    if report.table_1:
        parts += [frontier_section(root), *(table_1_section(report, d, root) for d in report.datasets)]
    if report.theory:
        parts.append(theory_section(report, root))
    if report.audits:
        parts += [table_2_section(report, d) for d in report.datasets]
    parts.append(_settings(report))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width,initial-scale=1"><title>The paper, side by side</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


# --- the first screen ---

REST = {"not decided": "Not decided at this sample size", "failed": "Failed", NOT_FINISHED: "Not finished"}


def _first_screen(report: Report) -> str:
    found = {d: report.verdicts(d) for d in report.datasets} if report.table_1 else {}

    def items(*verdicts: str) -> str:
        """Of the data sets in turns, so that all of them are seen before the list is folded."""
        lines = [
            [f"<li><b>{TITLES[d]}</b> {escape(text)}</li>" for verdict in verdicts for text in of.get(verdict, [])]
            for d, of in found.items()
        ]
        return _list([line for turn in zip_longest(*lines) for line in turn if line is not None])

    cards = ""
    if found:
        counts = Counter({v: sum(len(of.get(v, [])) for of in found.values()) for v in REST})
        most = sum(len(texts) for of in found.values() for texts in of.values()) / 2
        more = "".join(
            f"<details{' open' if n > most else ''}><summary>{REST[v]}: {n} cells</summary>{items(v)}</details>"
            for v, n in counts.items()
            if n
        )
        cards = (
            f'<div class="cards"><div class="card yes"><h3>Protects</h3><p>Under the worst attack tried, less than '
            "half of the uncompressed SSIM is left, with its interval. That is not nothing.</p>"
            f"{items('protects')}</div>"
            f'<div class="card seems"><h3>Only seems to</h3><p>Less than half is left to the attack as in the paper, '
            f"but not to one who knows the compressor or has a better setting.</p>{items('only seems to')}"
            "<p><b>Does not protect</b>, not even from the attack as in the paper:</p>"
            f"{items('does not protect')}</div>"
            f'<div class="card price"><h3>At what price</h3>{_price(report)}</div></div>{more}'
        )
    missing, total = report.unfinished
    banner = (
        f'<p class="warning">Not finished: {missing} of {total} figures of table 1, rows of table 2 and tests of '
        "section 3 are missing. The run can be resumed.</p>"
        if missing
        else ""
    )
    for note in Table(report.table_1).notes:
        if NO_CONTROL in note:
            banner += f'<p class="warning"><b>{escape(note)}: nothing can be said about any defence there.</b></p>'
    images = max((r["n"] or 0 for r in report.table_1), default=0)
    about = (
        f"Budget “{report.budget.name}”: {images} images a cell; " if images else ""
    ) + f"seed {report.seed}. Intervals: 95 %, bootstrap over images; over models for membership."
    if images:
        about += " Worst: the greatest of three attacks on these images, slightly optimistic for the attacker."
    return (
        "<h1>Does gradient compression protect the training images? The paper, side by side with a stronger attacker"
        f'</h1>{banner}<p class="answer">{_answer(report, found)}</p>{cards}<p class="small">{escape(CITATION)}. '
        f"{escape(about)} SSIM: 1 is a copy.</p>"
    )


def _list(lines: Sequence[str], most: int = 6) -> str:
    if not lines:
        return "<ul><li>none</li></ul>"
    shown = f"<ul>{''.join(lines[:most])}</ul>"
    rest = lines[most:]
    return shown + (f"<details><summary>{len(rest)} more</summary><ul>{''.join(rest)}</ul></details>" if rest else "")


def _answer(report: Report, found: dict[str, dict[str, list[str]]]) -> str:
    if not found:
        return "Membership inference only: see the claims below."
    kinds = ("protects", "only seems to", "does not protect", *REST)
    counts = {v: sum(len(of.get(v, [])) for of in found.values()) for v in kinds}
    total = sum(len(texts) for of in found.values() for texts in of.values())
    what = "defences" if len(found) == 1 else "pairs of defence and data set"
    others = [f", {counts['does not protect']} do not"] if counts["does not protect"] else []
    others += [f"; {REST[v][0].lower() + REST[v][1:]}: {counts[v]}" for v in REST if counts[v]]
    gains = _gains(report)
    gain = (
        f" Knowing the compressor raises the SSIM of what is reconstructed by a factor of {np.median(gains):.1f} "
        f"(median over cells, {min(gains):.1f} to {max(gains):.1f})."
        if gains
        else ""
    )
    return (
        f"Of {total} {what}, {counts['protects']} protect against the worst attack that we found, "
        f"{counts['only seems to']} only seem to{''.join(others)}.{gain}{_means(report)}"
    )


def _means(report: Report) -> str:
    """What each attack leaves, in a sentence a data set; or that it can't tell."""
    notes = Table(report.table_1).notes
    found = [f"{escape(note)}." for note in notes]
    for dataset in Table(report.table_1).datasets:
        plain = report.row(dataset, ("none", None), NAIVE)
        rows = [[report.row(dataset, c, kind) for kind in (NAIVE, AWARE, WORST)] for c in CELLS[1:]]
        known = [[r["ours"] for r in own if r is not None and r["status"] == "finished"] for own in rows]
        whole = [own for own in known if len(own) == 3]
        cells = "cells" if len(whole) == len(rows) else f"the {len(whole)} of {len(rows)} cells with all three"
        means = "in no cell are all three attacks finished"
        if whole:
            naive, aware, worst = np.mean(whole, axis=0)
            means = (
                f"mean SSIM over {cells}: {naive:.2f} to the attack as in the paper, {aware:.2f} to one who knows the "
                f"compressor, {worst:.2f} at worst"
            )
        top = report.row(dataset, ("none", None), WORST)
        if plain is not None and plain["ours"] is not None:
            most = "-" if top is None or top["ours"] is None else f"{top['ours']:.2f}"
            found.append(f"{TITLES[dataset]}, {means}; without compression {plain['ours']:.2f}, at worst {most}.")
    return " " + " ".join(found)


def _gains(report: Report) -> list[float]:
    """How many times the naive SSIM the aware attack reaches, by cell, where both are above 0.01."""
    found = []
    for dataset in Table(report.table_1).works:
        for cell in CELLS[1:]:
            naive, aware = (report.row(dataset, cell, kind) for kind in (NAIVE, AWARE))
            if naive and aware and naive["ours"] and aware["ours"] and min(naive["ours"], aware["ours"]) > 0.01:
                found.append(aware["ours"] / naive["ours"])
    return found


def _price(report: Report) -> str:
    dataset = report.datasets[0]
    lines: Lines = [["", "bytes", "accuracy %"]]
    plain = report.row(dataset, ("none", None), NAIVE)
    for cell in CELLS:
        row, audit = report.row(dataset, cell, NAIVE), report.audit(dataset, cell)
        if row is None or plain is None or not row["bytes_per_step"]:
            continue
        ratio = plain["bytes_per_step"] / row["bytes_per_step"]
        size = human_bytes(row["bytes_per_step"]) + ("" if cell[0] == "none" else f" (1/{ratio:.3g})")
        lines.append([title_of(cell), size, "-" if audit is None else f"{100 * audit['accuracy']['value']:.1f}"])
    note = f"Bytes of a step of ResNet-18; accuracy of the audit's networks on {TITLES[dataset]}, with error feedback."
    return f"<p>{escape(note)}</p>{table(lines)}"


# --- claims ---


def _claims(report: Report) -> str:
    rows = "".join(
        f"<tr><td>{escape(c.quote)}</td><td>{_badge(c.verdict)}</td><td>{escape(c.evidence)}<br><span "
        f'class="small">Rule: {escape(c.rule)}</span></td></tr>'
        for c in report.claims
    )
    done = sum(c.verdict == REPRODUCED for c in report.claims)
    return (
        f"<h2>The paper's claims</h2><p>{done} of {len(report.claims)} reproduced. Each verdict is computed from the "
        "figures by the rule beside it.</p>"
        '<table class="claims"><thead><tr><th>claim</th><th>verdict</th><th>evidence</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _badge(verdict: str) -> str:
    return f'<span class="badge {verdict.replace(" ", "-")}">{escape(verdict)}</span>'


# --- settings ---


def _settings(report: Report) -> str:
    parts = [
        "<h2>Every setting, and how it was chosen</h2>",
        "<p>The paper names ResNet-18 and the cosine attack, and leaves open the stem, the mode of batch norm, whether "
        "the model is trained, the weight of total variation (TV), restarts, iterations, and how the objective was "
        "minimised: as published (Geiping et al. 2020; hard signs, step 0.1) or better (soft signs, step 0.8, cosine "
        "schedule). The combinations below "
        "were tried on uncompressed gradients of tuning images (the last of the test set), and the one whose mean SSIM "
        "comes nearest to the paper's is used for its table, on other images (the first of the test set). Common to "
        "all: one image a gradient, its label known, what one worker sends, no error feedback, compressors in their "
        "first state. The steps schedule falls by 10 after 3/8, 5/8 and 7/8 of the iterations. SSIM is scikit-image's, "
        "7x7 uniform window, data range 1. Top-K sends as many bytes as PowerSGD of the same rank, values and indices "
        "counted. Behind torchvision's stem (imagenet), batch norm in "
        "training mode is left out: one value a channel is left of an image of 32x32 pixels, without variance.</p>",
    ]
    for dataset, found in report.search.items():
        lines: Lines = [["", "victim", "attack", "mean SSIM [95 %]", "distance to the paper's"]]
        order = sorted(found, key=lambda s: (found[s].mean is None, distance_to_paper(found[s], dataset) or 0.0))
        lines += [_tried(s, report, dataset) for s in order]
        paper = TABLE_1[dataset]["none", None].mean
        worst = (
            f"<p>For the worst case of its 11 cells, {report.portfolio[dataset]} attacks of "
            f"{report.budget.tuning_iterations} iterations were compared on the tuning images.</p>"
            if dataset in report.portfolio
            else ""
        )
        parts.append(
            f"<h3>{TITLES[dataset]}: the paper's {paper:.4f} was sought among {len(found)} settings, on "
            f"{report.budget.tuning} tuning images</h3>{worst}"
            f"<details open><summary>Settings, nearest first</summary>{table(lines)}</details>"
        )
    if report.common is not None and len(report.search) > 1:
        setting, distance = report.common
        text = f"The one setting nearest to all data sets: {setting.name}; mean distance {distance:.3f}."
        parts.append(f"<p>{escape(text)}</p>")
    return "".join(parts)


def _tried(setting: Setting, report: Report, dataset: str) -> list[str]:
    found, mark = report.search[dataset][setting], "nearest" if setting == report.nearest.get(dataset) else ""
    if found.mean is None:
        text = f"failed: {found.reason}" if found.status == "failed" else found.status
        return [mark, setting.victim.name, attack_name(setting.attack), text, "-"]
    distance, interval = found.mean - TABLE_1[dataset]["none", None].mean, bootstrap_interval(found.ssim or [])
    text = f"{found.mean:.3f}" + ("" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]")
    return [mark, setting.victim.name, attack_name(setting.attack), text, f"{distance:+.3f}"]
