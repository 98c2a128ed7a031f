"""A worker's part in a training, for studies of workers that do otherwise than the protocol says."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, nn

from raytrust.compress import Compressor
from raytrust.train.mixing import Images
from raytrust.wire.channel import Channel


class Part:
    """What a worker does in each step of `raytrust.train.loop.train`: here what the protocol says.

    All workers make the same collectives, the honest with the malicious. looks: after how many steps `look` is called.
    """

    looks: Collection[int] = ()

    def batch(self, own: Images, step: int) -> Images:
        """The images and labels that it trains on, of those that are its own."""
        return own

    def gradient(
        self, grads: Sequence[Tensor], step: int, compressor: Compressor, channel: Channel
    ) -> Sequence[Tensor]:
        """The gradient that it hands to its compressor. What is said on this channel is not counted."""
        return grads

    def reduce(self, compressor: Compressor, grads: Sequence[Tensor], channel: Channel) -> list[Tensor]:
        """The step that it takes, one tensor a parameter."""
        return compressor.reduce(grads, channel).mean

    def look(self, step: int, model: nn.Module) -> None:
        """Look at the model after `step` steps, its buffers averaged over workers, and leave it as it is."""
