"""What torch's own communication hooks send, and what of their state everyone on the wire knows.

`torch.distributed.algorithms.ddp_comm_hooks`: `allreduce_hook`, `fp16_compress_hook` and `bf16_compress_hook` send one
vector a bucket; `powerSGD_hook` three, whose parts are told apart here by the hook's own rules. Each may be in
`fp16_compress_wrapper` or `bf16_compress_wrapper`. `batched_powerSGD_hook` is none of them: it fails in every torch
since 1.12 (it hands a matrix to an orthogonalisation of batches).
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raytrust.compress.interface import Layout, Vantage
from raytrust.wire.channel import Message

_HOME = "torch.distributed.algorithms.ddp_comm_hooks"
_WHOLE = ("allreduce_hook", "fp16_compress_hook", "bf16_compress_hook")
_WRAPPERS = {"fp16_compress_wrapper": torch.float16, "bf16_compress_wrapper": torch.bfloat16}


class TorchHook(NamedTuple):
    """method: "whole" for one vector a bucket, divided by the number of workers before it is sent; or "powersgd".
    dtype: of PowerSGD's arithmetic."""

    method: Literal["whole", "powersgd"]
    dtype: torch.dtype


def recognised(hook: Callable[..., Any]) -> TorchHook | None:
    """Which of torch's hooks this is, also in a wrapper or with arguments bound; None for any other."""
    # By name, as only `raytrust.wire` may import them.
    dtype = torch.float32
    while True:
        if isinstance(hook, partial):
            hook = hook.func
            continue
        if not getattr(hook, "__module__", "").startswith(_HOME):
            return None
        wrapper = hook.__qualname__.partition(".")[0]
        if wrapper not in _WRAPPERS:
            break
        dtype, hook = _WRAPPERS[wrapper], inspect.getclosurevars(hook).nonlocals["hook"]
    if hook.__qualname__ == "powerSGD_hook":
        return TorchHook("powersgd", dtype)
    return TorchHook("whole", dtype) if hook.__qualname__ in _WHOLE else None


@dataclass
class PowerSGDFactors:
    """What a step of torch's PowerSGD sent, as the vantage has it: of the tapped worker, or the mean of all.

    matrices: the parameters that were compressed, as n x m matrices. rights: the Q that all knew, (r, m), orthonormal.
    ps: M Q, (r, n). lefts: P^, (r, n), orthonormal. qs: M^T P^, (r, m). vectors: the other parameters; whole: as sent.
    """

    matrices: list[int] = field(default_factory=list)
    rights: list[Tensor] = field(default_factory=list)
    ps: list[Tensor] = field(default_factory=list)
    lefts: list[Tensor] = field(default_factory=list)
    qs: list[Tensor] = field(default_factory=list)
    vectors: list[int] = field(default_factory=list)
    whole: list[Tensor] = field(default_factory=list)

    def decoded(self, layout: Layout) -> list[Tensor]:
        """One tensor a parameter."""
        parts = dict(zip(self.vectors, self.whole, strict=True))
        for i, left, q in zip(self.matrices, self.lefts, self.qs, strict=True):
            parts[i] = (left.T @ q).view(layout.shapes[i])
        return [parts[i] for i in range(len(layout.shapes))]


def factors(
    state: Any,
    dtype: torch.dtype,
    layout: Layout,
    buckets: Sequence[Sequence[int]],
    messages: Sequence[Message],
    vantage: Vantage,
) -> PowerSGDFactors:
    """What `powerSGD_hook` sent in a step that compresses, with its state before the step.

    messages: of each bucket the uncompressed tensors, P and Q; last the result, with the number of workers.
    """
    workers = int(messages[-1].received[1])

    def payload(message: Message) -> Tensor:
        # It sums, and divides what it has received.
        return message.sent[0].float() if vantage == "link" else message.received[0].float() / workers

    # A copy, as the hook will draw the same numbers when the step is made.
    generator, all_factors = copy.deepcopy(state.rng), PowerSGDFactors()
    for number, indices in enumerate(buckets):
        whole, first, second = messages[3 * number : 3 * number + 3]
        batches, vectors = _batches(state, layout, indices)
        all_factors.vectors += vectors
        parts = payload(whole).split([layout.sizes[i] for i in vectors])
        all_factors.whole += [part.view(layout.shapes[i]) for i, part in zip(vectors, parts, strict=True)]
        widths = [(len(batch), n, m, min(n, m, state.matrix_approximation_rank)) for batch, n, m in batches]
        ps = _cut(payload(first), [(b, n, r) for b, n, _, r in widths])
        # Of the sum, which all receive; its scale is lost in the orthogonalisation.
        lefts = _cut(first.received[0].to(dtype), [(b, n, r) for b, n, _, r in widths])
        qs = _cut(payload(second), [(b, m, r) for b, _, m, r in widths])
        rights = _rights(state, number, [(b, m, r) for b, _, m, r in widths], dtype, generator, first.received[0])
        for (batch, _, _), right, p, left, q in zip(batches, rights, ps, lefts, qs, strict=True):
            # A vector, which a `min_compression_rate` below 1 may compress, is its P but for the sign, Q being 1 or -1.
            if len(layout.shapes[batch[0]]) < 2:
                all_factors.vectors += batch
                all_factors.whole += list((p @ right.float().mT)[:, :, 0])
                continue
            all_factors.matrices += batch
            left = orthogonalised(left, state.orthogonalization_epsilon)
            all_factors.rights += list(right.float().mT)
            all_factors.ps += list(p.mT)
            all_factors.lefts += list(left.float().mT)
            all_factors.qs += list(q.mT)
    return all_factors


