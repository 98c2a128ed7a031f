"""Gradient compressors: one file a method, `ErrorFeedback` around any of them.

`build` turns a `Defence` and the shapes of a gradient into a `Compressor`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raytrust.compress.dense import Dense
from raytrust.compress.error_feedback import ErrorFeedback
from raytrust.compress.interface import Compressor, LinearView, Reduced, Vantage, View
from raytrust.compress.powersgd import PowerSGD
from raytrust.compress.topk import TopK
from raytrust.config import Defence, DenseConfig, PowerSGDConfig, TopKConfig

__all__ = [
    "Compressor",
    "Dense",
    "ErrorFeedback",
    "LinearView",
    "PowerSGD",
    "Reduced",
    "TopK",
    "Vantage",
    "View",
    "build",
]


def build(defence: Defence, shapes: Sequence[torch.Size], seed: int = 0) -> Compressor:
    """A compressor in its state before the first step, for gradients of the given shapes.

    seed: of what is random in the method; it is public, and all workers must give the same.
    """
    compressor: Compressor
    match defence.compressor:
        case DenseConfig():
            compressor = Dense(shapes)
        case PowerSGDConfig() as config:
            compressor = PowerSGD(config, shapes, seed)
        case TopKConfig() as config:
            compressor = TopK(config, shapes)
    return ErrorFeedback(compressor) if defence.error_feedback else compressor
