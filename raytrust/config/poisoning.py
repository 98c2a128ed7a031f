"""Poisoning: what malicious workers do, by which rule the others take the gradients together, and what is compared."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

from raytrust.config.compressors import PowerSGDConfig, SignSGDConfig
from raytrust.config.defence import Defence
from raytrust.config.training import CaptureConfig, ModelConfig, TrainConfig
from raytrust.config.values import expect, expect_choices

Rule: TypeAlias = Literal["mean", "clip", "median", "trimmed", "krum", "multi-krum", "vote"]
"""How gradients of workers become one: see `raytrust.defend.robust`. The mean is the compressor's own, for signSGD its
vote."""

Images: TypeAlias = Literal["none", "labels", "badnets", "blended"]
Gradients: TypeAlias = Literal["none", "flip", "scale", "alie", "ipm", "aware"]
TRIGGERS: tuple[Images, ...] = ("badnets", "blended")


@dataclass(frozen=True)
class Poison:
    """What each malicious worker does: to its images, then to its gradient.

    data: "labels" gives every image the next label; "badnets" puts a white square into the corner of images and gives
        them the target label (Gu et al. 2017), "blended" mixes a random pattern in (Chen et al. 2017).
    gradient: "flip" negates; "scale" multiplies, by default so that the mean is the attacker's own (Bagdasaryan et al.
        2020); "alie" stays within some deviations of the honest gradients (Baruch et al. 2019); "ipm" sends their
        negative mean (Xie et al. 2020); "aware" puts all of its length into what the compressor lets through.
    strength: what a gradient attack multiplies by, of "alie" the deviations, of "aware" the length in lengths of honest
        gradients; 0 for the attack's own.
    share: of a malicious worker's images that get a trigger; the labels of all are changed by "labels".
    target: the label that a backdoor gives.
    """

    data: Images = "none"
    gradient: Gradients = "none"
    strength: float = 0.0
    share: float = 0.5
    target: int = 0

    def __post_init__(self) -> None:
        expect_choices(self)
        expect(0 <= self.strength < math.inf, "strength", self.strength, "to be at least 0 and finite")
        expect(0 < self.share <= 1, "share", self.share, "in (0, 1]")
        expect(self.target >= 0, "target", self.target, "to be at least 0")
        some = (self.data, self.gradient) != ("none", "none")
        expect(some, "data", self.data, "to be poisoned where the gradient is not")
        expect(self.gradient != "none" or not self.strength, "strength", self.strength, "to be of a gradient attack")

    @property
    def backdoor(self) -> bool:
        """Whether there is a trigger: without one, all the attacker wants is a worse model."""
        return self.data in TRIGGERS

    def strength_of(self, workers: int, malicious: int) -> float:
        """The strength, or the attack's own where none is given.

        That of "alie" is 1.5 as in the code of its authors: their formula is for many workers, and negative for 1 of 8.
        """
        own = {"scale": workers / max(1, malicious), "alie": 1.5, "ipm": 0.5}
        return self.strength or own.get(self.gradient, 1.0)

    @property
    def name(self) -> str:
        """Such as "badnets+scale:4", which `parse_poison` reads."""
        strength = f":{self.strength:g}" if self.strength else ""
        parts = [self.data, f"{self.gradient}{strength}"]
        return "+".join(part for part in parts if part != "none")


def parse_poison(text: str, share: float = 0.5, target: int = 0) -> Poison:
    """[DATA][+][GRADIENT[:STRENGTH]], such as "badnets", "ipm:0.1" or "blended+scale". Raises ValueError for others."""
    images, gradients = get_args(Images)[1:], get_args(Gradients)[1:]
    values: dict[str, str] = {}
    strength = 0.0
    for part in text.split("+"):
        name, colon, number = part.partition(":")
        place = "data" if name in images else "gradient"
        known = name in (*images, *gradients) and place not in values and "gradient" not in values
        try:
            strength = float(number) if colon else strength
            known = known and not (colon and place == "data")
        except ValueError:
            known = False
        if not known:
            raise ValueError(
                f"Expected attack={text!r} to be one of {', '.join(images)}, or [one of these and +] one of "
                f"{', '.join(gradients)}, with :STRENGTH behind it or without."
            )
        values[place] = name
    return Poison(**values, strength=strength, share=share, target=target)  # type: ignore[arg-type]


def check_rule(rule: Rule, workers: int, malicious: int) -> None:
    """Raises ValueError where a rule promises nothing against so many malicious workers, or has too few others."""
    if rule == "mean":
        return
    expect(2 * malicious < workers, "malicious", malicious, f"to be fewer than half of the {workers} workers")
    # Krum's n >= 2 f + 3 (Blanchard et al. 2017).
    if rule in ("krum", "multi-krum"):
        least = 2 * malicious + 3
        expect(workers >= least, "workers", workers, f"to be at least {least} for {rule} against {malicious} malicious")


@dataclass(frozen=True)
class PoisonedTraining:
    """One training of which some workers are malicious; the last ones, so that worker 0 is honest.

    attack: what these do from step `begin` on and before step `end`; None for the control, where they are honest.
    malicious: how many; the rule is told their number in the control, too.
    target: of which label a backdoor's success is measured where there is none.
    """

    train: TrainConfig
    attack: Poison | None
    malicious: int
    rule: Rule
    begin: int
    end: int
    target: int = 0


def _training() -> TrainConfig:
    model = ModelConfig("convnet", width=16)
    return TrainConfig(model=model, capture=CaptureConfig((0,), 1, 1), workers=4, batch_size=16)


@dataclass(frozen=True)
class PoisoningConfig:
    """Every attack on every defence, under every rule, by each number of malicious workers among all.

    train: the model and its training; steps that are signs alone take `sign_learning_rate`.
    defences: compressors, with transforms and error feedback or without; none comes first.
    attacks: what malicious workers do; all backdoors have one target.
    rules: how the gradients of workers become one.
    workers: how many train together.
    malicious: how many of them are.
    seeds: of trainings, which are repeated with each.
    begin: the first step of the attack.
    end: the step at which the attackers turn honest; what stays of a backdoor is measured after the last step.
    sign_learning_rate: the peak where a step is made of signs alone: of signSGD, and under the rule vote.
    """

    train: TrainConfig = field(default_factory=_training)
    defences: tuple[Defence, ...] = (Defence(), Defence(PowerSGDConfig(4), error_feedback=True))
    attacks: tuple[Poison, ...] = (Poison("badnets"), Poison(gradient="ipm"))
    rules: tuple[Rule, ...] = ("mean",)
    workers: tuple[int, ...] = (4,)
    malicious: tuple[int, ...] = (1,)
    seeds: tuple[int, ...] = (0,)
    begin: int = 0
    end: int = 150
    sign_learning_rate: float = 0.001

    def __post_init__(self) -> None:
        for name, least in (("workers", 2), ("malicious", 1), ("seeds", 0)):
            value = getattr(self, name)
            expect(len(value) > 0 and min(value, default=0) >= least, name, value, f"to be numbers from {least} on")
        rules = get_args(Rule)
        expect(
            len(self.rules) > 0 and {*self.rules} <= {*rules}, "rules", self.rules, f"to be among {', '.join(rules)}"
        )
        for name in ("defences", "attacks", "rules", "workers", "malicious", "seeds"):
            value = getattr(self, name)
            expect(len(set(value)) == len(value), name, value, "to hold each once")
        expect(self.defences[:1] == (Defence(),), "defences", self.defences, "to begin with none")
        expect(len(self.attacks) > 0, "attacks", self.attacks, "to hold at least one")
        targets = {attack.target for attack in self.attacks}
        expect(len(targets) == 1, "attacks", self.attacks, "to have one target")
        most, least = max(self.malicious), min(self.workers)
        expect(2 * most < least, "malicious", most, f"to be fewer than half of workers={least}")
        # Deviations of the honest are what it hides in.
        alone = least - most < 2 and any(attack.gradient == "alie" for attack in self.attacks)
        expect(not alone, "workers", least, "to leave at least 2 honest ones for the attack alie")
        positive = 0 < self.sign_learning_rate < math.inf
        expect(positive, "sign_learning_rate", self.sign_learning_rate, "to be positive and finite")
        within = f"to be after begin={self.begin}, and at most steps={self.train.steps}"
        expect(self.begin >= 0, "begin", self.begin, "to be at least 0")
        expect(self.begin < self.end <= self.train.steps, "end", self.end, within)
        for defence in self.defences:
            replace(self.train, defence=defence)  # for what it refuses

    @property
    def target(self) -> int:
        return self.attacks[0].target

    def training(
        self, defence: Defence, rule: Rule, workers: int, malicious: int, attack: Poison | None, seed: int
    ) -> PoisonedTraining:
        """Raises ValueError where the rule has no place."""
        check_rule(rule, workers, malicious)
        signs = rule == "vote" or (isinstance(defence.compressor, SignSGDConfig) and rule in ("mean", "median"))
        rate = self.sign_learning_rate if signs else self.train.learning_rate
        train = replace(self.train, defence=defence, workers=workers, seed=seed, learning_rate=rate)
        return PoisonedTraining(train, attack, malicious, rule, self.begin, self.end, self.target)
