"""What is said of jobs: how many are done, and how long the rest takes by what was measured."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from jobs_toys import Batch, Square

from raytrust.jobs import progress as module
from raytrust.jobs.progress import Progress, clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def finished(cost: float, seconds: float) -> dict[str, Any]:
    return {"job_cost": cost, "job_seconds": seconds}


def test_the_time_left_follows_from_what_was_measured() -> None:
    stream = io.StringIO()
    progress = Progress(parallel=2, every=0.0, stream=stream)
    progress.expect_jobs(("squares", "batches"), [Square(10), Square(10), Square(20)])
    assert (progress.jobs_left, progress.seconds_left()) == (3, None)
    progress.started("squares", "a", "square of 10")
    progress.finished("squares", "a", finished(10.0, 120.0))
    assert progress.seconds_left() == pytest.approx(12 * 30 / 2)
    progress.started("squares", "b", "square of 10")
    progress.failed("squares", "b", "it broke")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[0:00] 1/3 squares | about 3:00 left"
    assert lines[1].startswith("[0:00] 2/3 squares | square of 10: FAILED, it broke | about ")


def test_rates_are_guessed_until_they_are_measured() -> None:
    progress = Progress(parallel=1, stream=io.StringIO(), rates={"squares": 2.0})
    progress.expect_jobs(("squares",), [Square(10)])
    assert progress.seconds_left() == 20.0
    progress.expect_jobs(("batches",), [Batch(10)])
    assert progress.seconds_left() is None
    progress.measure("squares", 5.0, 1.0)
    progress.expect("batches", 0, 0.0)
    assert progress.seconds_left() == 50.0


def test_a_sign_of_life_and_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now, stream = [0.0], io.StringIO()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    progress = Progress(parallel=1, stream=stream, every=5.0, heartbeat=10.0)
    progress.expect("squares", 9, 9.0)
    for second in range(8):
        now[0] = float(second)
        progress.started("squares", str(second), f"square of {second}")
        progress.finished("squares", str(second), finished(1.0, 1.0))
    progress.started("squares", "x", "the last")
    now[0] += 11.0
    progress.tick()
    assert [line.split(" |")[0] for line in stream.getvalue().splitlines()] == [
        "[0:00] 1/9 squares", "[0:05] 6/9 squares", "[0:18] 8/9 squares",
    ]  # fmt: skip
    assert "running the last" in stream.getvalue()


def test_a_terminal_has_a_bar_below_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        with Progress(parallel=1, stream=stream, every=0.0) as progress:
            progress.expect("squares", 2, 2.0)
            progress.started("squares", "a", "square of 1")
            progress.finished("squares", "a", finished(1.0, 3.0))
            progress.say("a line that is much longer than any terminal is wide " * 3 + "[and] is not :marked: up")
    assert plain.getvalue().count("\n") == 2
    assert "\x1b" not in plain.getvalue()
    assert plain.getvalue().endswith("[and] is not :marked: up\n")
    assert "\x1b" in terminal.getvalue()
    assert "1/2" in terminal.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3600, "1:00:00"), (36_061, "10:01:01")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
