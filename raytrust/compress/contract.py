"""What every compressor guarantees of a step, as a check for the tests of a method of your own.

    check(Defence(Mine()))                   # one worker
    check(Defence(Mine()), GroupChannel())   # called by every worker of a process group

tests/compress/test_contract.py puts all methods of the package through it, with error feedback and without.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raytrust.compress import Compressor, ErrorFeedback, build
from raytrust.config import Defence
from raytrust.wire.channel import Channel, LocalChannel, Message, Tap

# A convolution, a bias, a matrix, one entry, a column, a row, a 1x1 convolution.
SHAPES = [torch.Size(s) for s in [(6, 3, 3, 3), (6,), (4, 10), (1,), (9, 1), (1, 7), (5, 4, 1, 1)]]
STEPS = 3


@dataclass(frozen=True)
class Step:
    """What one worker saw of a step. inputs: what was compressed, with the residual if there is one."""

    inputs: list[Tensor]
    mean: list[Tensor]
    own: list[Tensor]
    residual: list[Tensor] | None
    messages: list[Message]
    public_state: dict[str, Tensor]


def check(defence: Defence, channel: Channel | None = None, mean_of_own: bool = True, exact: float = 1e-5) -> None:
    """Raises AssertionError, with the guarantee, if the defence's compressor breaks one. A collective call.

    mean_of_own: whether the mean is that of what the workers sent; a majority vote's is not. exact: how far a mean that
    is summed in the format of the wire may be from that of the values, absolute, for gradients of unit variance.
    """
    channel = channel or LocalChannel()
    holds = _Guarantees(defence, exact)
    steps = take_steps(defence, channel, holds)
    for step in steps:
        workers = channel.all_gather(step.own)
        holds("workers end with the same mean", _alike(channel.all_gather(step.mean)))
        if mean_of_own:
            mean = [torch.stack(of_all).mean(0) for of_all in zip(*workers, strict=True)]
            holds.close("the mean is that of what the workers sent", step.mean, mean)
        if step.residual is not None:
            left = [x - own for x, own in zip(step.inputs, step.own, strict=True)]
            holds.close("the residual is what was not sent", step.residual, left)
        _check_decoding(defence, step, workers, holds)
    again = take_steps(defence, channel, holds, overwrite=True)
    holds("a step depends on gradients and seed alone", all(map(_equal, steps, again)))
    _check_state(defence, channel, holds)
    _check_refusal(defence, channel, holds)
    for shapes in [], [torch.Size((0,)), torch.Size((3, 0))]:
        compressor = build(defence, shapes)
        for _ in range(2):
            mean = compressor.reduce([torch.zeros(s) for s in shapes], channel).mean
            holds("without entries the mean has the gradient's shapes", [m.shape for m in mean] == shapes)


class _Guarantees:
    def __init__(self, defence: Defence, exact: float):
        self._name, self._exact = defence.name, exact

    def __call__(self, guarantee: str, condition: bool) -> None:
        if not condition:
            raise AssertionError(f"Expected of {self._name}: {guarantee}.")

    def close(self, guarantee: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        pairs = list(zip(found, expected, strict=True))
        self(guarantee, all(torch.allclose(x, y, rtol=1e-5, atol=self._exact) for x, y in pairs))


def take_steps(
    defence: Defence, channel: Channel, holds: Callable[[str, bool], None], overwrite: bool = False
) -> list[Step]:
    """Some steps, with gradients that differ between workers. overwrite: whatever a step returned and was given."""
    compressor = build(defence, SHAPES, seed=5, private_seed=5)
    steps = []
    for i in range(STEPS):
        grads = gradients(100 * i + channel.rank)
        before, generator = [g.clone() for g in grads], torch.random.get_rng_state()
        residual, state = _residual(compressor), compressor.public_state()
        inputs = [g + e for g, e in zip(before, residual, strict=True)] if residual else before
        tap = Tap(channel, keep=True)
        reduced = compressor.reduce(grads, tap)
        mean, own = [m.clone() for m in reduced.mean], [o.clone() for o in reduced.decoded_own]
        holds("the mean has the gradient's shapes", [m.shape for m in mean] == SHAPES)
        holds("reading what was sent does not change the mean", all(map(torch.equal, reduced.mean, mean)))
        holds("the gradients stay as they are", all(map(torch.equal, grads, before)))
        holds("the global generator stays as it is", torch.equal(torch.random.get_rng_state(), generator))
        steps.append(Step(inputs, mean, own, _residual(compressor), tap.messages, state))
        # As an optimiser does that works in place.
        if overwrite:
            for tensor in (*reduced.mean, *grads):
                tensor.fill_(torch.nan)
            holds(
                "what was sent does not depend on what the caller may write to",
                all(map(torch.equal, reduced.decoded_own, own)),
            )
            holds("reading what was sent does not write to the mean", all(m.isnan().all() for m in reduced.mean))
    return steps


def gradients(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # The default type is the user's to set, and must not change what is checked.
    return [torch.randn(shape, generator=generator, dtype=torch.float32) for shape in SHAPES]


def _check_decoding(defence: Defence, step: Step, workers: Sequence[Sequence[Tensor]], holds: _Guarantees) -> None:
    """By one who has the messages and the public state, but nothing else of the sender's."""
    fresh = build(defence, SHAPES, seed=99)
    fresh.load_public_state(step.public_state)
    (link,) = fresh.decode(step.messages, "link")
    holds.close("the wire alone says what was sent", link, step.own)
    peer = fresh.decode(step.messages, "peer")
    whose = workers if len(peer) > 1 or len(workers) == 1 else [step.mean]
    holds("a peer decodes each worker's message, or the mean", len(peer) == len(whose))
    for decoded, expected in zip(peer, whose, strict=True):
        holds.close("a peer decodes what the workers sent, or its mean", decoded, expected)


def _check_state(defence: Defence, channel: Channel, holds: _Guarantees) -> None:
    # Another seed, so that a state which forgets the dice is found out.
    compressor, resumed = (build(defence, SHAPES, seed=seed, private_seed=5) for seed in (5, 6))
    for i in range(2):
        compressor.reduce(gradients(i + channel.rank), channel)
    file = io.BytesIO()
    torch.save(compressor.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    grads = gradients(9 + channel.rank)
    expected = [m.clone() for m in compressor.reduce(grads, channel).mean]
    holds("a state goes on to the bit", all(map(torch.equal, resumed.reduce(grads, channel).mean, expected)))


def _check_refusal(defence: Defence, channel: Channel, holds: _Guarantees) -> None:
    for value in (torch.nan, torch.inf):
        grads = gradients(0)
        grads[2].view(-1)[7] = value
        tap = Tap(channel, keep=True)
        try:
            build(defence, SHAPES).reduce(grads, tap)
        except ValueError:
            holds("a gradient that is not finite is refused before anything is sent", not tap.messages)
        else:
            holds(f"a gradient that holds {value} is refused", False)


def _residual(compressor: Compressor) -> list[Tensor] | None:
    residual = compressor.residual if isinstance(compressor, ErrorFeedback) else None
    return residual and [r.clone() for r in residual]


def _alike(workers: Sequence[Sequence[Tensor]]) -> bool:
    return all(all(map(torch.equal, one, workers[0])) for one in workers)


def _equal(one: Step, other: Step) -> bool:
    sent = [[x for m in step.messages for x in (*m.sent, *m.received)] for step in (one, other)]
    return all(map(torch.equal, [*one.mean, *one.own, *sent[0]], [*other.mean, *other.own, *sent[1]]))
