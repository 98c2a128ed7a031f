"""Settings of the attacks, and the attacks of the field as such settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Literal, TypeAlias

from raytrust.config.compressors import DGCConfig, QSGDConfig, ScaledSignConfig, SignSGDConfig, VqSGDConfig
from raytrust.config.defence import Defence
from raytrust.config.register import ATTACKS, OBJECTIVES
from raytrust.config.training import LocalConfig, Threat
from raytrust.config.values import ADDED, expect, expect_choices

Through: TypeAlias = Literal["steps", "surrogate", "gradient"]


@dataclass(frozen=True)
class InversionConfig:
    """Gradient inversion: minimise matching distance + priors over the private images, or solve for them.

    The defaults are the strongest settings that we know for a few hundred iterations: long steps by soft signs along a
    cosine, chosen on images and data sets other than those reported (docs/findings.md). The attacks of the field, as
    published, are constants of this module.

    objective: "naive" takes the decoded gradient for the whole gradient, as published attacks do; "aware" compares only
        what the compressor let through (`View.distance`).
    tv: weight of the mean absolute difference of neighbouring pixels, in normalised pixel units.
    step_size: in normalised pixel units for Adam; the learning rate of L-BFGS.
    iterations: steps of the optimiser.
    restarts: independent random starts, run as one batch; the one with the least objective is returned.
    signed: what the optimiser is fed: the gradient ("none"), its sign ("hard"), or tanh(s u) / s ("soft") of the
        gradient u in units of its mean magnitude, where s falls from 1 to 0 over the iterations.
    capture_step: the training step whose messages are attacked.
    seed: of the starts.
    method: "optimise" looks for the images; "analytic" solves for the input of a linear first layer (Phong et al. 2018;
        of several images, before a ReLU, Dimitrov et al. 2024) or of a patch embedding (Lu et al. 2022) and heeds no
        other setting but `objective` and `residual`; "regression" makes images of the last layer's input, which the
        classifier's gradient gives away, by a linear map that is fitted to auxiliary images, and heeds but `denoise`;
        or an attack that is registered.
    matching: the distance on decoded gradients and on linear views: 1 - cosine of the whole, or of each tensor by
        itself and averaged by their entries ("tensors"), relative squared L2 or relative L1; or an objective that is
        registered. Signs and quantised gradients are compared tensor by tensor in any case, and know no other than
        "cosine" and "tensors", which are one there.
    optimiser: Adam, or L-BFGS without line search.
    bound: weight of the excess of entries that sparsification left out over the smallest that it sent, for "aware"
        (`SparseView.excess`).
    schedule: the step size falls by 10 after 3/8, 5/8 and 7/8 of the iterations, along half a cosine, or not at all.
    warmup: iterations over which the step size rises linearly first.
    l2: weight of the mean square of the pixels (this and the next are in `raytrust.attacks.inversion.priors`).
    colour: weight of the difference between colour channels.
    bn: weight of the distance from what batch norm knows of the features.
    group: weight of the distance of each restart from the mean of all.
    label_recovery: how labels are found where the threat withholds them: by one of `attacks.inversion.labels`, or as
        soft labels that are optimised with the images ("joint", Zhu et al. 2019). Granted labels are used as they are.
    precision: of the passes through the model; sums and distances are in float32. Soft labels and models without a
        fast path are float32 throughout.
    residual: of earlier steps, which error feedback and DGC add to what is sent. "ignore" compares all measurements
        with the gradient; "avoid" only those that are free of it, and "weigh" all, older ones less, which takes
        `Threat.history` (`raytrust.leak.history`). Without effect for "naive", and where the messages hold none.
    through: how several local steps of the victim are met (`LocalConfig`): "steps" simulates them from the candidate
        images, and is exact; "surrogate" takes what was sent for one gradient midway between the weights before and
        after (Zhu, Yao & Blaschko 2023), for many steps; "gradient" for one gradient at the weights before, as
        published attacks on one step do. Without effect on one step, and for other methods than "optimise". Nobody can
        simulate DP-SGD's noise: its steps are simulated as if they had none, nor been clipped.
    halving: whether, after 1/8, 1/4 and 1/2 of the iterations, the worse half of the restarts is retired.
    start: where the first restart begins: normal noise, or what the "regression" arrives at; the others at noise.
    denoise: the standard deviation, in units of the range of pixels, of noise that is taken out of what the attack
        arrived at, by a network that is trained on auxiliary images (Yue et al. 2023); 0 for none.
    """

    objective: Literal["naive", "aware"] = "aware"
    # Published programs of what they call the same attack differ by up to five orders of magnitude here.
    tv: float = 1e-2
    # The published 0.1 is too short for a few hundred iterations. 2 is better on digits, but worse than 1 on CIFAR-10.
    step_size: float = 1.0
    iterations: int = 400
    restarts: int = 1
    # With the cosine schedule below 0.212 SSIM, where hard signs and the step schedule had 0.151 (docs/findings.md).
    signed: Literal["none", "hard", "soft"] = "soft"
    capture_step: int = 0
    seed: int = 0
    method: Annotated[str, ATTACKS] = "optimise"
    # Which of "cosine" and "tensors" is stronger depends on the data and network: tensors on digits, the cosine of the
    # whole for PowerSGD on CIFAR-10. So the sweep's portfolio has both.
    matching: Annotated[str, OBJECTIVES] = "cosine"
    optimiser: Literal["adam", "lbfgs"] = "adam"
    schedule: Literal["steps", "cosine", "constant"] = "cosine"
    warmup: int = 0
    # A negative result: on Top-K 0.195 SSIM without it, 0.175 with weight 1, 0.063 with weight 10.
    bound: float = 0.0
    l2: float = 0.0
    colour: float = 0.0
    bn: float = 0.0
    group: float = 0.0
    label_recovery: Literal["counts", "bias_sign", "idlg", "joint"] = "counts"
    halving: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    # Avoiding lost everywhere, by eight to forty times fewer measurements, and weighing pays only where the training
    # batches are as small as the private one.
    residual: Literal["ignore", "avoid", "weigh"] = "ignore"
    through: Through = field(default="steps", metadata=ADDED)
    start: Literal["noise", "regression"] = field(default="noise", metadata=ADDED)
    denoise: float = field(default=0.0, metadata=ADDED)

    def __post_init__(self) -> None:
        expect_choices(self)
        for name in ("tv", "bound", "l2", "colour", "bn", "group"):
            weight = getattr(self, name)
            expect(0 <= weight < math.inf, name, weight, "to be at least 0 and finite")
        expect(0 <= self.denoise <= 1, "denoise", self.denoise, "in [0, 1], a share of the range of pixels")
        expect(0 < self.step_size < math.inf, "step_size", self.step_size, "to be positive and finite")
        expect(self.iterations >= 1, "iterations", self.iterations, "to be at least 1")
        expect(self.restarts >= 1, "restarts", self.restarts, "to be at least 1")
        expect(self.capture_step >= 0, "capture_step", self.capture_step, "to be at least 0")
        expect(0 <= self.seed < 2**31, "seed", self.seed, "in [0, 2**31)")
        expect(self.warmup >= 0, "warmup", self.warmup, "to be at least 0")

    @property
    def name(self) -> str:
        """A short name for tables, such as "aware tv=0.01 lr=0.1 r=2 s=0"; further settings if they aren't default."""
        name = f"{self.objective} tv={self.tv:.2g} lr={self.step_size:.2g} r={self.restarts} s={self.capture_step}"
        names = [f.name for f in fields(self)]
        for setting in fields(self)[names.index("method") :]:
            value = getattr(self, setting.name)
            if value != setting.default:
                text = value if isinstance(value, str) else f"{value:.2g}"
                # A method may have the name of a start.
                name += f" {text}" if isinstance(value, str) and setting.name != "start" else f" {setting.name}={text}"
        return name

    @property
    def learns(self) -> bool:
        """Whether it takes auxiliary images to learn from."""
        return "regression" in (self.method, self.start) or self.denoise > 0

    def passes(self, local: LocalConfig) -> int:
        """Passes through the network there and back, of one batch that was sent after such local steps."""
        if self.method == "regression":
            return 1  # it iterates nothing
        return self.iterations * self.restarts * (local.steps if self.through == "steps" else 1)

    def against(self, defence: Defence) -> InversionConfig:
        """This attack as it applies to a defence: where all is sent the two objectives are one, called naive; what has
        no effect is set to its default."""
        # One attack under two names would be run twice, and would stand in a table as two.
        attack = replace(self, objective="naive") if defence.shows_all else self
        # Whoever knows these compressors compares tensor by tensor in any case: see `matching`.
        by_tensor = (SignSGDConfig, ScaledSignConfig, QSGDConfig, VqSGDConfig)
        if self.method == "analytic":
            # They are no linear view, either: what they decode to is all that can be solved for.
            objective = "naive" if isinstance(defence.compressor, by_tensor) else attack.objective
            kept = {name: getattr(self, name) for name in ("capture_step", "iterations", "seed", "residual")}
            attack = replace(ANALYTIC, objective=objective, **kept)
        if self.method == "regression":
            # Of what messages decode to, whoever sent them.
            kept = {name: getattr(self, name) for name in ("capture_step", "iterations", "seed", "denoise")}
            attack = replace(REGRESSION, **kept)
        if attack.objective == "aware" and attack.matching == "tensors" and isinstance(defence.compressor, by_tensor):
            attack = replace(attack, matching="cosine")
        remembers = defence.error_feedback or isinstance(defence.compressor, DGCConfig)
        return attack if attack.objective == "aware" and remembers else replace(attack, residual="ignore")


