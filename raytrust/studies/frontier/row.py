"""A row of the frontier: one defence, as ``frontier.json`` holds it, and that file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from raytrust.jobs.files import write_file
from raytrust.metrics.statistics import Figure
from raytrust.metrics.verdict import VERDICTS, Evidence, Verdict

Ends = list[float]  # of an interval, low and high


class Row(TypedDict, total=False):
    """A defence, what it costs and what it leaks. A file may hold further keys, which are kept as they are.

    A finished row has numbers for `leakage_ssim` and, where a model was trained, for `accuracy`. A failed one has None
    for all that is MEASURED, so that a failure can't pass for a zero; bytes it may have, as training may have finished
    when its attack failed.
    """

    name: str
    status: Literal["finished", "failed"]
    reason: str | None  # of a failure
    run: str  # its directory under captures/
    compressor: str  # the method
    rank: int | None
    level: float | None
    equal_to_rank: int | None
    equal_by: str | None
    error_feedback: bool
    transforms: list[str]  # what is done to the gradient before it is compressed
    noisy: bool  # whether one of them adds noise
    epsilon: float | None  # of DP-SGD, for all messages of the training, with delta
    delta: float | None
    seeds: list[int] | None
    threat: dict[str, Any]
    understood: bool  # whether attacks know the method; see `raytrust.leak.rules.is_understood`
    untrained: bool  # True where the model was attacked as it was: then no accuracy is the defence's
    remarks: list[str]  # what a reader must know, such as "sends more bytes than the gradient itself"
    bytes_per_step: float | None
    compression_ratio: float | None
    # Of training, in [0, 1]. It stands beside leakage, since a defence that spoils the model is no bargain. An audit of
    # a model that is not trained has none of these three.
    accuracy: float
    accuracy_interval: Ends | None
    n_test: int
    # Of the strongest attack, as a defence is only as private as that leaves it: means over the evaluation images.
    leakage_ssim: float
    leakage_interval: Ends | None
    ssim_std: float
    psnr: float
    registered_psnr: float | None
    mse: float
    lpips: float | None
    st_lpips: float | None
    n_images: int
    oracle_ssim: float
    label_accuracy: float | None
    attack: dict[str, Any]  # its settings
    attacks_tried: int
    n_tuning_images: int
    # Of the best attack that ignores the compressor and of the best that knows it: what lies between them is a
    # protection against the ignorant alone.
    naive_ssim: float | None
    aware_ssim: float | None
    aware_gain: float | None
    aware_gain_interval: Ends | None
    aware_gain_p: float | None
    # An SSIM says little by itself: on small digits the mean image reaches 0.4 to 0.5 without any attack.
    mean_image_ssim: float | None
    other_image_ssim: float | None
    identified_mse: float | None
    identified_ssim: float | None
    identified_features: float | None
    floor_ssim: float | None  # the greater of the two
    excess: float | None  # leakage less the floor
    excess_interval: Ends | None
    identified: int | None  # of the images, among `candidates`
    candidates: int | None
    naive_excess_interval: Ends | None
    naive_identified: int | None
    # A verdict depends on the other rows too, so that one in a file is not believed but computed anew when rows are
    # read: see `studies.frontier.verdicts`.
    verdict: Verdict | None
    verdict_reason: str | None
    control: bool
    pareto: bool


# A failed row carries None for each of these: a leakage of 0 after a failure would look like perfect privacy.
MEASURED = (
    "accuracy", "accuracy_interval", "n_test", "leakage_ssim", "leakage_interval", "ssim_std", "psnr",
    "registered_psnr", "mse", "lpips", "st_lpips", "n_images", "oracle_ssim", "label_accuracy", "attack",
    "naive_ssim", "aware_ssim", "aware_gain", "aware_gain_interval", "aware_gain_p", "mean_image_ssim",
    "other_image_ssim", "identified_mse", "identified_ssim", "identified_features", "floor_ssim", "excess",
    "excess_interval", "identified", "candidates", "naive_excess_interval", "naive_identified",
)  # fmt: skip


def load_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a JSON file written by `write_rows`.

    Raises:
        ValueError: not JSON, NaN or infinity in it, not a list of objects, or rows that `write_rows` refuses.
    """

    def refuse(constant: str) -> None:
        # Python reads NaN and Infinity though JSON has neither, and comparisons with NaN are silently false.
        raise ValueError(f"Expected finite numbers in {path}, got {constant}.")

    return checked(json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse))


