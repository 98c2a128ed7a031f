"""A compressor in a user's own training: `ddp_comm_hook` for `torch.nn.parallel.DistributedDataParallel`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.futures import Future

from raytrust.compress.interface import Compressor, Layout
from raytrust.compress.parts import InParts
from raytrust.compress.transformed import Transformed
from raytrust.wire.channel import Channel, GroupChannel

Bucket: TypeAlias = Any  # torch.distributed.GradBucket: some gradients, one after the other in one vector
Hook: TypeAlias = Callable[[object, Bucket], "Future[Tensor]"]


def ddp_comm_hook(compressor: Compressor, channel: Channel | None = None) -> Hook:
    """A communication hook that averages the gradients of a `DistributedDataParallel` model with `compressor`.

        compressor = compress.build(Defence(PowerSGDConfig(rank=4), error_feedback=True), ddp.module)
        ddp.register_comm_hook(ddp.module, compress.ddp_comm_hook(compressor))

    Register it before the first backward pass. The first argument, the hook's state, is the model that the compressor
    was built for, from which the hook has the order of the parameters. With None in its place the order is taken from
    the buckets of the first backward pass, which are the parameters in reverse; this needs parameters of one dtype.
    channel: between the workers of the model's process group, such as `Tap(GroupChannel())`, which counts the bytes;
    the default is the default group. One hook serves one model.

    All buckets of a backward pass are reduced together, in the order of the parameters, after the last of them is
    full. So a step is that of `compressor.reduce` on the whole gradient, to the bit: state belongs to a parameter and
    not to a bucket, neither `bucket_cap_mb` nor DDP's rebuilding of its buckets after the first pass changes anything,
    and a global selection is global. It costs the overlap of communication with the backward pass.

    A compressor of `build(..., overlap=True)` has that overlap: from the second pass on each bucket is reduced as it
    fills, on a thread of its own, while the backward pass goes on. The result is the same, to the bit with two workers,
    and with more but for the order in which gloo's ring sums. It is for methods that treat every parameter by itself:
    none, half, signSGD and Signum, the scaled sign, and PowerSGD with its warm start. What is not finite is then found
    bucket by bucket, when others have been sent. To make the hook is a collective call, as it talks in a group of its
    own, unless a channel is given: `Tap(GroupChannel.apart())`, say, of a group that nothing else uses meanwhile.

    Parameters that are frozen when DDP is made have no part in it, nor have passes under `no_sync()`: the pass after
    them reduces the sum. With `find_unused_parameters`, one that this worker did not use counts as a gradient of zero;
    one that no worker used keeps the `grad` that it had, and what its residual sent is lost. The compressor works in
    float32, and its mean is rounded to the dtype of the parameters.

    To go on with another number of workers than a state was saved with, load `redistribute` of all their states. A
    worker that has another one's residual or momentum raises ValueError in its first backward pass.

    The backward pass raises ValueError if the model's parameters are not those of `compressor.layout`, if a gradient is
    sparse, or, by the name of the parameter, if one holds NaN or infinity, before anything is sent; other workers then
    wait until this one ends. A loss scaled for float16 overflows on purpose: train in bfloat16 instead.
    """
    if isinstance(compressor, Transformed) and (config := compressor.of_images):
        raise ValueError(
            f"Expected a defence without {config.method}: DistributedDataParallel hands over means of images."
        )
    pending: list[tuple[Bucket, Future[Tensor]]] = []
    # Of each parameter in the layout. Kept from the first pass on: DDP then rebuilds its buckets in the order in which
    # gradients came, and theirs says nothing any more.
    places: dict[Tensor, int] = {}

    def hook(state: object, bucket: Bucket) -> Future[Tensor]:
        # What a pass that failed has left.
        if bucket.index() == 0:
            pending.clear()
        device = bucket.buffer().device
        future: Future[Tensor] = Future(devices=None if device.type == "cpu" else [device])
        pending.append((bucket, future))
        # A future for each bucket at once, but the work when the last is full: a step is of the whole gradient.
        if bucket.is_last():
            buckets = [b for b, _ in pending]
            if not places:
                places.update(_places(state, buckets, compressor.layout))
            _reduce(buckets, places, compressor, GroupChannel() if channel is None else channel)
            for filled, waiting in pending:
                waiting.set_result(filled.buffer())
            pending.clear()
        return future

    return _unannotated(_overlapped(hook, compressor, channel) if isinstance(compressor, InParts) else hook)


def _unannotated(hook: Hook) -> Hook:
    # DDP refuses any annotations but the types themselves, and these are strings.
    hook.__annotations__.clear()
    return hook


def _overlapped(whole: Hook, compressor: InParts, channel: Channel | None) -> Hook:
    """A hook that reduces every bucket by itself. whole: that of the first pass, after which DDP has other buckets."""
    layout = compressor.layout
    alone = GroupChannel.apart() if channel is None else channel
    # One thread, so that all workers' collectives are in the order of their buckets.
    thread = ThreadPoolExecutor(1, "raytrust-overlap")
    first: list[Bucket] = []
    places: dict[Tensor, int] = {}

    def step(bucket: Bucket) -> Tensor:
        indices, grads = tuple(places[p] for p in bucket.parameters()), _gradients(bucket)
        with torch.no_grad():
            for grad, mean in zip(grads, compressor.reduce_part(indices, grads, alone).mean, strict=True):
                grad.copy_(mean)
        return bucket.buffer()

    def hook(state: object, bucket: Bucket) -> Future[Tensor]:
        if not places:
            if bucket.index() == 0:
                first.clear()
            first.append(bucket)
            future = whole(state, bucket)
            if bucket.is_last():
                places.update(_places(state, first, layout))
            return future
        device = bucket.buffer().device
        future = Future(devices=None if device.type == "cpu" else [device])
        filled = None if device.type == "cpu" else torch.cuda.current_stream(device).record_event()

        def work() -> None:
            try:
                if filled is not None:
                    torch.cuda.current_stream(device).wait_event(filled)
                future.set_result(step(bucket))
            except Exception as error:
                future.set_exception(error)  # type: ignore[arg-type]

        thread.submit(work)
        return future

    return hook


def _reduce(buckets: Sequence[Bucket], places: dict[Tensor, int], compressor: Compressor, channel: Channel) -> None:
    """The gradients in the buckets become their mean over workers."""
    grads: list[Tensor] = [torch.empty(0)] * len(places)
    for bucket in buckets:
        for parameter, grad in zip(bucket.parameters(), _gradients(bucket), strict=True):
            grads[places[parameter]] = grad
    with torch.no_grad():
        for grad, mean in zip(grads, compressor.reduce(grads, channel).mean, strict=True):
            grad.copy_(mean)


def _gradients(bucket: Bucket) -> list[Tensor]:
    """Views into the bucket, each like its parameter."""
    buffer, parameters = bucket.buffer(), bucket.parameters()
    if buffer.is_sparse:
        raise ValueError("Expected dense gradients, got a sparse one.")
    parts = buffer.split([p.numel() for p in parameters])
    # They lie there with their parameters' strides, such as channels_last, which `bucket.gradients()` does not heed.
    return [
        part.as_strided(p.shape, p.stride()) if _is_dense(p) else part.view(p.shape)
        for part, p in zip(parts, parameters, strict=True)
    ]


def _is_dense(x: Tensor) -> bool:
    """Whether the entries fill their memory without gaps, in whatever order."""
    return 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) == x.numel()


def _places(state: object, buckets: Sequence[Bucket], layout: Layout) -> dict[Tensor, int]:
    """Each parameter's place in the layout, from the model or from the buckets of the first pass."""
    held = [p for bucket in reversed(buckets) for p in bucket.parameters()]
    if isinstance(state, nn.Module):
        parameters = [p for p in state.parameters() if p.requires_grad]
    elif state is None:
        parameters = held
        if len({p.dtype for p in held}) > 1:
            raise ValueError(f"Expected state={state} to be the model, as its parameters have several dtypes.")
    else:
        raise ValueError(f"Expected state={state!r} to be the model or None.")
    if len(parameters) != len(layout.shapes):
        raise ValueError(f"Expected the compressor's {len(layout.shapes)} parameters, got {len(parameters)}.")
    for name, shape, p in zip(layout.names, layout.shapes, parameters, strict=True):
        if p.shape != shape:
            raise ValueError(f"Expected {name} of shape {tuple(shape)}, as in the compressor, got {tuple(p.shape)}.")
    if set(parameters) != set(held):
        raise ValueError(f"Expected DDP to average the model's {len(parameters)} parameters, got {len(held)} others.")
    return {p: place for place, p in enumerate(parameters)}
