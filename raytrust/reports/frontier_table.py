"""From saved results to the table of the privacy frontier: rows, their file, their verdicts.

A row is one defence, a plain dict as ``frontier.json`` holds it. It may carry any further keys, which are kept as they
are. Keys that raytrust reads:

- ``name``, ``compressor``, ``error_feedback``, ``status`` ("finished" or "failed"), ``reason`` (of a failure);
- ``accuracy`` in [0, 1], ``accuracy_interval`` [low, high], ``n_test``;
- ``leakage_ssim`` (mean SSIM under the strongest attack), ``leakage_interval`` or None, ``n_images``;
- ``naive_ssim``, ``aware_ssim``: the best attack that ignores the compressor, and the best that knows it;
- ``mean_image_ssim``, ``other_image_ssim``: floors, what the mean of the data set and a random other image reach;
- ``floor_ssim`` (the greater of the two), ``excess`` (leakage - floor) and ``excess_interval``, ``identified`` (how
  many of the images, among ``candidates``): the evidence of the strongest attack; ``naive_excess_interval`` and
  ``naive_identified``: of the best naive one;
- ``bytes_per_step``, ``compression_ratio``; ``attack`` (the winner's settings), ``attacks_tried``, ``seeds``;
- ``remarks``: a list of strings that a reader must know, such as "sends more bytes than the gradient itself".

``verdict`` ("leaks", "resists", "undecided", None of a failure), ``verdict_reason``, ``control`` (whether the attack
works without compression) and ``pareto`` are written for other readers, but computed anew here from the evidence, so
that they can't be stale. The rule is that of `raytrust.metrics.verdict`.

A finished row has numbers for accuracy and leakage. A failed row has none for accuracy and for whatever an attack
measures, so that a failure can't pass for a zero, neither in a file nor in a figure; bytes it may have, as training may
have finished when its attack failed.
"""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from raytrust.jobs.files import write_file
from raytrust.metrics.verdict import VERDICTS
from raytrust.reports import judged

Row = dict[str, Any]

_REQUIRED = ("accuracy", "leakage_ssim")
_ATTACKED = ("naive_ssim", "aware_ssim", "oracle_ssim", "ssim_std", "psnr", "mse", "lpips", "label_accuracy")
_COMPARED = ("identified_mse", "identified_ssim", "mean_image_ssim", "other_image_ssim", "aware_gain", "aware_gain_p")
_EVIDENCE = ("floor_ssim", "excess", "excess_interval", "identified", "naive_excess_interval", "naive_identified")
_MEASURED = (*_REQUIRED, *_ATTACKED, *_COMPARED, *_EVIDENCE, "verdict")  # None in a failed row
_TABLE_WIDTH = 120


# --- files ---


def load_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a JSON file written by :func:`write_rows`.

    Raises:
        ValueError: not JSON, NaN or infinity in it, not a list of objects, or rows that :func:`write_rows` refuses.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"Expected finite numbers in {path}, got {constant}.")

    return _checked(json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse))


