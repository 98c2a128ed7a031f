"""What a person in front of the terminal sees while a sweep runs."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

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
        self._best: dict[str, tuple[float, float, str]] = {}
        self._names: dict[str, str] = {}

    def started(self, phase: str, key: str, what: str) -> None:
        self._running[phase, key] = what
        self._names[key] = what

    def finished(self, phase: str, key: str, result: dict[str, Any]) -> None:
        name = self._end(phase, key)
        if phase == "defences":
            self._seconds["defences"].append(result["wall_seconds"])
            self._seconds["attacks"] += [result["attack_seconds"] / max(1, result["attacks"])] * result["attacks"]
            self._best[key] = (result["accuracy"], result["leakage"], name)
            text = f"{name}: accuracy {100 * result['accuracy']:.1f} %, leakage {result['leakage']:.3f} so far"
        elif phase == "attacks":
            self._seconds["attacks"].append(result["attack_seconds"])
            objective = result["figures"]["attack"]["objective"]
            text = f"{name}: {objective} attack, SSIM {result['ssim']:.3f} on the tuning images"
            if key in self._best:
                accuracy, leakage, _ = self._best[key]
                self._best[key] = (accuracy, max(leakage, result["ssim"]), name)
        else:
            means = {f["attack"]["objective"]: sum(f["ssim"]) / len(f["ssim"]) for f in result["figures"]}
            values = ", ".join(f"{objective} {mean:.3f}" for objective, mean in means.items())
            text = f"{name}: SSIM on the evaluation images: {values}"
        self._line(phase, text)

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
        parts = [f"{self._done[phase]}/{self._totals[phase]} {WORDS[phase]}", text, self._best_so_far(), self._left()]
        self.say(" | ".join(part for part in parts if part))

    def _best_so_far(self) -> str:
        """The least leakage among the defences whose accuracy is within two points of the best."""
        if not self._best:
            return ""
        top = max(accuracy for accuracy, _, _ in self._best.values())
        accuracy, leakage, name = min(
            (best for best in self._best.values() if best[0] >= top - 0.02), key=lambda best: best[1]
        )
        return f"best so far {name} ({100 * accuracy:.1f} %, {leakage:.3f})"

    def _left(self) -> str:
        if not self._seconds["defences"]:
            return ""
        mean = {phase: sum(s) / len(s) if s else 0.0 for phase, s in self._seconds.items()}
        left = {phase: max(0, self._totals[phase] - self._done[phase]) for phase in PHASES}
        attacks = mean["attacks"] * (left["attacks"] + self._evaluation_cost * left["evaluation"]) / self._parallel
        return f"about {_clock(left['defences'] * mean['defences'] + attacks)} left"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