# Through noise a prior does what more data would: at a deviation of 0.01 the SSIM of digits is 0.08 with the weight
# that is best without noise, and 0.42 with ten times that (docs/findings.md).
PRIORS_THROUGH_NOISE = (3, 10, 30)


def against_each(
    attacks: Iterable[InversionConfig], defence: Defence, compared: Iterable[Defence] = ()
) -> list[InversionConfig]:
    """The attacks as they apply to a defence, each once; where it adds noise, those that know it also with a heavier
    weight of total variation.

    All that are compared meet them: an attack that is tried on one defence alone would make the others look better.
    Where there is no noise to know of, both objectives do, or what a compressor hides from the ignorant would be less.
    """
    applied = [attack.against(defence) for attack in attacks]
    if any(d.noisy for d in (defence, *compared)):
        applied += through_noise(applied, ("aware",) if defence.noisy else ("naive", "aware"))
    return list(dict.fromkeys(applied))


def through_noise(attacks: Iterable[InversionConfig], objectives: Sequence[str]) -> list[InversionConfig]:
    """Of the attacks by the cosine of these objectives, those with a heavier weight of total variation."""
    known = [a for a in attacks if (a.method, a.matching) == ("optimise", "cosine") and a.objective in objectives]
    return [replace(a, tv=a.tv * by) for a in known if a.tv > 0 for by in PRIORS_THROUGH_NOISE]


