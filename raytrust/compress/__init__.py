"""Gradient compressors: one file a method, `ErrorFeedback` around any of them.

`build` turns a `Defence` and a model (or the shapes of its gradient) into a `Compressor`; `ddp_comm_hook` puts one into
`DistributedDataParallel`.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import nn

# Each file registers its method, as a file outside the package would.
from raytrust.compress import (  # noqa: F401
    atomo,
    dense,
    dgc,
    powersgd,
    qsgd,
    randk,
    scaled_sign,
    signsgd,
    threshold,
    topk,
    vqsgd,
)
from raytrust.compress.base import Base
from raytrust.compress.ddp import ddp_comm_hook
from raytrust.compress.dense_start import DenseStart
from raytrust.compress.error_feedback import ErrorFeedback
from raytrust.compress.expansion import expansion_remark
from raytrust.compress.hook import HookCompressor
from raytrust.compress.interface import Compressor, Layout, Reduced, Vantage, payloads_by_worker
from raytrust.compress.parts import InParts
from raytrust.compress.state import redistribute
from raytrust.compress.transformed import Transformed, for_private_batch
from raytrust.config import Defence
from raytrust.config.register import METHODS

__all__ = [
    "Base",
    "Compressor",
    "DenseStart",
    "ErrorFeedback",
    "HookCompressor",
    "Layout",
    "Reduced",
    "Transformed",
    "Vantage",
    "build",
    "ddp_comm_hook",
    "expansion_remark",
    "for_private_batch",
    "payloads_by_worker",
    "redistribute",
]


def build(
    defence: Defence,
    parameters: nn.Module | Sequence[torch.Size],
    seed: int = 0,
    names: Sequence[str] | None = None,
    overlap: bool = False,
    private_seed: int | None = None,
) -> Compressor:
    """A compressor in its state before the first step.

    parameters: the model whose gradients it is to average (those of its parameters that are trained), or their shapes.
    seed: of what is random in the method; all workers must give the same. names: of the parameters,
    where shapes are given; errors and states name them. overlap: whether `ddp_comm_hook` is to reduce each bucket as it
    fills, see there; ValueError for a method that can't. private_seed: of the noise of transforms, by default a fresh
    one of the system's, that of every worker another; one that is given repeats a run, and protects nothing where it
    is known or given twice. Raises ValueError for what is no `Defence`.
    """
    if not isinstance(defence, Defence):
        raise ValueError(f"Expected defence={defence!r} to be a Defence, which config.parse_defence makes of text.")
    layout = Layout.of(parameters) if isinstance(parameters, nn.Module) else Layout(parameters, names)
    method = defence.compressor.method
    if method not in METHODS:  # options that `Defence` takes, of which no class is registered
        raise ValueError(f"Expected compressor={defence.compressor!r} to be of a method that can be built.")
    compressor: Compressor = METHODS[method](defence.compressor, layout, seed)
    if defence.start_step:
        compressor = DenseStart(compressor, defence.start_step)
    compressor = ErrorFeedback(compressor) if defence.error_feedback else compressor
    if defence.transforms:
        # Not `seed`: other workers have it, Rand-K's public state holds it, and who has it takes the noise off.
        own = secrets.randbits(128) if private_seed is None else private_seed
        compressor = Transformed(compressor, defence.transforms, own)
    return InParts(compressor) if overlap else compressor
