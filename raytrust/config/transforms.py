"""What is done to a gradient before it is compressed, one class each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from raytrust.config.method import TransformConfig
from raytrust.config.register import TRANSFORMS
from raytrust.config.values import expect, expect_choices


@dataclass(frozen=True)
class ClipConfig(TransformConfig):
    """The worker's whole gradient is scaled down to this L2 norm, where it is longer."""

    method: ClassVar[str] = "clip"
    norm: float = 1.0

    def __post_init__(self) -> None:
        expect(0 < self.norm < math.inf, "norm", self.norm, "to be positive and finite")

    @property
    def name(self) -> str:
        return f"clip {self.norm:g}"


@dataclass(frozen=True)
class NoiseConfig(TransformConfig):
    """Every entry gets independent noise of mean zero and this standard deviation (Zhu et al. 2019, sec. 5.1)."""

    method: ClassVar[str] = "noise"
    deviation: float = 0.01
    kind: Literal["gaussian", "laplace"] = "gaussian"

    def __post_init__(self) -> None:
        expect(0 < self.deviation < math.inf, "deviation", self.deviation, "to be positive and finite")
        expect_choices(self)

    @property
    def name(self) -> str:
        return ("noise" if self.kind == "gaussian" else "Laplace noise") + f" {self.deviation:g}"


@dataclass(frozen=True)
class PruneConfig(TransformConfig):
    """Gradient pruning (Zhu et al. 2019, sec. 5.2; Huang et al. 2021): this fraction of the entries, those of the least
    magnitude, becomes zero; of each tensor, or of the whole gradient.

    It saves no bytes by itself.
    """

    method: ClassVar[str] = "prune"
    fraction: float = 0.9
    scope: Literal["layer", "global"] = "layer"

    def __post_init__(self) -> None:
        expect(0 < self.fraction < 1, "fraction", self.fraction, "in (0, 1), of the entries that become zero")
        expect_choices(self)

    @property
    def name(self) -> str:
        return f"prune {100 * self.fraction:g} %" + (" globally" if self.scope == "global" else "")


@dataclass(frozen=True)
class DPSGDConfig(TransformConfig):
    """Differentially private SGD (Abadi et al. 2016), the reference defence: each image's gradient is clipped to norm
    `clip`, and Gaussian noise of standard deviation noise * clip is added to the sum over a Poisson sample."""

    method: ClassVar[str] = "dp-sgd"
    of_images: ClassVar[bool] = True
    noise: float = 1.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        expect(0 < self.noise < math.inf, "noise", self.noise, "to be positive and finite")
        expect(0 < self.clip < math.inf, "clip", self.clip, "to be positive and finite")

    @property
    def name(self) -> str:
        return f"DP-SGD noise {self.noise:g}, clip {self.clip:g}"


@dataclass(frozen=True)
class SoteriaConfig(TransformConfig):
    """Soteria (Sun et al. 2021): of the weight's gradient in the final linear layer this fraction of the columns
    becomes zero, those of the entries of the representation, the layer's input, that tell most of the image.

    Those of the least ||dr/dX|| / |r|, summed over the images X of the batch (`raytrust.train.soteria`).
    """

    method: ClassVar[str] = "soteria"
    of_images: ClassVar[bool] = True
    fraction: float = 0.8

    def __post_init__(self) -> None:
        expect(0 < self.fraction < 1, "fraction", self.fraction, "in (0, 1), of the columns that become zero")

    @property
    def name(self) -> str:
        return f"Soteria {100 * self.fraction:g} %"

    def pruned(self, features: int) -> int:
        """How many of so many columns become zero."""
        return round(self.fraction * features)


@dataclass(frozen=True)
class MixupConfig(TransformConfig):
    """MixUp (Zhang et al. 2018; against inversion Huang et al. 2021): the gradient is of images each of which is mixed
    with others of the worker's own batch, `images` in all, and of targets that are mixed alike.

    largest: the share that an image can have in a mixture. 1 with two images is Zhang's MixUp with alpha 1; of Huang et
        al., who take 4 and 6, is the default.
    """

    method: ClassVar[str] = "mixup"
    of_images: ClassVar[bool] = True
    images: int = 2
    largest: float = 0.65

    def __post_init__(self) -> None:
        expect(self.images >= 2, "images", self.images, "to be at least 2, of a mixture")
        range_ = f"in (1 / {self.images}, 1], of which shares of {self.images} images can sum to 1"
        expect(1 / self.images < self.largest <= 1, "largest", self.largest, range_)

    @property
    def name(self) -> str:
        largest = "" if self.largest == type(self).largest else f", largest {self.largest:g}"
        return f"MixUp of {self.images}{largest}"


for _kind in TransformConfig.__subclasses__():
    TRANSFORMS.add(_kind.method, _kind)


def transform_types() -> tuple[type, ...]:
    """The types that `Defence` takes for its transforms."""
    return tuple(TRANSFORMS[method] for method in TRANSFORMS)
