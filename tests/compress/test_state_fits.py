"""A state is taken by the compressor that it fits, and refused in one line by every other, which then is as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_state import NAMES, step, tensors
from torch import Tensor, nn
from toys import DEFENCES, SHAPES, gradients

from raytrust.compress import Compressor, build
from raytrust.compress.powersgd import PowerSGD
from raytrust.config import Defence, PowerSGDConfig, QSGDConfig, TopKConfig
from raytrust.wire.channel import LocalChannel, Tap

every_defence = pytest.mark.parametrize("name", DEFENCES)


def compressor_of(name: str, steps: int = 1) -> Compressor:
    compressor = build(DEFENCES[name], SHAPES, 5, NAMES)
    for i in range(steps):
        step(compressor, i)
    return compressor


STATES = {name: compressor_of(name).state_dict() for name in DEFENCES}


def refusal(load: Callable[[Any], None], state: Any) -> str:
    with pytest.raises(ValueError, match=r"^Expected ") as raised:
        load(state)
    message = str(raised.value)
    assert "\n" not in message
    return message


def assert_untouched(compressor: Compressor, expected: list[Tensor]) -> None:
    """The next step is as if no state had been offered."""
    assert all(map(torch.equal, step(compressor, 7), expected))


@every_defence
def test_the_state_of_every_other_defence_is_refused(name: str) -> None:
    compressor, expected = compressor_of(name), step(compressor_of(name), 7)
    for other in DEFENCES:
        if DEFENCES[other] != DEFENCES[name]:
            assert refusal(compressor.load_state_dict, STATES[other]).startswith("Expected state ")
    assert_untouched(compressor, expected)


@every_defence
@pytest.mark.parametrize("steps", [0, 1])
def test_a_state_that_lacks_something_or_has_more_is_refused(name: str, steps: int) -> None:
    """A residual of some parameters but not of all, too."""
    state, compressor = compressor_of(name, steps).state_dict(), compressor_of(name)
    expected = step(compressor_of(name), 7)
    for key in state:
        whole = DEFENCES[name].error_feedback and len(tensors(state)) == 1
        if not whole:
            message = refusal(compressor.load_state_dict, {k: x for k, x in state.items() if k != key})
            assert key in message or key == "metadata"
    message = refusal(compressor.load_state_dict, state | {"weight": torch.zeros(1)})
    assert "'weight'" in message
    assert_untouched(compressor, expected)


@every_defence
def test_a_tensor_of_another_shape_or_dtype_is_refused(name: str) -> None:
    state, compressor = STATES[name], compressor_of(name)
    expected = step(compressor_of(name), 7)
    for key, x in tensors(state).items():
        for changed in (x[None].expand(2, *x.shape), x.to(torch.complex64), x.tolist()):
            assert f"state[{key!r}]" in refusal(compressor.load_state_dict, state | {key: changed})
    assert_untouched(compressor, expected)


@every_defence
def test_a_public_state_that_does_not_fit_is_refused(name: str) -> None:
    compressor, expected = compressor_of(name), step(compressor_of(name), 7)
    state = compressor.public_state()
    for key, x in state.items():
        without = {k: y for k, y in state.items() if k != key}
        for changed in (without, state | {key: x[None]}, state | {key: x.to(torch.complex64)}):
            assert "public state" in refusal(compressor.load_public_state, changed)
    assert "'q'" in refusal(compressor.load_public_state, state | {"q": torch.zeros(1)})
    assert_untouched(compressor, expected)


@every_defence
def test_states_of_other_parameters_are_refused(name: str) -> None:
    compressor, expected = compressor_of(name), step(compressor_of(name), 7)
    prefixed = [f"module.{n}" for n in NAMES]  # as of `build(defence, ddp)`
    exchanged = [SHAPES[1], SHAPES[0], *SHAPES[2:]]
    for shapes, names in (
        (SHAPES, prefixed),
        (SHAPES, NAMES[::-1]),
        (exchanged, NAMES),
        (SHAPES[:-1], NAMES[:-1]),
        ([*SHAPES, torch.Size((3,))], [*NAMES, "another"]),
    ):
        other = build(DEFENCES[name], shapes, 5, names)
        other.reduce([torch.ones(shape) for shape in shapes], LocalChannel())
        assert "parameter" in refusal(compressor.load_state_dict, other.state_dict())
    assert_untouched(compressor, expected)


def test_the_words_of_a_refusal() -> None:
    """By hand: what was in it and what was expected."""
    module = nn.Sequential(nn.Linear(3, 2))
    wrapped = nn.ModuleDict({"module": module})  # names as of a model under DistributedDataParallel

    def message(ours: Defence, theirs: Defence, model: nn.Module = module) -> str:
        return refusal(build(ours, module).load_state_dict, build(theirs, model).state_dict())

    four, two = Defence(PowerSGDConfig(4)), Defence(PowerSGDConfig(2))
    assert message(four, two) == "Expected state of 'powersgd' with rank=4, got one with rank=2."
    eight = Defence(QSGDConfig(bits=8))
    assert message(eight, Defence(QSGDConfig(bits=4))) == "Expected state of 'qsgd' with bits=8, got one with bits=4."
    fed = Defence(PowerSGDConfig(4), error_feedback=True)
    assert message(fed, four) == "Expected state with error feedback, got one without error feedback."
    assert message(four, fed) == "Expected state without error feedback, got one with error feedback."
    assert message(four, Defence(TopKConfig(level=0.1))) == "Expected state of method 'powersgd', got one of 'topk'."
    assert message(four, four, wrapped) == (
        "Expected state of the parameter '0.weight' of shape (2, 3), "
        "got 'module.0.weight' of shape (2, 3) in its place."
    )
    assert message(four, four, nn.Linear(3, 2, bias=False)) == "Expected state of 2 parameters, got one of 1."
    words = "Expected state to be what a compressor's state_dict() gave, got the keys 'generator', 'q.0.weight'."
    assert refusal(build(four, module).load_state_dict, tensors(build(four, module).state_dict())) == words
    state = build(fed, module).state_dict()
    del state["q.0.weight"]
    assert refusal(build(fed, module).load_state_dict, state) == (
        "Expected state to hold 'q.0.weight', got 'generator', 'metadata'."
    )


def test_equal_options_are_equal_however_they_are_written() -> None:
    """1 and 1.0, as in the digest of a config."""
    state = build(Defence(TopKConfig(level=1)), SHAPES).state_dict()
    build(Defence(TopKConfig(level=1.0)), SHAPES).load_state_dict(state)


def test_a_product_that_does_not_fill_its_part_of_the_message_is_refused() -> None:
    """A warm start of another rank, had it come past the checks of states."""
    compressor, other = build(Defence(PowerSGDConfig(4)), SHAPES), build(Defence(PowerSGDConfig(2)), SHAPES)
    assert isinstance(compressor, PowerSGD)
    assert isinstance(other, PowerSGD)
    compressor.q = other.q
    tap = Tap(LocalChannel())
    with pytest.raises(ValueError, match="Expected out of shape"):
        compressor.reduce(gradients(0), tap)
    assert tap.sent_bytes == 0
