"""What a network is asked for: how it takes its images, and the loss whose gradient is sent.

The attacker's gradient has to be of the very loss that the victim's was of, or the true image is no minimum of any
distance (binary cross-entropy taken for cross-entropy leaves the truth at a distance of 0.38).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

LossFunction: TypeAlias = Callable[[Any, Any], Tensor]


class Sample(NamedTuple):
    """What belongs to images besides themselves, as the attacker knows it.

    target: what the loss compares with: a tensor, or tensors in tuples and dicts. inputs: the network's other inputs,
    by the names of its arguments. All tensors begin with the dimensions that the images begin with.
    """

    target: Any
    inputs: dict[str, Tensor]


# Labels, (..., batch), or probabilities of classes, (..., batch, classes), or all that a network and its loss take.
Targets: TypeAlias = "Tensor | Sample"


@dataclass(frozen=True, eq=False)
class Task:
    """How a network takes a batch, and its loss.

    loss: (output, target) -> (), the mean over the batch; of whatever the network returns, such as a tuple or a dict.
        None: mean cross-entropy of logits (batch, classes), for which alone labels can be recovered.
    argument: the name of the network's argument that takes the images; None: the first one.
    """

    loss: LossFunction | None = None
    argument: str | None = None

    def output(self, network: Callable[..., Any], images: Tensor, targets: Targets) -> Any:
        """What the network makes of a batch, images (batch, channels, height, width)."""
        inputs = targets.inputs if isinstance(targets, Sample) else {}
        if self.argument is None:
            return network(images, **inputs)
        return network(**{self.argument: images}, **inputs)

    def batch_loss(
        self, network: Callable[..., Any], images: Tensor, targets: Targets, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The loss of one batch, () in float32 at least.

        dtype: in which an own loss gets the output, by default what it comes in, but at least float32.
        """
        output = self.output(network, images, targets)
        if self.loss is None:
            return F.cross_entropy(_precise(output), _target(targets))
        return self._checked(self.loss(_precise(output, dtype), _target(targets)))

    def losses(self, output: Any, targets: Targets, shape: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor:
        """Those of n batches whose outputs lie one after the other, (n,).

        targets: (n, batch, ...) each. shape: (n, batch). dtype: as in `batch_loss`.
        """
        target = _target(targets)
        if self.loss is None:
            return F.cross_entropy(_precise(output), target.flatten(0, 1), reduction="none").unflatten(0, shape).mean(1)
        n, size = shape
        output = _precise(output, dtype)
        for tensor in tensors_of(output):
            if tensor.ndim == 0 or len(tensor) != n * size:
                raise ValueError(f"Expected the output's tensors to begin with the batch, got {tuple(tensor.shape)}.")
        # One by one: what a loss does with the dimension of the batch only it knows. The passes through the network,
        # which cost the time, stay common to all.
        parts = (self.loss(row_of(output, slice(i * size, (i + 1) * size)), row_of(target, i)) for i in range(n))
        return torch.stack([self._checked(part) for part in parts])

    def _checked(self, loss: Tensor) -> Tensor:
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"Expected the loss to be one number, the mean over the batch, got {got}.")
        return loss.reshape(())


CROSS_ENTROPY = Task()


def row_of(targets: Any, i: Any) -> Any:
    """Those of one batch of several, or of some."""
    return pytree.tree_map(lambda t: t[i] if isinstance(t, Tensor) else t, targets)


def stacked_alone(targets: Any) -> Any:
    """Of one batch, (n, ...) each, those of n batches of one image, (n, 1, ...)."""
    return pytree.tree_map(lambda t: t.unsqueeze(1) if isinstance(t, Tensor) else t, targets)


def flat(targets: Any) -> Any:
    """Of several batches, (n, batch, ...) each, those of all their images, (n * batch, ...)."""
    return pytree.tree_map(lambda t: t.flatten(0, 1) if isinstance(t, Tensor) else t, targets)


def moved(targets: Targets, device: str | torch.device) -> Targets:
    return pytree.tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, targets)


def stacked(targets: Sequence[Targets]) -> Targets:
    """Of several batches, (n, batch, ...) each."""
    return pytree.tree_map(lambda *ts: torch.stack(ts) if isinstance(ts[0], Tensor) else ts[0], *targets)


def tensors_of(targets: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(targets) if isinstance(t, Tensor)]


def in_dtype(tensors: Any, dtype: torch.dtype) -> Any:
    """The same with those of floating point in this dtype."""
    return pytree.tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, tensors)


def _target(targets: Targets) -> Any:
    return targets.target if isinstance(targets, Sample) else targets


def _precise(output: Any, dtype: torch.dtype | None = None) -> Any:
    if dtype is not None:
        return in_dtype(output, dtype)
    # Losses of bfloat16 outputs would be rounded to three digits, and their slopes with them.
    return pytree.tree_map(lambda t: t.float() if isinstance(t, Tensor) and _is_low(t) else t, output)


def _is_low(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype.itemsize < 4
