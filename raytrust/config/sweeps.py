"""A search over defences and attacks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from raytrust.config.attacks import InversionConfig, against_each
from raytrust.config.defence import Defence
from raytrust.config.training import TrainConfig
from raytrust.config.values import expect


@dataclass(frozen=True)
class SweepConfig:
    """A search over defences and, for each of them, over attacks.

    train: what all defences share; its own `defence` is ignored. defences: audited first, in this order; `trials`
    counts all defences, and those beyond the list are chosen by the search. portfolio: attacks that every defence meets
    in the outer search. attack_trials: further attacks the inner search tries on each defence. bytes_objective: whether
    the outer search also minimises bytes per step.
    """

    name: str = "sweep"
    train: TrainConfig = field(default_factory=TrainConfig)
    defences: tuple[Defence, ...] = (Defence(),)
    trials: int = 1
    portfolio: tuple[InversionConfig, ...] = (InversionConfig(),)
    attack_trials: int = 0
    bytes_objective: bool = False

    def __post_init__(self) -> None:
        expect(self.trials >= 1, "trials", self.trials, "to be at least 1")
        expect(len(self.portfolio) >= 1, "portfolio", self.portfolio, "to hold at least one attack")
        expect(self.attack_trials >= 0, "attack_trials", self.attack_trials, "to be at least 0")
        expect(len(set(self.defences)) == len(self.defences), "defences", self.defences, "to differ from each other")
        for defence in self.defences:
            # For what it refuses: not each network can be trained with each defence.
            replace(self.train, defence=defence)
        # Tables and plots know a defence by its name alone.
        names = [defence.name for defence in self.defences]
        expect(len(set(names)) == len(names), "defences", names, "to have names that tell them apart")
        for attack in self.portfolio:
            # Refused here, as the attack would else find no messages once training, which takes minutes, is over.
            steps = self.train.capture.steps
            expect(attack.capture_step in steps, "capture_step", attack.capture_step, f"to be a captured step {steps}")
            granted, least = self.train.threat.auxiliary, max(2, self.train.threat.batch_size)
            enough = f"to be at least {least} for attack={attack.name!r}"
            expect(granted >= least or not attack.learns, "auxiliary", granted, enough)
            one, local = "regression" in (attack.method, attack.start), self.train.local.steps
            expect(local == 1 or not one, "local_steps", local, f"to be 1 for attack={attack.name!r}")

    def portfolio_against(self, defence: Defence) -> list[InversionConfig]:
        """The attacks of the portfolio as they apply to a defence, each once."""
        return against_each(self.portfolio, defence, self.defences)
