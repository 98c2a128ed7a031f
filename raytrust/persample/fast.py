"""The fast path: layers record what their gradients are made of, for all candidates in one pass there and back."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from raytrust.networks.task import Targets, Task, flat, in_dtype
from raytrust.persample.plain import Distance, are_trained, derivatives, precision_of, with_inputs_in
from raytrust.persample.rules import NORMS, RULES, Rule, rule_of


@dataclass(eq=False)
class Call:
    """One layer's part in a pass over all candidates."""

    layer: Recorded
    inputs: Tensor  # (candidates * batch, ...)
    version: int  # of the inputs, which nothing may overwrite
    signals: Tensor | None = None  # like the output


class Tape:
    """The calls of a pass over the images of `candidates`."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.starts: list[Tensor] = []
        self.candidates = self.images = 0

    def begin(self, candidates: int, images: int) -> None:
        self.calls, self.starts, self.candidates, self.images = [], [], candidates, images

    def recorded(self, layer: Recorded, inputs: Tensor, output: Tensor) -> Tensor:
        """The output of a call, which from now on has a part in the pass."""
        if not output.requires_grad:
            # No image had a part in it so far. To each it is a number that the loss depends on, a row an image.
            inputs, output = (t if len(t) == self.images else _rows(t, self.images) for t in (inputs, output))
            output = output.detach().requires_grad_()
            self.starts.append(output)
        call = Call(layer, inputs, inputs._version)
        self.calls.append(call)
        # A hook on the tensor sees the derivative at this point, also where a ReLU then overwrites the output; one on
        # the module would see it after that.
        output.register_hook(partial(setattr, call, "signals"))
        # Of a leaf, which could not be overwritten.
        return output.view_as(output) if output.is_leaf else output


def _rows(t: Tensor, images: int) -> Tensor:
    """One row an image of what all share: its first dimension is the images' if that is 1."""
    return t.expand(images, *t.shape[1:]) if len(t) == 1 else t.expand(images, *t.shape)


class Recorded(nn.Module):
    """Mixed into the type of a layer: its calls are recorded."""

    _tape: Tape  # of the whole model
    _rule: Rule
    _places: dict[str, int]  # of its trained parameters in the model, by name

    def forward(self, input: Tensor, *rest: Any, **named: Any) -> Tensor:
        if self._rule.forward is None:
            inputs, output = input, super().forward(input, *rest, **named)
        else:
            inputs, output = self._rule.forward(self, input, self._tape.candidates)
        # Under no_grad, nothing is learnt from what comes out.
        return self._tape.recorded(self, inputs, output) if self._places and torch.is_grad_enabled() else output


@cache
def _recorded(kind: Any) -> Any:
    return type(kind.__name__, (Recorded, kind), {})


def without_rule(model: nn.Module) -> list[str]:
    """The types of the layers with trained parameters that no rule is true of."""
    trained = {id(p) for p, t in zip(model.parameters(), are_trained(model), strict=True) if t}
    layers = [m for m in model.modules() if any(id(p) in trained for p in m._parameters.values()) and not rule_of(m)]
    return sorted({type(m).__name__ + " as it is here" * (type(m) in RULES) for m in layers})


class FastPath:
    """What the engine asks for, of a copy of a model whose trained layers all have a rule.

    dtype: in which the passes run; sums over positions and the distance are in float32 at least. rows: whether images
    may be laid out as rows of channels, where that is faster.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, task: Task, rows: bool):
        self._task, self._precision = task, precision_of(model)
        self._model, self._tape = copy.deepcopy(model).requires_grad_(False), Tape()
        self._dtype, self._accumulator = dtype, torch.promote_types(dtype, torch.float32)
        self._shapes = [p.shape for p in model.parameters()]
        trained = enumerate(zip(self._model.parameters(), are_trained(model), strict=True))
        places = {id(p): i for i, (p, t) in trained if t}
        for layer in self._model.modules():
            # Norms stay precise: what is folded into their scales costs nothing beside a convolution.
            if not isinstance(layer, NORMS) or dtype == self._accumulator:
                layer._apply(lambda t: t.to(dtype) if t.is_floating_point() else t, recurse=False)
            if (rule := rule_of(layer)) is not None:
                names = {name: places[id(p)] for name, p in layer._parameters.items() if id(p) in places}
                vars(layer).update(_tape=self._tape, _rule=rule, _places=names)
                # Another type for the same object: attributes that a model reads, and layers that it shares, stay.
                kind: Any = type(layer)
                layer.__class__ = _recorded(kind)
        # Rows of channels suit oneDNN, and tensor cores; cuDNN in float32 prefers planes.
        rows &= dtype != torch.float32 or next(model.parameters()).device.type == "cpu"
        self._format = torch.channels_last if rows else torch.contiguous_format
        self._model.to(memory_format=self._format)

    def gradients(self, x: Tensor, labels: Targets) -> tuple[Tensor, Iterable[tuple[int, Tensor]]]:
        """The losses (n,), and the gradients (n, *shape) by their parameter's place in the model, if they are not
        zeros."""
        losses, calls = self._record(x.detach().requires_grad_(), labels, create_graph=False)
        ends = [t.detach() for call in calls for t in (call.inputs, call.signals) if t is not None]
        return losses, self._by_place(calls, ends, len(x))

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
        for i, gradient in self._by_place(calls, cut, len(x)):
            gradients[i] = gradient
        values = distance(gradients)
        pairs = [(end, start) for end, start in zip(ends, cut, strict=True) if end.requires_grad]
        slopes = torch.autograd.grad(values.sum(), [start for _, start in pairs], allow_unused=True)
        reached = [(end, slope) for (end, _), slope in zip(pairs, slopes, strict=True) if slope is not None]
        return values.detach(), derivatives([e for e, _ in reached], leaves, [s for _, s in reached])

    def _record(self, x: Tensor, labels: Targets, create_graph: bool) -> tuple[Tensor, list[Call]]:
        """One forward and one backward pass: the losses (n,), and the calls that have a part in them."""
        self._tape.begin(len(x), x.shape[0] * x.shape[1])
        images = x.flatten(0, 1).to(self._dtype)
        images = images.contiguous(memory_format=self._format) if images.ndim == 4 else images
        output = self._task.output(self._model, images, flat(with_inputs_in(labels, self._dtype)))
        losses = self._task.losses(
            in_dtype(output, self._accumulator), labels, (x.shape[0], x.shape[1]), self._precision
        )
        torch.autograd.grad(losses.sum(), [x, *self._tape.starts], create_graph=create_graph, allow_unused=True)
        calls = self._tape.calls
        self._tape.begin(0, 0)
        if any(call.inputs._version != call.version for call in calls):
            raise ValueError("Expected the model to leave the inputs of its layers as they are.")
        return losses.detach(), [call for call in calls if call.signals is not None]

    def _by_place(self, calls: Sequence[Call], ends: Sequence[Tensor], n: int) -> Iterator[tuple[int, Tensor]]:
        """Each gradient as soon as it is complete, so that no more than a layer's need be held; ends: inputs and
        signals of each call in turn."""
        uses = Counter(i for call in calls for i in call.layer._places.values())
        sums: dict[int, Tensor] = {}
        for call, inputs, signals in zip(calls, ends[::2], ends[1::2], strict=True):
            parts = call.layer._rule.gradients(call.layer, inputs, signals, n)
            for name, i in call.layer._places.items():
                sums[i] = sums[i] + parts[name] if i in sums else parts[name]
                uses[i] -= 1
                if not uses[i]:
                    yield i, sums.pop(i)
