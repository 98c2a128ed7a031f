"""The first screen of the report: what protects, what only seems to, and at what price."""

from __future__ import annotations

from collections import Counter
from itertools import zip_longest
from typing import Any

import numpy as np

from raytrust.reports.text import Lines, human_bytes
from raytrust.studies.paper.assemble import Report
from raytrust.studies.paper.selection import AWARE, NAIVE, NOT_FINISHED, WORST
from raytrust.studies.paper.verdicts import NO_CONTROL, Table
from raytrust.studies.published import CELLS, TITLES, title_of

REST = {"not decided": "not decided at this sample size", "failed": "failed", NOT_FINISHED: "not finished"}
Verdicts = dict[str, dict[str, list[str]]]  # by data set and verdict, what it rests on for each cell


def first_screen(report: Report) -> dict[str, Any]:
    """What `paper_first.html.j2` shows."""
    verdicts: Verdicts = {d: report.verdicts(d) for d in report.datasets} if report.table_1 else {}
    rest = [(words, _items(verdicts, verdict)) for verdict, words in REST.items()]
    missing, total = report.unfinished
    return {
        "unfinished": (missing, total),
        "no_control": [note for note in Table(report.table_1).notes if NO_CONTROL in note],
        "answer": _answer(report, verdicts),
        "cards": {verdict: _items(verdicts, verdict) for verdict in ("protects", "only seems to", "does not protect")},
        "price": _price(report) if verdicts else [],
        "price_of": TITLES[report.datasets[0]],
        "rest": [(words, items) for words, items in rest if items],
        "most": _counts(verdicts).total() / 2,
        "budget": report.budget.name,
        "seed": report.seed,
        "images": max((row["n"] or 0 for row in report.table_1), default=0),
    }


def _items(verdicts: Verdicts, verdict: str) -> list[str]:
    """Of the data sets in turns, so that all of them are seen before the list is folded."""
    lines = [[f"{TITLES[d]}: {text}" for text in by_verdict.get(verdict, [])] for d, by_verdict in verdicts.items()]
    return [line for turn in zip_longest(*lines) for line in turn if line is not None]


def _counts(verdicts: Verdicts) -> Counter[str]:
    """How many cells have each verdict."""
    return Counter(v for by_verdict in verdicts.values() for v, texts in by_verdict.items() for _ in texts)


def _answer(report: Report, verdicts: Verdicts) -> str:
    if not verdicts:
        return "Membership inference only: see the claims below."
    counts = _counts(verdicts)
    what = "defences" if len(verdicts) == 1 else "pairs of defence and data set"
    text = (
        f"Of {counts.total()} {what}, {counts['protects']} protect against the worst attack that we found, "
        f"{counts['only seems to']} only seem to"
    )
    if counts["does not protect"]:
        text += f", {counts['does not protect']} do not"
    text += "".join(f"; {words}: {counts[verdict]}" for verdict, words in REST.items() if counts[verdict]) + "."
    if gains := _gains(report):
        text += (
            f" Knowing the compressor raises the SSIM of what is reconstructed by a factor of {np.median(gains):.1f} "
            f"(median over cells, {min(gains):.1f} to {max(gains):.1f})."
        )
    return f"{text} {means(report)}"


def means(report: Report) -> str:
    """What each attack leaves, in a sentence a data set; or that it can't tell."""
    table = Table(report.table_1)
    sentences = [f"{note}." for note in table.notes]
    for dataset in table.datasets:
        rows = [[report.row(dataset, cell, kind) for kind in (NAIVE, AWARE, WORST)] for cell in CELLS[1:]]
        known = [[r["ours"] for r in three if r is not None and r["status"] == "finished"] for three in rows]
        whole = [three for three in known if len(three) == 3]
        cells = "cells" if len(whole) == len(rows) else f"the {len(whole)} of {len(rows)} cells with all three"
        text = "in no cell are all three attacks finished"
        if whole:
            naive, aware, worst = np.array(whole, dtype=float).mean(axis=0)
            text = (
                f"mean SSIM over {cells}: {naive:.2f} to the attack as in the paper, {aware:.2f} to one who knows the "
                f"compressor, {worst:.2f} at worst"
            )
        plain, top = (report.row(dataset, CELLS[0], kind) for kind in (NAIVE, WORST))
        if plain is not None and plain["ours"] is not None:
            most = "-" if top is None or top["ours"] is None else f"{top['ours']:.2f}"
            sentences.append(f"{TITLES[dataset]}, {text}; without compression {plain['ours']:.2f}, at worst {most}.")
    return " ".join(sentences)


def _gains(report: Report) -> list[float]:
    """How many times the naive SSIM the aware attack reaches, by cell, where both are above 0.01."""
    gains = []
    for dataset in Table(report.table_1).works:
        for cell in CELLS[1:]:
            naive, aware = (report.row(dataset, cell, kind) for kind in (NAIVE, AWARE))
            before, after = (0.0 if row is None else row["ours"] or 0.0 for row in (naive, aware))
            # The factor between two figures that are nearly 0 is one of noise.
            if min(before, after) > 0.01:
                gains.append(after / before)
    return gains


def _price(report: Report) -> Lines:
    """What each defence sends, and the accuracy that it leaves on the first data set."""
    dataset = report.datasets[0]
    lines: Lines = [["", "bytes", "accuracy %"]]
    plain = report.row(dataset, CELLS[0], NAIVE)
    for cell in CELLS:
        row, audit = report.row(dataset, cell, NAIVE), report.audit(dataset, cell)
        sent, dense = (None if r is None else r["bytes_per_step"] for r in (row, plain))
        if sent and dense:
            size = human_bytes(sent) + ("" if cell[0] == "none" else f" (1/{dense / sent:.3g})")
            lines.append(
                [title_of(cell), size, "-" if audit is None else f"{100 * (audit['accuracy'].value or 0):.1f}"]
            )
    return lines
