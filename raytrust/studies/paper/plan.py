"""What is tried: victims, attacks on them, and the budgets that say how many of each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

from raytrust.config import CaptureConfig, Defence, InversionConfig, MembershipConfig, ModelConfig, Threat, TrainConfig
from raytrust.config.attacks import GEIPING
from raytrust.config.values import expect, expect_choices
from raytrust.studies.published import CELLS, defence_of

# The 0.1 of all published programs is too short for attacks of a few hundred iterations (docs/findings.md). In units of
# the normalised pixels, of which a box is about 4 wide.
STRONG_STEP = 0.8


@dataclass(frozen=True)
class Victim:
    """The model whose gradient is attacked, as far as the paper leaves it open: a ResNet-18.

    steps: of training behind its weights; 0 is the untrained model. of: how long that training is in all, to which the
    learning rate is fitted; 0 for the untrained model.
    """

    stem: Literal["cifar", "imagenet"] = "cifar"
    batch_norm: Literal["eval", "train"] = "eval"
    steps: int = 0
    of: int = 0
    width: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        expect_choices(self)
        expect(0 <= self.steps <= self.of, "steps", self.steps, f"in [0, of={self.of}]")

    @property
    def name(self) -> str:
        state = "untrained" if self.steps == 0 else f"trained for {self.steps} steps"
        return f"{self.stem} stem, width {self.width}, {state}, batch norm in {self.batch_norm} mode"

    def train_config(self, defence: Defence | None = None) -> TrainConfig:
        """What decides a capture of a single image at this victim."""
        return TrainConfig(
            defence=defence or Defence(),
            model=ModelConfig("resnet18", stem=self.stem, width=self.width),
            threat=Threat(batch_norm=self.batch_norm),
            workers=1,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Setting:
    """A victim and the attack on it: what table 1 of the paper leaves open."""

    victim: Victim = field(default_factory=Victim)
    attack: InversionConfig = GEIPING

    @property
    def name(self) -> str:
        return f"{self.victim.name}; {attack_name(self.attack)}"


def attack_name(attack: InversionConfig) -> str:
    restarts = "1 restart" if attack.restarts == 1 else f"{attack.restarts} restarts"
    return (
        f"{attack.objective}, TV {attack.tv:g}, {restarts} of {attack.iterations} iterations, {attack.signed} sign, "
        f"step {attack.step_size:g}, {attack.schedule} schedule, {attack.precision}"
    )


@dataclass(frozen=True)
class Budget:
    """How much is tried.

    The search for the paper's setting takes every combination of `stems`, `norms`, `states`, `tvs`, `iterations` and
    `restarts`, with the attack as it was published and with the strong one; of victims that are trained or have batch
    norm in training mode only the longest, with `search_tvs`.

    name: of the budget.
    images: evaluated in each cell.
    tuning: other images, on which settings are chosen.
    chunk: images of a unit of work.
    iterations: lengths of the attack that are searched.
    tuning_iterations: the length of the search for the worst case.
    restarts: numbers of restarts that are searched.
    stems: of ResNet-18 that are searched.
    norms: modes of batch norm that are searched.
    states: steps of training behind the weights that are searched.
    tvs: TV weights that are searched.
    search_tvs: TV weights that are searched for victims that are trained or have batch norm in training mode.
    portfolio: TV weights of the strong attacks that are tried for the worst case, beside the one that was best without
        compression.
    training: steps of the training run from which the states are taken.
    batch_size: images of a step of that run.
    width: of the network.
    precision: of the passes through the model.
    theory_steps: when section 3 is tested.
    theory_width: of the network that section 3 is tested on.
    theory_images: on how many images section 3 is tested.
    theory_iterations: of the attacks that section 3 is tested with.
    membership: options of `MembershipConfig` and its training, for table 2.
    """

    name: str
    images: int
    tuning: int
    chunk: int
    iterations: tuple[int, ...]
    tuning_iterations: int
    restarts: tuple[int, ...] = (1,)
    stems: tuple[Literal["cifar", "imagenet"], ...] = ("imagenet", "cifar")
    norms: tuple[Literal["eval", "train"], ...] = ("eval", "train")
    states: tuple[int, ...] = (0,)
    tvs: tuple[float, ...] = (1e-1, 1e-2, 1e-4)
    search_tvs: tuple[float, ...] = (1e-2,)
    portfolio: tuple[float, ...] = (1e-1, 1e-2)
    training: int = 0
    batch_size: int = 64
    width: int = 64
    # Passes in bfloat16 cost about half, and short attacks reached the same SSIM with them (docs/findings.md).
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    theory_steps: tuple[int, ...] = (0, 50, 199)
    theory_width: int = 16
    theory_images: int = 2
    theory_iterations: int = 100
    # Left out of the hash, as a dict has none.
    membership: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        expect_choices(self)
        for name in ("images", "tuning"):
            expect(getattr(self, name) >= 2, name, getattr(self, name), "to be at least 2, for an interval")
        expect(max(self.states) <= self.training, "states", self.states, f"to be at most training={self.training}")

    def search(self, seed: int) -> list[Setting]:
        """Every setting that is tried for the paper's, without a compressor, each once: the published attack first.

        Without batch norm in training mode behind torchvision's stem: of one image of up to 32x32 pixels it leaves one
        value a channel, which has no variance.
        """
        found = []
        for attack, stem, state, norm, tv, iterations, restarts in product(
            (self.attack, self.strong_attack),
            *(self.stems, self.states, self.norms, self.tvs, self.iterations, self.restarts),
        ):
            if (stem, norm) == ("imagenet", "train"):
                continue
            # Every combination with trained victims and both modes of batch norm would multiply the search.
            plain = state == 0 and norm == "eval"
            if not plain and (tv not in self.search_tvs or iterations != max(self.iterations)):
                continue
            victim = Victim(stem, norm, state, self.training if state else 0, self.width, seed)
            found.append(Setting(victim, attack(tv, iterations, restarts, seed)))
        return found

    def attack(self, tv: float, iterations: int, restarts: int, seed: int) -> InversionConfig:
        """The attack of Geiping et al. 2020."""
        return replace(GEIPING, tv=tv, iterations=iterations, restarts=restarts, seed=seed, precision=self.precision)

    def strong_attack(self, tv: float, iterations: int, restarts: int, seed: int) -> InversionConfig:
        """The same objective, better minimised: by soft signs, long steps and the cosine schedule, which were chosen on
        the test images 100 to 103 of CIFAR-10 (docs/findings.md): up to 100 images are evaluated without meeting them.
        """
        attack = self.attack(tv, iterations, restarts, seed)
        return replace(attack, step_size=STRONG_STEP, signed="soft", schedule="cosine")

    def membership_config(self, seed: int, images: int) -> MembershipConfig:
        """The audit behind table 2: all defences with error feedback, as the paper describes them.

        images: for training. Where there are fewer than the budget's points, all of them are points, and what else is
        counted in points shrinks in proportion.
        """
        most = self.membership["points"]
        points = min(most, images)
        counts = {name: self.membership[name] * points // most for name in ("mislabelled", "duplicates", "guesses")}
        options = self.membership | counts | {"points": points}
        names = ("model", "width", "steps", "learning_rate", "batch_size")
        train = {name: options.pop(name) for name in names}
        return MembershipConfig(
            name="paper tables",
            train=TrainConfig(
                model=ModelConfig(train.pop("model"), width=train.pop("width")),
                threat=Threat(batch_size=8),
                capture=CaptureConfig((0,), tuning=1, evaluation=1),
                workers=1,
                seed=seed,
                **train,
            ),
            defences=tuple(defence_of(cell, error_feedback=cell[0] != "none") for cell in CELLS),
            # The paper does not speak of property inference, which would add models to train.
            property_models=0,
            **options,
        )


# The audits of table 2. Intervals are over models, so that a larger budget has more of them, trained for longer.
_TINY = dict(model="convnet", width=2, steps=4, learning_rate=0.05, batch_size=8, models=4, points=120, mislabelled=4,
             duplicates=4, guesses=20)  # fmt: skip
_QUICK = dict(model="convnet", width=16, steps=300, learning_rate=0.05, batch_size=32, models=4, points=2000,
              mislabelled=50, duplicates=50, guesses=200)  # fmt: skip
_STANDARD = _QUICK | dict(steps=600, models=8)
_FULL = dict(model="resnet18", width=64, steps=8000, learning_rate=0.1, batch_size=128, models=16, points=20000,
             mislabelled=500, duplicates=500, guesses=1000)  # fmt: skip
BUDGETS = {
    # To see that everything works: its figures say nothing.
    "tiny": Budget(
        "tiny", images=2, tuning=2, chunk=2, iterations=(3,), tuning_iterations=2, tvs=(1e-2,), portfolio=(1e-2,),
        width=4, states=(0, 2), training=2, batch_size=8, norms=("eval",), theory_steps=(0, 1), theory_width=4,
        theory_images=1, theory_iterations=2, precision="float32", membership=_TINY,
    ),
    "quick": Budget(
        "quick", images=3, tuning=2, chunk=3, iterations=(100,), tuning_iterations=40, states=(0, 60), training=60,
        portfolio=(1e-2,), theory_steps=(0, 199), theory_iterations=60, membership=_QUICK,
    ),
    "standard": Budget(
        "standard", images=10, tuning=4, chunk=5, iterations=(100, 300), tuning_iterations=100, states=(0, 400),
        training=400, portfolio=(1e-1, 1e-2, 1e-3), theory_steps=(0, 100, 399), theory_width=32, theory_images=4,
        theory_iterations=200, membership=_STANDARD,
    ),
    # In float32, although it takes longer: the derivative in bfloat16 is off by about a fifth (docs/findings.md), which
    # the figures of record are spared.
    "full": Budget(
        "full", images=10, tuning=10, chunk=5, iterations=(300, 4800), restarts=(1, 4), tuning_iterations=1000,
        states=(0, 400, 4000), training=4000, search_tvs=(1e-1, 1e-2, 1e-4), portfolio=(1e-1, 1e-2, 1e-3, 1e-4),
        theory_steps=(0, 400, 3999), theory_width=64, theory_images=10, theory_iterations=1000,
        precision="float32", membership=_FULL,
    ),
}  # fmt: skip
