"""The state of every compressor: what is public, what a checkpoint keeps, and that what was handed out stands still."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import COMPRESSORS, DEFENCES, SHAPES, gradients
from two_workers import STEPS, alone

from raytrust.compress import Compressor, build
from raytrust.config import DGCConfig, PowerSGDConfig, RandKConfig, SignSGDConfig
from raytrust.wire.channel import LocalChannel, Tap

NAMES = ["conv.weight", "conv.bias", "0", "q", "generator", "step", "residual.v"]  # some are names of states, too

every_defence = pytest.mark.parametrize("name", DEFENCES)


def step(compressor: Compressor, seed: int) -> list[Tensor]:
    """All that a step says and returns."""
    tap = Tap(LocalChannel(), keep=True)
    reduced = compressor.reduce(gradients(seed), tap)
    return [x.clone() for x in (*reduced.mean, *reduced.decoded_own, *(x for m in tap.messages for x in m.sent))]


def tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """A state without its metadata."""
    return {key: value for key, value in state.items() if key != "metadata"}


def fresh(name: str, seed: int = 5) -> Compressor:
    return build(DEFENCES[name], SHAPES, seed, NAMES)


@every_defence
@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_checkpoint_goes_on_to_the_bit(name: str, before: int) -> None:
    compressor, file = fresh(name), io.BytesIO()
    for i in range(before):
        step(compressor, i)
    torch.save(compressor.state_dict(), file)
    file.seek(0)
    restored = fresh(name, seed=6)
    step(restored, 99)  # what it did before is forgotten
    restored.load_state_dict(torch.load(file, weights_only=True))
    for i in range(before, before + 3):
        assert all(map(torch.equal, step(restored, i), step(compressor, i)))


@every_defence
def test_a_state_names_its_parameters(name: str) -> None:
    compressor = fresh(name)
    step(compressor, 0)
    shapes = dict(zip(NAMES, SHAPES, strict=True))
    for key, value in tensors(compressor.state_dict()).items():
        kind, _, parameter = key.partition(".")
        if parameter:
            expected = shapes[parameter]
            assert value.shape == (len(value), expected[1:].numel()) if kind == "q" else value.shape == expected
        else:
            assert key in ("seed", "step", "generator")
    assert DEFENCES[name].error_feedback == any(key.startswith("residual.") for key in compressor.state_dict())


@every_defence
def test_a_state_that_was_handed_out_stands_still(name: str) -> None:
    compressor, other = fresh(name), fresh(name, seed=6)
    step(compressor, 0)
    for state, load in [
        (compressor.public_state(), other.load_public_state),
        (compressor.state_dict(), other.load_state_dict),
    ]:
        load(state)
        before = copy.deepcopy(state)
        for moved in (compressor, other):
            step(moved, 1)
        assert state.get("metadata") == before.get("metadata")
        assert all(torch.equal(x, before[key]) for key, x in tensors(state).items())


@every_defence
def test_a_state_that_was_handed_out_may_be_overwritten(name: str) -> None:
    compressor, other, undisturbed = fresh(name), fresh(name, seed=6), fresh(name)
    for i in range(2):
        state = compressor.state_dict()
        other.load_state_dict(state)
        for x in (*tensors(state).values(), *compressor.public_state().values()):
            x.fill_(99)
        state.get("metadata", {}).clear()
        expected = step(undisturbed, i)
        for c in (compressor, other):
            assert all(map(torch.equal, step(c, i), expected))


@every_defence
def test_a_copy_goes_on_like_the_original(name: str) -> None:
    compressor, undisturbed = fresh(name), fresh(name)
    for i in range(2):
        step(compressor, i)
        step(undisturbed, i)
    copied, other = copy.deepcopy(compressor), copy.deepcopy(compressor)
    for _ in range(2):  # the original does not move with its copy
        step(copied, 50)
    for i in (2, 3):
        expected = step(undisturbed, i)
        for c in (compressor, other):
            assert all(map(torch.equal, step(c, i), expected))


@pytest.mark.parametrize("name", COMPRESSORS)
def test_the_public_state_is_what_a_peer_could_compute(name: str) -> None:
    """Counters, and of PowerSGD no more than what was sent; no dice of a worker's own; error feedback adds nothing."""
    state = alone(name)[-1].public_state
    match COMPRESSORS[name]:
        case PowerSGDConfig():
            assert all(key.startswith("q.") for key in state)
            assert 0 < sum(x.numel() for x in state.values()) <= alone(name)[-1].sent_bytes // 4
        case RandKConfig():
            assert {key: x.tolist() for key, x in state.items()} == {"seed": 5, "step": STEPS - 1}
        case DGCConfig():
            assert {key: x.tolist() for key, x in state.items()} == {"step": STEPS - 1}
        case _:
            assert state == {}
    if f"{name}+EF" in DEFENCES:
        assert alone(f"{name}+EF")[-1].public_state.keys() == state.keys()


@every_defence
def test_the_public_state_is_the_same_on_all_workers(name: str, group: list[dict[str, Any]]) -> None:
    for i in range(STEPS):
        first, second = (worker["reductions"][name][i].public_state for worker in group)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_who_has_a_memory() -> None:
    """Besides error feedback, only Signum and DGC keep something of past gradients to themselves."""
    for name, config in COMPRESSORS.items():
        compressor = fresh(name)
        step(compressor, 0)
        state = compressor.state_dict()
        private = tensors(state).keys() - compressor.public_state().keys() - {"generator", "seed", "step"}
        kinds = {key.partition(".")[0] for key in private}
        assert kinds == set(state["metadata"]["memory"])
        match config:
            case DGCConfig():
                assert kinds == {"u", "v"}
            case SignSGDConfig(momentum=momentum) if momentum:
                assert kinds == {"momentum"}
            case _:
                assert kinds == set()
