from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import SHAPES, distance, gradients

from raytrust.compress import Layout
from raytrust.compress.powersgd import PowerSGD, floats_sent
from raytrust.config import PowerSGDConfig
from raytrust.leak import view_of
from raytrust.wire.channel import LocalChannel, Tap


def reduce_once(matrix: Tensor, rank: int) -> Tensor:
    return PowerSGD(PowerSGDConfig(rank), Layout([matrix.shape])).reduce([matrix], LocalChannel()).mean[0]


def low_rank(n: int, m: int, rank: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, rank, generator=generator) @ torch.randn(rank, m, generator=generator)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 8), st.integers(0, 9))
def test_a_matrix_of_that_rank_arrives_whole(n: int, m: int, rank: int, seed: int) -> None:
    k = min(n, m, rank)
    left, right = (torch.linalg.qr(low_rank(side, k, k, seed)).Q for side in (n, m))
    matrix = left @ right.T
    compressor = PowerSGD(PowerSGDConfig(rank), Layout([matrix.shape]))
    compressor.reduce([matrix], LocalChannel())  # a random first Q may happen to be close to singular
    assert distance([compressor.reduce([matrix], LocalChannel()).mean[0]], [matrix]) < 1e-5


def test_a_mean_of_that_rank_arrives_whole_from_workers_that_differ(group: list[dict[str, Any]]) -> None:
    for worker in group:
        mean, found = worker["low rank"]
        assert distance([found], [mean]) < 1e-5


def test_a_matrix_of_that_rank_arrives_whole_at_once() -> None:
    matrix = low_rank(12, 20, 3)
    assert distance([reduce_once(matrix, 3)], [matrix]) < 1e-5


@pytest.mark.parametrize(("shape", "rank"), [((64, 3, 3, 3), 27), ((10, 512), 10), ((10, 512), 50), ((1, 9), 1)])
def test_a_layer_with_a_side_of_at_most_the_rank_arrives_whole(shape: tuple[int, ...], rank: int) -> None:
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert distance([reduce_once(grad, rank)], [grad]) < 1e-5


def test_a_tensor_of_one_dimension_arrives_bit_for_bit() -> None:
    grads = gradients(0)
    mean, own = PowerSGD(PowerSGDConfig(1), Layout(SHAPES)).reduce(grads, LocalChannel())
    for i, shape in enumerate(SHAPES):
        if len(shape) == 1:
            assert torch.equal(mean[i], grads[i])
            assert torch.equal(own[i], grads[i])


def test_a_classifier_s_gradient_of_deficient_rank_stays_accurate() -> None:
    """Gram-Schmidt loses 7 % here: the rows of a softmax classifier's gradient sum to zero, so its rank is 9 of 10."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(64, 512, generator=generator)
    labels = torch.randint(0, 10, (64,), generator=generator)
    weight = (0.01 * torch.randn(10, 512, generator=generator)).requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(features @ weight.T, labels), weight)
    compressor = PowerSGD(PowerSGDConfig(rank=10), Layout([grad.shape]))
    for _ in range(3):  # with the warm start, whose Q is deficient too
        (mean,), _ = compressor.reduce([grad], LocalChannel())
        assert distance([mean], [grad]) < 1e-5


@pytest.mark.parametrize("rank", [2, 8, 30])
def test_the_basis_is_orthonormal_whatever_the_gradient(rank: int) -> None:
    matrix = 1e-4 * low_rank(40, 60, 2)
    compressor = PowerSGD(PowerSGDConfig(rank), Layout([matrix.shape]))
    for _ in range(4):
        (mean,), _ = compressor.reduce([matrix], LocalChannel())
        assert distance([mean], [matrix]) < 1e-4


@pytest.mark.parametrize("warm_start", [True, False])
def test_a_gradient_of_zeros_gives_zeros_and_does_no_harm(warm_start: bool) -> None:
    matrix = low_rank(12, 20, 2)
    compressor = PowerSGD(PowerSGDConfig(2, warm_start), Layout([matrix.shape, torch.Size((3,))]))
    for _ in range(2):
        tap, state = Tap(LocalChannel(), keep=True), compressor.public_state()
        mean, _ = compressor.reduce([torch.zeros_like(matrix), torch.zeros(3)], tap)
        assert all(torch.equal(m, torch.zeros_like(m)) for m in mean)
        compressor_of_peer = PowerSGD(PowerSGDConfig(2, warm_start), Layout([matrix.shape, torch.Size((3,))]))
        compressor_of_peer.load_public_state(state)
        assert float(view_of(compressor_of_peer, tap.messages, "link").distance([matrix[None], torch.ones(1, 3)])) == 1
    for _ in range(2):  # a second step, because the warm start knew nothing
        mean, _ = compressor.reduce([matrix, torch.zeros(3)], LocalChannel())
    assert distance(mean, [matrix, torch.zeros(3)]) < 1e-5


def test_the_warm_start_is_a_power_iteration() -> None:
    """On one matrix again and again, the error falls to that of the best approximation of the rank (SVD)."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(30, 40, generator=generator) @ torch.diag(0.8 ** torch.arange(40.0))
    best = float(torch.linalg.svdvals(matrix)[4:].square().sum().sqrt())

    def errors(warm_start: bool) -> list[float]:
        compressor = PowerSGD(PowerSGDConfig(4, warm_start), Layout([matrix.shape]))
        means = [compressor.reduce([matrix], LocalChannel()).mean[0].clone() for _ in range(30)]
        return [float((matrix - mean).norm()) for mean in means]

    warm, cold = errors(True), errors(False)
    assert warm[0] == cold[0] > 1.05 * best  # the first step is the same
    assert warm[-1] < 1.001 * best
    assert min(cold) > 1.01 * best
    assert len(set(cold)) == 30  # a new draw each step


def test_one_step_is_algorithm_1() -> None:
    """P = M Q; P^ = orthonormal basis of P; Q' = M^T P^; decoded: P^ Q'^T, the projection of M on the span of P."""
    matrix = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    compressor = PowerSGD(PowerSGDConfig(2), Layout([matrix.shape]), seed=3)
    q = compressor.public_state()["q.0"].T
    tap = Tap(LocalChannel(), keep=True)
    (mean,), _ = compressor.reduce([matrix], tap)
    p = matrix @ q
    torch.testing.assert_close(tap.messages[0].sent[0].view(2, 6), p.T)
    projection = p @ torch.linalg.inv(p.T @ p) @ p.T
    torch.testing.assert_close(mean, projection @ matrix, rtol=1e-4, atol=1e-5)
    following, received = compressor.public_state()["q.0"], tap.messages[1].received[0].view(2, 5)
    torch.testing.assert_close(following, received / received.abs().max())


def test_the_seed_draws_the_first_q() -> None:
    qs = [PowerSGD(PowerSGDConfig(2), Layout(SHAPES), seed).public_state()["q.0"] for seed in (1, 1, 2)]
    assert torch.equal(qs[0], qs[1])
    assert not torch.equal(qs[0], qs[2])


@pytest.mark.parametrize(("rank", "floats"), [(1, 1 * (5 + 12) + 7), (2, 2 * (5 + 12) + 7), (9, 5 * (5 + 12) + 7)])
def test_floats_sent(rank: int, floats: int) -> None:
    assert floats_sent([torch.Size((5, 3, 2, 2)), torch.Size((7,))], rank) == floats
