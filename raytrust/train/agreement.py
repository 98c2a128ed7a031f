"""What workers agree on before they send: that the loss and the gradient of each are finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from raytrust.compress import Compressor, HookCompressor
from raytrust.compress.interface import FlatGradients
from raytrust.wire.channel import Channel


def agree_to_go_on(step: int, loss: Tensor, grads: Sequence[Tensor], compressor: Compressor, channel: Channel) -> float:
    """The loss as a number. Raises FloatingPointError on every worker if one has a loss or a gradient that is not
    finite.

    The workers exchange one flag for it. It says nothing else, is not part of the gradient traffic, and not counted.
    """
    # A sum is finite only if all its terms are. One look at the device says all, as each look waits for it.
    sums = torch.stack([loss.float(), *(g.detach().sum(dtype=torch.float32) for g in grads)])
    nats, finite = torch.stack([loss, sums.isfinite().all().to(loss.dtype)]).tolist()
    reason = ""
    if not math.isfinite(nats):
        reason = f"The training loss became {nats} at step {step}."
    elif not finite:
        # The converse does not hold, as a sum may overflow: the entries are looked at.
        try:
            compressor.layout.check(grads)
        except ValueError as error:
            reason = f"The gradient is not finite at step {step}. {error}"
    # One worker alone need not ask, which it would wait for once more.
    healthy = not reason
    if channel.world_size > 1:
        healthy = channel.all_mean(loss.new_tensor([float(healthy)])).item() >= 1
    if not healthy:
        raise FloatingPointError(
            reason or f"The training loss or gradient of another worker is not finite at step {step}."
        )
    return float(nats)


def checked(grads: Sequence[Tensor], compressor: Compressor) -> Sequence[Tensor]:
    """The gradients that workers have agreed on, as a compressor takes them without checking them once more."""
    known = isinstance(compressor, HookCompressor) or any(g.dtype != torch.float32 for g in grads)
    # On the CPU nothing waits for the check, and a copy of the gradient would cost more.
    if known or not grads or grads[0].device.type == "cpu":
        return grads
    return FlatGradients(torch.cat([g.detach().reshape(-1) for g in grads]), compressor.layout)
