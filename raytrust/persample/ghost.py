"""Gradients that are tensors to a view, and products of thin factors inside: README.md says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from raytrust.persample.products import Product

Form = Literal["whole", "flat", "matrix", "transposed", "square"]
_DENSE: dict[Form, Callable[[Tensor], Tensor]] = {
    "whole": lambda gradients: gradients,
    "flat": lambda gradients: gradients.flatten(1),
    "matrix": lambda gradients: gradients.flatten(2),
    "transposed": lambda gradients: gradients.flatten(2).mT,
    "square": lambda gradients: gradients.flatten(1).square(),
}


def as_plain(gradient: Tensor) -> Tensor:
    """A plain tensor for what may stand for one."""
    return gradient.dense() if isinstance(gradient, GhostGradient) else gradient


class GhostGradient(Tensor):
    """Stands for the gradients (n, *shape) of a `Product`; what a view does with them decides what is computed.

    From the factors: `flatten(1)` and then a product with a vector, a squared norm (`.square().sum(1)`), entries
    (`[:, positions]`); as matrices (n, outputs, rest), a product with one matrix from either side, or from the right
    with one a candidate, also after `.mT`; `split` along the candidates. Anything else sees the gradients themselves.
    All is differentiable in the factors.
    """

    product: Product
    form: Form

    @staticmethod
    def __new__(cls, product: Product, form: Form = "whole") -> GhostGradient:
        rows, columns = product.shape[0], product.shape[1:].numel()
        if form == "whole" and len(product.shape) == 2:
            form = "matrix"
        shapes = {"whole": product.shape, "matrix": (rows, columns), "transposed": (columns, rows)}
        shape = (product.n, *shapes.get(form, (rows * columns,)))
        # A tensor without storage: shape and type are all that a view may learn without forming the gradients.
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=product.dtype, device=product.inputs.device)
        self.product, self.form = product, form
        return self

    def dense(self) -> Tensor:
        """What this stands for, as a plain tensor."""
        return _DENSE[self.form](self.product.dense)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Here, before autograd and any kernel, is the one place where it can still be chosen what is computed: a view
        # need not know of ghosts.
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        rule = _RULES.get(func)
        if rule is not None and kwargs.keys() <= _NAMED.get(func, set()):
            result = rule(*args, **kwargs)
            if result is not None:
                return result
        args, kwargs = tree_map(as_plain, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # A kernel would find no storage.
        raise NotImplementedError(f"{func} got around __torch_function__.")


# Each rule returns None where it does not apply.


def _reshape(g: GhostGradient, *shape: Any) -> GhostGradient | None:
    sizes = shape[0] if isinstance(shape[0], (tuple, list)) else shape
    if g.form not in ("whole", "matrix", "flat"):
        return None
    for form in ("whole", "matrix", "flat"):
        ghost = GhostGradient(g.product, form)
        if len(sizes) == ghost.ndim and all(s in (-1, t) for s, t in zip(sizes, ghost.shape, strict=True)):
            return ghost
    return None


def _flatten(g: GhostGradient, start_dim: int = 0, end_dim: int = -1) -> GhostGradient | None:
    return _reshape(g, *g.shape[:start_dim], -1) if end_dim == -1 else None


def _square(g: GhostGradient) -> GhostGradient | None:
    return GhostGradient(g.product, "square") if g.form == "flat" else None


def _sum(g: GhostGradient, dim: Any = None, *more: Any) -> Tensor | None:
    return g.product.squared_norm() if g.form == "square" and dim in (1, -1) and not more else None


def _matmul(a: Tensor, b: Tensor) -> Tensor | None:
    if not isinstance(a, GhostGradient):
        if not isinstance(b, GhostGradient) or a.ndim != 2 or (b_transposed := _transpose(b)) is None:
            return None
        result = _matmul(b_transposed, a.mT)
        return None if result is None else result.mT
    if isinstance(b, GhostGradient):
        return None
    if a.form == "flat" and b.ndim == 1:
        return a.product.inner(b)
    if a.form == "matrix" and b.ndim in (2, 3):
        return a.product.times(b)
    return a.product.transposed_times(b) if a.form == "transposed" and b.ndim in (2, 3) else None


def _transpose(g: GhostGradient) -> GhostGradient | None:
    mirrored: dict[Form, Form] = {"matrix": "transposed", "transposed": "matrix"}
    return GhostGradient(g.product, mirrored[g.form]) if g.form in mirrored else None


def _split(g: GhostGradient, sizes: Any, dim: int = 0) -> tuple[GhostGradient, ...] | None:
    if dim != 0 or isinstance(sizes, int):
        return None
    return tuple(GhostGradient(part, g.form) for part in g.product.split(sizes))


def _entries(g: GhostGradient, index: Any) -> Tensor | None:
    match g.form, index:
        case "flat", (slice(start=None, stop=None, step=None), Tensor(ndim=1, dtype=torch.int64) as positions):
            return g.product.entries(positions)
    return None


_RULES: dict[Any, Callable[..., Any]] = {
    Tensor.flatten: _flatten,
    Tensor.reshape: _reshape,
    Tensor.view: _reshape,
    Tensor.square: _square,
    Tensor.sum: _sum,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.mT.__get__: _transpose,  # type: ignore[attr-defined]
    Tensor.split: _split,
    Tensor.__getitem__: _entries,
}
# What a rule takes by name. torch hands on the dim of a split so, also where the caller gave it by position.
_NAMED = {Tensor.sum: {"dim"}, Tensor.split: {"dim"}}
_METADATA = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
}
