from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest

from raytrust.jobs import progress as module
from raytrust.studies.frontier.progress import FrontierProgress

TOTALS = {"defences": 3, "attacks": 6, "evaluation": 3}


class Terminal:
    """A progress display whose clock stands still between `wait`s."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, totals: dict[str, int] = TOTALS, parallel: int = 2):
        self._stream, self._now = io.StringIO(), 1000.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self._now))
        self.progress = FrontierProgress(totals, parallel=parallel, evaluation_cost=4.0, stream=self._stream)

    def wait(self, seconds: float) -> None:
        self._now += seconds

    @property
    def lines(self) -> list[str]:
        return self._stream.getvalue().splitlines()

    @property
    def last(self) -> list[str]:
        return self.lines[-1].split(" | ")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    return Terminal(monkeypatch)


def defence(accuracy: float = 0.9, leakage: float = 0.3, seconds: float = 20.0) -> dict[str, Any]:
    return {
        "accuracy": accuracy,
        "leakage": leakage,
        "attacks": 2,
        "attack_seconds": 6.0,
        "wall_seconds": seconds,
    }


def attack(ssim: float, objective: str = "aware") -> dict[str, Any]:
    return {"ssim": ssim, "attack_seconds": 3.0, "figures": {"attack": {"objective": objective}, "ssim": [ssim]}}


def test_a_line_for_what_finished(terminal: Terminal) -> None:
    terminal.progress.started("defences", "run", "PowerSGD rank 2")
    terminal.wait(21)
    terminal.progress.finished("defences", "run", defence() | {"floor": 0.2})
    assert terminal.last[:2] == [
        "[0:21] 1/3 defences trained",
        "PowerSGD rank 2: accuracy 90 %, SSIM 0.30 on the tuning images (floor 0.20)",
    ]
    terminal.progress.started("attacks", "run", "PowerSGD rank 2")
    terminal.wait(3600)
    terminal.progress.finished("attacks", "run", attack(0.25, "naive"))
    assert terminal.last[:2] == [
        "[1:00:21] 1/6 attacks tuned",
        "PowerSGD rank 2: accuracy 90 %, naive attack, SSIM 0.25 on the tuning images",
    ]
    terminal.progress.started("evaluation", "run", "PowerSGD rank 2")
    figures: list[dict[str, Any]] = [
        {"attack": {"objective": o}, "ssim": s} for o, s in (("naive", [0.1, 0.2]), ("aware", [0.3, 0.3]))
    ]
    floors = {"mean_image_ssim": [0.1, 0.1], "other_image_ssim": [0.2, 0.4]}
    terminal.progress.finished("evaluation", "run", {"figures": [f | floors for f in figures]})
    assert terminal.last[:2] == [
        "[1:00:21] 1/3 defences evaluated",
        "PowerSGD rank 2: accuracy 90 %, SSIM naive 0.15, aware 0.30 on the evaluation images (floor 0.30)",
    ]
    assert len(terminal.lines) == 3  # one each


def test_a_failure_is_counted_and_says_why(terminal: Terminal) -> None:
    terminal.progress.started("defences", "run", "none")
    terminal.progress.failed("defences", "run", "the training loss became nan")
    assert terminal.lines == ["[0:00] 1/3 defences trained | none: FAILED, the training loss became nan"]


def test_no_defence_is_called_the_best(terminal: Terminal) -> None:
    """Before all attacks are made, the one that leaks least is the one that was attacked worst."""
    for key, accuracy, leakage in [("a", 0.90, 0.5), ("b", 0.885, 0.4)]:
        terminal.progress.started("defences", key, key)
        terminal.progress.finished("defences", key, defence(accuracy, leakage))
    assert all("best" not in line for line in terminal.lines)
    assert [line.split(" | ")[1][0] for line in terminal.lines] == ["a", "b"]


def test_the_time_left_is_that_of_what_is_left(terminal: Terminal) -> None:
    terminal.progress.started("defences", "a", "a")
    terminal.progress.finished("defences", "a", defence(seconds=20))
    # 2 defences of 20 s; 6 attacks, and 3 evaluations worth 4 attacks each, of 3 s, two at once: 27 s
    assert terminal.last[2] == "about 1:07 left"
    for key in "bc":
        terminal.progress.started("defences", key, key)
        terminal.progress.finished("defences", key, defence(seconds=40))
    assert terminal.last[2] == "about 0:27 left"
    for _ in range(6):
        terminal.progress.started("attacks", "a", "a")
        terminal.progress.finished("attacks", "a", attack(0.1))
    assert terminal.last[2] == "about 0:18 left"
    for key in "abc":
        terminal.progress.started("evaluation", key, key)
        terminal.progress.finished("evaluation", key, {"figures": []})
    assert terminal.last[2] == "about 0:00 left"


def test_no_time_is_promised_before_anything_is_known(terminal: Terminal) -> None:
    terminal.progress.say("Ray is up")
    terminal.progress.started("defences", "a", "a")
    terminal.wait(11)
    terminal.progress.tick()
    assert terminal.lines == ["[0:00] Ray is up", "[0:11] 0/3 defences trained | running a"]


def test_more_than_was_expected_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, {"defences": 1, "attacks": 0, "evaluation": 0})
    for key in "ab":
        terminal.progress.started("defences", key, key)
        terminal.progress.finished("defences", key, defence())
    assert terminal.last[2] == "about 0:00 left"


def test_a_sign_of_life_every_ten_seconds(terminal: Terminal) -> None:
    terminal.progress.tick()  # nothing is running
    terminal.wait(60)
    terminal.progress.tick()
    assert terminal.lines == []
    for key in ("a", "b", "c"):  # the third waits for a place
        terminal.progress.started("attacks", key, key.upper())
    terminal.progress.tick()
    assert terminal.last == ["[1:00] 0/6 attacks tuned", "running A, B"]
    for _ in range(5):
        terminal.wait(1.9)
        terminal.progress.tick()
    assert len(terminal.lines) == 1
    terminal.wait(1)
    terminal.progress.tick()
    assert len(terminal.lines) == 2


def test_lines_go_to_the_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    FrontierProgress(TOTALS, parallel=1, evaluation_cost=1.0).say("hello")
    assert capsys.readouterr().out == "[0:00] hello\n"
