"""What the terminal shows of a sweep. No defence is called the best: before all attacks are made, the one that leaks
least is the one that was attacked worst."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TextIO

from raytrust.jobs.progress import Progress
from raytrust.metrics.verdict import floor_of_images

WORDS = {"defences": "defences trained", "attacks": "attacks tuned", "evaluation": "defences evaluated"}


class FrontierProgress(Progress):
    """Prints a line whenever something finishes.

    totals: how many items each phase has. evaluation_cost: how long an evaluation takes compared with an attack of the
    search.
    """

    def __init__(
        self, totals: dict[str, int], parallel: int, evaluation_cost: float, stream: TextIO | None = None
    ) -> None:
        super().__init__(parallel, stream=stream)
        self._evaluation_cost = evaluation_cost
        self._accuracy: dict[str, float] = {}
        for phase, count in totals.items():
            self.expect(phase, count, count)

    def finished(self, phase: str, key: str, result: dict[str, Any]) -> None:
        name = self.end(phase, key)
        if phase == "defences":
            self.measure(phase, result["wall_seconds"])
            # The audit's own attacks tell how long one takes before the search has made any.
            self.measure("attacks", result["attack_seconds"], result["attacks"])
            # The later phases report on the defence without knowing its training.
            self._accuracy[key] = result["accuracy"]
            text = f"SSIM {result['leakage']:.2f} on the tuning images{_floor_text(result.get('floor'))}"
        elif phase == "attacks":
            self.measure(phase, result["attack_seconds"])
            figures = result["figures"]
            objective, floor = figures["attack"]["objective"], _floor_text(_floor([figures]))
            text = f"{objective} attack, SSIM {result['ssim']:.2f} on the tuning images{floor}"
        else:
            means = {f["attack"]["objective"]: sum(f["ssim"]) / len(f["ssim"]) for f in result["figures"]}
            values = ", ".join(f"{objective} {mean:.2f}" for objective, mean in means.items())
            text = f"SSIM {values or '-'} on the evaluation images{_floor_text(_floor(result['figures']))}"
        accuracy = f"accuracy {100 * self._accuracy[key]:.0f} %, " if key in self._accuracy else ""
        self.line(phase, f"{name}: {accuracy}{text}")

    def counted(self, phase: str) -> str:
        return super().counted(phase).removesuffix(phase) + WORDS[phase]

    def seconds_left(self) -> float | None:
        """Defences are trained one after another, attacks `parallel` at once."""
        # Before a defence is finished there is no rate, and a guess would mislead.
        if (defence := self.rate("defences")) is None:
            return None
        attacks = self._count["attacks"] + self._evaluation_cost * self._count["evaluation"]
        return self._count["defences"] * defence + attacks * (self.rate("attacks") or 0.0) / self.parallel


def _floor(figures: Sequence[dict[str, Any]]) -> float | None:
    """What is reached on the attacked images without any attack, if it was measured; the same for all attacks."""
    # The floor belongs to the images, so that whichever attack has it will do.
    for of_one in figures:
        floor = floor_of_images(of_one.get("mean_image_ssim"), of_one.get("other_image_ssim"))
        if floor is not None:
            return sum(floor) / len(floor)
    return None


def _floor_text(floor: float | None) -> str:
    return "" if floor is None else f" (floor {floor:.2f})"
