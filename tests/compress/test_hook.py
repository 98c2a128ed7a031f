"""Other people's communication hooks, driven as DDP drives them: the same gradients, and what they send in a tap."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    bf16_compress_wrapper,
    fp16_compress_hook,
    fp16_compress_wrapper,
)
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import (
    PowerSGDState,
    batched_powerSGD_hook,
    powerSGD_hook,
)
from torch.nn.parallel import DistributedDataParallel

from raytrust.compress import HookCompressor, Layout, build, ddp_comm_hook
from raytrust.compress.torch_hooks import recognised
from raytrust.config import parse_defence
from raytrust.wire.channel import Channel, LocalChannel, Tap
from raytrust.wire.processes import default_group, in_processes
from raytrust.wire.recording import record

STEPS = 5
CAP = 0.001  # MiB: several buckets


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(54, 20), nn.Linear(20, 20)
        )


def loss_of(model: nn.Module, step: int, rank: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return model(torch.randn(4, 1, 7, 7, generator=generator)).square().mean()


def gradient(model: nn.Module, step: int, rank: int = 0) -> list[Tensor]:
    return list(torch.autograd.grad(loss_of(model, step, rank), list(model.parameters())))


def powersgd(rank: int = 3, **options: Any) -> PowerSGDState:
    return PowerSGDState(None, rank, **{"start_powerSGD_iter": 2, "min_compression_rate": 1} | options)


def ours(text: str) -> Callable[[nn.Module], tuple[Any, Any]]:
    return lambda model: (ddp_comm_hook(build(parse_defence(text), model)), model)


def sign_hook(state, bucket):  # without annotations: DDP takes none but its own types
    """Somebody's own: signs and the mean magnitude of a bucket, gathered."""
    buffer, workers = bucket.buffer(), dist.get_world_size()
    signs, scales = ([torch.zeros_like(x) for _ in range(workers)] for x in (buffer, buffer[:1]))
    dist.all_gather(scales, buffer.abs().mean()[None])
    future = dist.all_gather(signs, buffer.sign(), async_op=True).get_future()
    return future.then(lambda _: torch.stack([a * b for a, b in zip(signs, scales, strict=True)]).mean(0))


HOOKS: dict[str, Callable[[nn.Module], tuple[Any, Any]]] = {
    "powersgd": lambda _: (powerSGD_hook, powersgd()),
    "powersgd 1, cold, batched": lambda _: (
        powerSGD_hook,
        powersgd(1, warm_start=False, batch_tensors_with_same_shape=True),
    ),
    "powersgd in fp16": lambda _: (fp16_compress_wrapper(powerSGD_hook), powersgd()),
    "all-reduce": lambda _: (allreduce_hook, None),
    "fp16": lambda _: (fp16_compress_hook, None),
    "sign": lambda _: (sign_hook, None),  # of which raytrust knows nothing
    "our topk": ours("topk:0.1:ef"),
}


@pytest.mark.parametrize("name", HOOKS)
def test_it_is_what_ddp_does_with_the_hook(name: str) -> None:
    model, other = net(), net()
    # DDP cuts buckets in the order in which gradients come: of a convolution it has the weight before the bias.
    cap = None if name == "sign" else CAP
    with default_group():
        hook, state = HOOKS[name](model)
        ddp = DistributedDataParallel(model, bucket_cap_mb=cap)
        ddp.register_comm_hook(state, hook)
        expected = []
        for step in range(STEPS):
            ddp.zero_grad()
            # On gloo's own threads, which do not wait for each other, callbacks of several buckets get into each
            # other's way; while one listens they take turns.
            with record(keep=False):
                loss_of(ddp, step).backward()
            expected.append([p.grad.clone() for p in model.parameters()])
        del ddp
    hook, state = HOOKS[name](other)
    compressor, tap = HookCompressor(hook, state, other, bucket_cap_mb=cap), Tap(LocalChannel(), keep=True)
    assert cap is None or len(compressor.buckets) > 2
    for step in range(STEPS):
        grads = gradient(other, step)
        before = [g.clone() for g in grads]
        reduced = compressor.reduce(grads, tap)
        torch.testing.assert_close(reduced.mean, expected[step], rtol=1e-4, atol=1e-6)
        assert all(map(torch.equal, grads, before))
        assert all(map(torch.equal, reduced.mean, reduced.decoded_own))
        assert tap.messages[-1].op == "result"
        assert all(map(torch.equal, compressor.decode(tap.messages, "peer")[0], reduced.mean))


def test_buckets_are_those_of_ddp() -> None:
    sizes = [2000, 7 * 2**20, 2**18, 3, 2**18 - 16, 5]  # 4 bytes each
    shapes = [torch.Size((n,)) for n in sizes]
    assert HookCompressor(allreduce_hook, None, Layout(shapes)).buckets == [[5, 4, 3, 2], [1], [0]]
    assert HookCompressor(allreduce_hook, None, Layout(shapes), bucket_cap_mb=1).buckets == [[5, 4, 3, 2], [1], [0]]
    assert HookCompressor(allreduce_hook, None, Layout(shapes), bucket_cap_mb=100).buckets == [[5, 4, 3, 2, 1, 0]]


