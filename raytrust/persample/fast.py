"""The fast path: layers record what their gradients are made of, for all candidates in one pass there and back."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrust.persample.plain import Distance, are_trained, derivatives
from raytrust.persample.rules import NORMS, RULES, Rule, rule_of


@dataclass(eq=False)
class Call:
    """One layer's part in a pass over all candidates."""

    layer: Recorded
    inputs: Tensor  # (candidates * batch, ...)
    version: int  # of the inputs, which nothing may overwrite
    signals: Tensor | None = None  # like the output


class Recorded(nn.Module):
    """Mixed into the type of a layer: its calls are recorded."""

    _tape: SimpleNamespace  # of the whole model: the calls of a pass, and how many candidates it is for
    _rule: Rule
    _places: dict[str, int]  # of its trained parameters in the model, by name

    def forward(self, input: Tensor, *rest: Any, **named: Any) -> Tensor:
        if self._rule.forward is None:
            inputs, output = input, super().forward(input, *rest, **named)
        else:
            inputs, output = self._rule.forward(self, input, self._tape.candidates)
        if self._places:
            if not output.requires_grad:
                raise ValueError(f"Expected what comes out of {self} to depend on the images.")
            call = Call(self, inputs, inputs._version)
            self._tape.calls.append(call)
            # A hook on the tensor sees the derivative at this point, also where a ReLU then overwrites the output; one
            # on the module would see it after that.
            output.register_hook(partial(setattr, call, "signals"))
        return output


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

    def __init__(self, model: nn.Module, dtype: torch.dtype, rows: bool):
        self._model, self._tape = copy.deepcopy(model).requires_grad_(False), SimpleNamespace()
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

    def gradients(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Iterable[tuple[int, Tensor]]]:
        """The losses (n,), and the gradients (n, *shape) by their parameter's place in the model, if they are not
        zeros."""
        losses, calls = self._record(x.detach().requires_grad_(), labels, create_graph=False)
        ends = [t.detach() for call in calls for t in (call.inputs, call.signals) if t is not None]
        return losses, self._by_place(calls, ends, len(x))

    def match(
        self, x: Tensor, labels: Tensor, distance: Distance, leaves: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The distances (n,), and the derivatives of their sum by the leaves that x and labels come from."""
        _, calls = self._record(x, labels, create_graph=True)
        # Cut at each layer's inputs and signals: the distance's derivative by these is had layer by layer, without a
        # graph through gradients; then both passes, transposed, bring it to the leaves.
        ends = [t for call in calls for t in (call.inputs, call.signals) if t is not None]
        cut = [t.detach().requires_grad_() for t in ends]
        zero = x.new_zeros((), dtype=self._accumulator)
        gradients = [zero.expand(len(x), *shape) for shape in self._shapes]
        for i, gradient in self._by_place(calls, cut, len(x)):
            gradients[i] = gradient
        values = distance(gradients)
        slopes = torch.autograd.grad(values.sum(), cut, allow_unused=True)
        reached = [(end, slope) for end, slope in zip(ends, slopes, strict=True) if slope is not None]
        return values.detach(), derivatives([e for e, _ in reached], leaves, [s for _, s in reached])

    def _record(self, x: Tensor, labels: Tensor, create_graph: bool) -> tuple[Tensor, list[Call]]:
        """One forward and one backward pass: the losses (n,), and the calls that have a part in them."""
        vars(self._tape).update(calls=[], candidates=len(x))
        images, targets = x.flatten(0, 1).to(self._dtype), labels.flatten(0, 1)
        logits = self._model(images.contiguous(memory_format=self._format) if images.ndim == 4 else images)
        logits = logits.to(self._accumulator)
        loss = F.cross_entropy(logits, targets, reduction="sum") / labels.shape[1]
        torch.autograd.grad(loss, x, create_graph=create_graph)
        calls: list[Call] = vars(self._tape).pop("calls")
        if any(call.inputs._version != call.version for call in calls):
            raise ValueError("Expected the model to leave the inputs of its layers as they are.")
        losses = F.cross_entropy(logits.detach(), targets.detach(), reduction="none").unflatten(0, labels.shape[:2])
        return losses.mean(1), [call for call in calls if call.signals is not None]

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
