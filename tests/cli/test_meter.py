"""What a sweep says of its own cost."""

from __future__ import annotations

import time

import pytest

from raytrust.cli.frontier import Meter


def test_it_tells_work_from_what_surrounds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    meter = Meter(100.0)
    clock[0] = 104.0
    meter.started("defences", "a", "none")
    clock[0] = 130.0
    meter.finished("defences", "a", {"cpu_seconds": 20.0, "waited_seconds": 12.0})
    meter.started("defences", "b", "PowerSGD rank 1")
    clock[0] = 140.0
    meter.failed("defences", "b", "it broke")
    meter.finished("attacks", "a", {"figures": {"cpu_seconds": 6.0}, "attack_seconds": 9.0})
    clock[0] = 150.0
    meter.finished("evaluation", "a", {"figures": [{"cpu_seconds": 3.0}, {"cpu_seconds": 1.0}]})
    assert meter.busy == 30.0
    assert meter.ends(55.0) == 4 + 12 + 5  # until there were workers, and from 150 to 155
    assert meter.beyond(55.0, 2) == (55 - 21 - 15) / 2
    assert meter.text(55.0, 2) == (
        "55 s; training and attacks took 30 CPU seconds, 15 s on 2 CPUs; start and end 21 s; 9.5 s a defence besides"
    )


def test_nothing_to_do_costs_nothing_besides() -> None:
    assert Meter(time.monotonic()).beyond(3.0, 2) == 0.0
