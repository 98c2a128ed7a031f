"""PowerSGD against PyTorch's own `powerSGD_hook`, step by step from the same state, in two gloo processes.

The hook runs under DDP on one bucket; before each of its steps our compressor takes over its Q and its residual.
PyTorch orthogonalises Q and then P, by Gram-Schmidt up to rank 2; both span what ours span, so the mean gradient is the
same: measured to 1.4e-6.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as oracle
from torch.nn.parallel import DistributedDataParallel
from toys import distance

from raytrust.compress import ErrorFeedback, build
from raytrust.config import Defence, PowerSGDConfig
from raytrust.wire.channel import Channel
from raytrust.wire.processes import in_processes

STEPS = 7
START = 2  # DDP has its final buckets from the second pass on; PyTorch starts no earlier with a memory

CASES = list(itertools.product((1, 2, 4), (False, True), (False, True)))  # rank, error feedback, warm start


def label(case: tuple[int, bool, bool]) -> str:
    rank, error_feedback, warm_start = case
    return f"rank {rank}" + " EF" * error_feedback + " warm" * warm_start


def net() -> nn.Module:
    """Every matrix is larger than its factors of rank 4, so that PyTorch compresses it; two are of one shape."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 9, 24),
            nn.ReLU(),
            nn.Linear(24, 24),
            nn.ReLU(),
            nn.Linear(24, 24),
            nn.ReLU(),
            nn.Linear(24, 12),
        )


@dataclass(frozen=True)
class Step:
    """One step of one worker; lists in the order of the model's parameters. Residuals: after the step."""

    inputs: list[Tensor]  # with the residual
    mean: list[Tensor]
    oracle: list[Tensor]
    residual: list[Tensor] | None
    oracle_residual: list[Tensor] | None


def steps(channel: Channel, rank: int, error_feedback: bool, warm_start: bool) -> list[Step]:
    model = net()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = {p: name for name, p in named.items()}
    ddp = DistributedDataParallel(model, bucket_cap_mb=1000)
    state = oracle.PowerSGDState(
        None,
        matrix_approximation_rank=rank,
        start_powerSGD_iter=START,
        min_compression_rate=1,  # whatever it makes smaller: all matrices, no bias
        use_error_feedback=error_feedback,
        warm_start=warm_start,
    )
    local: dict[str, Tensor] = {}  # this worker's gradients, in the order of the bucket

    def hook(state, bucket):  # without annotations: DDP takes none but its own types
        assert bucket.index() == 0
        assert bucket.is_last()
        local.clear()
        grads = zip(bucket.parameters(), bucket.gradients(), strict=True)
        local.update((names[p], grad.clone()) for p, grad in grads)
        before.update(_state(state, local, named, rank))
        return oracle.powerSGD_hook(state, bucket)

    before: dict[str, Tensor] = {}
    ddp.register_comm_hook(state, hook)
    compressor = build(Defence(PowerSGDConfig(rank, warm_start), error_feedback), model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(10 * step + channel.rank)
        x, y = torch.randn(16, 3, 5, 5, generator=generator), torch.randint(12, (16,), generator=generator)
        optimiser.zero_grad()
        before.clear()
        F.cross_entropy(ddp(x), y).backward()
        if step >= START:
            ours = {k: x for k, x in before.items() if error_feedback or not k.startswith("residual.")}
            compressor.load_state_dict(compressor.state_dict() | ours)
            grads = [local[name] for name in named]
            inputs = [g + before[f"residual.{name}"] for g, name in zip(grads, named, strict=True)]
            mean = [m.clone() for m in compressor.reduce(grads, channel).mean]
            residual = oracle_residual = None
            if isinstance(compressor, ErrorFeedback):
                residual = [e.clone() for e in compressor.residual or []]
                parts = _split(state.error_dict[0], {name: local[name].shape for name in local})
                oracle_residual = [parts[name].clone() for name in named]
            averaged = [p.grad.clone() for p in named.values() if p.grad is not None]
            found.append(Step(inputs, mean, averaged, residual, oracle_residual))
        optimiser.step()
    return found


def _state(
    state: oracle.PowerSGDState, local: dict[str, Tensor], named: dict[str, nn.Parameter], rank: int
) -> dict[str, Tensor]:
    """PyTorch's Q and residual before a step, under our names: Q as (rank, m), the residual like the parameter."""
    shapes = {name: local[name].shape for name in local}
    found = {f"residual.{name}": torch.zeros_like(p.detach()) for name, p in named.items()}
    if 0 in state.error_dict:
        found |= {f"residual.{name}": e.clone() for name, e in _split(state.error_dict[0], shapes).items()}
    return found | {f"q.{name}": q.T.contiguous() for name, q in _qs(state, shapes, rank)}


def _qs(state: oracle.PowerSGDState, shapes: dict[str, torch.Size], rank: int) -> Iterator[tuple[str, Tensor]]:
    """(name, (m, rank)) in PyTorch's order, which groups the matrices by shape: its memory, or what it will draw."""
    grouped: dict[tuple[int, int], list[str]] = {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            grouped.setdefault((shape[0], shape[1:].numel()), []).append(name)
    sizes = {name: (m, min(n, m, rank)) for (n, m), group in grouped.items() for name in group}
    if state.warm_start and 0 in state.q_memory_dict:
        parts = state.q_memory_dict[0].split([m * r for m, r in sizes.values()])
        yield from ((name, part.clone().view(size)) for (name, size), part in zip(sizes.items(), parts, strict=True))
    else:
        seed = copy.deepcopy(state.rng).randint(1_000_000_000)
        generator = torch.Generator().manual_seed(seed)
        yield from ((name, torch.randn(size, generator=generator)) for name, size in sizes.items())


def _split(flat: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def everything(channel: Channel) -> dict[Any, list[Step]]:
    return {case: steps(channel, *case) for case in CASES}


@pytest.fixture(scope="module")
def workers() -> list[dict[Any, list[Step]]]:
    return in_processes(everything, 2)


every_case = pytest.mark.parametrize("case", CASES, ids=label)


@every_case
def test_the_mean_gradient_is_that_of_pytorch(case: Any, workers: list[dict[Any, list[Step]]]) -> None:
    for worker in workers:
        assert len(worker[case]) == STEPS - START
        for step in worker[case]:
            for ours, theirs in zip(step.mean, step.oracle, strict=True):
                assert distance([ours], [theirs]) < 1e-5


@every_case
def test_the_comparison_is_of_something_lossy(case: Any, workers: list[dict[Any, list[Step]]]) -> None:
    """Every matrix was compressed, on both sides."""
    for step in zip(*(worker[case] for worker in workers), strict=True):
        for i, theirs in enumerate(step[0].oracle):
            uncompressed = (step[0].inputs[i] + step[1].inputs[i]) / 2
            if theirs.dim() > 1:
                assert distance([theirs], [uncompressed]) > 0.01
            else:
                torch.testing.assert_close(theirs, uncompressed)


@pytest.mark.parametrize("case", [case for case in CASES if case[1]], ids=label)
def test_residuals_agree_in_the_mean_only(case: Any, workers: list[dict[Any, list[Step]]]) -> None:
    """PyTorch subtracts the decoded mean, we what this worker sent. So the sums over workers are equal."""
    for first, second in zip(*(worker[case] for worker in workers), strict=True):
        ours = [(a + b) / 2 for a, b in zip(first.residual, second.residual, strict=True)]
        theirs = [(a + b) / 2 for a, b in zip(first.oracle_residual, second.oracle_residual, strict=True)]
        assert distance(ours, theirs) < 1e-5
        assert distance(first.residual, first.oracle_residual) > 0.1
