"""Was this image in the batch whose compressed gradient crossed the wire? Attacks on one step's decoded messages.

The scores by cosine and by gradient difference are those of Li, Li & Ribeiro 2023 ("Effective Passive Membership
Inference Attacks in Federated Learning against Overparameterized Models"), of what a compressor let through.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raytrust.leak.observation import Observation, decoded
from raytrust.persample.engine import PerSampleGradients

ATTACKS = ("cosine", "gradient difference")


@dataclass(frozen=True)
class MessageScores:
    """Of n candidates, higher means that the image was in the batch; each (n,) in float64.

    cosine: cos(g, M) in [-1, 1] of the candidate's gradient g with the decoded message M.
    gradient_difference: 2 B <g, M> - |g|^2 = |B M|^2 - |B M - g|^2: how much nearer to zero the batch's summed gradient
        B M comes when g is taken away.
    loss: log p_y at this step, which needs no message: what the same attacker would know from the model alone.
    """

    cosine: Tensor
    gradient_difference: Tensor
    loss: Tensor


def message_scores(seen: Observation, x: Tensor, labels: Tensor, chunk: int = 64, device: str = "cpu") -> MessageScores:
    """Score candidates against the messages of one step.

    x: (n, channels, height, width) in [0, 1]; labels: (n,). Batch norm is in evaluation mode, whatever mode the private
    gradient was taken in. After an all-reduce a peer sees the mean over all workers; then B counts all their images.
    Memory is that of `chunk` candidates. device: where gradients are taken; scores are on the CPU.
    """
    message, images = decoded(seen, device)
    gradients = PerSampleGradients(seen.build_model().to(device).eval())
    mean, std = (s.to(device).view(-1, 1, 1) for s in (seen.mean, seen.std))
    norm = float(torch.stack([m.double().square().sum() for m in message]).sum().sqrt())
    parts = []
    for some, y in zip(x.split(chunk), labels.split(chunk), strict=True):
        batches = ((some.to(device) - mean) / std)[:, None]
        scores = gradients.products_and_norms(batches, y[:, None].to(device), message)
        parts.append(torch.stack(scores).double().cpu())
    loss, inner, squared = torch.cat(parts, dim=1)
    tiny = torch.finfo(torch.float64).tiny
    return MessageScores(
        cosine=inner / (squared.sqrt() * norm).clamp_min(tiny),
        gradient_difference=2 * images * inner - squared,
        loss=-loss,
    )
