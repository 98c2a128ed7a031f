"""PowerSGD (Vogels, Karimireddy & Jaggi 2019, Algorithm 1): low-rank compression by one step of power iteration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytrust.channel import Channel, Message
from raytrust.compress.interface import LinearView, Reduced, Vantage, flatten, unflatten
from raytrust.config import PowerSGDConfig


class PowerSGD:
    """Each gradient, as the n x m matrix M = view(shape[0], -1), is sent as P = M Q and Q' = M^T P^, where P^ is an
    orthonormal basis of the mean of P over workers; it decodes to P^ Q'^T. Tensors of one dimension are sent whole.

    Two all-reduces: the P with the tensors of one dimension, then the Q'. The rank is min(n, m, rank), so the mean of a
    matrix whose smaller side is at most `rank` arrives without loss; so does what each worker sent if n <= m, else it
    lacks what lies outside the span of the mean. The first Q is drawn from `seed`, which all workers share; with
    `warm_start` the mean Q' is the Q of the next step, else a new one is drawn. Error feedback is not part of this
    class.

    We deviate from Algorithm 1 in the orthogonalisation: Householder QR instead of Gram-Schmidt, which loses
    orthogonality on gradients whose rank is below `rank` (a classifier's is at most classes - 1).
    """

    def __init__(self, config: PowerSGDConfig, shapes: Sequence[torch.Size], seed: int = 0):
        self._config = config
        self._shapes = list(shapes)
        self._matrices = [i for i, s in enumerate(shapes) if _is_matrix(s)]
        self._vectors = [i for i, s in enumerate(shapes) if not _is_matrix(s)]
        self._sizes = [_matrix_size(shapes[i]) for i in self._matrices]  # (n, m)
        self._ranks = [min(n, m, config.rank) for n, m in self._sizes]
        self._generator = torch.Generator().manual_seed(seed)
        self._q = self._draw()

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        matrices = [
            grads[i].detach().float().reshape(size) for i, size in zip(self._matrices, self._sizes, strict=True)
        ]
        ps = [m @ q.to(m.device) for m, q in zip(matrices, self._q, strict=True)]
        sent_first = flatten([*ps, *(grads[i] for i in self._vectors)])
        mean_ps, mean_vectors = self._split_first(channel.all_mean(sent_first))
        bases = [_orthonormal(p) for p in mean_ps]
        qs = [m.T @ basis for m, basis in zip(matrices, bases, strict=True)]
        mean_qs = self._split_second(channel.all_mean(flatten(qs)))
        own = self._assemble(bases, qs, self._split_first(sent_first)[1])
        mean = self._assemble(bases, mean_qs, mean_vectors)
        self._q = [q.clone() for q in mean_qs] if self._config.warm_start else self._draw()
        return Reduced(mean, own)

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        bases, qs, vectors = self._parse(messages, vantage)
        return [self._assemble(bases, qs, vectors)]

    def view(self, messages: Sequence[Message], vantage: Vantage, victim: int = 0) -> LinearView:
        """Two linear measurements of every matrix: M Q, for the public Q of this step, and M^T P^.

        Q enters as an orthonormal basis of its columns (M Q^ follows from M Q), so that no direction counts for more
        than it weighs in M; columns on which a degenerate Q sheds no light are left out.
        """
        bases, qs, vectors = self._parse(messages, vantage)
        first, _ = self._split_first(messages[0].sent[0] if vantage == "link" else messages[0].received[0])
        inputs = [_whiten(q.to(p)) for q, p in zip(self._q, first, strict=True)]
        ps = [p @ mix for p, (_, mix) in zip(first, inputs, strict=True)]
        directions = [basis for basis, _ in inputs]

        def measure(grads: Sequence[Tensor]) -> list[Tensor]:
            matrices = [
                grads[i].reshape(len(grads[i]), *size) for i, size in zip(self._matrices, self._sizes, strict=True)
            ]
            return [
                *(m @ d for m, d in zip(matrices, directions, strict=True)),
                *(m.mT @ b for m, b in zip(matrices, bases, strict=True)),
                *(grads[i] for i in self._vectors),
            ]

        def adjoint(measured: Sequence[Tensor]) -> list[Tensor]:
            k = len(self._matrices)
            grads: list[Tensor] = [torch.empty(0)] * len(self._shapes)
            for j, i in enumerate(self._matrices):
                matrix = measured[j] @ directions[j].T + bases[j] @ measured[k + j].mT
                grads[i] = matrix.reshape(len(matrix), *self._shapes[i])
            for i, vector in zip(self._vectors, measured[2 * k :], strict=True):
                grads[i] = vector
            return grads

        return LinearView([*ps, *qs, *vectors], measure, adjoint)

    def public_state(self) -> dict[str, Tensor]:
        """The Q of the coming step, which every peer computed in the step before."""
        return {f"q.{i}": q.clone() for i, q in zip(self._matrices, self._q, strict=True)}

    def load_public_state(self, state: dict[str, Tensor]) -> None:
        self._q = [state[f"q.{i}"].clone() for i in self._matrices]

    def _draw(self) -> list[Tensor]:
        return [
            torch.randn(m, r, generator=self._generator) for (_, m), r in zip(self._sizes, self._ranks, strict=True)
        ]

    def _parse(self, messages: Sequence[Message], vantage: Vantage) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """(P^, Q', tensors of one dimension), as the vantage has them."""
        first, second = messages
        bases = [_orthonormal(p) for p in self._split_first(first.received[0])[0]]
        sent = vantage == "link"
        _, vectors = self._split_first(first.sent[0] if sent else first.received[0])
        return bases, self._split_second(second.sent[0] if sent else second.received[0]), vectors

    def _split_first(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        shapes = [torch.Size((n, r)) for (n, _), r in zip(self._sizes, self._ranks, strict=True)]
        parts = unflatten(flat, [*shapes, *(self._shapes[i] for i in self._vectors)])
        return parts[: len(shapes)], parts[len(shapes) :]

    def _split_second(self, flat: Tensor) -> list[Tensor]:
        return unflatten(flat, [torch.Size((m, r)) for (_, m), r in zip(self._sizes, self._ranks, strict=True)])

    def _assemble(self, bases: list[Tensor], qs: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
        grads: list[Tensor] = [torch.empty(0)] * len(self._shapes)
        for i, basis, q in zip(self._matrices, bases, qs, strict=True):
            grads[i] = (basis @ q.T).view(self._shapes[i])
        for i, vector in zip(self._vectors, vectors, strict=True):
            grads[i] = vector.view(self._shapes[i])
        return grads


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
    return len(shape) >= 2


def _matrix_size(shape: torch.Size) -> tuple[int, int]:
    return shape[0], shape[1:].numel()


def _orthonormal(p: Tensor) -> Tensor:
    """(n, r), r <= n -> orthonormal (n, r) whose columns span those of `p`, also where their rank is below r."""
    return torch.linalg.qr(p).Q


def _whiten(q: Tensor) -> tuple[Tensor, Tensor]:
    """(m, r) -> an orthonormal basis (m, s) of the columns of `q`, of numerical rank s; mix (r, s): basis = q mix."""
    u, s, vh = torch.linalg.svd(q, full_matrices=False)
    keep = s > s[0] * 1e-4 if s.numel() and s[0] > 0 else torch.zeros_like(s, dtype=torch.bool)
    return u[:, keep], vh.T[:, keep] / s[keep]
