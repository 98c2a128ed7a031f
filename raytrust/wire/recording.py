"""What any code sends through torch.distributed, other people's communication hooks among it: `record`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch.distributed as dist
from torch import Tensor

from raytrust.wire.channel import Message, Record

# What torch.distributed calls of a process group, and the name of the collective. Some are of newer versions alone.
_IN_PLACE = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "broadcast": "broadcast",
    "reduce": "reduce",
}
_FROM_INPUTS = {
    "allgather": "all_gather",
    "allgather_coalesced": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "all_gather_single_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter",
    "gather": "gather",
    "gather_single": "gather",
    "gather_into_tensor": "gather",
    "scatter": "scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
}
_POINT_TO_POINT = {"send": "send"}

_lock = threading.RLock()
_records: list[Record] = []
_originals: dict[str, Any] = {}


@contextmanager
def record(keep: bool = True) -> Iterator[Record]:
    """Record what this process sends through torch.distributed while the block runs, whoever sends it.

        ddp.register_comm_hook(state, powerSGD_hook)
        with raytrust.record() as recorded:
            loss.backward()
        print(recorded.sent_bytes, [message.op for message in recorded.messages])

    Yields a `Record`: payloads as they were handed over and what came back, copied, of all collectives and of `send`,
    on all threads and groups. keep: False to count bytes alone. What is computed stays the same to the bit; but each
    collective is waited for before the next, so that nothing overlaps meanwhile. All is as before when the block ends,
    also by an error.

    Not heard: what never passes through Python, which are the built-in hooks in C++, DDP's own all-reduce without any
    hook (register `allreduce_hook` instead), its broadcast of buffers, and functional collectives
    (`torch.distributed._functional_collectives`, as in compiled code).
    """
    recorded = Record(keep)
    with _lock:
        if not _records:
            _listen()
        _records.append(recorded)
    try:
        yield recorded
    finally:
        with _lock:
            # By identity: records of nested blocks end in any order, where threads have blocks of their own.
            _records[:] = [r for r in _records if r is not recorded]
            if not _records:
                _listen_no_more()


# Methods of the class, and not the functions of torch.distributed: code that imported these by name would go unheard,
# and so would callbacks of futures on gloo's own threads if the calling thread alone were watched.
def _listen() -> None:
    kinds = ((_IN_PLACE, _in_place), (_FROM_INPUTS, _from_inputs), (_POINT_TO_POINT, _sent))
    for names, payloads in kinds:
        for name, op in names.items():
            # What lies in the class is a descriptor; what `getattr` gives is none, and put back would lose the group.
            if name in vars(dist.ProcessGroup):
                _originals[name] = vars(dist.ProcessGroup)[name]
                setattr(dist.ProcessGroup, name, _heard(getattr(dist.ProcessGroup, name), op, payloads))


def _listen_no_more() -> None:
    for name, original in _originals.items():
        setattr(dist.ProcessGroup, name, original)
    _originals.clear()


Payloads = tuple[list[Tensor], list[Tensor]]  # sent, and the tensors in which something will be received


def _heard(original: Callable[..., Any], op: str, payloads: Callable[..., Payloads]) -> Callable[..., Any]:
    @wraps(original)
    def method(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        values = [*args, *kwargs.values()]
        sent, received = payloads(op, group, values)
        copies = tuple(x.detach().clone() for x in sent)
        work = original(group, *args, **kwargs)
        if received and work is not None:
            # Before any callback of the caller's, which may write over what was received.
            work.wait()
        message = Message(_named(op, values), copies, tuple(_by_rank(op, sent, received, group.size())))
        with _lock:
            for recorded in _records:
                recorded.note(message)
        return work

    return method


def _in_place(op: str, group: dist.ProcessGroup, values: Sequence[Any]) -> Payloads:
    tensors = _tensors(values[0])
    root = next((v for v in (getattr(x, "rootRank", None) for x in values[1:]) if v is not None), None)
    if op == "broadcast":
        return (tensors if root == group.rank() else []), tensors
    return tensors, ([] if op == "reduce" and root != group.rank() else tensors)


def _from_inputs(op: str, group: dist.ProcessGroup, values: Sequence[Any]) -> Payloads:
    return _tensors(values[1]), _tensors(values[0])


def _sent(op: str, group: dist.ProcessGroup, values: Sequence[Any]) -> Payloads:
    return _tensors(values[0]), []


def _tensors(nested: Any) -> list[Tensor]:
    if isinstance(nested, Tensor):
        return [nested]
    return [x for part in nested for x in _tensors(part)]


def _by_rank(op: str, sent: Sequence[Tensor], received: Sequence[Tensor], workers: int) -> list[Tensor]:
    """Of a gather of one tensor into one, the part of each rank."""
    whole = op in ("all_gather", "gather") and len(sent) == len(received) == 1
    return list(received[0].chunk(workers)) if whole else list(received)


def _named(op: str, values: Sequence[Any]) -> str:
    """With the reduction, where it is no sum."""
    for value in values[1:]:
        reduction = getattr(value, "reduceOp", value)
        reduction = getattr(reduction, "op", reduction)
        if isinstance(reduction, dist.ReduceOp.RedOpType):
            return op if reduction.name == "SUM" else f"{op} {reduction.name.lower()}"
    return op
