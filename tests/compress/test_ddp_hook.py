"""A compressor under DistributedDataParallel, in two gloo processes: what DDP does is what a loop by hand does."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raytrust.compress import Compressor, build, ddp_comm_hook
from raytrust.compress.parts import InParts
from raytrust.config import (
    AtomoConfig,
    Defence,
    DenseConfig,
    DGCConfig,
    HalfConfig,
    PowerSGDConfig,
    QSGDConfig,
    RandKConfig,
    ScaledSignConfig,
    SignSGDConfig,
    ThresholdConfig,
    TopKConfig,
    VqSGDConfig,
    parse_defence,
)
from raytrust.config.defence import compressor_types
from raytrust.wire.channel import Channel, LocalChannel, Tap
from raytrust.wire.processes import in_processes

STEPS = 4
BY_PARAMETER = ("dense", "half", "powersgd", "signum", "scaled sign")  # what may overlap
BUCKET_MB = 0.0005  # 524 bytes: several buckets

METHODS: dict[str, Defence] = {
    "dense": Defence(DenseConfig()),
    "half": Defence(HalfConfig(), error_feedback=True),
    "powersgd": Defence(PowerSGDConfig(rank=2), error_feedback=True),
    "topk": Defence(TopKConfig(level=0.1), error_feedback=True),
    "randk": Defence(RandKConfig(level=0.1), error_feedback=True),
    "threshold": Defence(ThresholdConfig(level=0.1, sample=1.0), error_feedback=True),
    "dgc": Defence(DGCConfig(level=0.1)),
    "signum": Defence(SignSGDConfig(momentum=0.9)),
    "scaled sign": Defence(ScaledSignConfig(), error_feedback=True),
    "qsgd": Defence(QSGDConfig()),
    "vqsgd": Defence(VqSGDConfig(samples=100)),
    "atomo": Defence(AtomoConfig(rank=2)),
}
POWERSGD = METHODS["powersgd"]


class Net(nn.Module):
    """Registered in another order than it is used; `head` and `side` are of one shape; the bias of `body` is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 5)
        self.conv = nn.Conv2d(2, 4, 3)
        self.side = nn.Linear(5, 5)
        self.body = nn.Linear(36, 5)
        self.body.bias.requires_grad_(False)

    def forward(self, x: Tensor, side: bool = True) -> Tensor:
        hidden = F.relu(self.body(F.relu(self.conv(x.to(self.conv.weight.dtype))).flatten(1)))
        hidden = hidden + self.side(hidden) if side else hidden
        return self.head(hidden.to(self.head.weight.dtype)).float()


def net(change: Callable[[nn.Module], object] | None = None) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
    if change is not None:
        change(model)
    return model


def to_bfloat16(model: nn.Module) -> None:
    model.bfloat16()


def to_mixed(model: nn.Module) -> None:
    model.get_submodule("head").bfloat16()


def to_channels_last(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Case:
    """One way to train. passes: backward passes a step. skips: whether workers leave out `side` at times."""

    defence: Defence
    change: Callable[[nn.Module], object] | None = None
    ddp: dict[str, Any] = field(default_factory=dict)
    state: bool = True  # the model, or None
    overlap: bool = False
    passes: int = 1
    skips: bool = False


CASES = {name: Case(defence) for name, defence in METHODS.items()} | {
    "one bucket": Case(POWERSGD, ddp={"bucket_cap_mb": 1000}),
    "in any layout": Case(POWERSGD, to_channels_last),
    "bfloat16": Case(POWERSGD, to_bfloat16),
    "two dtypes": Case(POWERSGD, to_mixed),
    "state None": Case(POWERSGD, state=False),
    "state None, several first buckets": Case(POWERSGD, ddp={"find_unused_parameters": True}, state=False),
    "gradients in the buckets": Case(POWERSGD, ddp={"gradient_as_bucket_view": True}),
    "static graph": Case(POWERSGD, ddp={"static_graph": True}),
    "accumulation": Case(POWERSGD, passes=2),
    "unused parameters": Case(POWERSGD, ddp={"find_unused_parameters": True}, skips=True),
}
CASES |= {f"{name}, overlapped": Case(METHODS[name], overlap=True) for name in BY_PARAMETER} | {
    "overlapped, in any layout": Case(POWERSGD, to_channels_last, overlap=True),
    "overlapped, accumulation": Case(POWERSGD, passes=2, overlap=True),
    "overlapped, unused parameters": Case(POWERSGD, ddp={"find_unused_parameters": True}, skips=True, overlap=True),
    "overlapped, one bucket": Case(POWERSGD, ddp={"bucket_cap_mb": 1000}, overlap=True),
    "overlapped, late": Case(parse_defence("powersgd:2:ef:start_step=2"), overlap=True),
}


def uses_side(case: Case, step: int, rank: int) -> bool:
    """All workers, then one of them, then none."""
    return not case.skips or step % 3 == 0 or (step % 3 == 1 and rank == 0)


def loss_of(model: nn.Module, case: Case, step: int, rank: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * number + rank)
    x, y = torch.randn(6, 2, 5, 5, generator=generator), torch.randint(5, (6,), generator=generator)
    return F.cross_entropy(model(x, side=uses_side(case, step, rank)), y)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@dataclass(frozen=True)
class Run:
    """weights: after each step. buckets: of each backward pass, the names of the parameters in each bucket."""

    weights: list[dict[str, Tensor]]
    state: dict[str, Any]
    buckets: list[list[list[str]]]


def optimiser_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.5)


