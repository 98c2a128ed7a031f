"""A second device where there is none: tensors that say they are on a GPU, and refuse what a GPU's would refuse.

Their numbers lie in the memory of the CPU. An operation on tensors of both devices is an error, as it is on CUDA, but
for numbers of no dimension and for copies. It knows what is on which device; it computes nothing like a GPU.

It can be told to write down where work is done, and how often numbers are read, for which a GPU's host has to wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

FAR = torch.device("lazy:0")  # one that torch knows by name, and for which it starts no driver
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item")
_PASSES = ("convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm", "native_batch_norm", "linalg_svd")


@dataclass
class Log:
    """near, far: passes, such as convolutions and products of matrices, on the CPU alone and on the device. reads: how
    often the host had to wait for the device, by what made it."""

    near: Counter[str] = field(default_factory=Counter)
    far: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)


_log = [Log()]


class Far(Tensor):
    """near: the numbers."""

    near: Tensor

    @staticmethod
    def __new__(cls: type[Far], near: Tensor) -> Far:
        far = Tensor._make_wrapper_subclass(
            cls, near.size(), near.stride(), near.storage_offset(), dtype=near.dtype, device=FAR
        )
        far.near = near
        return far

    def __init__(self, near: Tensor):
        pass

    def tolist(self) -> Any:
        _log[0].reads["tolist"] += 1
        return self.near.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert {FAR} device type tensor to numpy. Use Tensor.cpu() first.")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("Expected far_device() around everything that is done to these tensors.")


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        far = [x for x in tensors if isinstance(x, Far)]
        if far and func not in _COPIES and any(not isinstance(x, Far) and x.dim() for x in tensors):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got cpu and {FAR}.")
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in _PASSES and not any(x.is_meta for x in tensors):  # nothing is computed of shapes alone
            (_log[0].far if far else _log[0].near)[name] += 1
        if far and name in _READS:
            _log[0].reads[name] += 1
        target = kwargs.get("device")
        if target is not None and torch.device(target).type == FAR.type:
            kwargs["device"] = torch.device("cpu")
        if far and target is not None and torch.device(target).type == "cpu":
            _log[0].reads["cpu"] += 1
        is_far = bool(far) if target is None else torch.device(target).type == FAR.type
        wrappers = {id(x.near): x for x in far}  # what is written in place is returned as what it was

        def wrapped(x: Any) -> Any:
            if isinstance(x, Tensor) and is_far and not x.is_meta:
                return wrappers[id(x)] if id(x) in wrappers else Far(x)
            return x

        near_args, near_kwargs = tree_map(lambda x: x.near if isinstance(x, Far) else x, (args, kwargs))
        result = func(*near_args, **near_kwargs)
        if func is torch.ops.aten.copy_.default:
            _log[0].reads["copy_"] += bool(far) and not isinstance(args[0], Far)
            return args[0]
        if func is torch.ops.aten._to_copy.default and result is near_args[0]:
            result = result.clone()
        return tree_map(wrapped, result)


class _Literals(TorchFunctionMode):
    """Tensors of Python's numbers are made on the CPU and then moved, past what torch does for them in one go."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") in (FAR, str(FAR)):
            return torch.tensor(*args, **(kwargs | {"device": "cpu"})).to(FAR)
        if func is Tensor.new_tensor and args[0].device == FAR:
            return torch.tensor(*args[1:], dtype=kwargs.get("dtype", args[0].dtype)).to(FAR)
        if func is Tensor.__getitem__ and args[0].device == FAR and isinstance(args[1], list):
            return args[0][torch.tensor(args[1]).to(FAR)]
        return func(*args, **kwargs)


@contextmanager
def far_device(log: Log | None = None) -> Iterator[torch.device]:
    """Within it tensors may be moved to the device that it gives, and made there. log: is written into."""
    _log[0] = log or Log()
    with _Literals(), _Mode():
        yield FAR
