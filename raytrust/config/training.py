"""What is trained, under which threat, and what is captured."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from raytrust.config.defence import Defence
from raytrust.config.register import NETWORKS
from raytrust.config.transforms import SoteriaConfig
from raytrust.config.values import ADDED, expect, expect_choices

WIDTHS = {"resnet18": 64, "convnet": 64, "normed-convnet": 64, "resnet20": 16, "lenet": 12}
WITH_NORM = ("resnet18", "resnet20", "normed-convnet")


@dataclass(frozen=True)
class ModelConfig:
    """The network that is trained.

    resnet18 is torchvision's, with `width` channels in its first stage (64 in the paper of He et al.); convnet three
    convolutions of `width` channels and a linear layer, without a norm; normed-convnet the same with a norm after each
    convolution; resnet20 the ResNet-20 for CIFAR of He et al., with `width` channels in its first stage (16 in their
    paper); lenet three convolutions of `width` channels with sigmoids and a linear layer (Zhu et al. 2019; 12 in their
    paper).

    name: one of these, one that is registered, package.module:function, or torchvision:NAME.
    stem: of resnet18: "cifar" is a 3x3 convolution of stride 1 and no max-pool, "imagenet" torchvision's 7x7 stem.
    norm: of resnet18, resnet20 and normed-convnet: batch norm, or group norm of 8 channels a group, which mixes no
        images.
    width: channels of the first stage; by default that of the paper, and 64 for convnet. Other networks are given it
        where it is set.
    options: further options of a network that is not shipped, on a command line as depth=3,bias=False.
    checkpoint: a file of weights to begin with, as torch.save made it of a state dict; kept with its digest, see
        `raytrust.networks.checkpoint.identified`.
    """

    name: Annotated[str, NETWORKS] = "resnet18"
    stem: Literal["cifar", "imagenet"] = "cifar"
    width: int | None = None
    norm: Literal["batch", "group"] = field(default="batch", metadata=ADDED)
    options: tuple[tuple[str, int | float | bool | str], ...] = field(default=(), metadata=ADDED)
    checkpoint: str = field(default="", metadata=ADDED)

    def __post_init__(self) -> None:
        expect_choices(self)
        if self.width is None:
            # The default depends on the network, so that it can't stand at the field, and a frozen class sets nothing
            # else.
            object.__setattr__(self, "width", WIDTHS.get(self.name))
        expect(self.width is None or 1 <= self.width <= 1024, "width", self.width, "in [1, 1024]")
        normed = self.norm == "batch" or self.name in WITH_NORM
        expect(normed, "norm", self.norm, f"to be 'batch' for {self.name}: {', '.join(WITH_NORM)} have the choice")
        named = [name for name, _ in self.options]
        expect(len(set(named)) == len(named), "options", self.options, "to give each option once")
        # In one order, so that equal networks have one digest.
        object.__setattr__(self, "options", tuple(sorted(self.options)))
        empty = f"to be empty for {self.name}, which has stem and width"
        expect(not (self.options and self.shipped), "options", self.options, empty)

    @property
    def shipped(self) -> bool:
        """Whether it is one of the package's own."""
        return self.name in WIDTHS

    @property
    def title(self) -> str:
        """In words, such as "resnet18 of width 16"."""
        options = ", ".join(f"{name} {value}" for name, value in self.options)
        width = "" if self.width is None else f" of width {self.width}"
        weights = f", weights of {self.checkpoint.rpartition('/')[2].partition('#')[0]}" * bool(self.checkpoint)
        norm = ", group norm" * (self.norm == "group")
        return f"{self.name}{width}{norm}" + (f" ({options})" if options else "") + weights


