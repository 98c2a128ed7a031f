"""What an attacker makes of an update that a worker made in several local steps: see `InversionConfig.through`.

Distance and labels are of the messages in any case; what differs is the gradient that candidates are given.
"""

from __future__ import annotations

from dataclasses import replace

from raytrust.config import ONE_STEP, InversionConfig
from raytrust.leak.observation import Observation, decoded


def as_one_gradient(seen: Observation) -> Observation:
    """The observation with its update taken for the gradient of one step, at the weights before it."""
    return replace(seen, local=ONE_STEP)


def at_midpoint(seen: Observation, device: str = "cpu") -> Observation:
    """The observation with its update taken for one gradient at the middle between the weights before and after it.

    To first order in the learning rate the gradient there is the mean of those along a straight path (Zhu, Yao &
    Blaschko 2023, Surrogate Model Extension; they also learn where on the line the point lies, which we leave in the
    middle). The weights after are those to which the decoded update leads.
    """
    halfway = seen.local.steps * seen.local.learning_rate / 2
    update = decoded(seen, device).gradient
    moved = zip(seen.weights.items(), update, strict=True)
    weights = {name: w - halfway * g.to(w.device, w.dtype) for (name, w), g in moved}
    return replace(seen, weights=weights, local=ONE_STEP)


def check_applies(seen: Observation, config: InversionConfig) -> None:
    """Raises ValueError for settings that have no sense where the victim made local steps."""
    if seen.local.steps == 1:
        return
    # Recovered labels come without an order, and which images share a local step would be made up with it.
    unordered = seen.labels is None and seen.targets is None and config.label_recovery != "joint"
    if unordered and config.through == "steps" and seen.local.parts(seen.threat.batch_size):
        raise ValueError(
            "Expected labels to be known, or label_recovery='joint', for through='steps' of parts of a batch: labels "
            "that are recovered don't tell which step each belongs to."
        )
    if config.bn > 0 and seen.buffers_after is not None:
        raise ValueError(
            f"Expected bn={config.bn} to be 0 after {seen.local.steps} local steps: the buffers mix the statistics of "
            "all of them."
        )
