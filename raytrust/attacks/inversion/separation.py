"""The images of a whole batch from the gradient of one linear layer before a ReLU: SPEAR (Dimitrov et al. 2024).

The gradient of the weight is S^T X, for the inputs X of B images and the signals S that come back to the layer's
outputs: a matrix of rank B, of which any factors L R are S^T = L Q and X = Q^-1 R for some Q of size B x B. Behind a
ReLU signals are zero wherever an output was negative, about half of them, and no mixture L q of several has as many
zeros. So the columns of Q are the q for which L q is sparsest; each lies in the kernel of some B - 1 rows of L. Whether
they were found shows at the outputs, which are negative where the signals are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of rows at once: for B images one draw in about 2^(B - 1) / B finds one of them.
DRAWS = 4096
# How often, some seconds in all; and how often where no image was found, as behind another activation than a ReLU.
ROUNDS, ROUNDS_IN_VAIN = 16, 4
# Rows among which is drawn: more tell no more, and cost as much more.
ROWS = 1024
# Relative to the largest entry of a signal: what counts as zero in a float32 gradient.
ZERO = 1e-4
# Two directions are one if the cosine between them is nearer to 1 than this.
SAME = 1e-6
# Relative to the largest singular value: what is smaller is rounding.
WEAKEST = 1e-6
# Of the outputs' signs, those that may disagree with the signals: of a mixture of two images a quarter of one's do.
MISMATCH = 0.002


def separate(
    layer: tuple[Tensor, Tensor], gradient: tuple[Tensor, Tensor], images: int, seed: int = 0
) -> tuple[Tensor, float] | None:
    """The inputs of a linear layer, (images, inputs) in any order and float64, and the share of its outputs whose signs
    they don't explain; None where they can't be told apart.

    layer, gradient: the weight (outputs, inputs) and bias (outputs,), and the gradients of them. They can't be told
    apart where the gradient has not this rank, as a compressor or noise changed it, where no ReLU follows, and where
    draws of rows don't suffice, as for more than about 14 images. seed: of the rows that are drawn.
    """
    weight, bias = (g.double() for g in gradient)
    if not 1 <= images <= min(weight.shape):
        return None
    generator = torch.Generator().manual_seed(seed)
    factors = _factors(weight, images, generator)
    if factors is None:
        return None
    columns, rows = factors
    length = columns.norm(dim=1)
    # Where the signals of all images are zero, nothing is said of any.
    live = columns[length > ZERO * length.max()]
    some = live[torch.randperm(len(live), generator=generator)[:ROWS].to(live.device)]
    if len(some) < images:
        return None
    found = columns.new_empty((0, images))
    for turn in range(ROUNDS):
        found = _sparsest(torch.cat([found, _kernels(some, generator)]), some)
        # Entries of what is no signal of an image are as small as a zero seldom.
        by_chance = images + 1 + len(some) // 128
        if turn + 1 >= ROUNDS_IN_VAIN and not bool((_zeros(found @ some.T).sum(1) > by_chance).any()):
            return None
        if len(found) < images:
            continue
        found = torch.stack([_refined(direction, live) for direction in found])
        if int(torch.linalg.matrix_rank(found, rtol=WEAKEST)) < images:
            continue
        # A direction has no length, but the bias's gradient is the sum of all signals.
        signals = columns @ found.T
        scale = torch.linalg.lstsq(signals, bias[:, None]).solution[:, 0]
        if bool((scale == 0).any()):
            continue
        inputs: Tensor = torch.linalg.solve(found.T * scale, rows)
        w, b = (x.to(inputs) for x in layer)
        mismatch = float(((inputs @ w.T + b > 0) != ~_zeros(signals.T)).double().mean())
        if mismatch <= MISMATCH:
            return inputs, mismatch
    return None


def _factors(weight: Tensor, images: int, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
    """The factors (outputs, images) and (images, inputs) of a matrix of this rank, the second of orthonormal rows; None
    for one of another rank."""
    # Of its product with a few random columns more than its rank: a decomposition of the whole takes a minute for a
    # large layer.
    drawn = torch.randn((weight.shape[1], images + 8), generator=generator, dtype=weight.dtype).to(weight.device)
    span = torch.linalg.qr(weight @ drawn)[0]
    u, s, rows = torch.linalg.svd(span.T @ weight, full_matrices=False)
    if s[0] == 0 or int((s > WEAKEST * s[0]).sum()) != images:
        return None
    return span @ (u[:, :images] * s[:images]), rows[:images]


def _kernels(columns: Tensor, generator: torch.Generator) -> Tensor:
    """Of random sets of rows, one less than there are columns, the directions that they are orthogonal to."""
    outputs, images = columns.shape
    # The first of a random order: a draw without replacement for each.
    chosen = torch.rand((DRAWS, outputs), generator=generator).topk(images - 1, 1).indices.to(columns.device)
    return torch.linalg.svd(columns[chosen])[2][:, -1]


def _sparsest(directions: Tensor, columns: Tensor) -> Tensor:
    """Of these directions, the sparsest that are independent: as many as there are columns, or less."""
    zeros, images = _zeros(directions @ columns.T).sum(1), columns.shape[1]
    kept: list[Tensor] = []
    # A direction that is none has as many zeros as were made. Others that lie in the span of what is kept are mixtures.
    for i in zeros.argsort(descending=True).tolist():
        if len(kept) == images or (images > 1 and int(zeros[i]) < images):
            break
        if kept and bool(((torch.stack(kept) @ directions[i]).abs() > 1 - SAME).any()):
            continue
        several = torch.stack([*kept, directions[i]])
        if int(torch.linalg.matrix_rank(several, rtol=WEAKEST)) == len(several):
            kept.append(directions[i])
    return torch.stack(kept) if kept else directions[:0]


def _refined(direction: Tensor, columns: Tensor) -> Tensor:
    """The direction again, from more rows in which its signal is zero than the few that were drawn; columns: without
    rows of zeros."""
    rows = columns[_zeros((columns @ direction)[None])[0]]
    rows = rows / rows.norm(dim=1, keepdim=True)
    # First from all; then from the better half, as a small entry that is not zero may be among them.
    for count in (len(rows), max(columns.shape[1], len(rows) // 2)):
        nearest = rows[(rows @ direction).abs().argsort()[:count]]
        # Of the triangular factor, as the left singular vectors of thousands of rows take seconds.
        direction = torch.linalg.svd(torch.linalg.qr(nearest, mode="r")[1])[2][-1]
    return direction


def _zeros(signals: Tensor) -> Tensor:
    """Which entries of each signal, (signals, outputs), are zero."""
    size = signals.abs()
    return size <= ZERO * size.amax(1, keepdim=True)
