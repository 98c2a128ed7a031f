"""Gradient inversion by optimisation (Geiping et al. 2020), on decoded gradients or on what the compressor let through.

Images and restarts are one batch: one forward and one backward pass an iteration for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytrust.attacks.inversion.gradients import GradientMatcher
from raytrust.attacks.inversion.priors import total_variation
from raytrust.capture import Observation
from raytrust.compress import View
from raytrust.compress.interface import identity_view
from raytrust.config import InversionConfig

MAX_GRADIENT_ENTRIES = 2**28  # per-candidate gradients held at once; beyond it observations are taken in turns (1 GiB)


@dataclass(frozen=True)
class Candidates:
    """What the restarts of one observation arrived at.

    images: (restarts, batch, channels, height, width) in [0, 1], each restart's best. objective: (restarts,), matching
    distance + weighted prior at these images, inf for a restart that diverged.
    """

    images: Tensor
    objective: Tensor

    @property
    def diverged(self) -> int:
        return int((~self.objective.isfinite()).sum())

    def pick(self) -> int:
        """The restart that the attacker hands in: the least objective, which it can observe.

        Raises FloatingPointError if all restarts diverged.
        """
        if self.diverged == len(self.objective):
            raise FloatingPointError(f"All {self.diverged} restarts of the attack diverged.")
        return int(self.objective.argmin())


class GradientInversion:
    """The attack of Geiping et al. 2020: Adam in the box of valid pixels on 1 - cosine + total variation.

    With objective "aware" the cosine is taken over what the messages reveal (`Compressor.view`) instead of over the
    decoded gradient.
    """

    def __init__(self, config: InversionConfig, device: str = "cpu"):
        self.config = config
        self.device = device

    def reconstruct(self, seen: Observation) -> Tensor:
        """The private batch as far as it can be had: (batch, channels, height, width) in [0, 1]."""
        (candidates,) = self.candidates([seen])
        return candidates.images[candidates.pick()]

    def candidates(self, seen: Sequence[Observation]) -> list[Candidates]:
        """All restarts for several observations of one model."""
        return invert([(s, self.config) for s in seen], self.device)


def invert(jobs: Sequence[tuple[Observation, InversionConfig]], device: str = "cpu") -> list[Candidates]:
    """Attack several observations of one model, each with its own settings, as one batch.

    The settings may differ in everything but `iterations`. What a job arrives at does not depend on the others in the
    batch. Raises ValueError for observations of different models or a threat that withholds the labels.
    """
    for seen, config in jobs[1:]:
        if not _same_model(jobs[0][0], seen):
            raise ValueError("Expected all observations to be of one model at one step.")
        if config.iterations != jobs[0][1].iterations:
            raise ValueError(f"Expected iterations={config.iterations} to be {jobs[0][1].iterations} in all jobs.")
    entries = sum(w.numel() for w in jobs[0][0].weights.values())
    room = max(1, MAX_GRADIENT_ENTRIES // entries)  # restarts at once
    batches: list[list[tuple[Observation, InversionConfig]]] = [[]]
    for job in jobs:
        if batches[-1] and sum(config.restarts for _, config in [*batches[-1], job]) > room:
            batches.append([])
        batches[-1].append(job)
    return [candidates for batch in batches for candidates in _invert_batch(batch, device)]


def _invert_batch(jobs: Sequence[tuple[Observation, InversionConfig]], device: str) -> list[Candidates]:
    first, iterations = jobs[0][0], jobs[0][1].iterations
    restarts = [config.restarts for _, config in jobs]
    matcher = GradientMatcher(first.build_model().to(device))
    views = [_view(seen, config, device) for seen, config in jobs]
    labels = _each([_labels(seen) for seen, _ in jobs], restarts).to(device)
    tv, step_size, signed = (
        torch.tensor([v for v, n in zip(values, restarts, strict=True) for _ in range(n)], device=device)
        for values in zip(*((c.tv, c.step_size, c.signed) for _, c in jobs), strict=True)
    )
    mean, std = (s.to(device).view(-1, 1, 1) for s in (first.mean, first.std))
    low, high = -mean / std, (1 - mean) / std
    x = torch.cat([_start(seen, config) for seen, config in jobs]).to(device).clamp_(low, high).requires_grad_()

    def distance(grads: Sequence[Tensor]) -> Tensor:
        parts = zip(*(g.split(restarts) for g in grads), strict=True)
        return torch.cat([view.distance(part) for view, part in zip(views, parts, strict=True)])

    optimiser = torch.optim.Adam([x], lr=1.0)  # scaled to each candidate's own step size below
    milestones = [iterations * k // 8 for k in (3, 5, 7)]
    best, best_x = torch.full((len(x),), torch.inf, device=device), x.detach().clone()
    for iteration in range(iterations + 1):
        value, gradient = matcher(x, labels, distance)
        prior = tv * total_variation(x)
        with torch.no_grad():
            value = value + prior
            better = value < best  # never true for NaN
            best = torch.where(better, value, best)
            best_x = torch.where(_column(better), x, best_x)
        if iteration == iterations:
            break
        gradient = gradient + torch.autograd.grad(prior.sum(), x)[0]
        x.grad = torch.where(_column(signed), gradient.sign(), gradient)
        before = x.detach().clone()
        optimiser.step()
        rate = step_size * 0.1 ** sum(iteration >= m for m in milestones)
        with torch.no_grad():
            x.copy_(torch.lerp(before, x, _column(rate)).clamp_(low, high))
    images = (best_x * std + mean).clamp(0, 1).cpu().split(restarts)
    return [Candidates(i, o) for i, o in zip(images, best.cpu().split(restarts), strict=True)]


def _view(seen: Observation, config: InversionConfig, device: str) -> View:
    compressor = seen.build_compressor()
    messages = [m.to(device) for m in seen.messages]
    if config.objective == "aware":
        return compressor.view(messages, seen.threat.vantage, seen.victim)
    decoded = compressor.decode(messages, seen.threat.vantage)
    return identity_view(decoded[seen.victim] if len(decoded) > 1 else decoded[0])


def _start(seen: Observation, config: InversionConfig) -> Tensor:
    """Normal noise, (restarts, batch, channels, height, width): one draw for each restart, in their order."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = (seen.threat.batch_size, *seen.image_shape)
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(config.restarts)])


def _each(values: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Each tensor as often as its count says, stacked."""
    return torch.stack([v for v, n in zip(values, counts, strict=True) for _ in range(n)])


def _column(values: Tensor) -> Tensor:
    """(candidates,) -> (candidates, 1, 1, 1, 1), to meet images."""
    return values.view(-1, 1, 1, 1, 1)


def _same_model(a: Observation, b: Observation) -> bool:
    if (a.model, a.classes, a.image_shape, a.threat) != (b.model, b.classes, b.image_shape, b.threat):
        return False
    first, second = ([*s.weights.values(), *s.buffers.values(), s.mean, s.std] for s in (a, b))
    return all(map(torch.equal, first, second))


def _labels(seen: Observation) -> Tensor:
    if seen.labels is None:
        raise ValueError("Expected a threat with labels='known': this attack does not recover labels.")
    return seen.labels