def _batches(state: Any, layout: Layout, indices: Sequence[int]) -> tuple[list[tuple[list[int], int, int]], list[int]]:
    """Of a bucket: the matrices that are compressed in the hook's order, each batch with its n and m, and the rest."""
    by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    vectors = []
    for i in indices:
        n = layout.shapes[i][0]
        m = layout.sizes[i] // max(n, 1)
        rank = min(n, m, state.matrix_approximation_rank)
        if (n + m) * rank * state.min_compression_rate < n * m:
            by_size[n, m].append(i)
        else:
            vectors.append(i)
    # The hook orders them by size in any case, and takes those of one size together if it is told to.
    batched = state.batch_tensors_with_same_shape
    grouped = [[group] if batched else [[i] for i in group] for group in by_size.values()]
    return [(b, *size) for size, group in zip(by_size, grouped, strict=True) for b in group], vectors


def _rights(
    state: Any,
    number: int,
    shapes: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
    rng: np.random.RandomState,
    like: Tensor,
) -> Iterator[Tensor]:
    """The Q of this step: the mean Q of the step before, or, at first and without a warm start, drawn."""
    epsilon = state.orthogonalization_epsilon
    if state.warm_start and number in state.p_memory_dict:
        drawn = _cut(state.q_memory_dict[number].to(like.device, dtype), shapes)
    else:
        generator = torch.Generator().manual_seed(rng.randint(1_000_000_000))
        drawn = [torch.randn(shape, dtype=dtype, generator=generator).to(like.device) for shape in shapes]
    return (orthogonalised(q, epsilon) for q in drawn)


def _cut(flat: Tensor, shapes: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    parts = flat.split([b * n * r for b, n, r in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def orthogonalised(matrices: Tensor, epsilon: float) -> Tensor:
    """Orthonormal columns of each (batch, rows, columns), to rounding those that `powerSGD_hook` makes of them."""
    if matrices.shape[2] > 2 and matrices.dtype == torch.float32:
        return torch.linalg.qr(matrices).Q
    # Gram-Schmidt, which differs from QR in the signs, and, where columns depend on each other, in all.
    matrices = matrices.clone()
    for i, column in enumerate(matrices.unbind(2)):
        column /= torch.linalg.vector_norm(column, dim=1, keepdim=True) + epsilon
        rest = matrices[:, :, i + 1 :]
        rest -= torch.sum(column[:, :, None] * rest, dim=1, keepdim=True) * column[:, :, None]
    return matrices


def public(state: Any) -> dict[str, Tensor]:
    """Of a `PowerSGDState`, what all workers have in common: its step, the warm start by bucket, and the generator."""
    _, keys, position, *_ = state.rng.get_state()
    drawn = {"iter": torch.tensor(state.iter), "rng": torch.tensor([*keys.tolist(), position])}
    return drawn | {f"q.{number}": q.clone() for number, q in state.q_memory_dict.items()}


def load_public(state: Any, held: dict[str, Tensor], layout: Layout, buckets: Sequence[Sequence[int]]) -> None:
    """Take over what `public` gave of a state of the same layout. Raises ValueError for what is none."""
    if missing := {"iter", "rng"} - held.keys():
        raise ValueError(f"Expected the public state of torch's PowerSGD to hold {sorted(missing)}, got {[*held]}.")
    *keys, position = held["rng"].tolist()
    state.iter = int(held["iter"])
    state.rng.set_state(("MT19937", np.array(keys, dtype=np.uint32), position))
    state.q_memory_dict = {int(key[2:]): q.clone() for key, q in held.items() if key.startswith("q.")}
    # Of P only that it is there counts, and its size: the hook writes over it.
    state.p_memory_dict = {
        number: q.new_zeros(sum(len(i) * n * min(n, m, state.matrix_approximation_rank) for i, n, m in batches))
        for number, q in state.q_memory_dict.items()
        for batches, _ in (_batches(state, layout, buckets[number]),)
    }
