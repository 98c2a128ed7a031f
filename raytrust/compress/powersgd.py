"""PowerSGD (Vogels, Karimireddy & Jaggi 2019, Algorithm 1): low-rank compression by one step of power iteration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytrust.compress.base import Base
from raytrust.compress.interface import Layout, Reduced, Vantage
from raytrust.compress.state import State
from raytrust.compress.views import FactorView, LinearView
from raytrust.config import PowerSGDConfig, register
from raytrust.wire.channel import Channel, Message

_TINY = torch.finfo(torch.float32).tiny


@register.compressor(PowerSGDConfig)
class PowerSGD(Base):
    """Each gradient, as the n x m matrix M = view(shape[0], -1), is sent as P = M Q and Q' = M^T P^, where P^ is an
    orthonormal basis of the mean of P over workers; it decodes to P^ Q'^T. Tensors of one dimension are sent whole.

    Two all-reduces: the P with the tensors of one dimension, then the Q'. The rank is min(n, m, rank), so the mean of a
    matrix whose smaller side is at most `rank` arrives without loss; so does what each worker sent if n <= m, else it
    lacks what lies outside the span of the mean. The first Q is drawn from `seed`, which all workers share; with
    `warm_start` the mean Q' is the Q of the next step, but for a matrix of m <= rank and m <= n, whose Q is square and
    stays; else a new one is drawn. Error feedback is not part of this class. Factors are held and sent transposed,
    (r, n) and (r, m) by rows, which is how the products run fastest.

    We deviate from Algorithm 1 in two points. The basis is by Householder QR instead of Gram-Schmidt, which loses
    orthogonality on gradients whose rank is below `rank` (a classifier's is at most classes - 1). And the warm start is
    divided by its largest magnitude, which changes nothing but that P is of the scale of M instead of its square.
    """

    def __init__(self, config: PowerSGDConfig, layout: Layout, seed: int = 0):
        super().__init__(config, layout)
        self._config: PowerSGDConfig = config
        self._matrices = [i for i, s in enumerate(layout.shapes) if _is_matrix(s)]
        self._vectors = [i for i, s in enumerate(layout.shapes) if not _is_matrix(s)]
        self._sizes = [_matrix_size(layout.shapes[i]) for i in self._matrices]  # (n, m)
        self._ranks = [min(n, m, config.rank) for n, m in self._sizes]
        widths = list(zip(self._ranks, self._sizes, strict=True))
        self._first = Layout([torch.Size((r, n)) for r, (n, _) in widths] + [layout.shapes[i] for i in self._vectors])
        self._second = Layout([torch.Size((r, m)) for r, (_, m) in widths])
        self._generator = torch.Generator().manual_seed(seed)
        self._q = self._draw()

    def reduce(self, grads: Sequence[Tensor], channel: Channel) -> Reduced:
        flat = self._input(grads)
        tensors = self.layout.unflatten(flat)
        matrices = [tensors[i].view(size) for i, size in zip(self._matrices, self._sizes, strict=True)]
        ps, vectors, sent_first = self._message(self._first, "p", flat)
        self._q = [q.to(flat.device) for q in self._q]  # drawn on the CPU, or loaded from wherever
        for m, q, p in zip(matrices, self._q, ps, strict=True):
            _multiply(q, m.T, p)
        for i, vector in zip(self._vectors, vectors, strict=True):
            vector.copy_(tensors[i])
        mean_ps, mean_vectors = self._split_first(channel.all_mean(sent_first))
        bases = [_orthonormal(p) for p in mean_ps]
        qs, _, sent_second = self._message(self._second, "q", flat)
        for m, basis, q in zip(matrices, bases, qs, strict=True):
            _multiply(basis, m, q)
        mean_qs = self._second.unflatten(channel.all_mean(sent_second))
        if self._config.warm_start:
            # A square Q stays as it was drawn, of full rank: after a gradient of lower rank, M Q would miss directions.
            self._q = [
                old if q.shape[0] == q.shape[1] else q / q.abs().max().clamp_min(_TINY)
                for old, q in zip(self._q, mean_qs, strict=True)
            ]
        else:
            self._q = self._draw()

        def subtract(x: Tensor) -> None:
            parts = self.layout.unflatten(x)
            for i, size, basis, q in zip(self._matrices, self._sizes, bases, qs, strict=True):
                parts[i].view(size).addmm_(basis.T, q, alpha=-1)
            for i in self._vectors:
                parts[i].zero_()

        mean = self._assemble(bases, mean_qs, mean_vectors, self._scratch("mean", len(flat), flat))
        own = self._scratch("own", len(flat), flat)
        return Reduced(mean, lambda: self._assemble(bases, qs, vectors, own), subtract)

    def decode(self, messages: Sequence[Message], vantage: Vantage) -> list[list[Tensor]]:
        bases, qs, vectors = self._parse(messages, vantage)
        out = messages[0].received[0].new_empty(self.layout.entries)
        return [self._assemble(bases, qs, vectors, out)]

    def view(self, messages: Sequence[Message], vantage: Vantage, victim: int = 0) -> LinearView:
        """Two linear measurements of every matrix: M Q, for the public Q of this step, and M^T P^.

        Q enters as an orthonormal basis of its columns (M Q^ follows from M Q), so that no direction counts for more
        than it weighs in M; columns on which a degenerate Q sheds no light are left out.
        """
        bases, qs, vectors = self._parse(messages, vantage)
        first, _ = self._split_first(messages[0].sent[0] if vantage == "link" else messages[0].received[0])
        inputs = [_whiten(q.to(p)) for q, p in zip(self._q, first, strict=True)]
        ps = [mix @ p for p, (_, mix) in zip(first, inputs, strict=True)]
        directions = [basis for basis, _ in inputs]
        matrices = dict(zip(self._matrices, self._sizes, strict=True))
        return FactorView([*ps, *qs, *vectors], matrices, directions, bases, self._vectors, self.layout.shapes)

    def pure_view(self, messages: Sequence[Message], vantage: Vantage, before: Sequence[Message] | None) -> LinearView:
        """What the messages measure of the gradient alone, where error feedback added a residual E to it.

        before: the messages of the previous step, if the attacker has them. E is what the projection on its P^ left
        over, so P^^T E = 0, for each worker, as all have the same P^, and for their mean. So the part P^^T M Q of M Q
        is the gradient's, and so is that of M^T times the new P^ whose directions lie in the span of the former one.
        Tensors of one dimension have no residual. Raises ValueError if that leaves nothing.
        """
        bases, qs, vectors = self._parse(messages, vantage)
        first, _ = self._split_first(messages[0].sent[0] if vantage == "link" else messages[0].received[0])
        former = [] if before is None else [_orthonormal(p) for p in self._split_first(before[0].received[0])[0]]
        pieces: list[tuple[int, Tensor, Tensor | None]] = []  # (matrix, left, right): left M right^T is measured
        observed: list[Tensor] = []
        for j, left in enumerate(former):
            right, mix = _whiten(self._q[j].to(left))
            inside = _within(bases[j], left)
            pieces += [(j, left, right), (j, inside @ bases[j], None)]
            observed += [left @ (mix @ first[j]).T, inside @ qs[j]]
        kept = [k for k, o in enumerate(observed) if o.numel()]
        pieces, observed = [pieces[k] for k in kept], [observed[k] for k in kept]
        if not observed and not vectors:
            raise ValueError("Expected a history of at least 1 step, to tell the gradient from the residual.")

        def measure(grads: Sequence[Tensor]) -> list[Tensor]:
            products = [
                left @ grads[self._matrices[j]].reshape(len(grads[0]), *self._sizes[j]) for j, left, _ in pieces
            ]
            measured = [x if right is None else x @ right.T for x, (_, _, right) in zip(products, pieces, strict=True)]
            return [*measured, *(grads[i] for i in self._vectors)]

        def adjoint(measured: Sequence[Tensor]) -> list[Tensor]:
            grads = [measured[0].new_zeros(len(measured[0]), *shape) for shape in self.layout.shapes]
            for m, (j, left, right) in zip(measured, pieces, strict=False):
                matrix = left.T @ (m if right is None else m @ right)
                grads[self._matrices[j]] += matrix.reshape(grads[self._matrices[j]].shape)
            for i, vector in zip(self._vectors, measured[len(pieces) :], strict=True):
                grads[i] = vector
            return grads

        return LinearView([*observed, *vectors], measure, adjoint)

    def public_state(self) -> dict[str, Tensor]:
        """The Q of the coming step, (rank, m) by parameter name, which every peer computed in the step before."""
        names = [self.layout.names[i] for i in self._matrices]
        return {f"q.{name}": q.clone() for name, q in zip(names, self._q, strict=True)}

    def _take_public(self, state: State) -> None:
        self._q = [state[f"q.{self.layout.names[i]}"].clone() for i in self._matrices]

    def _tensors(self) -> dict[str, Tensor]:
        return self.public_state() | {"generator": self._generator.get_state()}

    def _take(self, state: State) -> None:
        self._take_public(state)
        self._generator.set_state(state["generator"].cpu())  # of a checkpoint that was read onto a GPU

    def _draw(self) -> list[Tensor]:
        return [torch.randn(s, generator=self._generator, dtype=torch.float32) for s in self._second.shapes]

    def _message(self, layout: Layout, name: str, like: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """A buffer for a message: (its matrices, its vectors, all of it as one vector)."""
        flat = self._scratch(name, layout.entries, like)
        parts = layout.unflatten(flat)
        return parts[: len(self._matrices)], parts[len(self._matrices) :], flat

    def _parse(self, messages: Sequence[Message], vantage: Vantage) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """(P^, Q', tensors of one dimension), as the vantage has them."""
        first, second = messages
        bases = [_orthonormal(p) for p in self._split_first(first.received[0])[0]]
        sent = vantage == "link"
        _, vectors = self._split_first(first.sent[0] if sent else first.received[0])
        return bases, self._second.unflatten(second.sent[0] if sent else second.received[0]), vectors

    def _split_first(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        parts = self._first.unflatten(flat)
        return parts[: len(self._matrices)], parts[len(self._matrices) :]

    def _assemble(self, bases: list[Tensor], qs: list[Tensor], vectors: list[Tensor], out: Tensor) -> list[Tensor]:
        grads = self.layout.unflatten(out)
        for i, size, basis, q in zip(self._matrices, self._sizes, bases, qs, strict=True):
            _multiply(basis.T, q, grads[i].view(size))
        for i, vector in zip(self._vectors, vectors, strict=True):
            grads[i].copy_(vector)
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
    return len(shape) >= 2 and shape.numel() > 0


def _matrix_size(shape: torch.Size) -> tuple[int, int]:
    return shape[0], shape[1:].numel()


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b. Raises ValueError for an `out` of another shape.

    torch.mm would resize it, which detaches it from the message that it is a part of: what had been there is then sent.
    """
    if out.shape != (a.shape[0], b.shape[1]):
        raise ValueError(f"Expected out of shape {(a.shape[0], b.shape[1])}, got {tuple(out.shape)}.")
    torch.mm(a, b, out=out)


def _orthonormal(p: Tensor) -> Tensor:
    """(r, n), r <= n -> orthonormal rows (r, n) that span those of `p`, also where their rank is below r."""
    return torch.linalg.qr(p.T).Q.T.contiguous()


def _whiten(q: Tensor) -> tuple[Tensor, Tensor]:
    """(r, m) -> an orthonormal basis (s, m) of the rows of `q`, of numerical rank s; mix (s, r): basis = mix q."""
    u, s, vh = torch.linalg.svd(q, full_matrices=False)
    keep = s > s[0] * 1e-4 if s.numel() and s[0] > 0 else torch.zeros_like(s, dtype=torch.bool)
    return vh[keep], u.T[keep] / s[keep, None]


def _within(rows: Tensor, others: Tensor) -> Tensor:
    """(k, r): coefficients of the directions in the span of orthonormal rows (r, n) that lie in that of others, too."""
    rows, others = rows.double(), others.double()
    outside = rows - (rows @ others.T) @ others  # its singular values are the sines of the angles between the spans
    u, s, _ = torch.linalg.svd(outside, full_matrices=False)
    return u.T[s < 1e-5].float()
