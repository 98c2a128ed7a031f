"""A model as its owner trains it: its gradient of private images, and what of it would cross the wire.

All that would make an attack on it meaningless is refused here in a line, before anything is attacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from raytrust.compress import Compressor, HookCompressor, Transformed, build, for_private_batch
from raytrust.config import ONE_STEP, Defence, LocalConfig, MixupConfig, Threat
from raytrust.leak import identity_view
from raytrust.leak.history import holds_residual
from raytrust.leak.observation import Capture, Observation, Truth
from raytrust.networks.build import copy_of
from raytrust.networks.kernels import sound_kernels
from raytrust.networks.task import Sample, Targets, Task, row_of
from raytrust.persample.matcher import GradientMatcher
from raytrust.studies.audit.private import Private
from raytrust.train.clipped import ClippedGradients
from raytrust.train.gradient import gradients_of_images
from raytrust.train.local import pseudo_gradient
from raytrust.train.mixing import Images, Mixing
from raytrust.train.soteria import SoteriaGradients
from raytrust.wire.channel import LocalChannel, Tap

# Of two gradients of the same batch, relative: more than kernels that add in another order make of it, in float32.
TWICE = 1e-3
# 1 - cosine at the true image, in float32 and in less: rounding leaves 1e-6, a wrong loss 0.05 and more.
AT_TRUTH, AT_TRUTH_HALF = 1e-3, 2e-2


class Victim:
    """A private copy of the model on the CPU, and the gradient that its owner would compute.

    Modules stay in the modes in which they are, but dropout is off: of `network`, which the attacker has, too. With
    `dropout` the owner drops out where it was on. mean, std: (channels,), with which images are normalised. local: the
    steps that the owner makes before it sends.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        mean: Tensor,
        std: Tensor,
        dropout: bool = False,
        local: LocalConfig = ONE_STEP,
    ):
        if any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters()):
            # A copy would lose them, and with them what they do to the gradient.
            raise ValueError("Expected parameters without hooks of their own: make what they do a defence.")
        self.network, self.task, self.mean, self.std = copy_of(model).cpu(), task, mean, std
        self.local = local
        modules = self.network.named_modules()
        self.dropouts = [name for name, m in modules if m.training and _drops(m)]
        self.drops = dropout and bool(self.dropouts)
        # The mask is nothing that an attacker could know: without it he is as strong as he can be.
        for name in self.dropouts:
            self.network.get_submodule(name).eval()
        if not any(p.requires_grad for p in self.network.parameters()):
            raise ValueError("Expected a model with parameters that are trained, got none that requires a gradient.")
        self.dtype = next(p.dtype for p in self.network.parameters() if p.is_floating_point())
        # Whatever the owner computes in, the attacker's derivatives are in float32.
        self.known = copy_of(self.network).float()
        self.classes = 0  # of cross-entropy, once `check` has seen them

    @property
    def trains_norms(self) -> bool:
        return any(isinstance(m, _BatchNorm) and m.training for m in self.network.modules())

    def seen(self, images: Tensor) -> Tensor:
        """Images as the model sees them."""
        return (images - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)

    @contextmanager
    def _drawing(self, network: nn.Module, seed: int, drops: bool) -> Iterator[None]:
        """What is random in the network comes from this seed, and the caller's generator is left as it is."""
        dropouts = [network.get_submodule(name) for name in self.dropouts if drops]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in dropouts:
                module.train()
            try:
                yield
            finally:
                for module in dropouts:
                    module.eval()

    def drawing(self, network: nn.Module, step: int) -> AbstractContextManager[None]:
        """For a step of training, which drops out as the owner does."""
        return self._drawing(network, step, self.drops)

    def gradient(
        self, network: nn.Module, x: Tensor, targets: Targets, seed: int = 0, drops: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss of a batch x, as the model sees it, and the gradients of the trained parameters, float32, or the
        pseudo-gradients of local steps.

        The network is left as it was. Raises ValueError for what the model and its loss can't take.
        """
        # On a copy: what a model keeps of its pass, in buffers or attributes, must not stay where an attacker looks.
        network = copy_of(network)
        try:
            with sound_kernels(network), self._drawing(network, seed, drops), torch.enable_grad():
                loss, grads = self.update(network, x, targets)
        # A model and a loss raise whatever they like for what they can't take.
        except Exception as error:
            taken = f"Expected the model and its loss to take images {tuple(x.shape)} and their labels"
            raise ValueError(f"{taken}, but {_first_line(error)}") from error
        return loss, [g.float() for g in grads]

    def update(self, network: nn.Module, x: Tensor, targets: Targets) -> tuple[Tensor, Sequence[Tensor]]:
        """The same of this network itself, whose weights stay and whose buffers move, in its own precision."""
        parameters = [p for p in network.parameters() if p.requires_grad]
        x, targets = x.to(self.dtype), self._in_dtype(targets)

        def gradient(rows: Any) -> tuple[Tensor, list[Tensor]]:
            loss = self.task.batch_loss(network, x[rows], row_of(targets, rows))
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            pairs = zip(grads, parameters, strict=True)
            return loss.detach(), [torch.zeros_like(p) if g is None else g for g, p in pairs]

        return pseudo_gradient(parameters, self.local, len(x), gradient)

    def _handed_over(
        self, network: nn.Module, compressor: Compressor, x: Tensor, targets: Targets, step: int, index: int
    ) -> Sequence[Tensor]:
        """What the owner would hand to this compressor for private batch `index`."""
        network = copy_of(network)
        special = self.of_images(network, compressor)
        if special is None:
            return self.gradient(network, x, targets, seed=index, drops=self.drops)[1]
        with self._drawing(network, index, self.drops):
            return [g.float() for g in special(x.to(self.dtype), self._in_dtype(targets), step, private=index)[1]]

    def of_images(self, network: nn.Module, compressor: Compressor) -> ClippedGradients | SoteriaGradients | None:
        """What makes the gradients of a network for a compressor with a transform that needs to know the images."""
        if not isinstance(compressor, Transformed) or (config := compressor.of_images) is None:
            return None
        gradients = gradients_of_images(network, config, compressor.seed, self.task, self.local)
        if isinstance(gradients, SoteriaGradients) and self.local.steps > 1:
            takes = "which takes the gradient of one step"
            raise ValueError(f"Expected local_steps={self.local.steps} to be 1 with {config.method}, {takes}.")
        return gradients

    def mixed(
        self, compressor: Compressor, x: Tensor, targets: Targets, step: int,
        private: int | None = None, others: Private | None = None,
    ) -> tuple[Tensor, Targets]:  # fmt: skip
        """A batch as the owner mixes it for a compressor with such a transform, and its targets; else as it is.

        others: what a private batch is mixed with that is too small to be mixed within itself.
        """
        config = compressor.of_images if isinstance(compressor, Transformed) else None
        if not isinstance(config, MixupConfig):
            return x, targets
        if self.classes == 0 or not isinstance(targets, Tensor):
            raise ValueError(f"Expected cross-entropy of images alone for {config.method}, which mixes labels.")
        mixing, more = Mixing(config, compressor.seed, self.classes), None  # type: ignore[attr-defined]
        if others is not None and isinstance(others.targets, Tensor):
            more = Images(self.seen(others.images), others.targets)
        x, mixed = mixing(Images(x, targets), step, private=private, others=more)
        return x, mixed.to(torch.promote_types(self.dtype, torch.float32))

    def check(self, data: Private, size: int) -> int:
        """How many classes there are, 0 where the loss is the owner's. Raises ValueError for a model that can't be
        audited: a gradient of zero or not finite, that differs from one time to the next, or that the attacker, who has
        the model and its loss, would not get from the true images."""
        batch = data.batch(0, size)
        x, targets = self.seen(batch.images), batch.targets
        classes = self._classes(x, targets, data.targets)
        self.classes = classes
        _, first = self.gradient(self.network, x, targets, seed=1)
        if not all(bool(g.isfinite().all()) for g in first):
            raise ValueError("Expected a finite gradient of these images, got NaN or infinity in it.")
        length = torch.stack([g.norm() for g in first]).norm()
        if length == 0:
            raise ValueError("Expected a gradient of these images, got zero: no parameter has a part in the loss.")
        _, again = self.gradient(self.network, x, targets, seed=2)
        apart = float(torch.stack([(a - b).norm() for a, b in zip(first, again, strict=True)]).norm() / length)
        if apart > TWICE:
            raise ValueError(
                f"Expected a model that answers twice alike, got gradients of the same images that differ by "
                f"{apart:.1%}: something in it, or in its loss, draws random numbers (of F.dropout: model.eval())."
            )
        distance, _ = GradientMatcher(copy_of(self.known), task=self.task, local=self.local)(
            x[None], row_of(targets, None), lambda grads: identity_view(first).distance(self._sent(grads))
        )
        limit = AT_TRUTH if self.dtype.itemsize >= 4 else AT_TRUTH_HALF
        if not float(distance) <= limit:
            raise ValueError(
                "Expected the gradient that an attacker computes from the true images to be the one that is sent, got "
                f"a distance of {float(distance):.2g}."
            )
        return classes

    def _in_dtype(self, targets: Targets) -> Targets:
        """With the network's other inputs in its own precision."""
        if not isinstance(targets, Sample):
            return targets
        inputs = {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in targets.inputs.items()}
        return Sample(targets.target, inputs)

    def _sent(self, grads: Sequence[Tensor]) -> list[Tensor]:
        return [g for g, p in zip(grads, self.network.parameters(), strict=True) if p.requires_grad]

    @torch.no_grad()
    def _classes(self, x: Tensor, targets: Targets, every: Targets) -> int:
        if self.task.loss is not None:
            return 0
        network = copy_of(self.network)
        try:
            output = self.task.output(network, x.to(self.dtype), self._in_dtype(targets))
        except Exception as error:
            raise ValueError(f"Expected the model to take images {tuple(x.shape)}, but {_first_line(error)}") from error
        labels = every.target if isinstance(every, Sample) else every
        if not isinstance(output, Tensor) or output.ndim != 2:
            got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"Expected logits (n, classes) from the model, got {got}; give loss= for other outputs.")
        if not bool(((labels >= 0) & (labels < output.shape[1])).all()):
            ends = f"[{labels.min()}, {labels.max()}]"
            raise ValueError(f"Expected labels in [0, {output.shape[1]}), the classes of the model, got {ends}.")
        return output.shape[1]

    def captures(
        self, network: nn.Module, compressor: Compressor, defence: Defence, first: Compressor | None, threat: Threat,
        data: Private, classes: int, state: State, step: int, auxiliary: Tensor | None = None,
    ) -> list[Capture]:  # fmt: skip
        """What each private batch would have sent at this step of the network's training, with this compressor.

        first: the compressor in its first state, where it is not what `defence` says. state: of the network, shared by
        all its captures, as are the attacker's auxiliary images.
        """
        captured = []
        # The attacker has the method and its public state of now, and no residual.
        twin = compressor.as_seen() if isinstance(compressor, HookCompressor) else first
        for index in range(len(data.images) // threat.batch_size):
            batch = data.batch(index, threat.batch_size)
            granted = threat.labels == "known"
            labels = batch.targets if self.task.loss is None and isinstance(batch.targets, Tensor) else None
            rest = data.without(index, threat.batch_size)
            x, targets = self.mixed(compressor, self.seen(batch.images), batch.targets, step, index, rest)
            gradient = self._handed_over(network, compressor, x, targets, step, index)
            if not all(bool(g.isfinite().all()) for g in gradient):
                raise FloatingPointError(f"The gradient of private batch {index} is not finite at step {step}.")
            tap = Tap(LocalChannel(), keep=True)
            # A copy, or error feedback would carry what a private batch left into the next.
            for_private_batch(compressor, index).reduce(gradient, tap)
            seen = Observation(
                step=step,
                weights=state.weights,
                buffers=state.others,
                messages=tuple(tap.messages),
                compressor_state=compressor.public_state(),
                defence=defence,
                model=None,
                threat=threat,
                labels=labels if granted else None,
                image_shape=(batch.images.shape[1], batch.images.shape[2], batch.images.shape[3]),
                classes=classes,
                mean=self.mean,
                std=self.std,
                victim=0,
                world_size=1,
                residual=holds_residual(compressor) and step > 0,
                network=self.known,
                task=self.task,
                targets=batch.targets if labels is None else None,
                mixed=targets.float() if granted and targets is not batch.targets else None,  # type: ignore[union-attr]
                method=twin,
                auxiliary=auxiliary,
                local=self.local,
            )
            captured.append(Capture(index, seen, Truth(batch.images, torch.empty(0) if labels is None else labels)))
        return captured


@dataclass(frozen=True)
class State:
    """Of a network, by name. weights: what is trained, so what gradients are sent of. others: frozen, and buffers."""

    weights: dict[str, Tensor]
    others: dict[str, Tensor]

    @classmethod
    def of(cls, network: nn.Module) -> State:
        named = {name: p.detach().clone() for name, p in network.named_parameters()}
        trained = {name for name, p in network.named_parameters() if p.requires_grad}
        buffers = {name: b.detach().clone() for name, b in network.named_buffers()}
        frozen = {name: value for name, value in named.items() if name not in trained}
        return cls({name: value for name, value in named.items() if name in trained}, {**frozen, **buffers})


def _drops(module: nn.Module) -> bool:
    """Whether this module by itself drops out in training mode."""
    return isinstance(module, _DropoutNd) or (
        isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"


def compressor_of(defence: Defence, state: State, seed: int) -> Compressor:
    return build(defence, [w.shape for w in state.weights.values()], seed, list(state.weights), private_seed=seed)
