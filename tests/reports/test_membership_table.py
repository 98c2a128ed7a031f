"""The membership audit's control: attacks that fail without compression show no protection."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from raytrust.metrics.statistics import Figure
from raytrust.reports.membership_table import control_lines
from raytrust.studies.membership.row import MessageFigure


def row(final: tuple[Any, Any, Any], messages: tuple[Any, Any, Any] | None = None, **changes: Any) -> dict[str, Any]:
    steps = () if messages is None else (0, 90)
    of_step = {"control": "held-out points", "score": "gradient difference"}
    return {
        "name": "none",
        "status": "finished",
        "arm": {"compressor": {"method": "none"}},
        "models": 8,
        "final": {"LiRA online": SimpleNamespace(auc=Figure(*final, n=8))},
        "messages": [MessageFigure(*(messages or ()), n=8, step=step, **of_step) for step in steps],
        **changes,
    }


def test_attacks_that_beat_chance_with_their_interval_work() -> None:
    assert control_lines([row((0.61, 0.56, 0.66), (0.9, 0.85, 0.95))]) == [
        "Control, final models (LiRA online): the attack works without compression: AUC 0.61 (n = 8), "
        "+0.11 [+0.06, +0.16] over the floor 0.50.",
        "Control, messages (gradient difference, step 90): the attack works without compression: AUC 0.90 (n = 8), "
        "+0.40 [+0.35, +0.45] over the floor 0.50.",
    ]


@pytest.mark.parametrize("final", [(0.52, 0.49, 0.55), (0.7, None, None), (None, None, None), (0.5, 0.5, 0.5)])
def test_attacks_that_do_not_show_no_protection(final: tuple[Any, Any, Any]) -> None:
    (line,) = control_lines([row(final)])
    assert line.startswith(
        "The attack on final models (LiRA online) fails here: nothing that it says of a defence may be"
    )


def test_noise_is_no_control() -> None:
    noise = row((0.5, 0.49, 0.51), arm={"compressor": {"method": "none"}, "transforms": [{"method": "noise"}]})
    assert control_lines([noise, row((0.61, 0.56, 0.66))]) == control_lines([row((0.61, 0.56, 0.66))])
    assert control_lines([noise])[0].startswith("No control:")


def test_without_uncompressed_training_there_is_no_control() -> None:
    compressed = row((0.9, 0.8, 1.0), arm={"compressor": {"method": "powersgd"}})
    private = row((0.9, 0.8, 1.0), arm={"noise_multiplier": 1.0}, privacy={"epsilon": 1.0})
    failed = {"name": "none", "status": "failed", "reason": "out of memory", "arm": {"compressor": {"method": "none"}}}
    for rows in ([compressed, private, failed], []):
        assert control_lines(rows) == [
            "No control: uncompressed training was not audited. Nothing here may be called protective."
        ]
