"""What an image looks like: priors on candidates.

All take images as the model sees them, (candidates, batch, channels, height, width), and return (candidates,), at
least 0.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm

from raytrust.config import InversionConfig, Threat
from raytrust.leak.observation import Observation

# Of the prior on statistics where it is tried unasked: a proxy is further off, and must pull less (docs/findings.md).
WEIGHTS = {"known": 0.01, "proxy": 0.001}

Statistics = list[tuple[Tensor, Tensor]]  # (mean, variance) of the input of each batch norm, each (..., channels)


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of vertical plus of horizontal neighbours (anisotropic TV, as in Geiping et al. 2020).

    0 for constant images.
    """
    rows = (x[..., 1:, :] - x[..., :-1, :]).abs()
    columns = (x[..., :, 1:] - x[..., :, :-1]).abs()
    return rows.flatten(1).mean(1) + columns.flatten(1).mean(1)


def total_colour(x: Tensor) -> Tensor:
    """Total variation of the differences between channels: R - G, R - B, G - B.

    With `total_variation`, this is the double-opponent vectorial TV of Åström & Schnörr 2016, which wants edges at the
    same place in all channels. 0 for images of one channel, and where channels differ by a constant.
    """
    pairs = list(combinations(range(x.shape[2]), 2))
    if not pairs:
        return x.new_zeros(len(x))
    return total_variation(torch.stack([x[:, :, i] - x[:, :, j] for i, j in pairs], 2))


def mean_square(x: Tensor) -> Tensor:
    """Mean squared pixel: how far from the mean image (R_l2 of Yin et al. 2021, eq. 5, by the pixel)."""
    return x.flatten(1).square().mean(1)


def group_spread(x: Tensor, counts: Sequence[int]) -> Tensor:
    """Mean squared difference from the mean of the group (Yin et al. 2021, eq. 11, without registration).

    counts: the sizes of the groups, in the order of the candidates. Each group's mean counts as a constant. Candidates
    that are not finite have no part in it.
    """
    centres = []
    for group in x.detach().split(list(counts)):
        finite = group.flatten(1).isfinite().all(1).view(-1, *[1] * (x.ndim - 1))
        # Left out by a choice and not by a weight of 0: 0 times NaN is NaN, and one broken restart would break its
        # group.
        total = torch.where(finite, group, torch.zeros_like(group)).sum(0, keepdim=True)
        centres.append((total / finite.sum().clamp_min(1)).expand_as(group))
    return (x - torch.cat(centres)).flatten(1).square().mean(1)