def write_rows(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Writes the rows as JSON, atomically: a reader finds the old file or the new one, never a part.

    Raises:
        ValueError: a row without a name; a status other than "finished" and "failed"; a failed row that carries a
            verdict or anything MEASURED; a finished row without a number for accuracy or leakage, or with an unknown
            verdict; NaN or infinity anywhere.
        TypeError: a value that JSON has no form for.

    The file is then left as it was.
    """
    # Checked and turned into text before the file is touched: refused rows leave the old file as it was.
    write_file(path, (json.dumps(checked(rows), indent=2, allow_nan=False) + "\n").encode())


def checked(rows: Any) -> list[Row]:
    """The rows, if they are as `write_rows` expects them; else ValueError."""
    if not isinstance(rows, list | tuple) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("Expected a list of objects, one a defence.")
    for row in rows:
        name, status = row.get("name"), row.get("status")
        if not isinstance(name, str) or not name:
            raise ValueError(f"Expected a row with a name, got name={name!r}.")
        if status not in ("finished", "failed"):
            raise ValueError(f"Expected status='finished' or 'failed' in row {name!r}, got {status!r}.")
        for key in (*MEASURED, "verdict") if status == "failed" else ():
            if row.get(key) is not None:
                raise ValueError(f"Expected {key}=None in the failed row {name!r}, got {row[key]!r}.")
        needed = ["leakage_ssim", *(["accuracy"] if row.keys() & {"accuracy", "n_test"} else [])]
        for key in needed if status == "finished" else ():
            value = row.get(key)
            # To Python True is a number, and would pass for an accuracy of 1.
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"Expected a finite number {key} in the finished row {name!r}, got {value!r}.")
        if row.get("verdict") not in (None, *VERDICTS):
            raise ValueError(f"Expected verdict={row['verdict']!r} of row {name!r} to be one of {VERDICTS}.")
    return list(rows)


def split(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """The finished rows, least leakage first and then the most accurate, and the failed rows in their order."""
    rows = list(rows)
    finished = [row for row in rows if row["status"] == "finished"]
    finished.sort(key=lambda row: (row["leakage_ssim"], -row.get("accuracy", 0.0)))
    return finished, [row for row in rows if row["status"] == "failed"]


def is_plain(row: Row) -> bool:
    """Whether it is training without compression: no defence, but the control."""
    return row.get("compressor") == "none" and not row.get("transforms")


def accuracy(row: Row) -> Figure:
    """Of a finished row, in [0, 1]; without a value where nothing was trained."""
    return Figure.of(row.get("accuracy"), row.get("accuracy_interval"), row.get("n_test"))


def leakage(row: Row) -> Figure:
    """Mean SSIM of a finished row under the strongest attack."""
    return Figure.of(row["leakage_ssim"], row.get("leakage_interval"), row.get("n_images"))


def evidence(row: Row) -> Evidence:
    """What the strongest attack on a finished row reached."""
    return _evidence(row, row["leakage_ssim"], row.get("excess_interval"), row.get("identified"))


def naive_evidence(row: Row) -> Evidence | None:
    """What the strongest attack that ignores the compressor reached; None if there was none."""
    if (value := row.get("naive_ssim")) is None:
        return None
    return _evidence(row, value, row.get("naive_excess_interval"), row.get("naive_identified"))


def _evidence(row: Row, value: float, interval: Ends | None, identified: int | None) -> Evidence:
    return Evidence(
        value=value,
        floor=row.get("floor_ssim"),
        interval=None if interval is None else (interval[0], interval[1]),
        n=row.get("n_images") or 0,
        identified=identified,
        candidates=row.get("candidates") or 1,
    )
