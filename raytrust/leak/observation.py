"""What the attacker sees, and what it must not: `Observation` and `Truth`; and what the messages decode to.

A capture is one private batch at one step of training.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raytrust.compress import Compressor, build
from raytrust.config import ONE_STEP, Defence, LocalConfig, ModelConfig, Threat
from raytrust.leak.rules import EarlierStep, decoded_of
from raytrust.networks.build import build_model, copy_of, with_state
from raytrust.networks.task import CROSS_ENTROPY, Targets, Task
from raytrust.wire.channel import Message


@dataclass(frozen=True)
class Observation:
    """All that an attack receives.

    weights, buffers: of the model at this step, by name. messages: those of the private batch's reduction, as the
    threat's vantage shows them. labels: (batch_size,) if the threat grants them, else None. image_shape: (channels,
    height, width). mean, std: (channels,), the public normalisation: the model saw (image - mean) / std of an image in
    [0, 1]. compressor_state: the public state before this reduction. victim: the rank whose batch it is.
    network, task: the model itself where no config describes it, as its owner handed it over (its modules' modes are
    kept), and its loss. targets: what that loss and the network take besides images, where it is more than labels.
    method: what sent the messages where that is no defence's compressor, such as a communication hook, as everyone
    knows it.
    residual: whether the messages hold the residual of earlier steps besides the gradient (of DGC, what its v kept).
    buffers_after: the buffers as the private batch left them, if the threat grants its statistics, else None.
    mixed: the targets that mixing made of the labels, probabilities (batch_size, classes), where a defence mixes images
    and the threat grants the labels, else None.
    local: the steps that the victim made by itself, whose pseudo-gradient the messages are of.
    history: the victim's steps before this one, oldest first: as many as the threat grants and there were.
    auxiliary: other images of the kind, (n, channels, height, width) in [0, 1], none of them private: as many as the
    threat grants, the same in all captures of a training; None where it grants none.
    """

    step: int
    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    messages: tuple[Message, ...]
    compressor_state: dict[str, Tensor]
    defence: Defence
    model: ModelConfig | None
    threat: Threat
    labels: Tensor | None
    image_shape: tuple[int, int, int]
    classes: int
    mean: Tensor
    std: Tensor
    victim: int
    world_size: int
    residual: bool
    buffers_after: dict[str, Tensor] | None = None
    history: tuple[EarlierStep, ...] = ()
    network: nn.Module | None = None
    task: Task = CROSS_ENTROPY
    targets: Targets | None = None
    method: Compressor | None = None
    auxiliary: Tensor | None = None
    mixed: Tensor | None = None
    local: LocalConfig = ONE_STEP

    def build_model(self) -> nn.Module:
        """The model under attack, with its weights and buffers, in the mode that the threat says."""
        if self.network is not None:
            return with_state(copy_of(self.network), {**self.weights, **self.buffers})
        assert self.model is not None
        model = build_model(self.model, self.image_shape[0], self.classes, seed=0)
        model.load_state_dict({**self.weights, **self.buffers})
        return model.train(self.threat.batch_norm == "train")

    def build_compressor(self) -> Compressor:
        """A fresh compressor with the public state, with which the messages are decoded and viewed."""
        if self.method is not None:
            compressor = copy.deepcopy(self.method)
        else:
            compressor = build(self.defence, [w.shape for w in self.weights.values()], names=list(self.weights))
        compressor.load_public_state(self.compressor_state)
        return compressor


@dataclass(frozen=True)
class Truth:
    """The private batch: images (batch, channels, height, width) in [0, 1], labels (batch,), empty where the loss is
    not of classes. For evaluation alone."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Capture:
    """One private batch at one step: what was seen of it, and what it was. `index` numbers the batches of a step."""

    index: int
    seen: Observation
    truth: Truth


class Decoded(NamedTuple):
    """What messages decode to: one tensor a parameter, and of how many images it is the mean gradient."""

    gradient: list[Tensor]
    images: int


def decoded(seen: Observation, device: str = "cpu") -> Decoded:
    """The gradient as a receiver has it: the victim's where the vantage tells workers apart, else all workers' mean."""
    threat, messages = seen.threat, [m.to(device) for m in seen.messages]
    gradient = decoded_of(seen.build_compressor(), messages, threat.vantage, seen.victim)
    alone = threat.vantage == "link" or seen.messages[-1].op == "all_gather"
    return Decoded(gradient, threat.batch_size * (1 if alone else seen.world_size))


def seen_messages(messages: list[Message], threat: Threat) -> tuple[Message, ...]:
    """The messages as the vantage has them: a peer did not see what a worker handed to an all-reduce."""
    if threat.vantage == "link":
        return tuple(messages)
    hidden = [Message(m.op, tuple(torch.empty_like(x, device="meta") for x in m.sent), m.received) for m in messages]
    return tuple(hidden)
