"""Transforms of a worker's gradient, and then a compressor."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from raytrust.compress.interface import Compressor, FlatGradients, Layout, Reduced, Scratch, Vantage
from raytrust.compress.state import State, expect_tensors, metadata_of
from raytrust.config import to_dict
from raytrust.config.method import TransformConfig
from raytrust.config.register import TRANSFORM_METHODS
from raytrust.defend import Transform, private_generator
from raytrust.wire.channel import Channel, Message

_STEP = "transform_step"


class Transformed:
    """Changes a worker's gradient by transforms, in their order, and reduces it with the compressor inside.

    seed: of what is random in them, which is the worker's own, and private: a function of the seed, the step, the rank
    and `draw`. It is not the compressor's, which all workers share and some states tell. Who protects something gives
    none that can be guessed, and never the same one twice.
    draw: tells private batches apart that meet copies of one compressor, see `for_private_batch`.
    """

    def __init__(self, inner: Compressor, configs: Sequence[TransformConfig], seed: int):
        self.inner, self.configs, self.seed, self.step, self.draw = inner, tuple(configs), seed, 0, 0
        self.transforms: list[Transform] = [TRANSFORM_METHODS[config.method](config) for config in configs]
        self._scratch = Scratch()

    @property
    def layout(self) -> Layout:
        return self.inner.layout

    @property
    def of_images(self) -> TransformConfig | None:
        """What has to be done where the images are known, to the gradients that it is handed."""
        return next((config for config in self.configs if config.of_images), None)

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        device = grads[0].device if grads else torch.device("cpu")
        flat = self._scratch("transformed", self.layout.entries, torch.empty(0, device=device))
        self.layout.check(grads)
        if grads:
            torch.cat([g.detach().reshape(-1) for g in grads], out=flat)
        changed = FlatGradients(flat, self.layout)
        generator = private_generator(self.seed, self.step, channel.rank, self.draw, device=device)
        for transform in self.transforms:
            transform(changed, generator)
        self.step += 1
        return self.inner.reduce(changed, channel)

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        return self.inner.decode(messages, vantage)

    # Neither seed nor step are in it: together they would give the noise away.
    def public_state(self) -> dict[str, Tensor]:
        return self.inner.public_state()

    def load_public_state(self, state: dict[str, Tensor]) -> None:
        self.inner.load_public_state(state)

    def state_dict(self) -> State:
        state = self.inner.state_dict()
        config = state["metadata"]["config"] | {"transforms": [to_dict(config) for config in self.configs]}
        return state | {"metadata": state["metadata"] | {"config": config}, _STEP: torch.tensor(self.step)}

    def load_state_dict(self, state: State) -> None:
        held, own = metadata_of(state), [to_dict(config) for config in self.configs]
        config = dict(held.get("config") or {})
        if (others := config.pop("transforms", [])) != own:
            raise ValueError(f"Expected state of transforms={own}, got one of transforms={others}.")
        expect_tensors({key: x for key, x in state.items() if key == _STEP}, {_STEP: torch.tensor(0)})
        inner = {key: x for key, x in state.items() if key != _STEP}
        self.inner.load_state_dict(inner | {"metadata": held | {"config": config}})
        self.step = int(state[_STEP])


def for_private_batch(compressor: Compressor, index: int) -> Compressor:
    """A copy of a compressor that a private batch is to be sent by, which draws as it would for no other batch."""
    compressor = copy.deepcopy(compressor)
    if isinstance(compressor, Transformed):
        # From 1 on, as training itself draws with 0.
        compressor.draw = 1 + index
    return compressor
