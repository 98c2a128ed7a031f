"""The fast path: layers record what their gradients are made of, for all candidates in one pass there and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from raytrust.networks.build import copy_of
from raytrust.networks.task import Targets, Task, flat, in_dtype
from raytrust.persample.functions import FUNCTIONS
from raytrust.persample.plain import (
    DifferentiableTwice,
    Distance,
    are_trained,
    derivatives,
    precision_of,
    with_inputs_in,
)
from raytrust.persample.rules import NORMS, Rule, rule_of
from raytrust.persample.tape import Call, Tape, by_place
from raytrust.persample.watch import Watch


class Recorded(nn.Module):
    """Mixed into the type of a layer: its calls are recorded."""

    _watch: Watch  # over the whole model
    _rule: Rule
    _places: dict[str, int]  # of its trained parameters in the model, by name

    def forward(self, input: Tensor, *rest: Any, **named: Any) -> Tensor:
        learns = torch.is_grad_enabled()
        if learns and self._watch.is_constant(input):
            return super().forward(input, *rest, **named)
        # What happens inside is known.
        with torch._C.DisableTorchFunction():
            if self._rule.forward is None:
                inputs, output = input, super().forward(input, *rest, **named)
            else:
                inputs, output = self._rule.forward(self, input, self._watch.tape.candidates)
        # Under no_grad, nothing is learnt from what comes out.
        return self._watch.tape.recorded(self, inputs, output) if self._places and learns else output


@cache
def _recorded(kind: Any) -> Any:
    return type(kind.__name__, (Recorded, kind), {})


class FastPath:
    """What the engine asks for, of a copy of a model by the rules of its layers and of the functions that it calls.

    dtype: in which the passes run; sums over positions and the distance are in float32 at least. rows: whether images
    may be laid out as rows of channels, where that is faster. tape: of a path of the same model that was found right.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, task: Task, rows: bool, tape: Tape | None = None):
        self._task, self._precision = task, precision_of(model)
        self._model = copy_of(model).requires_grad_(False)
        self._dtype, self._accumulator = dtype, torch.promote_types(dtype, torch.float32)
        self._shapes = [p.shape for p in model.parameters()]
        trained = enumerate(zip(self._model.parameters(), are_trained(model), strict=True))
        places = {id(p): i for i, (p, t) in trained if t}
        ruled = []
        for layer in self._model.modules():
            # Norms stay precise: what is folded into their scales costs nothing beside a convolution.
            if not isinstance(layer, NORMS) or dtype == self._accumulator:
                layer._apply(lambda t: t.to(dtype) if t.is_floating_point() else t, recurse=False)
            if (rule := rule_of(layer)) is not None:
                names = {name: places[id(p)] for name, p in layer._parameters.items() if id(p) in places}
                vars(layer).update(_rule=rule, _places=names)
                ruled.append(layer)
                # Another type for the same object: attributes that a model reads, and layers that it shares, stay.
                kind: Any = type(layer)
                layer.__class__ = _recorded(kind)
        # Rows of channels suit oneDNN, and tensor cores; cuDNN in float32 prefers planes.
        rows &= dtype != torch.float32 or next(model.parameters()).device.type == "cpu"
        self._format = torch.channels_last if rows else torch.contiguous_format
        self._model.to(memory_format=self._format)
        weights = {i: p for i, p in enumerate(self._model.parameters()) if id(p) in places}
        self.tape = tape or Tape()
        self._watch = Watch(self.tape, weights, FUNCTIONS)
        for layer in ruled:
            vars(layer).update(_watch=self._watch)
        self._keep_buffers()

    def _keep_buffers(self) -> None:
        # Spectral norm in training mode, for one, improves an estimate in every pass; the model is to be left as it is.
        self._buffers = {b: (b.clone(), b._version) for b in self._model.buffers()}

    @torch.no_grad()
    def refresh(self, model: nn.Module) -> None:
        """Take over the weights and buffers of a model like that of which this is."""
        own, others = ([*m.parameters(), *m.buffers()] for m in (self._model, model))
        for kept, value in zip(own, others, strict=True):
            kept.copy_(value)
        self._keep_buffers()

    def gradients(self, x: Tensor, labels: Targets) -> tuple[Tensor, Iterable[tuple[int, Tensor]]]:
        """The losses (n,), and the gradients (n, *shape) by their parameter's place in the model, if they are not
        zeros."""
        losses, calls = self._record(x.detach().requires_grad_(), labels, create_graph=False)
        ends = [t.detach() for call in calls for t in (call.inputs, call.signals) if t is not None]
        return losses, by_place(calls, ends, len(x))

    def match(
        self, x: Tensor, labels: Targets, distance: Distance, leaves: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The distances (n,), and the derivatives of their sum by the leaves that x and labels come from."""
        _, calls = self._record(x, labels, create_graph=True)
        # Cut at each layer's inputs and signals: the distance's derivative by these is had layer by layer, without a
        # graph through gradients; then both passes, transposed, bring it to the leaves.
        ends = [t for call in calls for t in (call.inputs, call.signals) if t is not None]
        cut = [t.detach().requires_grad_(t.requires_grad) for t in ends]
        zero = x.new_zeros((), dtype=self._accumulator)
        gradients = [zero.expand(len(x), *shape) for shape in self._shapes]
        for i, gradient in by_place(calls, cut, len(x)):
            gradients[i] = gradient
        values = distance(gradients)
        pairs = [(end, start) for end, start in zip(ends, cut, strict=True) if end.requires_grad]
        slopes = torch.autograd.grad(values.sum(), [start for _, start in pairs], allow_unused=True)
        reached = [(end, slope) for (end, _), slope in zip(pairs, slopes, strict=True) if slope is not None]
        return values.detach(), derivatives([e for e, _ in reached], leaves, [s for _, s in reached])

    def _record(self, x: Tensor, labels: Targets, create_graph: bool) -> tuple[Tensor, list[Call]]:
        """One forward and one backward pass: the losses (n,), and the calls that have a part in them."""
        tape = self.tape
        tape.begin(len(x), x.shape[0] * x.shape[1])
        for buffer, (kept, version) in self._buffers.items():
            if buffer._version != version:
                self._buffers[buffer] = kept, buffer.copy_(kept)._version
        images = x.flatten(0, 1).to(self._dtype)
        images = images.contiguous(memory_format=self._format) if images.ndim == 4 else images
        with DifferentiableTwice() if create_graph else nullcontext(), self._watch:
            output = self._task.output(self._model, images, flat(with_inputs_in(labels, self._dtype)))
        losses = self._task.losses(
            in_dtype(output, self._accumulator), labels, (x.shape[0], x.shape[1]), self._precision
        )
        torch.autograd.grad(losses.sum(), [x, *tape.starts], create_graph=create_graph, allow_unused=True)
        calls = tape.calls
        tape.begin(0, 0)
        if any(call.inputs._version != call.version for call in calls):
            raise ValueError("Expected the model to leave the inputs of its layers as they are.")
        return losses.detach(), [call for call in calls if call.signals is not None]
