"""What a person in front of the terminal sees while a sweep runs.

No line ranks defences: before all attacks are made, and the uncompressed gradient is known to give way, the one that
leaks least is the one that was attacked worst.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from raytrust.metrics.verdict import floor_of_images

PHASES = ("defences", "attacks", "evaluation")
WORDS = {"defences": "defences trained", "attacks": "attacks tuned", "evaluation": "defences evaluated"}


class Progress:
    """A listener that prints a line whenever something finishes, and what is running every `heartbeat` seconds.

    totals: how many items each phase has. parallel: how many attacks run at once. evaluation_cost: how long an
    evaluation takes compared with an attack of the search.
    """

    def __init__(
        self,
        totals: dict[str, int],
        parallel: int,
        evaluation_cost: float,
        stream: TextIO | None = None,
        heartbeat: float = 10.0,
    ):
        self._totals = totals
        self._parallel = parallel
        self._evaluation_cost = evaluation_cost
        self._stream = stream or sys.stdout
        self._heartbeat = heartbeat
        self._started = self._printed = time.monotonic()
        self._done = dict.fromkeys(PHASES, 0)
        self._running: dict[tuple[str, str], str] = {}
        self._seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self._accuracy: dict[str, float] = {}
        self._names: dict[str, str] = {}

    def started(self, phase: str, key: str, what: str) -> None:
        self._running[phase, key] = what
        self._names[key] = what

    def finished(self, phase: str, key: str, result: dict[str, Any]) -> None:
        name = self._end(phase, key)
        if phase == "defences":
            self._seconds["defences"].append(result["wall_seconds"])
            self._seconds["attacks"] += [result["attack_seconds"] / max(1, result["attacks"])] * result["attacks"]
            self._accuracy[key] = result["accuracy"]
            floor = result.get("floor")
            text = f"SSIM {result['leakage']:.2f} on the tuning images{_floor_text(floor)}"
        elif phase == "attacks":
            self._seconds["attacks"].append(result["attack_seconds"])
            figures = result["figures"]
            objective = figures["attack"]["objective"]
            text = f"{objective} attack, SSIM {result['ssim']:.2f} on the tuning images{_floor_text(_floor([figures]))}"
        else:
            means = {f["attack"]["objective"]: sum(f["ssim"]) / len(f["ssim"]) for f in result["figures"]}
            values = ", ".join(f"{objective} {mean:.2f}" for objective, mean in means.items())
            text = f"SSIM {values or '-'} on the evaluation images{_floor_text(_floor(result['figures']))}"
        accuracy = f"accuracy {100 * self._accuracy[key]:.0f} %, " if key in self._accuracy else ""
        self._line(phase, f"{name}: {accuracy}{text}")

    def failed(self, phase: str, key: str, reason: str) -> None:
        self._line(phase, f"{self._end(phase, key)}: FAILED, {reason}")

    def tick(self) -> None:
        if time.monotonic() - self._printed >= self._heartbeat and self._running:
            names = list(dict.fromkeys(self._running.values()))[: self._parallel]
            self._line(next(iter(self._running))[0], "running " + ", ".join(names))

    def say(self, text: str) -> None:
        """A line with the time since the start."""
        self._printed = time.monotonic()
        print(f"[{_clock(self._printed - self._started)}] {text}", file=self._stream, flush=True)

    def _end(self, phase: str, key: str) -> str:
        self._done[phase] += 1
        self._running.pop((phase, key), None)
        return self._names.get(key, key)

    def _line(self, phase: str, text: str) -> None:
        parts = [f"{self._done[phase]}/{self._totals[phase]} {WORDS[phase]}", text, self._left()]
        self.say(" | ".join(part for part in parts if part))

    def _left(self) -> str:
        if not self._seconds["defences"]:
            return ""
        mean = {phase: sum(s) / len(s) if s else 0.0 for phase, s in self._seconds.items()}
        left = {phase: max(0, self._totals[phase] - self._done[phase]) for phase in PHASES}
        attacks = mean["attacks"] * (left["attacks"] + self._evaluation_cost * left["evaluation"]) / self._parallel
        return f"about {_clock(left['defences'] * mean['defences'] + attacks)} left"


def _floor(figures: Sequence[dict[str, Any]]) -> float | None:
    """What is reached on the attacked images without any attack, if it was measured; the same for all attacks."""
    for of_one in figures:
        floor = floor_of_images(of_one.get("mean_image_ssim"), of_one.get("other_image_ssim"))
        if floor is not None:
            return sum(floor) / len(floor)
    return None


def _floor_text(floor: float | None) -> str:
    return "" if floor is None else f" (floor {floor:.2f})"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
