"""The frontier as plain text for a terminal, and its numbers in words."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from raytrust.config.attacks import ANALYTIC
from raytrust.metrics.statistics import Figure
from raytrust.reports.summary import control_sentence, pareto_sentence, remarks_of
from raytrust.reports.text import Lines, counted, human_bytes, short, span, text_table
from raytrust.studies.frontier.row import Row, accuracy, leakage, split
from raytrust.studies.frontier.verdicts import control_works, judge_rows

_WIDTH = 120


def frontier_table(rows: Sequence[Row]) -> str:
    """The frontier as plain text, at most 120 columns wide.

    Where the attack fails without compression, the first lines say so. Finished rows come first, least leakage on top;
    ``*`` marks the Pareto set (see `raytrust.studies.frontier.verdicts.mark_pareto`). Failed rows follow with their
    reason and no number. A caption says what the numbers are and their n.

    Raises:
        ValueError: as in `raytrust.studies.frontier.row.write_rows`.
    """
    rows = judge_rows(rows)
    finished, failed = split(rows)
    works = control_works(rows)
    trained = not finished or any("accuracy" in row for row in finished)
    head = ["  defence", "verdict", *["accuracy %"] * trained, "leakage\nSSIM", "ident."]
    head += ["naive/\naware", "bytes/\nstep"]
    lines: Lines = [[*head, "strongest attack"], *(_cells(row, trained) for row in finished)]
    caption = f"{provenance(finished)} ident.: images identified, told from all other candidates. "
    caption += "naive/aware: the strongest attack that ignores/knows the compressor. "
    caption += "r: restarts, s: training step attacked. "
    if works and any("accuracy" in row and not row.get("untrained") for row in finished):
        caption += pareto_sentence(rows)
    notes = [
        caption,
        *(f"{row['name']}: {remark.rstrip('.')}." for row in finished for remark in remarks_of(row, rows)),
    ]
    parts = [
        "" if works else f"{_filled(control_sentence(rows))}\n",
        text_table(lines, _WIDTH, wrapped={0: 22, len(head): 16}),
        *(_filled(f"  {row['name']}  failed: {reason_of(row)}", "    ") for row in failed),
        "",
        *(_filled(note) for note in notes),
    ]
    return "\n".join(parts[0 if parts[0] else 1 :])


def _filled(text: str, indent: str = "") -> str:
    # Neither an option such as --attack-trials nor a number and its sign are torn apart.
    text = text.replace(" %", "\N{NO-BREAK SPACE}%")
    return textwrap.fill(text, _WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def _cells(row: Row, trained: bool) -> list[str]:
    texts = row_texts(row)
    names = ("verdict", *("accuracy",) * trained, "leakage", "identified", "naive", "bytes", "attack")
    texts |= {"identified": texts["identified"].replace(" of ", "/"), "naive": f"{texts['naive']}/{texts['aware']}"}
    return [f"{'*' if row['pareto'] else ' '} {row['name']}", *(texts[name] for name in names)]


def row_texts(row: Row) -> dict[str, str]:
    """The numbers of a finished, judged row as text, by what they are."""
    images, ratio, identified = row.get("n_images"), row.get("compression_ratio"), row.get("identified")
    return {
        "verdict": str(row["verdict"]),
        "accuracy": f"{accuracy(row):.1%}",
        "leakage": str(leakage(row)),
        "floor": str(Figure(row.get("floor_ssim"))),
        "excess": f"{Figure.of(row.get('excess'), row.get('excess_interval')):+.2f}",
        "identified": "-" if identified is None else f"{identified} of {images}",
        "naive": str(Figure(row.get("naive_ssim"))),
        "aware": str(Figure(row.get("aware_ssim"))),
        "n": str(images or "-"),
        "bytes": human_bytes(row.get("bytes_per_step")),
        "ratio": "-" if ratio is None else f"{ratio:.3g}x",
        "attack": attack_text(row.get("attack")),
        "tried": str(row.get("attacks_tried") or "-"),
    }


def attack_text(attack: dict[str, Any] | None) -> str:
    """An attack's main settings in short: aware tv=0.01 lr=0.1 r=2 s=0."""
    names = ["objective", "method", "matching", "tv", "step_size", "restarts", "capture_step"]
    # It solves for the image: nothing is weighed, no step is taken, and it begins nowhere.
    if attack and attack.get("method") == ANALYTIC.method:
        names = ["objective", "method", "capture_step"]
    labels = {"tv": "tv=", "step_size": "lr=", "restarts": "r=", "capture_step": "s="}
    values = [(labels.get(name, ""), attack.get(name)) for name in names] if attack else []
    plain = ("optimise", "cosine")  # what they are where nothing else is said
    texts = [f"{label}{short(v)}" for label, v in values if v is not None and v not in plain]
    if attack and attack.get("residual", "ignore") != "ignore":
        texts.append(attack["residual"])
    return " ".join(texts) or "-"


def reason_of(row: Row) -> str:
    return str(row.get("reason") or "no reason recorded")


def provenance(finished: Sequence[Row]) -> str:
    """A caption's first sentences: what was measured on how many images and seeds, and what the intervals are."""
    if not finished:
        return "No defence finished."
    tests, images, tried = (
        span(row.get("n_test") for row in finished),
        span(row.get("n_images") for row in finished),
        span(row.get("attacks_tried") for row in finished),
    )
    seeds = span(len(row.get("seeds") or ()) or None for row in finished)
    missing = any(row.get("leakage_interval") is None for row in finished)
    # All defences are attacked on the same images, which have the same floors.
    floors = {(row.get("mean_image_ssim"), row.get("other_image_ssim")) for row in finished}
    floor = ""
    if len(floors) == 1 and None not in (pair := floors.pop()):
        floor = f" Floors, without any attack: the mean image {pair[0]:.2f}, a random other image {pair[1]:.2f}."
    steps = max((row.get("threat") or {}).get("history", 0) for row in finished)
    history = f" The attacker also had the messages of up to {steps} steps before (used to avoid or weigh residuals)."
    accuracy = f"Accuracy: test images, n = {tests}; training seeds: {seeds}. " * any("accuracy" in r for r in finished)
    return (
        f"{accuracy}Leakage: mean SSIM (1 = exact copy) to the private images, n = {images}, under the strongest of "
        f"{counted(tried, 'attack')}.{history * bool(steps)}{floor} 95 % intervals: {'Wilson, ' * bool(accuracy)}"
        f"bootstrap over images{' (none where n = 1)' * missing}."
    )
