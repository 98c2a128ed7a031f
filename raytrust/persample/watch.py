"""Weights that reach a function by any way: whatever a model computes with them, it does by calling torch.

Rules of layers know what a layer does with its weights. Here is what functions do: a position embedding that is added,
a weight that is standardised before its convolution, a subclass with a forward of its own. README.md says more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from raytrust.persample.rules import Gradients, Rule
from raytrust.persample.tape import Derived, Tape, Weight

# Functions that pair the rows of what they are given, by the names that they have as methods, operators, in place.
PAIRING = re.compile(
    r"_*((r|i)?(add|sub|mul|div|truediv)|true_divide|pow|maximum|minimum|where|lerp|addcmul|cat|concat|matmul|"
    r"scaled_dot_product_attention)_*"
)


class Watch(TorchFunctionMode):
    """Sees each call of torch in a forward pass, and records those that take a weight.

    weights: the trained parameters by their place in the model. rules: what to call instead of a function that takes
    both a weight and what depends on the images, with this first.
    """

    def __init__(self, tape: Tape, weights: Mapping[int, Tensor], rules: Mapping[Any, Callable[..., Any]]):
        super().__init__()
        self.tape, self._rules = tape, rules
        self._places = {id(w): place for place, w in weights.items()}
        self._leaves = {place: w.detach().requires_grad_() for place, w in weights.items()}

    def weight(self, t: object) -> Weight | None:
        return self._places.get(id(t), self.tape.derived.get(id(t)))

    def is_constant(self, t: Tensor) -> bool:
        """Whether it is the same for all images."""
        return self.weight(t) is not None or not (t.requires_grad or self.tape.has_rows(t))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = self._rules.get(func)
        # What is computed under no_grad teaches a weight nothing.
        if torch.is_grad_enabled():
            weights = images = False
            for t in _tensors(args, kwargs):
                if self.weight(t) is not None:
                    weights = True
                else:
                    images |= t.requires_grad
            if rule is not None and (weights or func is F.batch_norm):
                # Words are numbers, which have no derivative: they may come with an image all the same.
                images |= func is F.embedding and not self.is_constant(args[0])
                if images:
                    return rule(self, *args, **kwargs)
            if weights:
                if not images:
                    return self._derive(func, args, kwargs)
                paired = PAIRING.fullmatch(getattr(func, "__name__", ""))
                return self.paired(func, args, kwargs) if paired else self._one_by_one(func, args, kwargs)
        return func(*args, **kwargs)

    def record(self, gradients: Gradients, inputs: Tensor, output: Tensor, **weights: Tensor | None) -> Tensor:
        """The output of a function of these weights, by the names that the rule calls them."""
        return self.tape.recorded(self.site(gradients, **weights), inputs, output)

    def site(self, gradients: Gradients, **weights: Tensor | None) -> Any:
        """What stands for a layer."""
        places = {name: place for name, w in weights.items() if (place := self.weight(w)) is not None}
        return SimpleNamespace(_rule=Rule(gradients, None), _places=places, **weights)

    def _derive(self, func: Any, args: Any, kwargs: Any) -> Any:
        sources: dict[int, Tensor] = {}

        def with_graph(t: Any) -> Any:
            weight = self.weight(t)
            if weight is None:
                return t
            sources.update(weight.sources if isinstance(weight, Derived) else {weight: self._leaves[weight]})
            return weight.graph if isinstance(weight, Derived) else self._leaves[weight]

        def without(t: Any) -> Any:
            if not isinstance(t, Tensor) or not t.requires_grad:
                return t
            value = t.detach()
            self.tape.derived[id(value)] = Derived(value, t, sources)
            return value

        args, kwargs = tree_map(with_graph, (args, kwargs))
        return tree_map(without, func(*args, **kwargs))

    def paired(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A function of rows of images and of weights that are broadcast to them: each row gets its own."""
        tensors = list(_tensors(args, kwargs))
        ndim = max(t.ndim for t in tensors)
        rows = max(len(t) for t in tensors if t.ndim == ndim)

        def each(t: Any) -> Any:
            if self.weight(t) is None:
                return t
            if t.ndim == ndim and len(t) == rows > 1:
                return self.tape.start(self.site(_of_rows, weight=t), t, t)
            wide = t.reshape(*[1] * (ndim - t.ndim), *t.shape)
            return self.tape.start(self.site(_of_all, weight=t), t, wide.expand(rows, *wide.shape[1:]))

        args, kwargs = tree_map(each, (args, kwargs))
        return func(*args, **kwargs)

    def _one_by_one(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A function that is not known: each candidate gets its own weights."""
        n = self.tape.candidates

        def parts(t: Any) -> Any:
            if self.weight(t) is not None:
                return _Parts(self.tape.start(self.site(_of_candidates, weight=t), t, t.expand(n, *t.shape)))
            return _Parts(t.unflatten(0, (n, -1))) if isinstance(t, Tensor) and t.requires_grad else t

        split = tree_map(parts, (args, kwargs))
        results = []
        for i in range(n):
            own_args, own_kwargs = tree_map(lambda t, i=i: t.each[i] if isinstance(t, _Parts) else t, split)
            results.append(func(*own_args, **own_kwargs))
        return tree_map(lambda *ts: torch.cat(ts) if isinstance(ts[0], Tensor) else ts[0], *results)


class _Parts:
    def __init__(self, each: Tensor):
        self.each = each


def _tensors(args: Any, kwargs: Any) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (t for t in value if isinstance(t, Tensor))


# What the derivatives by starts of the graph are to the weights.


def _of_candidates(site: Any, inputs: Tensor, signals: Tensor, n: int) -> dict[str, Tensor]:
    return {"weight": signals}


def _of_all(site: Any, inputs: Tensor, signals: Tensor, n: int) -> dict[str, Tensor]:
    return {"weight": signals.unflatten(0, (n, -1)).sum(1).reshape(n, *site.weight.shape)}


def _of_rows(site: Any, inputs: Tensor, signals: Tensor, n: int) -> dict[str, Tensor]:
    """A candidate has a part in its own rows alone."""
    each = signals.unflatten(0, (n, -1))
    mine = torch.eye(n, dtype=signals.dtype, device=signals.device).view(n, n, *[1] * (each.ndim - 1))
    return {"weight": (mine * each).flatten(1, 2)}