def write_rows(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Writes the rows as JSON, atomically: a reader finds the old file or the new one, never a part.

    Raises:
        ValueError: a row without a name; a status other than "finished" and "failed"; a failed row that carries a
            verdict, or a number for accuracy or from an attack; a finished row without a number for accuracy or
            leakage, or with an unknown verdict; NaN or infinity anywhere.
        TypeError: a value that JSON has no form for.

    The file is then left as it was.
    """
    text = json.dumps(_checked(rows), indent=2, allow_nan=False)
    write_file(Path(path), (text + "\n").encode())


def judge_rows(rows: Sequence[Row]) -> list[Row]:
    """Copies of the rows with ``verdict``, ``verdict_reason``, ``control`` and ``pareto``, as
    `raytrust.reports.judged.judge_rows` computes them. Order is kept and the arguments are left alone.

    Raises:
        ValueError: as in :func:`write_rows`.
    """
    return judged.judge_rows(_checked(rows))


def _checked(rows: Any) -> list[Row]:
    if not isinstance(rows, list | tuple) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("Expected a list of objects, one a defence.")
    for row in rows:
        name, status = row.get("name"), row.get("status")
        if not isinstance(name, str) or not name:
            raise ValueError(f"Expected a row with a name, got name={name!r}.")
        if status == "failed":
            for key in _MEASURED:
                if row.get(key) is not None:
                    raise ValueError(f"Expected {key}=None in the failed row {name!r}, got {row[key]!r}.")
        elif status == "finished":
            for key in _REQUIRED:
                value = row.get(key)
                if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                    raise ValueError(f"Expected a finite number {key} in the finished row {name!r}, got {value!r}.")
            if row.get("verdict") not in (None, *VERDICTS):
                raise ValueError(f"Expected verdict={row['verdict']!r} of row {name!r} to be one of {VERDICTS}.")
        else:
            raise ValueError(f"Expected status='finished' or 'failed' in row {name!r}, got {status!r}.")
    return list(rows)


# --- table ---


def frontier_table(rows: Sequence[Row]) -> str:
    """The frontier as plain text for a terminal, at most 120 columns wide.

    Where the attack fails without compression, the first lines say so. Finished rows come first, least leakage on top;
    ``*`` marks the Pareto set (see `raytrust.reports.judged.mark_pareto`). Failed rows follow with their reason and no
    number. A caption says what the numbers are and their n.

    Raises:
        ValueError: as in :func:`write_rows`.
    """
    rows = judge_rows(rows)
    finished, failed = split(rows)
    header = ["  defence", "verdict", "accuracy %", "leakage\nSSIM", "iden-\ntified", "naive/\naware", "bytes/\nstep"]
    header += ["strongest attack"]
    cells = [header, *(_table_cells(row) for row in finished)]
    widths = [max(len(line) for cell in column for line in cell.split("\n")) for column in zip(*cells, strict=True)]
    spare = _TABLE_WIDTH - 2 * (len(widths) - 1) - sum(widths) + widths[0] + widths[-1]
    widths[0] = min(widths[0], max(14, min(22, spare - 10), spare - widths[-1]))  # long names and attacks wrap
    widths[-1] = min(widths[-1], spare - widths[0])

    lines = (
        []
        if control_works(rows)
        else [*textwrap.wrap(judged.control_sentence(rows), _TABLE_WIDTH, break_on_hyphens=False), ""]
    )
    lines += _table_lines(header, widths)
    lines.append("  ".join("-" * width for width in widths))
    for row_cells in cells[1:]:
        lines += _table_lines(row_cells, widths)
    for row in failed:
        rest = _TABLE_WIDTH - widths[0] - 2
        reason = textwrap.fill(f"failed: {reason_of(row)}", rest, subsequent_indent="  ")
        lines += _table_lines([f"  {row['name']}", reason], [widths[0], rest])
    remarks = [f"{row['name']}: {remark}." for row in finished for remark in judged.remarks_of(row, rows)]
    caption = f"{provenance(finished)} naive/aware: the strongest attack that ignores/knows the compressor. "
    caption += "r: restarts, s: training step attacked. "
    if control_works(rows):
        caption += "*: Pareto set, no other is better in leakage or accuracy by intervals apart, and worse in neither."
    texts = [text.replace(" %", "\N{NO-BREAK SPACE}%") for text in [caption, *remarks]]
    notes = [line for text in texts for line in textwrap.wrap(text, _TABLE_WIDTH)]
    return "\n".join([*lines, "", *notes])


def control_works(judged_rows: Sequence[Row]) -> bool:
    return any(row["control"] for row in judged_rows)


def _table_cells(row: Row) -> list[str]:
    naive, aware = ("-" if row.get(key) is None else two_digits(row[key]) for key in ("naive_ssim", "aware_ssim"))
    identified = row.get("identified")
    return [
        f"{'*' if row['pareto'] else ' '} {row['name']}",
        row["verdict"],
        accuracy_text(row),
        leakage_text(row),
        "-" if identified is None else f"{identified}/{row['n_images']}",
        f"{naive}/{aware}",
        human_bytes(row.get("bytes_per_step")),
        attack_text(row.get("attack")),
    ]


def accuracy_text(row: Row) -> str:
    """Of a finished row, in per cent, with its interval: 93.0 [89.9, 95.2]."""
    interval = row.get("accuracy_interval")
    ends = "" if interval is None else f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    return f"{100 * row['accuracy']:.1f}{ends}"


def leakage_text(row: Row) -> str:
    """Mean SSIM of a finished row with its interval: 0.41 ±0.10, or 0.41 [0.00, 0.71] if that isn't centred."""
    text, interval = two_digits(row["leakage_ssim"]), row.get("leakage_interval")
    if interval is None:
        return text
    low, high = interval
    centred = abs((low + high) / 2 - row["leakage_ssim"]) < 0.005
    return f"{text} ±{(high - low) / 2:.2f}" if centred else f"{text} [{two_digits(low)}, {two_digits(high)}]"


def two_digits(value: float) -> str:
    """With two digits after the point; what rounds to 0 has no sign."""
    return f"{round(value, 2) + 0.0:.2f}"


def _table_lines(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The lines of one row; a cell wider than its column is wrapped, with the indent of its first line."""
    columns = []
    for cell, width in zip(cells, widths, strict=True):
        indent = "    " if cell.startswith(("  ", "* ")) else ""
        columns.append([w for line in cell.split("\n") for w in textwrap.wrap(line, width, subsequent_indent=indent)])
    rows = zip_longest(*columns, fillvalue="")
    return ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def attack_text(attack: Row | None) -> str:
    """An attack's main settings in short: aware tv=0.01 lr=0.1 r=2 s=0."""
    names = {"objective": "", "tv": "tv=", "step_size": "lr=", "restarts": "r=", "capture_step": "s="}
    values = {label: attack.get(key) for key, label in names.items()} if attack else {}
    texts = [f"{label}{_short(value)}" for label, value in values.items() if value is not None]
    if attack and attack.get("residual", "ignore") != "ignore":
        texts.append(attack["residual"])
    return " ".join(texts) or "-"


def _short(value: object) -> str:
    """Two significant digits of a float, in the shorter notation: 0.01, 1e-4, 2.1e-5."""
    if not isinstance(value, float):
        return str(value)
    mantissa, exponent = f"{value:.1e}".split("e")
    return min(f"{value:.2g}", f"{mantissa.removesuffix('.0')}e{int(exponent)}", key=len)


def human_bytes(count: float | None) -> str:
    """Decimal units: 512 B, 1.2 kB, 44.7 MB."""
    if count is None:
        return "-"
    value, units = float(count), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.95 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def split(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """The finished rows, least leakage first and then the most accurate, and the failed rows in their order."""
    rows = list(rows)
    finished = [row for row in rows if row["status"] == "finished"]
    finished.sort(key=lambda row: (row["leakage_ssim"], -row["accuracy"]))
    return finished, [row for row in rows if row["status"] == "failed"]


def reason_of(row: Row) -> str:
    return str(row.get("reason") or "no reason recorded")


def _span(values: Iterable[int | None]) -> str:
    """The number that a caption gives for all rows, or their range: "4", "4 to 8", "?"."""
    known = sorted({value for value in values if value is not None})
    return "?" if not known else f"{known[0]}" if len(known) == 1 else f"{known[0]} to {known[-1]}"


def provenance(finished: Sequence[Row]) -> str:
    """A caption's first sentences: what was measured on how many images and seeds, and what the intervals are."""
    if not finished:
        return "No defence finished."
    tests, images, tried = (_span(row.get(key) for row in finished) for key in ("n_test", "n_images", "attacks_tried"))
    seeds = _span(len(row["seeds"]) if row.get("seeds") else None for row in finished)
    missing = any(row.get("leakage_interval") is None for row in finished)
    floors = {(row.get("mean_image_ssim"), row.get("other_image_ssim")) for row in finished}
    floor = ""
    if len(floors) == 1 and None not in (pair := floors.pop()):  # the same images for all, so the same floors
        floor = f" Floors, without any attack: the mean image {pair[0]:.2f}, a random other image {pair[1]:.2f}."
    steps = sorted({(row.get("threat") or {}).get("history", 0) for row in finished})
    history = ""
    if steps[-1]:
        history = (
            f" The attacker also had the messages of up to {steps[-1]} steps before (used to avoid or weigh residuals)."
        )
    return (
        f"Accuracy: test images, n = {tests}; training seeds: {seeds}. Leakage: mean SSIM (1 = exact copy) to the "
        f"private images, n = {images}, under the strongest of {tried} attacks.{history}{floor} 95 % intervals: "
        f"Wilson, bootstrap over images{' (none where n = 1)' if missing else ''}."
    )
