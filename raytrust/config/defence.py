"""`Defence`: what a worker does to its gradient before it crosses the wire."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from raytrust.config.compressors import DenseConfig, ScaledSignConfig
from raytrust.config.method import CompressorConfig, TransformConfig
from raytrust.config.register import COMPRESSORS, TRANSFORMS
from raytrust.config.transforms import ClipConfig, DPSGDConfig, MixupConfig, NoiseConfig, transform_types
from raytrust.config.values import ADDED, expect


def compressor_types() -> tuple[type, ...]:
    """The types that `Defence` takes for its compressor: of every method that is registered."""
    return tuple(COMPRESSORS[method] for method in COMPRESSORS)


@dataclass(frozen=True)
class Defence:
    """What stands between the private gradient and the wire: transforms, then a compressor, with or without error
    feedback.

    transforms: what is done to a worker's gradient before it is compressed, in this order. Error feedback goes around
    the compressor alone: what a transform took away does not come back. What is of the images and not of the worker's
    gradient, such as DP-SGD, which clips that of each image, comes first, and there is no more than one such.

    Refused with error feedback: DGC and Signum, which have a memory of their own, and unbiased Rand-K, whose residual
    would grow without bound. So does that of other unbiased methods whose error exceeds the gradient: ATOMO, vqSGD, and
    QSGD with the L2 norm and fewer levels than the square root of its bucket. They are for use without. Refused, too,
    is what is no config of a method, such as its name: `parse_defence` makes a `Defence` of text.

    start_step: how many steps of a training send the whole gradient before the compressor begins, as torch's
        `start_powerSGD_iter` does. It does not protect these steps; transforms do, from the first on.
    """

    compressor: Annotated[CompressorConfig, COMPRESSORS] = field(default_factory=DenseConfig)
    error_feedback: bool = False
    start_step: int = field(default=0, metadata=ADDED)
    transforms: tuple[Annotated[TransformConfig, TRANSFORMS], ...] = field(default=(), metadata=ADDED)

    def __post_init__(self) -> None:
        # The exact type: a subclass with options of its own would be built, hashed and saved as if it had none.
        types = compressor_types()
        names = ", ".join(sorted(kind.__name__ for kind in types))
        expect(type(self.compressor) in types, "compressor", self.compressor, f"to be one of {names}")
        expect(self.start_step >= 0, "start_step", self.start_step, "to be at least 0")
        expect(isinstance(self.error_feedback, bool), "error_feedback", self.error_feedback, "to be True or False")
        refused = self.error_feedback and not self.compressor.takes_error_feedback
        expect(not refused, "error_feedback", self.error_feedback, f"to be False with {self.compressor}")
        # "clip 1 from step 3" would say that three steps are not clipped.
        alone = self.transforms and isinstance(self.compressor, DenseConfig)
        without = "to be 0 for transforms without a compressor, as they begin with the first step"
        expect(not (alone and self.start_step), "start_step", self.start_step, without)
        known = transform_types()
        among = ", ".join(sorted(kind.__name__ for kind in known))
        for transform in self.transforms:
            expect(type(transform) in known, "transforms", self.transforms, f"to be of {among}")
        late = next((transform.method for transform in self.transforms[1:] if transform.of_images), "")
        first = f"to begin with {late}, which is of images and not of gradients, and to have one such alone"
        expect(not late, "transforms", self.transforms, first)

    @property
    def plain(self) -> bool:
        """Whether it is none: the gradient crosses the wire as it is."""
        return not self.transforms and isinstance(self.compressor, DenseConfig)

    @property
    def shows_all(self) -> bool:
        """Whether what is decoded is all that can be known of the gradient, but for its length and for noise."""
        exact = all(isinstance(transform, ClipConfig) for transform in self.transforms)
        return exact and isinstance(self.compressor, DenseConfig)

    @property
    def clips(self) -> bool:
        """Whether a gradient, or an image's, is made shorter, by a factor that nobody is told."""
        return any(isinstance(transform, ClipConfig | DPSGDConfig) for transform in self.transforms)

    @property
    def noisy(self) -> bool:
        """Whether noise is added to the gradient."""
        return any(isinstance(transform, NoiseConfig | DPSGDConfig) for transform in self.transforms)

    @property
    def dp_sgd(self) -> DPSGDConfig | None:
        """The transform that is of each image's gradient, if there is one."""
        return next((t for t in self.transforms if isinstance(t, DPSGDConfig)), None)

    @property
    def mixing(self) -> MixupConfig | None:
        """The transform that mixes images, if there is one."""
        return next((t for t in self.transforms if isinstance(t, MixupConfig)), None)

    @property
    def of_images(self) -> TransformConfig | None:
        """The transform that is done where the images are known, if there is one."""
        return next((t for t in self.transforms if t.of_images), None)

    @property
    def name(self) -> str:
        """A short name for tables and plots, such as "PowerSGD rank 4 + EF"."""
        return self.name_with(None)

    def name_with(self, fraction: float | None) -> str:
        """`name`, such as "Top-K 1.4 % (bytes of rank 4)", where it is known which fraction of the entries was sent."""
        after = f" from step {self.start_step}" if self.start_step else ""
        # The method's published name says that it has error feedback.
        if isinstance(self.compressor, ScaledSignConfig) and self.error_feedback:
            method = "EF-signSGD"
        else:
            method = self.compressor.name_with(fraction) + (" + EF" if self.error_feedback else "")
        methods = [] if self.transforms and method == DenseConfig.method else [method]
        return " + ".join([*(transform.name for transform in self.transforms), *methods]) + after
