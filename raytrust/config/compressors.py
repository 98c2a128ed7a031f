"""Compression methods, one class each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from raytrust.config.method import CompressorConfig
from raytrust.config.register import COMPRESSORS
from raytrust.config.values import ADDED, expect, expect_choices


@dataclass(frozen=True)
class DenseConfig(CompressorConfig):
    """No compression: the gradient crosses the wire as it is."""

    method: ClassVar[str] = "none"


@dataclass(frozen=True)
class HalfConfig(CompressorConfig):
    """The plain baseline: the gradient in 16 bits."""

    method: ClassVar[str] = "half"
    dtype: Literal["float16", "bfloat16"] = "float16"

    def __post_init__(self) -> None:
        expect_choices(self)

    @property
    def name(self) -> str:
        return {"float16": "fp16", "bfloat16": "bf16"}[self.dtype]


@dataclass(frozen=True)
class PowerSGDConfig(CompressorConfig):
    """PowerSGD of the given rank (Vogels et al. 2019, Algorithm 1), at most min(n, m) for an n x m matrix.

    min_compression_rate: a matrix of which the factors would be no smaller by this is sent whole, as torch's
        `PowerSGDState` does from 2 on; 0 to compress all.
    """

    method: ClassVar[str] = "powersgd"
    rank: int = 4
    warm_start: bool = True
    min_compression_rate: float = field(default=0.0, metadata=ADDED)

    def __post_init__(self) -> None:
        expect(self.rank >= 1, "rank", self.rank, "to be at least 1")
        expect(self.min_compression_rate >= 0, "min_compression_rate", self.min_compression_rate, "to be at least 0")

    @property
    def name(self) -> str:
        at_least = f" at least {self.min_compression_rate:g}x" if self.min_compression_rate else ""
        return f"PowerSGD rank {self.rank}" + ("" if self.warm_start else " cold") + at_least


@dataclass(frozen=True)
class TopKConfig(CompressorConfig):
    """Top-K (Aji & Heafield 2017). Exactly one of the two levels is given.

    level: the fraction of entries that is sent, in (0, 1].
    equal_to_rank: send what PowerSGD of this rank sends, counted in bytes (a value and an index each: half as many
        entries as PowerSGD sends floats) or in values, as `equal_by` says.
    scope: "global" selects over the whole gradient, "layer" the same number of entries in all, shared out by size.
    """

    method: ClassVar[str] = "topk"
    level: float | None = None
    equal_to_rank: int | None = None
    # The paper does not say which of the two it equates. Bytes are what a network carries, and Top-K's indices travel,
    # too.
    equal_by: Literal["bytes", "values"] = "bytes"
    scope: Literal["global", "layer"] = "global"

    def __post_init__(self) -> None:
        if (self.level is None) == (self.equal_to_rank is None):
            raise ValueError(
                f"Expected exactly one of level={self.level!r} and equal_to_rank={self.equal_to_rank!r} to be given."
            )
        if self.level is not None:
            expect(0 < self.level <= 1, "level", self.level, "in (0, 1], the fraction of entries that is sent")
        if self.equal_to_rank is not None:
            expect(self.equal_to_rank >= 1, "equal_to_rank", self.equal_to_rank, "to be at least 1")
        expect_choices(self)

    @property
    def name(self) -> str:
        return self.name_with(None)

    def name_with(self, fraction: float | None) -> str:
        if self.level is not None:
            size = f"{100 * self.level:.3g} %"
        else:
            sent = "" if fraction is None else f"{100 * fraction:.2g} % "
            size = f"{sent}({self.equal_by} of rank {self.equal_to_rank})"
        return f"Top-K {size}" + (" per layer" if self.scope == "layer" else "")


@dataclass(frozen=True)
class RandKConfig(CompressorConfig):
    """Rand-K (Stich et al. 2018). level: the fraction of entries that is sent, in (0, 1].

    unbiased: scale by 1 / level (Wangni et al. 2018): for use without error feedback, with which it is refused.
    """

    method: ClassVar[str] = "randk"
    level: float = 0.01
    unbiased: bool = False

    def __post_init__(self) -> None:
        _expect_level(self.level)

    @property
    def name(self) -> str:
        return f"Rand-K {100 * self.level:.3g} %" + (" unbiased" if self.unbiased else "")

    @property
    def takes_error_feedback(self) -> bool:
        # Its error exceeds the gradient where level < 1/2: the residual would grow without bound.
        return not self.unbiased


@dataclass(frozen=True)
class ThresholdConfig(CompressorConfig):
    """Threshold dropping (Aji & Heafield 2017). level: the fraction of entries that is to be sent, in (0, 1].

    sample: the fraction of entries from which the threshold is estimated, in (0, 1]; 1 is exact.
    """

    method: ClassVar[str] = "threshold"
    level: float = 0.01
    # An exact selection among all entries costs 11 to 19 copies of the gradient on a CPU, a sample a fraction.
    sample: float = 0.01

    def __post_init__(self) -> None:
        _expect_level(self.level)
        expect(0 < self.sample <= 1, "sample", self.sample, "in (0, 1], a fraction of the entries")

    @property
    def name(self) -> str:
        return f"Threshold {100 * self.level:.3g} %"


@dataclass(frozen=True)
class DGCConfig(CompressorConfig):
    """Deep gradient compression (Lin et al. 2018). level: the fraction of entries sent after the warm-up, in (0, 1].

    momentum: of the correction; the optimiser should then have none. masking: momentum factor masking. clip: the norm
    to which the mean gradient is to be clipped, or None. warmup_steps: over which the level falls from 25 %.
    """

    method: ClassVar[str] = "dgc"
    level: float = 0.001
    momentum: float = 0.9
    masking: bool = True
    clip: float | None = None
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _expect_level(self.level)
        expect(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        expect(self.clip is None or 0 < self.clip < math.inf, "clip", self.clip, "to be positive and finite, or None")
        expect(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "to be at least 0")

    @property
    def name(self) -> str:
        return f"DGC {100 * self.level:.3g} %"

    @property
    def takes_error_feedback(self) -> bool:
        # It accumulates what it did not send: with a residual around it, that would be sent twice.
        return False


@dataclass(frozen=True)
class SignSGDConfig(CompressorConfig):
    """signSGD with majority vote; with a momentum, in [0, 1), Signum (Bernstein et al. 2018)."""

    method: ClassVar[str] = "signsgd"
    momentum: float = 0.0

    def __post_init__(self) -> None:
        expect(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")

    @property
    def name(self) -> str:
        return f"Signum {self.momentum:.2g}" if self.momentum else "signSGD"

    @property
    def takes_error_feedback(self) -> bool:
        # With a momentum it is Signum, which remembers by that: the method has no residual besides.
        return self.momentum == 0


@dataclass(frozen=True)
class ScaledSignConfig(CompressorConfig):
    """mean|x| sign(x) for each tensor: with error feedback, EF-signSGD (Karimireddy et al. 2019)."""

    method: ClassVar[str] = "scaledsign"

    @property
    def name(self) -> str:
        return "scaled sign"


@dataclass(frozen=True)
class QSGDConfig(CompressorConfig):
    """QSGD (Alistarh et al. 2017) with 2^(bits - 1) - 1 levels, by buckets of `bucket` consecutive entries.

    norm: "l2" as in the paper's theory, or "max", the largest magnitude, as in its experiments.
    """

    method: ClassVar[str] = "qsgd"
    bits: Literal[2, 4, 8] = 4
    bucket: int = 512
    norm: Literal["l2", "max"] = "l2"

    def __post_init__(self) -> None:
        expect_choices(self)
        expect(1 <= self.bucket <= 2**18, "bucket", self.bucket, "in [1, 262144]")

    @property
    def name(self) -> str:
        bucket = "" if self.bucket == 512 else f" bucket {self.bucket}"
        return f"QSGD {self.bits} bits{bucket}" + (" max" if self.norm == "max" else "")


@dataclass(frozen=True)
class VqSGDConfig(CompressorConfig):
    """vqSGD with the cross-polytope (Gandikota et al. 2022). samples: how many vertices are sent a step."""

    method: ClassVar[str] = "vqsgd"
    samples: int = 1000

    def __post_init__(self) -> None:
        expect(1 <= self.samples <= 2**24, "samples", self.samples, "in [1, 16777216]")

    @property
    def name(self) -> str:
        return f"vqSGD {self.samples}"


@dataclass(frozen=True)
class AtomoConfig(CompressorConfig):
    """Spectral ATOMO (Wang et al. 2018). rank: the expected number of singular triples sent of each matrix."""

    method: ClassVar[str] = "atomo"
    rank: int = 3

    def __post_init__(self) -> None:
        expect(self.rank >= 1, "rank", self.rank, "to be at least 1")

    @property
    def name(self) -> str:
        return f"ATOMO {self.rank}"


def _expect_level(level: float) -> None:
    expect(0 < level <= 1, "level", level, "in (0, 1], the fraction of entries that is sent")


# The order of this file is that of error messages; classes register themselves where they are (raytrust/compress).
for _kind in CompressorConfig.__subclasses__():
    COMPRESSORS.add(_kind.method, _kind)