def under_ddp(case: Case, channel: Channel, saved: dict[str, Any] | None = None, first: int = 0) -> Run:
    """saved: written at half time; or, where it holds something, what to go on from at step `first`."""
    model = net(case.change)
    compressor = build(case.defence, model, seed=3, overlap=case.overlap)
    optimiser = optimiser_of(model)
    if first:
        assert saved is not None
        checkpoint = torch.load(io.BytesIO(saved["file"]), weights_only=True)
        for part, name in ((model, "model"), (compressor, "compressor"), (optimiser, "optimiser")):
            part.load_state_dict(checkpoint[name])  # type: ignore[attr-defined]
    ddp = DistributedDataParallel(model, **({"bucket_cap_mb": BUCKET_MB} | case.ddp))
    names = {p: name for name, p in model.named_parameters()}
    inner, buckets = ddp_comm_hook(compressor), []

    def hook(state, bucket):  # without annotations: DDP takes none but its own types
        if bucket.index() == 0:
            buckets.append([])
        buckets[-1].append([names[p] for p in bucket.parameters()])
        return inner(state, bucket)

    ddp.register_comm_hook(model if case.state else None, hook)
    found = []
    for step in range(first, STEPS):
        optimiser.zero_grad()
        for number in range(case.passes):
            with nullcontext() if number == case.passes - 1 else ddp.no_sync():
                loss_of(ddp, case, step, channel.rank, number).backward()
        optimiser.step()
        found.append(weights(model))
        if saved is not None and not first and step == STEPS // 2 - 1:
            file = io.BytesIO()
            parts = {"model": model, "compressor": compressor, "optimiser": optimiser}
            torch.save({name: part.state_dict() for name, part in parts.items()}, file)  # type: ignore[attr-defined]
            saved["file"] = file.getvalue()
    return Run(found, compressor.state_dict(), buckets)


def by_hand(case: Case, channel: Channel) -> Run:
    model = net(case.change)
    compressor = build(case.defence, model, seed=3)
    optimiser = optimiser_of(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = []
    for step in range(STEPS):
        optimiser.zero_grad()
        for number in range(case.passes):
            loss_of(model, case, step, channel.rank, number).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()]
        for (name, p), mean in zip(parameters.items(), compressor.reduce(grads, channel).mean, strict=True):
            unused = name.startswith("side") and not any(uses_side(case, step, r) for r in range(channel.world_size))
            p.grad = None if unused else mean.clone().to(p.dtype)
        optimiser.step()
        found.append(weights(model))
    return Run(found, compressor.state_dict(), [])


def plain_ddp(channel: Channel) -> list[dict[str, Tensor]]:
    model = net()
    ddp, optimiser = DistributedDataParallel(model), optimiser_of(model)
    found = []
    for step in range(STEPS):
        optimiser.zero_grad()
        loss_of(ddp, CASES["dense"], step, channel.rank, 0).backward()
        optimiser.step()
        found.append(weights(model))
    return found


