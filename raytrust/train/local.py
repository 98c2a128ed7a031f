"""The steps that a worker makes by itself before it sends, whatever it is that gives the gradient of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from raytrust.config import LocalConfig

# From the rows of a batch to its mean loss and gradient at the present weights.
Gradient: TypeAlias = Callable[[Any], tuple[Tensor, Sequence[Tensor]]]


def pseudo_gradient(
    parameters: Sequence[Tensor], local: LocalConfig, size: int, gradient: Gradient
) -> tuple[Tensor, Sequence[Tensor]]:
    """The mean loss along a worker's local steps, and (weights before - weights after) / (steps x learning rate).

    The weights are afterwards what they were before, to the bit. What a model keeps besides, as batch norms do in
    training mode, moves on with each step. size: images of the worker's batch. gradient: of some of these, called once
    a step. One step gives what `gradient` gives.
    """
    rows = local.rows(size)
    if local.steps == 1:
        return gradient(rows[0])
    before = [p.detach().clone() for p in parameters]
    losses, total = [], [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in before]
    try:
        for some in rows:
            loss, grads = gradient(some)
            losses.append(loss)
            with torch.no_grad():
                for p, whole, g in zip(parameters, total, grads, strict=True):
                    p.sub_(g, alpha=local.learning_rate)
                    # Summed up, as the difference of the weights would be rounded to what weights resolve.
                    whole += g
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
    return torch.stack(losses).mean(), [whole / local.steps for whole in total]
