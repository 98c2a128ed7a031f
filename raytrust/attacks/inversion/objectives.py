"""What a candidate's gradient is compared with, and by which distance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytrust.config import InversionConfig
from raytrust.config.register import OBJECTIVES
from raytrust.leak import LinearView, SparseView, View, identity_view, view_of
from raytrust.leak.history import pure_view, weighed_view
from raytrust.leak.observation import Observation, decoded
from raytrust.leak.soteria import pruned_by_soteria, without_pruned
from raytrust.leak.transformed import noise_variance
from raytrust.leak.views import SignView, TensorwiseView
from raytrust.persample.ghost import as_plain
from raytrust.persample.matcher import Distance


def target_view(seen: Observation, config: InversionConfig, device: str = "cpu") -> View:
    """What the attacker compares with: the decoded gradient ("naive"), or what the messages reveal ("aware"), of the
    gradient alone, or by age, if the config minds the residual.

    Raises ValueError for messages that are not finite, and where the attacker can't tell gradient and residual apart.
    """
    # Before any work: NaN in a message would be NaN in every distance, and look like an attack that diverged.
    messages = [*seen.messages, *(m for step in seen.history for m in step.messages)]
    # What the vantage hides is a meta tensor, which has a shape and no values.
    payloads = [x for m in messages for x in (*m.sent, *m.received) if not x.is_meta and x.is_floating_point()]
    if not all(bool(x.isfinite().all()) for x in payloads):
        raise ValueError("Expected finite messages, got NaN or infinity in them.")
    if config.objective == "naive":
        return identity_view(decoded(seen, device).gradient)
    pruned = pruned_by_soteria(seen, device)
    view = _revealed(seen, config, device)
    return view if pruned is None else without_pruned(view, pruned)


def _revealed(seen: Observation, config: InversionConfig, device: str) -> View:
    """What the messages tell of what was handed to the compressor, or of its part that transforms let through."""
    messages = [m.to(device) for m in seen.messages]
    compressor = seen.build_compressor()
    # At step 0 no residual has come about yet that could be told apart from the gradient.
    if config.residual != "ignore" and seen.residual:
        history = [step.to(device) for step in seen.history]
        told_apart = pure_view if config.residual == "avoid" else weighed_view
        return told_apart(compressor, messages, seen.threat.vantage, seen.victim, history)
    view = view_of(compressor, messages, seen.threat.vantage, seen.victim)
    if isinstance(view, LinearView) and seen.defence.transforms:
        # A tensor of which next to all is noise then counts for next to nothing, see `TensorwiseView`.
        workers = decoded(seen).images // seen.threat.batch_size
        size, transforms = seen.threat.batch_size, seen.defence.transforms
        view.noise = noise_variance(transforms, size, view.observed, workers, seen.local)
    return view


def matching_distance(view: View, config: InversionConfig) -> Distance:
    """The distance that the config asks for: (candidates, *shape) a parameter -> (candidates,).

    Raises ValueError for another than the cosine on a view that is not linear.
    """
    distance = _matching(view, config.matching)
    if config.bound > 0 and isinstance(view, SparseView):
        return lambda grads: distance(grads) + config.bound * view.excess(grads)
    return distance


def _matching(view: View, kind: str) -> Distance:
    if kind == "cosine" or (kind == "tensors" and isinstance(view, TensorwiseView | SignView)):
        # Signs and quantised gradients are compared tensor by tensor in any case, since one distance over all tensors
        # is the weaker attack: on signSGD 0.206 SSIM against 0.335 (docs/findings.md).
        return view.distance
    if not isinstance(view, LinearView):
        raise ValueError(f"Expected matching={kind!r} to be 'cosine': what was sent is no linear view.")
    if kind == "tensors":
        return TensorwiseView(view).distance
    objective = OBJECTIVES[kind]
    if objective in (l1, l2):
        return lambda grads: objective(view.measure(grads), view.observed)
    # Somebody else's may do with tensors whatever it likes, `torch.vmap` among it, which ghost gradients can't stand.
    return lambda grads: objective([as_plain(m) for m in view.measure(grads)], view.observed)


def l2(measured: Sequence[Tensor], observed: Sequence[Tensor]) -> Tensor:
    """sum (measured - observed)^2 / sum observed^2, (candidates,).

    The distance of Zhu et al. 2019 (Algorithm 1), but for a factor that makes priors comparable between models.
    """
    return _relative_distance(measured, observed, power=2)


def l1(measured: Sequence[Tensor], observed: Sequence[Tensor]) -> Tensor:
    """sum |measured - observed| / sum |observed|, (candidates,)."""
    return _relative_distance(measured, observed, power=1)


def _relative_distance(measured: Sequence[Tensor], observed: Sequence[Tensor], power: int) -> Tensor:
    """At least 0, and 0 at the true gradient. An observation that is zero throughout is not divided by."""
    pairs = list(zip(measured, observed, strict=True))
    apart = torch.stack([(m - o).flatten(1).abs().pow(power).sum(1) for m, o in pairs]).sum(0)
    size = torch.stack([o.abs().pow(power).sum() for o in observed]).sum()
    return apart / torch.where(size > 0, size, torch.ones_like(size))
