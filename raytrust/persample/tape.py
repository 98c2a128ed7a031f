"""What a pass over all candidates leaves behind: the calls that trained weights had a part in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from raytrust.persample.ghost import GhostGradient, as_plain


@dataclass(eq=False)
class Derived:
    """What is computed from weights alone, as a standardised weight is."""

    value: Tensor  # as the model gets it, without a graph
    graph: Tensor  # the same, with the graph that leads back to the weights
    sources: dict[int, Tensor]  # these weights, by their place in the model

    def pulled_back(self, slopes: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The gradients of the weights, (n, *shape) each, from those of this, by the same map for each candidate."""
        slopes = as_plain(slopes)
        leaves, back = list(self.sources.values()), slopes.requires_grad
        rows = [
            torch.autograd.grad(self.graph, leaves, s, True, create_graph=back, materialize_grads=True)
            for s in slopes.to(self.graph.dtype)
        ]
        for place, column in zip(self.sources, zip(*rows, strict=True), strict=True):
            yield place, torch.stack(column)


# A parameter by its place in the model, or what is computed from parameters.
Weight: TypeAlias = "int | Derived"


@dataclass(eq=False)
class Call:
    """One layer's part in a pass over all candidates."""

    layer: Any  # has `_rule`, and `_places`: the weights that it was called with, by the names that the rule knows
    inputs: Tensor  # (candidates * batch, ...)
    version: int  # of the inputs, which nothing may overwrite
    signals: Tensor | None = None  # like the output


class Tape:
    """The calls of a pass over the images of `candidates`."""

    def __init__(self) -> None:
        # As the first call understood it, in the order of calls: by the length alone, 8 positions would be taken for 8
        # images some day.
        self.by_image: list[bool] = []
        self.learns = True
        self.begin(0, 0)

    def begin(self, candidates: int, images: int) -> None:
        self.candidates, self.images, self._constants = candidates, images, 0
        self.calls: list[Call] = []
        self.starts: list[Tensor] = []
        self.derived: dict[int, Derived] = {}  # by the id of the value

    def recorded(self, layer: Any, inputs: Tensor, output: Tensor) -> Tensor:
        """The output of a call, which from now on has a part in the pass."""
        if not output.requires_grad:
            return self.start(layer, inputs, output)
        self._watch(layer, inputs, output)
        return output

    def has_rows(self, constant: Tensor) -> bool:
        """Whether what no image had a part in has a row an image all the same, as a second input has."""
        if self._constants == len(self.by_image) and self.learns:
            self.by_image.append(constant.ndim > 0 and len(constant) == self.images)
        self._constants += 1
        return self.by_image[self._constants - 1]

    def start(self, layer: Any, inputs: Tensor, values: Tensor) -> Tensor:
        """The values as a start of the graph, by which a derivative is had."""
        leaf = values.detach().requires_grad_()
        self.starts.append(leaf)
        self._watch(layer, inputs, leaf)
        # A leaf itself could not be overwritten.
        return leaf.view_as(leaf)

    def _watch(self, layer: Any, inputs: Tensor, output: Tensor) -> None:
        call = Call(layer, inputs, inputs._version)
        self.calls.append(call)
        # A hook on the tensor sees the derivative at this point, also where a ReLU then overwrites the output; one on
        # the module would see it after that.
        output.register_hook(partial(setattr, call, "signals"))


def by_place(calls: Sequence[Call], ends: Sequence[Tensor], n: int) -> Iterator[tuple[int, Tensor]]:
    """Each parameter's gradients as soon as they are complete, so that no more than a layer's need be held.

    ends: inputs and signals of each call in turn.
    """
    uses: Counter[Weight] = Counter(weight for call in calls for weight in call.layer._places.values())
    uses.update(place for weight in list(uses) if isinstance(weight, Derived) for place in weight.sources)
    sums: dict[Weight, Tensor] = {}

    def add(weight: Weight, part: Tensor) -> Iterator[tuple[int, Tensor]]:
        part = part if isinstance(part, GhostGradient) else part.to(torch.promote_types(part.dtype, torch.float32))
        sums[weight] = sums[weight] + part if weight in sums else part
        uses[weight] -= 1
        if uses[weight]:
            return
        total = sums.pop(weight)
        if isinstance(weight, int):
            yield weight, total
        else:
            for place, slopes in weight.pulled_back(total):
                yield from add(place, slopes)

    for call, inputs, signals in zip(calls, ends[::2], ends[1::2], strict=True):
        parts = call.layer._rule.gradients(call.layer, inputs, signals, n)
        for name, weight in call.layer._places.items():
            yield from add(weight, parts[name])