GEIPING = InversionConfig("naive", step_size=0.1, signed="hard", schedule="steps")
"""Geiping et al. 2020, with the published step schedule; the weight of TV and the iterations vary between programs."""

MODERN = InversionConfig(
    "naive", tv=0.1, step_size=0.1, colour=0.1, iterations=24000, signed="soft", schedule="cosine", warmup=50
)
"""Geiping's attack as the library `breaching` tunes it (its "modern" configuration)."""

DLG = InversionConfig(
    "naive",
    tv=0.0,
    step_size=1.0,
    iterations=300,
    signed="none",
    matching="l2",
    optimiser="lbfgs",
    schedule="constant",
    label_recovery="joint",
)
"""Deep Leakage from Gradients (Zhu et al. 2019), Algorithm 1. Our candidates stay in the box of valid pixels."""

IDLG = replace(DLG, label_recovery="idlg")
"""Improved DLG (Zhao et al. 2020): the label first, from the sign of the classifier's gradient; batches of one."""

GRAD_INVERSION = InversionConfig(
    "naive",
    tv=1e-4,
    step_size=0.1,
    restarts=8,
    signed="none",
    matching="l2",
    schedule="cosine",
    warmup=50,
    l2=1e-6,
    bn=0.1,
    group=0.01,
    label_recovery="bias_sign",
)
"""See through Gradients (Yin et al. 2021), eq. 1, with the published weights of the priors; as our terms are means and
relative, they don't weigh the same. Ours has no Langevin noise, and takes the pixel-wise mean of the group, without
registration."""

