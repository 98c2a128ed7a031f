"""Gradient compressors: one file a method, `ErrorFeedback` around any of them.

`build` turns a `Defence` and a model (or the shapes of its gradient) into a `Compressor`; `ddp_comm_hook` puts one into
`DistributedDataParallel`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from raytrust.compress.atomo import Atomo
from raytrust.compress.ddp import ddp_comm_hook
from raytrust.compress.dense import Dense, Half
from raytrust.compress.dgc import DGC
from raytrust.compress.error_feedback import ErrorFeedback
from raytrust.compress.expansion import expansion_remark
from raytrust.compress.interface import Compressor, Layout, Reduced, Vantage
from raytrust.compress.powersgd import PowerSGD
from raytrust.compress.qsgd import QSGD
from raytrust.compress.randk import RandK
from raytrust.compress.scaled_sign import ScaledSign
from raytrust.compress.signsgd import SignSGD
from raytrust.compress.state import redistribute
from raytrust.compress.threshold import Threshold
from raytrust.compress.topk import TopK
from raytrust.compress.vqsgd import VqSGD
from raytrust.config import (
    AtomoConfig,
    Defence,
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

__all__ = [
    "Compressor",
    "ErrorFeedback",
    "Layout",
    "Reduced",
    "Vantage",
    "build",
    "ddp_comm_hook",
    "expansion_remark",
    "redistribute",
]


def build(
    defence: Defence, parameters: nn.Module | Sequence[torch.Size], seed: int = 0, names: Sequence[str] | None = None
) -> Compressor:
    """A compressor in its state before the first step.

    parameters: the model whose gradients it is to average (those of its parameters that are trained), or their shapes.
    seed: of what is random in the method; all workers must give the same. names: of the parameters,
    where shapes are given; errors and states name them. Raises ValueError for what is no `Defence`.
    """
    if not isinstance(defence, Defence):
        raise ValueError(f"Expected defence={defence!r} to be a Defence, which config.parse_defence makes of text.")
    layout = Layout.of(parameters) if isinstance(parameters, nn.Module) else Layout(parameters, names)
    compressor = _method(defence, layout, seed)
    return ErrorFeedback(compressor) if defence.error_feedback else compressor


def _method(defence: Defence, layout: Layout, seed: int) -> Compressor:
    match defence.compressor:
        case DenseConfig():
            return Dense(layout)
        case HalfConfig() as config:
            return Half(config, layout)
        case PowerSGDConfig() as config:
            return PowerSGD(config, layout, seed)
        case TopKConfig() as config:
            return TopK(config, layout)
        case RandKConfig() as config:
            return RandK(config, layout, seed)
        case ThresholdConfig() as config:
            return Threshold(config, layout)
        case DGCConfig() as config:
            return DGC(config, layout)
        case SignSGDConfig() as config:
            return SignSGD(config, layout)
        case ScaledSignConfig():
            return ScaledSign(layout)
        case QSGDConfig() as config:
            return QSGD(config, layout, seed)
        case VqSGDConfig() as config:
            return VqSGD(config, layout, seed)
        case AtomoConfig() as config:
            return Atomo(config, layout, seed)
        case _:  # a config that `Defence` takes and that has no compressor
            raise ValueError(f"Expected compressor={defence.compressor!r} to be of a method that can be built.")