def test_a_copy_has_a_state_of_its_own() -> None:
    model = net()
    compressor, tap = HookCompressor(powerSGD_hook, powersgd(), model), Tap(LocalChannel())
    assert not compressor.compresses
    dense = copy.deepcopy(compressor).reduce(gradient(model, 0), tap)
    assert tap.sent_bytes == 4 * compressor.layout.entries
    assert all(map(torch.equal, dense.mean, gradient(model, 0)))
    compressor.start_compressing()
    assert compressor.compresses
    for step in range(3):
        copied = copy.deepcopy(compressor).reduce(gradient(model, step), LocalChannel()).mean
        assert all(map(torch.equal, compressor.reduce(gradient(model, step), LocalChannel()).mean, copied))
    # What is handed to an attacker lacks the residual, and goes on from the public state as the original does.
    seen = compressor.as_seen()
    assert compressor.state.error_dict
    assert not seen.state.error_dict
    fresh = HookCompressor(powerSGD_hook, powersgd(), model)
    fresh.load_public_state(compressor.public_state())
    for twin in (fresh, seen):
        twin.state.error_dict = {number: e.clone() for number, e in compressor.state.error_dict.items()}
    results = [c.reduce(gradient(model, 9), LocalChannel()).mean for c in (compressor, seen, fresh)]
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


def test_torchs_hooks_are_known_in_any_wrapping() -> None:
    assert recognised(powerSGD_hook) == ("powersgd", torch.float32)
    assert recognised(partial(bf16_compress_wrapper(powerSGD_hook))) == ("powersgd", torch.bfloat16)
    assert recognised(fp16_compress_wrapper(allreduce_hook)) == ("whole", torch.float16)
    for hook in (sign_hook, batched_powerSGD_hook, noop_hook, fp16_compress_wrapper(lambda s, b: 0)):
        assert recognised(hook) is None
    assert HookCompressor(noop_hook, object(), net()).as_seen().state is None


@pytest.mark.parametrize(
    ("hook", "state", "message"),
    [
        (noop_hook, None, "Expected hook=noop_hook to send through torch.distributed, but nothing was heard."),
        (lambda s, b: b.buffer(), None, "Expected hook=<lambda> to return a torch.futures.Future, got tensor"),
        (powerSGD_hook, None, "Expected state=None to be a PowerSGDState, as hook=powerSGD_hook takes."),
    ],
)
def test_what_is_no_hook_is_refused(hook: Any, state: Any, message: str) -> None:
    model = net()
    with pytest.raises(ValueError, match="^" + message.replace(".", r"\.").replace("<", "[<]")):
        HookCompressor(hook, state, model).reduce(gradient(model, 0), LocalChannel())


def test_other_refusals() -> None:
    model = net()
    compressor = HookCompressor(allreduce_hook, None, model)
    grads = gradient(model, 0)
    grads[2][0] = torch.nan
    with pytest.raises(ValueError, match=r"Expected the gradient of 2\.weight to be finite"):
        compressor.reduce(grads, LocalChannel())
    with pytest.raises(ValueError, match="Expected model=3 to be the model whose gradients the hook gets"):
        HookCompressor(allreduce_hook, None, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="as the hook's author says"):
        compressor.state_dict()
    with pytest.raises(ValueError, match="Expected the public state of torch's PowerSGD to hold"):
        HookCompressor(powerSGD_hook, powersgd(), model).load_public_state({})


def of_two(channel: Channel) -> dict[str, Any]:
    """A step of each hook that compresses, in one bucket, as gloo mixes up what callbacks of several send."""
    found: dict[str, Any] = {}
    for name, make in HOOKS.items():
        model = net()
        compressor, tap = HookCompressor(*make(model), model), Tap(channel, keep=True)
        compressor.start_compressing()
        reduced = compressor.reduce(gradient(model, 0, channel.rank), tap)
        try:
            own = reduced.decoded_own
        except ValueError as error:
            own = str(error)
        found[name] = reduced.mean, own, tap.messages
    try:
        HookCompressor(allreduce_hook, None, net()).reduce(gradient(net(), 0), LocalChannel())
    except ValueError as error:
        found["refused"] = str(error)
    return found


def test_two_workers_average_what_each_decodes_to() -> None:
    first, second = in_processes(of_two, 2)
    for name in HOOKS:
        (mean, own, _), (other_mean, other_own, _) = first[name], second[name]
        assert all(map(torch.equal, mean, other_mean))
        if isinstance(own, str):
            assert name in ("sign", "our topk")
            assert own.startswith("Expected one worker, or vantage='peer', to decode hook=")
        else:
            tolerance = 2e-3 if "fp16" in name else 1e-5
            averaged = [(x + y) / 2 for x, y in zip(own, other_own, strict=True)]
            torch.testing.assert_close(averaged, mean, rtol=tolerance, atol=tolerance)
    assert first["refused"] == "Expected channel of the 2 workers of the default process group, got one of 1."
