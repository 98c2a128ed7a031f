"""What becomes of residuals and momenta when training goes on with another number of workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_state import NAMES, tensors
from threads import on_workers
from torch import Tensor
from toys import DEFENCES, SHAPES, Echo, gradients, mean_over_workers, norm

from raytrust.compress import Compressor, ErrorFeedback, build, redistribute
from raytrust.config import Defence, DGCConfig, PowerSGDConfig, SignSGDConfig, TopKConfig
from raytrust.wire.channel import Channel, LocalChannel, Tap

STEPS = 3
WITH_MEMORY = [name for name in DEFENCES if name.endswith("+EF") or name in ("dgc", "dgc-warm-up", "signum")]
# A majority vote is no mean of what was sent, and a sum in 16 bits is one but for its rounding.
AVERAGED = [n for n in DEFENCES if n.endswith("+EF") and n not in ("signsgd+EF", "fp16+EF", "bf16+EF")]

every_change = pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2)])


def compressor_of(defence: Defence) -> Compressor:
    return build(defence, SHAPES, 5, NAMES)


def run(
    defence: Defence, workers: int, states: Sequence[Any] | None = None, seed: int = 0
) -> list[tuple[list[list[Tensor]], dict[str, Any], list[list[Tensor]]]]:
    """(means, state after the last step, gradients) of each worker, after some steps from a state each."""

    def work(channel: Channel) -> Any:
        compressor, means, grads = compressor_of(defence), [], []
        if states is not None:
            compressor.load_state_dict(states[channel.rank])
        for i in range(STEPS):
            grads.append(gradients(seed + 100 * i + channel.rank))
            means.append([m.clone() for m in compressor.reduce(grads[-1], channel).mean])
        return means, compressor.state_dict(), grads

    return on_workers(work, workers)


def states_of(defence: Defence, workers: int, seed: int = 0) -> list[dict[str, Any]]:
    return [state for _, state, _ in run(defence, workers, seed=seed)]


def kind(state: dict[str, Any], name: str) -> list[Tensor]:
    return [state[f"{name}.{parameter}"] for parameter in NAMES]


@every_change
@pytest.mark.parametrize("name", AVERAGED)
def test_nothing_of_the_gradient_is_lost_or_counted_twice(name: str, before: int, after: int) -> None:
    """All steps and what is still owed, the mean residual, are all mean gradients, across the change of workers."""
    first = run(DEFENCES[name], before)
    state = redistribute([state for _, state, _ in first])
    second = run(DEFENCES[name], after, [state] * after, seed=1000)
    total = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    for half in (first, second):
        for i in range(STEPS):
            came = mean_over_workers([grads[i] for _, _, grads in half])
            total = [t + g - m for t, g, m in zip(total, came, half[0][0][i], strict=True)]
    owed = mean_over_workers([kind(state, "residual") for _, state, _ in second])
    torch.testing.assert_close([t.float() for t in total], owed, rtol=0, atol=1e-4)


@every_change
@pytest.mark.parametrize("name", DEFENCES)
def test_replicas_stay_equal(name: str, before: int, after: int) -> None:
    state = redistribute(states_of(DEFENCES[name], before))
    (means, *_), *others = run(DEFENCES[name], after, [state] * after)
    for other, *_ in others:
        for mean, theirs in zip(means, other, strict=True):
            assert all(map(torch.equal, mean, theirs))


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_memories_become_their_mean_and_all_else_stays(name: str) -> None:
    states = states_of(DEFENCES[name], 3)
    result = redistribute(states)
    for key, x in tensors(result).items():
        kinds = result["metadata"]["memory"]
        if key.partition(".")[0] in kinds:
            torch.testing.assert_close(x, torch.stack([state[key] for state in states]).mean(0), rtol=0, atol=1e-5)
        else:
            assert torch.equal(x, states[2][key])
    backwards = redistribute(states[::-1])  # a worker may list them as it likes
    assert all(torch.equal(backwards[key], x) for key, x in tensors(result).items())
    for kept in kinds:  # of all states with this mean none is smaller
        assert norm(kind(result, kept)) ** 2 <= sum(norm(kind(state, kept)) ** 2 for state in states) / 3


def test_a_state_of_one_worker_is_taken_by_no_other() -> None:
    """Before anything is sent, and without harm to it: rank 0's file in the hands of all is the usual mistake."""
    for defence in (Defence(TopKConfig(level=0.1), True), Defence(DGCConfig()), Defence(SignSGDConfig(momentum=0.9))):
        first, second = states_of(defence, 2)
        word = next(iter(first["metadata"]["memory"]))
        for state, rank, workers in ((first, 0, 1), (first, 1, 2), (second, 0, 2), (first, 0, 3)):
            compressor, tap = compressor_of(defence), Tap(Echo(workers, rank))
            compressor.load_state_dict(state)
            with pytest.raises(ValueError, match=r"raytrust\.compress\.redistribute") as raised:
                compressor.reduce(gradients(0), tap)
            owner = state["metadata"]["worker"][0]
            assert f"worker {owner} of 2, whose {word} this is, got worker {rank} of {workers}" in str(raised.value)
            assert tap.sent_bytes == 0
            assert all(torch.equal(x, state[key]) for key, x in tensors(compressor.state_dict()).items())


def test_a_method_without_memory_goes_on_with_any_number_of_workers() -> None:
    for name in DEFENCES.keys() - set(WITH_MEMORY):
        compressor = compressor_of(DEFENCES[name])
        compressor.load_state_dict(states_of(DEFENCES[name], 2)[0])
        compressor.reduce(gradients(0), LocalChannel())


def test_before_the_first_step_there_is_nothing_to_hand_over() -> None:
    compressor = compressor_of(DEFENCES["topk+EF"])
    state = redistribute([compressor.state_dict()] * 2)
    compressor.load_state_dict(state)
    assert isinstance(compressor, ErrorFeedback)
    assert compressor.residual is None


def test_it_may_be_redistributed_again() -> None:
    """Also where no step was made in between."""
    state = redistribute(states_of(DEFENCES["topk+EF"], 2))
    again = redistribute([state] * 3)
    assert all(torch.equal(again[key], x) for key, x in tensors(state).items())


def test_states_that_do_not_belong_together_are_refused() -> None:
    defence = Defence(PowerSGDConfig(2), error_feedback=True)
    first, second = states_of(defence, 2)
    third = states_of(defence, 3)[2]
    other = states_of(defence, 2, seed=7)[1]
    of_topk = states_of(DEFENCES["topk+EF"], 2)[1]
    fresh = compressor_of(defence).state_dict()
    one_training = "Expected states after the same step of one training, got two values of 'q."
    for states, message in [
        ([], "Expected states=[] of at least 1 worker."),
        ([first], "Expected states of each of the 2 workers, got those of the ranks [0]."),
        ([first, first], "Expected states of each of the 2 workers, got those of the ranks [0, 0]."),
        ([first, second, first], "Expected states of each of the 2 workers, got those of the ranks [0, 1, 0]."),
        ([first, other], one_training),
        ([first, third], one_training),
        ([first, of_topk], "Expected states of one compressor, got {'method': 'powersgd'"),
        ([first, fresh], "Expected each of states to hold 'residual.0', 'residual.conv.bias'"),
        ([first, {}], "Expected state to be what a compressor's state_dict() gave, got the keys nothing."),
    ]:
        with pytest.raises(ValueError, match=r"^Expected ") as raised:
            redistribute(states)
        assert str(raised.value).startswith(message)
        assert "\n" not in str(raised.value)