@dataclass(frozen=True)
class Threat:
    """What the attacker can see, and how the private gradient comes about. It stands in every result.

    vantage: "link" sees one worker's own messages (a server, a wire-tap); "peer" sees what the collective returned.
    batch_size: images in the private batch; the attacker knows it.
    batch_norm: the mode in which the private gradient is taken: "eval" uses the running statistics, which the attacker
        knows as buffers of the model; "train" uses the statistics of the private batch itself.
    labels: "known" grants the private labels to the attacker, and, where a defence mixes images, the targets that it
        makes of them; "unknown" does not.
    batch_statistics: "known" grants the batch-norm buffers as the private batch left them, as a server that collects
        them has it, and with them the statistics of that batch; without effect in mode "eval". "proxy" has them
        estimated from the auxiliary images instead, in either mode.
    history: of how many preceding steps the attacker also holds the same worker's training messages, as the vantage
        shows them. Under error feedback they tell parts of the gradient from the residual of earlier steps.
    auxiliary: how many other images of the data set the attacker holds, none of them private: training images that are
        drawn by the seed, see `raytrust.train.private.auxiliary_images`.
    """

    vantage: Literal["link", "peer"] = "link"
    batch_size: int = 1
    batch_norm: Literal["eval", "train"] = "eval"
    labels: Literal["known", "unknown"] = "known"
    batch_statistics: Literal["unknown", "known", "proxy"] = "unknown"
    history: int = 0
    auxiliary: int = field(default=0, metadata=ADDED)

    def __post_init__(self) -> None:
        expect_choices(self)
        expect(self.history >= 0, "history", self.history, "to be at least 0")
        expect(self.batch_size >= 1, "batch_size", self.batch_size, "to be at least 1")
        expect(self.auxiliary >= 0, "auxiliary", self.auxiliary, "to be at least 0")
        # Statistics are estimated from batches of the private batch's size, of which there must be one.
        enough = self.batch_statistics != "proxy" or self.auxiliary >= self.batch_size
        least = f"to be at least the size of the private batch, {self.batch_size}, for batch_statistics='proxy'"
        expect(enough, "auxiliary", self.auxiliary, least)


@dataclass(frozen=True)
class CaptureConfig:
    """Which steps of training are captured, and for how many private batches.

    The two sets of batches share no image, and both are the same for every defence of one seed, so that defences are
    compared in pairs.

    steps: of training at which messages are captured.
    tuning: private batches on which attacks are chosen.
    evaluation: further private batches, on which leakage is reported.
    """

    steps: tuple[int, ...] = (0,)
    # An attack that is chosen on the images it is reported on looks stronger than it is: hence two sets.
    tuning: int = 2
    evaluation: int = 4

    def __post_init__(self) -> None:
        expect(len(self.steps) > 0, "steps", self.steps, "to name at least one step")
        expect(min(self.steps, default=0) >= 0, "steps", self.steps, "to be at least 0")
        expect(list(self.steps) == sorted(set(self.steps)), "steps", self.steps, "in increasing order, each once")
        expect(self.tuning >= 1, "tuning", self.tuning, "to be at least 1")
        expect(self.evaluation >= 1, "evaluation", self.evaluation, "to be at least 1")


@dataclass(frozen=True)
class LocalConfig:
    """The steps that a worker makes by itself in a round, before it sends (FedAvg, McMahan et al. 2017).

    They are plain SGD, without momentum and weight decay. What is sent in place of a gradient is the pseudo-gradient
    (weights before - weights after) / (steps x learning_rate) (Reddi et al. 2021, Algorithm 1, but for the factor that
    keeps its size): the mean of the local gradients along their path.

    steps: of each worker in a round; 1 sends the gradient itself, with which the learning rate has no effect.
    learning_rate: of the local steps; the attacker knows it.
    batch_size: images of one local step, which takes the next ones of the worker's batch, from the first again after
        the last; by default all of them. The attacker knows the order.
    """

    steps: int = 1
    learning_rate: float = 0.01
    # To know which images go together makes the attacker as strong as he can be: the victim could draw the order.
    batch_size: int | None = None

    def __post_init__(self) -> None:
        expect(self.steps >= 1, "steps", self.steps, "to be at least 1")
        expect(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "to be positive and finite")
        expect(self.batch_size is None or self.batch_size >= 1, "batch_size", self.batch_size, "to be at least 1")
        alone = "to be given with local steps of 2 and more: one step takes the whole batch"
        expect(self.batch_size is None or self.steps > 1, "batch_size", self.batch_size, alone)

    def rows(self, size: int) -> list[slice | list[int]]:
        """Which images of a batch of this size each step takes; a batch of no more than `batch_size` is taken whole."""
        if not self.parts(size):
            return [slice(None)] * self.steps
        assert self.batch_size is not None
        starts = range(0, self.steps * self.batch_size, self.batch_size)
        return [[i % size for i in range(start, start + self.batch_size)] for start in starts]

    def parts(self, size: int) -> bool:
        """Whether a step takes a part of a batch of this size."""
        return self.batch_size is not None and self.batch_size < size

    def check_takes_all(self, size: int) -> None:
        """Raises ValueError if an image of a private batch of this size has no part in what is sent."""
        if self.parts(size) and self.steps * (self.batch_size or 0) < size:
            raise ValueError(
                f"Expected {self.steps} local steps of batch_size={self.batch_size} to take each of the {size} images "
                "of a private batch."
            )

    @property
    def title(self) -> str:
        """In words, such as "4 local steps of 2 images, learning rate 0.01"; empty for one step."""
        if self.steps == 1:
            return ""
        images = "the whole batch" if self.batch_size is None else f"{self.batch_size} images"
        return f"{self.steps} local steps of {images}, learning rate {self.learning_rate:g}"


