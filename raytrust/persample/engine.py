"""One engine for the gradients of many samples or candidates, which every attack asks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from itertools import product
from typing import TypeAlias

import torch
from torch import Tensor, nn

from raytrust.config import ONE_STEP, LocalConfig
from raytrust.networks.task import CROSS_ENTROPY, Targets, Task, row_of
from raytrust.persample.fast import FastPath
from raytrust.persample.ghost import as_plain
from raytrust.persample.memory import is_out_of_memory
from raytrust.persample.plain import PlainPath, precision_of
from raytrust.persample.unrolled import UnrolledPath

Path: TypeAlias = FastPath | UnrolledPath | PlainPath


class PerSampleGradients:
    """The gradients of the loss of each of many candidate batches.

    Fast where the first call agrees with plain autograd, as it does wherever rules are known of what a model does with
    its parameters; any other model takes the slow path, one candidate after another, with one warning. Both agree to
    rounding. The model is left as it is, and must stay so meanwhile. A batch norm in training mode normalises each
    candidate batch by itself; of a frozen parameter the gradient is zero.

    dtype: in which the passes run, by default the model's own, but at least float32. bfloat16 is for CPUs with AMX or
    AVX512-BF16 and for GPUs; not for the slow path, which ignores it. task: how the model takes images, and its
    loss; by default mean cross-entropy. The modes of its modules are taken as they are. local: where it is of several
    steps, gradients are the pseudo-gradients of these, in the model's own dtype.
    """

    # Whether derivatives of the gradients are asked for, too, which the first call then checks.
    _twice = False

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None = None,
        task: Task = CROSS_ENTROPY,
        local: LocalConfig = ONE_STEP,
    ):
        self.task, self._precision, self._local = task, precision_of(model), local
        # Weights in half precision would swallow the local steps.
        self._dtype = dtype if dtype is not None and local.steps == 1 else self._precision
        self._shapes = [p.shape for p in model.parameters()]
        self._path: Path = PlainPath(model, self._precision, task, local)
        self._model = model
        self.fast = True

    def refresh(self) -> None:
        """Take over the weights and buffers that the model has now, as after a step of training."""
        if isinstance(self._path, FastPath):
            self._path.refresh(self._model)

    def dense(self, x: Tensor, labels: Targets) -> list[Tensor]:
        """The gradients themselves, one tensor a parameter, (n, *shape).

        x: (n, batch, channels, height, width), as the model sees images. labels: (n, batch), or what else
        the task takes, (n, batch, ...) each.
        """
        return self._formed(self._checked(x, labels).gradients(x, labels)[1], x)

    def squared_norms(self, x: Tensor, labels: Targets) -> Tensor:
        """Of each candidate's gradient, (n,); x, labels: as in `dense`. No more than one layer's gradients are held."""
        squared = x.new_zeros(len(x))
        if len(x):
            for _, gradient in self._checked(x, labels).gradients(x, labels)[1]:
                squared += gradient.reshape(len(x), -1).square().sum(1)
        return squared

    def products_and_norms(
        self, x: Tensor, labels: Targets, direction: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Each candidate's loss (nats), inner product of its gradient with `direction`, and squared gradient norm.

        x, labels: as in `dense`. direction: one tensor a parameter, in the model's order. Returns three of (n,). No
        more than one layer's gradients are held, if they are formed at all.
        """
        path, parts = self._checked(x, labels), []
        size = max(1, len(x) if self.fast else 1)
        for start in range(0, max(1, len(x)), size):
            images = x[start : start + size]
            losses, gradients = path.gradients(images, row_of(labels, slice(start, start + size)))
            inner, squared = torch.zeros_like(losses), torch.zeros_like(losses)
            for i, gradient in gradients:
                rows = gradient.reshape(len(images), -1)
                inner += rows @ direction[i].detach().flatten()
                squared += rows.square().sum(1)
            parts.append(torch.stack([losses, inner, squared]))
        losses, inner, squared = torch.cat(parts, 1)
        return losses, inner, squared

    def _formed(self, gradients: Iterable[tuple[int, Tensor]], x: Tensor) -> list[Tensor]:
        """As plain tensors, one a parameter, zeros where there is none."""
        formed = [x.new_zeros(()).expand(len(x), *shape) for shape in self._shapes]
        for i, gradient in gradients:
            formed[i] = as_plain(gradient).detach()
        return formed

    def _checked(self, x: Tensor, labels: Targets) -> Path:
        """The path to take; the first call chooses it."""
        if self.fast and isinstance(self._path, PlainPath):
            path = self._choice(self._path.model, x, labels)
            if isinstance(path, str):
                warnings.warn(f"Slow path: {path}.", stacklevel=3)
                self.fast = False
            else:
                self._path = path
        return self._path

    def _choice(self, model: nn.Module, x: Tensor, labels: Targets) -> FastPath | UnrolledPath | str:
        """The fast path, or why it is not to be trusted with this model.

        What can't be seen of a layer shows here: a weight that is used outside its layer, a module that mixes
        candidates, a rule that is wrong.
        """
        problem = ""
        with torch.no_grad():
            labels = row_of(labels, [0, -1])
        generator = torch.Generator().manual_seed(0)
        # Two candidates, as one alone mixes with nobody; noise, as the caller's images may be zero or not finite.
        noise = torch.randn(2, *x.shape[1:], generator=generator).to(x.device)
        direction = [torch.randn(shape, generator=generator).to(x.device) for shape in self._shapes]
        # A model may ask for planes, by `view`. And rounding may turn a ReLU: only double precision convicts.
        layouts = (True, False) if self._local.steps == 1 else (False,)
        for rows, dtype in product(layouts, dict.fromkeys((self._precision, torch.float64))):
            try:
                fast, plain = self._batched(model, dtype, rows), PlainPath(model, dtype, self.task, self._local)
                error = _error(*(self._probe(path, noise.to(dtype), labels, direction) for path in (fast, plain)))
            # In whatever way a model makes the fast path fail, the slow one is the definition.
            except Exception as failure:
                if isinstance(failure, RuntimeError) and is_out_of_memory(failure):
                    raise
                problem = f"the fast one fails, {str(failure).splitlines()[0].rstrip('.')}"
                continue
            # 2 % in single precision, 0.01 % in double: more than rounding makes of smooth layers.
            if error <= torch.finfo(dtype).eps ** 0.25:
                if isinstance(fast, UnrolledPath):
                    return fast if dtype == self._dtype else UnrolledPath(model, self._dtype, self.task, self._local)
                fast.tape.learns = False
                return fast if dtype == self._dtype else FastPath(model, self._dtype, self.task, rows, fast.tape)
            problem = f"the fast one's gradients are off by {error:.1%}"
        return problem

    def _batched(self, model: nn.Module, dtype: torch.dtype, rows: bool) -> FastPath | UnrolledPath:
        if self._local.steps > 1:
            return UnrolledPath(model, dtype, self.task, self._local)
        return FastPath(model, dtype, self.task, rows)

    def _probe(self, path: Path, x: Tensor, labels: Targets, direction: Sequence[Tensor]) -> list[list[Tensor]]:
        """The gradients, and the derivative of their inner products with a direction by the images if it is needed."""
        if not self._twice:
            return [self._formed(path.gradients(x, labels)[1], x)]
        gradients: list[Tensor] = []

        def along(ghosts: Sequence[Tensor]) -> Tensor:
            gradients[:] = self._formed(enumerate(ghosts), x)
            pairs = zip(ghosts, direction, strict=True)
            return torch.stack([g.reshape(len(x), -1) @ d.flatten().to(g.dtype) for g, d in pairs]).sum(0)

        _, slopes = path.match(x.requires_grad_(), labels, along, [x])
        return [gradients, slopes]


def _error(probe: Sequence[Sequence[Tensor]], exact: Sequence[Sequence[Tensor]]) -> float:
    """The largest error of a tensor, relative to it, or to a thousandth of all that are with it. What is not finite by
    plain autograd either, as weights are NaN, says nothing."""
    errors = []
    for tensors, references in zip(probe, exact, strict=True):
        # By `where`, as taking the finite entries out takes longer than both passes through a large network.
        sizes = torch.stack([e.nan_to_num(0, 0, 0).norm() for e in references])
        pairs = zip(tensors, references, strict=True)
        apart = torch.stack([(t - e).where(e.isfinite(), 0).norm() for t, e in pairs])
        errors.append(apart / sizes.maximum(1e-3 * sizes.norm() + torch.finfo(sizes.dtype).tiny))
    # NaN, which agrees with nothing, where the fast path alone is not finite.
    return float(torch.cat(errors).max())