class BatchNormPrior:
    """How far the statistics at each batch norm are from given ones: the sum over layers of the L2 distances of means
    and of variances (Yin et al. 2021, eq. 7; DeepInversion, Yin et al. 2020).

    The batch norms are in the mode of the model: in training mode each candidate batch is normalised by itself.
    Raises ValueError for a model without batch norm.
    """

    def __init__(self, model: nn.Module):
        # A copy, as the hooks below would else record the passes of the attack itself, too.
        self._model = forget_batch_statistics(copy.deepcopy(model)).requires_grad_(False)
        self._found: list[tuple[Tensor, Tensor]] = []
        norms = [m for m in self._model.modules() if isinstance(m, _BatchNorm)]
        if not norms:
            raise ValueError("Expected a model with batch norm for a prior on its statistics (bn > 0).")
        for norm in norms:
            norm.register_forward_pre_hook(self._record)

    def statistics(self, x: Tensor) -> Statistics:
        """Of each candidate batch, in the order in which the layers are used; variances without Bessel's correction."""

        def one(batch: Tensor) -> Statistics:
            self._found = []
            self._model(batch)
            return self._found

        return vmap(one)(x)

    def __call__(self, x: Tensor, targets: Statistics) -> Tensor:
        """targets: each (candidates, channels)."""
        terms = [
            torch.linalg.vector_norm(found - target, dim=1)
            for layer, goal in zip(self.statistics(x), targets, strict=True)
            for found, target in zip(layer, goal, strict=True)
        ]
        return torch.stack(terms).sum(0)

    def _record(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        variance, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
        self._found.append((mean, variance))


def attacks_on_statistics(
    attacks: Sequence[InversionConfig], threat: Threat, network: nn.Module
) -> tuple[InversionConfig, ...]:
    """Those to be made besides, where the threat tells of the private batch's statistics and the network has any: of
    each objective the first that optimises, once more with a prior on them. None that weighs them already."""
    granted = threat.batch_statistics == "proxy" or (threat.batch_statistics, threat.batch_norm) == ("known", "train")
    if not granted or not any(isinstance(m, _BatchNorm) for m in network.modules()):
        return ()
    without = [a for a in attacks if a.method == "optimise" and a.bn == 0]
    # In reverse, as the last value that is written for a key stays.
    first = {a.objective: a for a in reversed(without)}
    return tuple(replace(a, bn=WEIGHTS[threat.batch_statistics]) for a in without if first[a.objective] is a)


def forget_batch_statistics(model: nn.Module) -> nn.Module:
    """Let batch norms in training mode use the batch's statistics without updating their running ones, in place.

    They are built from elementary operations, so that the model can also be used under vmap.
    """
    for module in model.modules():
        # Another forward, of a subclass or of the object's own, is not ours to replace.
        known = type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and "forward" not in vars(module)
        if known and module.training:
            module.forward = partial(_normalise, module)
    return model


def _normalise(norm: Any, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0, keepdim=True)
    normal = (x - mean) * torch.rsqrt(variance + norm.eps)
    return normal * norm.weight.view(mean.shape) + norm.bias.view(mean.shape) if norm.affine else normal


@torch.no_grad()
def known_statistics(seen: Observation) -> Statistics:
    """The statistics that the threat lets an attacker take for those of the private batch, each (channels,).

    Where it grants the buffers that the private batch left behind, its own statistics, as running = (1 - momentum)
    before + momentum batch; by proxy those of auxiliary images, see `proxy_statistics`; else the running statistics,
    which are of the training data and not of the batch. Raises ValueError where these are but initial values.

    Huang et al. 2021 ("Evaluating Gradient Inversion Attacks and Defenses in Federated Learning") call the first
    BN_exact. In all three cases they are only what the prior pulls the candidates' own statistics towards: in training
    mode a candidate batch is normalised by itself, as the private batch was, or the gradient of the true batch would
    not be the one that was sent.
    """
    if seen.threat.batch_statistics == "proxy":
        return proxy_statistics(seen)
    model = seen.build_model()
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    if any(m.running_mean is None or m.momentum is None for m in norms.values()):
        raise ValueError("Expected batch norms with running statistics and momentum for a prior on them (bn > 0).")
    if seen.buffers_after is None:
        # Initial statistics (mean 0, variance 1) say nothing of any image, and would only mislead the search.
        if any(int(seen.buffers[f"{name}.num_batches_tracked"]) == 0 for name in norms):
            raise ValueError("Expected batch norms that have seen data for a prior on their statistics (bn > 0).")
        return [(seen.buffers[f"{name}.running_mean"], seen.buffers[f"{name}.running_var"]) for name in norms]
    # How many values a channel each variance is of depends on the architecture: a pass shows it for any network.
    counts: dict[str, int] = {}
    for name, norm in norms.items():
        norm.register_forward_pre_hook(lambda m, x, name=name: counts.update({name: x[0].numel() // x[0].shape[1]}))
    model(torch.zeros(seen.threat.batch_size, *seen.image_shape))
    found = []
    for name, norm in norms.items():
        assert norm.momentum is not None
        mean, variance = (
            (seen.buffers_after[key] - (1 - norm.momentum) * seen.buffers[key]) / norm.momentum
            for key in (f"{name}.running_mean", f"{name}.running_var")
        )
        n = counts[name]
        # Running variances have Bessel's correction, which those that the prior computes of a candidate don't have.
        found.append((mean, variance * (n - 1) / n))
    return found


@torch.no_grad()
def proxy_statistics(seen: Observation) -> Statistics:
    """What the statistics of a batch are to be expected to be, from the attacker's auxiliary images, each (channels,).

    At each batch norm the mean, over as many batches of the private batch's size as the auxiliary images make, of the
    batch's mean and of its variance without Bessel's correction, which is what the prior computes of a candidate; the
    last images, which fill no batch, are left out. Each batch passes through the known model in the mode of the threat,
    so in training mode it is normalised by itself. This is the proxy of LeakPro ("GIA Estimate", of one batch), for
    which the program of Huang et al. 2021 has the running statistics: those an untrained model does not have. Raises
    ValueError without auxiliary images and for a model without batch norm.
    """
    size = seen.threat.batch_size
    if seen.auxiliary is None or len(seen.auxiliary) < size:
        raise ValueError(f"Expected at least {size} auxiliary images for batch_statistics='proxy'.")
    prior = BatchNormPrior(seen.build_model())
    mean, std = (s.view(-1, 1, 1) for s in (seen.mean, seen.std))
    # One after the other, as many batches at once would fill the memory with their activations.
    batches = seen.auxiliary[: len(seen.auxiliary) // size * size].split(size)
    found = [prior.statistics(((batch - mean) / std)[None]) for batch in batches]
    return [
        (torch.cat([m for m, _ in layer]).mean(0), torch.cat([v for _, v in layer]).mean(0))
        for layer in zip(*found, strict=True)
    ]
