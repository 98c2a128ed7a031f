"""Configurations: frozen dataclasses that refuse unknown keys and values out of range.

Every object of this module is a value: it compares by content, it is hashable, and it turns into JSON and back without
loss (`to_dict`, `from_dict`). The type of `TrainConfig.compressor` selects the compression method. All errors are a
`ValueError` of one line that names the argument, its value and what was expected.
"""

from __future__ import annotations

from raytrust.config import register
from raytrust.config.attacks import InversionConfig
from raytrust.config.compressors import (
    AtomoConfig,
    DenseConfig,
    DGCConfig,
    HalfConfig,
    PowerSGDConfig,
    QSGDConfig,
    RandKConfig,
    ScaledSignConfig,
    SignSGDConfig,
    ThresholdConfig,
    TopKConfig,
    VqSGDConfig,
)
from raytrust.config.defence import Defence
from raytrust.config.learned import LearnedInverterConfig
from raytrust.config.membership import Arm, MembershipConfig
from raytrust.config.method import CompressorConfig, TransformConfig
from raytrust.config.parsing import parse_defence
from raytrust.config.spaces import Choice, LogInteger, LogUniform, Space
from raytrust.config.sweeps import SweepConfig
from raytrust.config.training import ONE_STEP, CaptureConfig, LocalConfig, ModelConfig, Threat, TrainConfig
from raytrust.config.transforms import ClipConfig, DPSGDConfig, MixupConfig, NoiseConfig, PruneConfig, SoteriaConfig
from raytrust.config.values import digest, from_dict, to_dict

__all__ = [
    "ONE_STEP",
    "Arm",
    "AtomoConfig",
    "CaptureConfig",
    "Choice",
    "ClipConfig",
    "CompressorConfig",
    "DGCConfig",
    "DPSGDConfig",
    "Defence",
    "DenseConfig",
    "HalfConfig",
    "InversionConfig",
    "LearnedInverterConfig",
    "LocalConfig",
    "LogInteger",
    "LogUniform",
    "MembershipConfig",
    "MixupConfig",
    "ModelConfig",
    "NoiseConfig",
    "PowerSGDConfig",
    "PruneConfig",
    "QSGDConfig",
    "RandKConfig",
    "ScaledSignConfig",
    "SignSGDConfig",
    "SoteriaConfig",
    "Space",
    "SweepConfig",
    "Threat",
    "ThresholdConfig",
    "TopKConfig",
    "TrainConfig",
    "TransformConfig",
    "VqSGDConfig",
    "digest",
    "from_dict",
    "parse_defence",
    "register",
    "to_dict",
]