ANALYTIC = InversionConfig("naive", method="analytic")
"""Phong et al. 2018 (Aono et al.), section 3: exact for one image and a linear first layer with bias. Lu et al. 2022
("APRIL"): and for a patch embedding with a learned position embedding. Which models these are, says
`raytrust.attacks.inversion.closed_form`."""


REGRESSION = InversionConfig("naive", method="regression")
"""After Xue et al. 2024 (FGLA), who train a generator from the features that the classifier's gradient gives away to
the images: a linear map in its place. See `raytrust.attacks.inversion.regression`."""


NAMED = {
    "geiping": GEIPING,
    "modern": MODERN,
    "dlg": DLG,
    "idlg": IDLG,
    "gradinversion": GRAD_INVERSION,
    "analytic": ANALYTIC,
    "regression": REGRESSION,
}
"""The attacks of the field by the names that command lines know."""


# An iteration takes as many passes as there are steps to simulate, where a surrogate takes one.
MOST_SIMULATED = 5


def ways_through(local: LocalConfig, images: int, labels_known: bool = True) -> tuple[Through, ...]:
    """The values of `InversionConfig.through` that are worth a try on private batches of so many images.

    They begin with the strongest. Of one step there is one, as all are one attack.
    """
    if local.steps == 1:
        return ("steps",)
    simulated = local.steps <= MOST_SIMULATED and (labels_known or not local.parts(images))
    return ("steps", "surrogate", "gradient") if simulated else ("surrogate", "gradient")


def through_local_steps(
    attacks: Sequence[InversionConfig], local: LocalConfig, images: int, labels_known: bool = True
) -> tuple[InversionConfig, ...]:
    """These attacks in each way through local steps; one gradient by the first distance alone.

    Attacks that are not by optimisation are kept as they are.
    """
    ways = ways_through(local, images, labels_known)
    searching = [attack for attack in attacks if attack.method == "optimise"]
    first = searching[0].matching if searching else ""
    tried = [replace(a, through=w) for w in ways for a in searching if w != "gradient" or a.matching == first]
    return (*(attack for attack in attacks if attack.method != "optimise"), *tried)


PUBLISHED = "published"


def published_attacks(threat: Threat) -> tuple[InversionConfig, ...]:
    """The attacks of the field by optimisation, as far as this threat tells them apart.

    Where labels are known, iDLG is DLG; of a batch it finds none. The prior of GradInversion on batch-norm statistics
    is left out unless the threat tells of these: an untrained model has none but initial ones.
    """
    names = ["geiping", "modern", "dlg", "gradinversion"]
    if threat.labels == "unknown" and threat.batch_size == 1:
        names.append("idlg")
    found = {name: NAMED[name] for name in names}
    if threat.batch_statistics == "unknown":
        found["gradinversion"] = replace(GRAD_INVERSION, bn=0.0)
    return tuple(found.values())


def named_attack(name: str) -> InversionConfig:
    """An attack of the field, or one that is registered, with the default settings.

    Raises ValueError for an unknown name.
    """
    if name not in NAMED and name not in ATTACKS:
        known = ", ".join(map(repr, dict.fromkeys([*NAMED, *ATTACKS])))
        raise ValueError(f"Expected attack={name!r} to be one of {known}.")
    return NAMED.get(name) or InversionConfig("naive", method=name)
