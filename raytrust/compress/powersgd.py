"""PowerSGD (Vogels, Karimireddy & Jaggi 2019, Algorithm 1): low-rank compression by one step of power iteration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from raytrust.compress.base import Base, Payload
from raytrust.compress.interface import Layout, Reduced, Vantage, payloads_by_worker
from raytrust.compress.state import State
from raytrust.config import PowerSGDConfig, register
from raytrust.wire.channel import Channel, Message


class Factors(NamedTuple):
    """What one step's messages hold, one tensor a matrix, and the tensors that were sent whole.

    ps: M Q, (r, n) by rows. bases: P^, orthonormal, (r, n). qs: M^T P^, (r, m). vectors: as they are.
    """

    ps: list[Tensor]
    bases: list[Tensor]
    qs: list[Tensor]
    vectors: list[Tensor]


_TINY = torch.finfo(torch.float32).tiny


@register.compressor(PowerSGDConfig)
class PowerSGD(Base):
    """Each gradient, as the n x m matrix M = view(shape[0], -1), is sent as P = M Q and Q' = M^T P^, where P^ is an
    orthonormal basis of the mean of P over workers; it decodes to P^ Q'^T. Sent whole are the `vectors`: tensors of one
    dimension, and matrices for which it would save less than `min_compression_rate`.

    Two all-reduces: the P with the vectors, then the Q'. The rank is min(n, m, rank), so the mean of a
    matrix whose smaller side is at most `rank` arrives without loss; so does what each worker sent if n <= m, else it
    lacks what lies outside the span of the mean. The first Q is drawn from `seed`, which all workers share; with
    `warm_start` the mean Q' is the Q of the next step, but for a matrix of m <= rank and m <= n, whose Q is square and
    stays; else a new one is drawn. Error feedback is not part of this class. Factors are held and sent transposed,
    (r, n) and (r, m).

    We deviate from Algorithm 1 in two points: the basis is by Householder QR instead of Gram-Schmidt, and the warm
    start is divided by its largest magnitude.
    """

    # Transposed, as the rank is small: the products then read and write a few long rows instead of many short ones.
    def __init__(self, config: PowerSGDConfig, layout: Layout, seed: int = 0):
        super().__init__(config, layout)
        self._config: PowerSGDConfig = config
        self.matrices = [i for i, s in enumerate(layout.shapes) if _is_matrix(s) and _is_worth_it(s, config)]
        self.vectors = [i for i in range(len(layout.shapes)) if i not in self.matrices]
        self.sizes = [_matrix_size(layout.shapes[i]) for i in self.matrices]  # (n, m)
        self._ranks = [min(n, m, config.rank) for n, m in self.sizes]
        widths = list(zip(self._ranks, self.sizes, strict=True))
        self._first = Layout([torch.Size((r, n)) for r, (n, _) in widths] + [layout.shapes[i] for i in self.vectors])
        self._second = Layout([torch.Size((r, m)) for r, (_, m) in widths])
        # The generator draws for all matrices in a row.
        self.per_parameter = config.warm_start
        self._generator = torch.Generator().manual_seed(seed)
        self.q = self._draw()

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        flat = self._input(grads)
        tensors = self.layout.unflatten(flat)
        inputs = [tensors[i].view(size) for i, size in zip(self.matrices, self.sizes, strict=True)]
        # The products are written where they are sent from: a message is one buffer, and its matrices are views of it.
        sent_first = self._scratch("first", self._first.entries, flat)
        ps, vectors = self._split(sent_first)
        # Drawn on the CPU, or loaded from wherever.
        self.q = [q.to(flat.device) for q in self.q]
        for m, q, p in zip(inputs, self.q, ps, strict=True):
            _multiply(q, m.T, p)
        for i, vector in zip(self.vectors, vectors, strict=True):
            vector.copy_(tensors[i])
        mean_ps, mean_vectors = self._split(channel.all_mean(sent_first))
        bases = [_orthonormal(p) for p in mean_ps]
        sent_second = self._scratch("second", self._second.entries, flat)
        qs = self._second.unflatten(sent_second)
        for m, basis, q in zip(inputs, bases, qs, strict=True):
            _multiply(basis, m, q)
        mean_qs = self._second.unflatten(channel.all_mean(sent_second))
        self.q = self._next(mean_qs)
        mean = self._write(self._scratch("mean", len(flat), flat), (*bases, *mean_qs, *mean_vectors))
        return self._reduced(mean, (*bases, *qs, *vectors))

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        factors = self.factors(messages, vantage)
        out = torch.empty(self.layout.entries, dtype=torch.float32, device=messages[0].received[0].device)
        return [self.layout.unflatten(self._write(out, (*factors.bases, *factors.qs, *factors.vectors)))]

    def factors(self, messages: Sequence[Message], vantage: Vantage) -> Factors:
        """What the messages of one step hold, as the vantage has them; the bases are everyone's."""
        first, second = messages
        ((sent_first,),) = payloads_by_worker([first], vantage)
        ((sent_second,),) = payloads_by_worker([second], vantage)
        ps, vectors = self._split(sent_first)
        bases = [_orthonormal(p) for p in self._split(first.received[0])[0]]
        return Factors(ps, bases, self._second.unflatten(sent_second), vectors)

    def _next(self, mean_qs: list[Tensor]) -> list[Tensor]:
        if not self._config.warm_start:
            return self._draw()
        # A square Q stays as it was drawn, of full rank: after a gradient of lower rank, M Q would miss directions.
        # Without the division, P would be of the scale of M squared, beyond float32 for large or small gradients.
        return [
            old if q.shape[0] == q.shape[1] else q / q.abs().max().clamp_min(_TINY)
            for old, q in zip(self.q, mean_qs, strict=True)
        ]

    def _write(self, out: Tensor, payload: Payload, share: float = 1.0) -> Tensor:
        """payload: all bases, then all Q', then the vectors."""
        grads, k = self.layout.unflatten(out), len(self.matrices)
        for i, size, basis, q in zip(self.matrices, self.sizes, payload[:k], payload[k : 2 * k], strict=True):
            _multiply(basis.T, q, grads[i].view(size))
        for i, vector in zip(self.vectors, payload[2 * k :], strict=True):
            grads[i].copy_(vector)
        return out if share == 1.0 else out.mul_(share)

    def _add(self, x: Tensor, payload: Payload, share: float = 1.0) -> Tensor:
        grads, k = self.layout.unflatten(x), len(self.matrices)
        # Product and sum are one call, in place: what was sent is never laid out as a whole.
        for i, size, basis, q in zip(self.matrices, self.sizes, payload[:k], payload[k : 2 * k], strict=True):
            grads[i].view(size).addmm_(basis.T, q, alpha=share)
        for i, vector in zip(self.vectors, payload[2 * k :], strict=True):
            grads[i].add_(vector, alpha=share)
        return x

    def public_state(self) -> dict[str, Tensor]:
        """The Q of the coming step, (rank, m) by parameter name, which every peer computed in the step before."""
        names = [self.layout.names[i] for i in self.matrices]
        return {f"q.{name}": q.clone() for name, q in zip(names, self.q, strict=True)}

    def _take_public(self, state: State) -> None:
        self.q = [state[f"q.{self.layout.names[i]}"].clone() for i in self.matrices]

    def _tensors(self) -> dict[str, Tensor]:
        return self.public_state() | {"generator": self._generator.get_state()}

    def _take(self, state: State) -> None:
        self._take_public(state)
        self._generator.set_state(state["generator"].cpu())  # of a checkpoint that was read onto a GPU

    def _draw(self) -> list[Tensor]:
        return [torch.randn(s, generator=self._generator, dtype=torch.float32) for s in self._second.shapes]

    def _split(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The first message: (its matrices, its vectors), views of it."""
        parts = self._first.unflatten(flat)
        return parts[: len(self.matrices)], parts[len(self.matrices) :]


def floats_sent(shapes: Sequence[torch.Size], rank: int) -> int:
    """How many floats PowerSGD of this rank sends a step: the sum of r (n + m) and of all tensors of one dimension.

    It sets the level of a method that is to send as much; what a method did send is counted on the wire.
    """
    total = 0
    for shape in shapes:
        if _is_matrix(shape):
            n, m = _matrix_size(shape)
            total += min(n, m, rank) * (n + m)
        else:
            total += shape.numel()
    return total


def _is_matrix(shape: torch.Size) -> bool:
    return len(shape) >= 2 and shape.numel() > 0


def _is_worth_it(shape: torch.Size, config: PowerSGDConfig) -> bool:
    n, m = _matrix_size(shape)
    return min(n, m, config.rank) * (n + m) * config.min_compression_rate < n * m


def _matrix_size(shape: torch.Size) -> tuple[int, int]:
    return shape[0], shape[1:].numel()


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b. Raises ValueError for an `out` of another shape."""
    # torch.mm would resize it, which detaches it from the message that it is a part of: what had been there is sent.
    if out.shape != (a.shape[0], b.shape[1]):
        raise ValueError(f"Expected out of shape {(a.shape[0], b.shape[1])}, got {tuple(out.shape)}.")
    torch.mm(a, b, out=out)


def _orthonormal(p: Tensor) -> Tensor:
    """(r, n), r <= n -> orthonormal rows (r, n) that span those of `p`, also where their rank is below r."""
    # Householder QR: Gram-Schmidt divides by what is left of a row that depends on others, which is rounding, and so
    # loses 7 % of a classifier's gradient, whose rows sum to zero.
    return torch.linalg.qr(p.T).Q.T.contiguous()