ONE_STEP = LocalConfig()


@dataclass(frozen=True)
class TrainConfig:
    """One training run: everything that decides what crosses the wire, but for the data.

    The optimiser is SGD with Nesterov momentum, on the mean gradient of all workers, or on the mean of what local steps
    make of it.

    workers: how many train together.
    batch_size: images a worker and step.
    steps: how long training is; 0 attacks and tests the model as it is.
    learning_rate: the peak of a schedule that rises over the first tenth of the steps and then falls linearly to zero.
    momentum: of the optimiser, in [0, 1).
    weight_decay: of the optimiser, on all parameters.
    seed: of everything that is random.
    """

    defence: Defence = field(default_factory=Defence)
    model: ModelConfig = field(default_factory=ModelConfig)
    threat: Threat = field(default_factory=Threat)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    workers: int = 2
    batch_size: int = 64
    steps: int = 200
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0
    local: LocalConfig = field(default=ONE_STEP, metadata=ADDED)

    def __post_init__(self) -> None:
        expect(self.workers >= 1, "workers", self.workers, "to be at least 1")
        expect(self.batch_size >= 1, "batch_size", self.batch_size, "to be at least 1")
        expect(self.steps >= 0, "steps", self.steps, "to be at least 0")
        expect(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "to be positive and finite")
        expect(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        expect(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "to be at least 0 and finite")
        expect(0 <= self.seed < 2**31, "seed", self.seed, "in [0, 2**31)")
        # Nothing is trained in the other mode, in which images do not meet.
        in_training = self.steps > 0 or self.threat.batch_norm == "train"
        mixes = in_training and self.model.name in WITH_NORM and self.model.norm == "batch"
        without = "to be 'group' with dp-sgd, which clips the gradient of each image, as a batch norm mixes them"
        expect(self.defence.dp_sgd is None or not mixes, "norm", self.model.norm, without)
        whole = self.defence.dp_sgd is None or self.steps == 0 or self.local.batch_size is None
        parts = "to be left out with dp-sgd, as one image more would move others to another local step"
        expect(whole, "local_batch_size", self.local.batch_size, parts)
        one = not isinstance(self.defence.of_images, SoteriaConfig) or self.local.steps == 1
        expect(one, "local_steps", self.local.steps, "to be 1 with soteria, which prunes the gradient of a batch")
        mixing = self.defence.mixing
        enough = mixing is None or self.steps == 0 or mixing.images <= self.batch_size
        expect(enough, "batch_size", self.batch_size, f"to be at least the images of {mixing and mixing.name}")
        self.local.check_takes_all(self.threat.batch_size)
        # Steps are in increasing order, so that the last is the largest.
        within = self.capture.steps[-1] < max(1, self.steps)
        expect(within, "capture.steps", self.capture.steps, f"to lie below steps={self.steps}, the length of training")