def resumed(case: Case, channel: Channel) -> tuple[Run, Run]:
    """A run without a break, and the second half of it from a checkpoint."""
    saved: dict[str, Any] = {}
    return under_ddp(case, channel, saved), under_ddp(case, channel, saved, first=STEPS // 2)


def refusal(
    channel: Channel,
    model: nn.Module,
    compressor: Compressor,
    state: object,
    loss: Callable[[nn.Module], Tensor],
) -> tuple[str, int]:
    """(what the backward pass raises, bytes sent for the gradient)."""
    ddp, tap = DistributedDataParallel(model, bucket_cap_mb=BUCKET_MB), Tap(channel)
    ddp.register_comm_hook(state, ddp_comm_hook(compressor, tap))
    try:
        loss(ddp).backward()
    except ValueError as error:
        return str(error), tap.sent_bytes
    return "", tap.sent_bytes


def poisoned(ddp: nn.Module, value: float) -> Tensor:
    """A loss whose gradient is not finite in one entry of `side.weight`."""
    weight = ddp.module.side.weight  # type: ignore[union-attr]
    weight.register_hook(lambda g: g.index_fill(0, torch.tensor([2]), value))
    return loss_of(ddp, CASES["powersgd"], 0, 0, 0)


def refusals(channel: Channel) -> dict[str, tuple[str, int]]:
    plain = partial(loss_of, case=CASES["dense"], step=0, rank=0, number=0)
    wider = [torch.Size((6, 5)), *(p.shape for p in list(net().parameters())[1:] if p.requires_grad)]
    found = {}
    for name, value in (("nan", torch.nan), ("inf", torch.inf)):
        model = net()
        found[name] = refusal(channel, model, build(POWERSGD, model), model, partial(poisoned, value=value))
    for name, state in (("another model", net()), ("no model", "model")):
        model = net()
        found[name] = refusal(channel, model, build(POWERSGD, model), state, plain)
    model = net()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    found["other shapes"] = refusal(channel, model, build(POWERSGD, wider, names=names), model, plain)
    found["other shapes, no state"] = refusal(channel, model, build(POWERSGD, wider, names=names), None, plain)
    found["fewer"] = refusal(channel, model, build(POWERSGD, wider[:-1]), model, plain)
    model = net(to_mixed)
    found["two dtypes"] = refusal(channel, model, build(POWERSGD, model), None, plain)
    model = nn.EmbeddingBag(7, 5, sparse=True)
    found["sparse"] = refusal(
        channel, model, build(POWERSGD, model), model, lambda ddp: ddp(torch.tensor([[1, 2]])).sum()
    )
    return found


def everything(channel: Channel) -> dict[str, Any]:
    return {
        "under ddp": {name: under_ddp(case, channel) for name, case in CASES.items()},
        "by hand": {name: by_hand(case, channel) for name, case in CASES.items()},
        "plain": plain_ddp(channel),
        "resumed": {name: resumed(CASES[name], channel) for name in (*METHODS, "powersgd, overlapped")},
        "refusals": refusals(channel),
    }


@pytest.fixture(scope="module")
def workers() -> list[dict[str, Any]]:
    return in_processes(everything, 2)


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """To the bit."""
    assert found.keys() == expected.keys()
    assert found.get("metadata") == expected.get("metadata")
    assert [k for k in found if k != "metadata" and not torch.equal(found[k], expected[k])] == []


every_case = pytest.mark.parametrize("name", CASES)


def test_every_method_is_here() -> None:
    assert {type(defence.compressor) for defence in METHODS.values()} == set(compressor_types())


@every_case
def test_a_step_is_the_step_by_hand(name: str, workers: list[dict[str, Any]]) -> None:
    for worker in workers:
        found, expected = worker["under ddp"][name], worker["by hand"][name]
        assert len(found.weights) == STEPS
        for after, by_hand_after in zip(found.weights, expected.weights, strict=True):
            assert_equal(after, by_hand_after)


@every_case
def test_the_state_is_that_of_the_parameters(name: str, workers: list[dict[str, Any]]) -> None:
    """Residuals, momenta and warm starts, by name."""
    for worker in workers:
        assert_equal(worker["under ddp"][name].state, worker["by hand"][name].state)
    if CASES[name].defence.error_feedback:
        residuals = {key for key in workers[0]["under ddp"][name].state if key.startswith("residual.")}
        trained = {"head.weight", "head.bias", "conv.weight", "conv.bias", "side.weight", "side.bias", "body.weight"}
        assert residuals == {f"residual.{parameter}" for parameter in trained}


@every_case
def test_replicas_stay_equal(name: str, workers: list[dict[str, Any]]) -> None:
    first, second = (worker["under ddp"][name].weights for worker in workers)
    for one, other in zip(first, second, strict=True):
        assert_equal(one, other)


@every_case
def test_it_trains_all_but_what_is_frozen(name: str, workers: list[dict[str, Any]]) -> None:
    before = weights(net(CASES[name].change))
    after = workers[0]["under ddp"][name].weights[-1]
    assert [key for key in before if torch.equal(before[key], after[key])] == ["body.bias"]


def test_buckets_are_rebuilt_on_the_way(workers: list[dict[str, Any]]) -> None:
    """What the cases rest on: another order after the first pass, several buckets, several first ones."""
    first, *later = workers[0]["under ddp"]["powersgd"].buckets
    assert len(first) == 1
    assert all(len(buckets) > 1 for buckets in later)
    in_order = [name for name, p in net().named_parameters() if p.requires_grad]
    assert [*chain(*first)] == in_order
    assert [*chain(*later[0])] not in (in_order, in_order[::-1])
    assert len(workers[0]["under ddp"]["state None, several first buckets"].buckets[0]) > 1
    assert len(workers[0]["under ddp"]["two dtypes"].buckets[0]) > 1
    assert {len(buckets) for buckets in workers[0]["under ddp"]["one bucket"].buckets} == {1}
    assert len(workers[0]["under ddp"]["accumulation"].buckets) == STEPS


def test_bucket_sizes_change_nothing(workers: list[dict[str, Any]]) -> None:
    for worker in workers:
        assert_equal(worker["under ddp"]["powersgd"].weights[-1], worker["under ddp"]["one bucket"].weights[-1])


def test_dense_is_plain_ddp_up_to_rounding(workers: list[dict[str, Any]]) -> None:
    for found, expected in zip(workers[0]["under ddp"]["dense"].weights, workers[0]["plain"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*METHODS, "powersgd, overlapped"])
def test_a_checkpoint_goes_on_to_the_bit(name: str, workers: list[dict[str, Any]]) -> None:
    for worker in workers:
        whole, second_half = worker["resumed"][name]
        assert len(second_half.weights) == STEPS - STEPS // 2
        for found, expected in zip(second_half.weights, whole.weights[STEPS // 2 :], strict=True):
            assert_equal(found, expected)
        assert_equal(second_half.state, whole.state)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", "Expected the gradient of side.weight to be finite, got nan in 5 of 25 entries."),
        ("inf", "Expected the gradient of side.weight to be finite, got inf in 5 of 25 entries."),
        ("another model", "Expected DDP to average the model's 7 parameters, got 7 others."),
        ("no model", "Expected state='model' to be the model or None."),
        ("other shapes", "Expected head.weight of shape (6, 5), as in the compressor, got (5, 5)."),
        ("other shapes, no state", "Expected head.weight of shape (6, 5), as in the compressor, got (5, 5)."),
        ("fewer", "Expected the compressor's 6 parameters, got 7."),
        ("two dtypes", "Expected state=None to be the model, as its parameters have several dtypes."),
        ("sparse", "Expected dense gradients, got a sparse one."),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_sent(
    name: str, message: str, workers: list[dict[str, Any]]
) -> None:
    for worker in workers:
        assert worker["refusals"][name] == (message, 0)


@dataclass
class Bucket:
    """All that the hook asks of a bucket."""

    number: int
    held: list[nn.Parameter]

    def __post_init__(self) -> None:
        self.vector = torch.cat([torch.full((p.numel(),), 1.0 + self.number) for p in self.held])

    def index(self) -> int:
        return self.number

    def is_last(self) -> bool:
        return self.number == 1

    def parameters(self) -> list[nn.Parameter]:
        return self.held

    def buffer(self) -> Tensor:
        return self.vector


def test_a_pass_is_reduced_when_its_last_bucket_is_full() -> None:
    model, tap = net(), Tap(LocalChannel())
    parameters = [p for p in model.parameters() if p.requires_grad]
    hook = ddp_comm_hook(build(Defence(DenseConfig()), model), tap)
    first, last = Bucket(0, parameters[4:]), Bucket(1, parameters[:4])
    of_a_failed_pass = hook(model, Bucket(0, parameters[4:]))
    waiting = hook(model, first)
    assert not waiting.done()
    assert tap.sent_bytes == 0
    assert hook(model, last).wait() is last.vector
    assert waiting.wait() is first.vector
    assert not of_a_failed_pass.done()
    assert tap.sent_bytes == 4 * sum(p.numel() for p in parameters)
    assert first.vector.unique().tolist() == [1.0]
    assert last.vector.unique().tolist() == [2.0]


@pytest.mark.parametrize("name", [name for name in METHODS if name not in BY_PARAMETER])
def test_what_selects_or_draws_over_all_parameters_does_not_overlap(name: str) -> None:
    kind = type(getattr(compressor := build(METHODS[name], net()), "inner", compressor)).__name__
    message = f"^Expected overlap=False with {kind}, whose step of one parameter depends on others[.]$"
    with pytest.raises(ValueError, match=message):
        build(METHODS[name], net(), overlap=True)


def test_what_is_not_finite_is_refused_by_name_under_overlap() -> None:
    model = net()
    parameters = [p for p in model.parameters() if p.requires_grad]
    compressor, tap = build(POWERSGD, model, overlap=True), Tap(LocalChannel())
    hook = ddp_comm_hook(compressor, tap)

    def backward(value: float) -> list[Tensor]:
        buckets = [Bucket(0, parameters[4:]), Bucket(1, parameters[:4])]
        buckets[1].vector[0] = value
        return [future.wait() for future in [hook(model, bucket) for bucket in buckets]]

    backward(1.0)
    backward(1.0)
    before, sent = compressor.state_dict(), tap.sent_bytes
    with pytest.raises(ValueError, match=r"Expected the gradient of head\.weight to be finite, got nan in 1 of 25"):
        backward(torch.nan)
    after = compressor.state_dict()
    # The bucket that was refused has left no trace.
    assert_equal(*({key: x for key, x in state.items() if "head" in key} for state in (after, before)))
    backward(1.0)
    assert tap.sent_bytes > sent
    assert all(x.isfinite().all() for key, x in compressor.state_dict().items() if key != "metadata")


def test_a_compressor_in_parts_is_one_to_everybody_else() -> None:
    """Its parts may change, it may be loaded, copied and reduce the whole: the state is that of a whole throughout."""
    model = net()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    one, other = build(POWERSGD, model), build(POWERSGD, model, overlap=True)
    assert isinstance(other, InParts)

    def step(number: int, partition: list[tuple[int, ...]]) -> None:
        generator = torch.Generator().manual_seed(number)
        grads = [torch.randn(s, generator=generator) for s in one.layout.shapes]
        mean = one.reduce(grads, LocalChannel()).mean
        for indices in partition:
            part = other.reduce_part(indices, [grads[i] for i in indices], LocalChannel()).mean
            torch.testing.assert_close(part, [mean[i] for i in indices])

    def assert_close(state: dict[str, Any], expected: dict[str, Any]) -> None:
        assert state.pop("metadata") == expected["metadata"]
        torch.testing.assert_close(state, {key: x for key, x in expected.items() if key != "metadata"})

    assert len(names) == 7
    for number, partition in enumerate([[(6, 5), (4, 1, 0), (2, 3)]] * 2 + [[(6,), (5, 4, 3, 2, 1, 0)]] * 2):
        step(number, partition)
        assert_close(other.state_dict(), one.state_dict())
    saved = one.state_dict()
    twin = copy.deepcopy(other)
    step(9, [(0, 1, 2, 3, 4, 5, 6)])
    assert_close(twin.state_dict(), saved)
    other.load_state_dict(saved)
    one.load_state_dict(saved)
    step(10, [(0, 1, 2, 3, 4, 5, 6)])
    torch.testing.assert_close(other.public_state(), one.public_state())
    grads = [torch.ones(s) for s in one.layout.shapes]
    torch.testing.assert_close(other.reduce(grads, LocalChannel()).mean, one.reduce(grads, LocalChannel()).mean)
