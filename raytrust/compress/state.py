"""The states of compressors: what they say of themselves, what is refused, and what becomes of them with other workers.

A state is one flat dict of tensors, by kind and parameter name ("residual.conv.weight"), beside one "metadata" entry of
builtins that names the method, its options and the parameters. `torch.load(..., weights_only=True)` reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from raytrust.compress.interface import Layout
from raytrust.config import to_dict
from raytrust.wire.channel import Channel

State: TypeAlias = dict[str, Any]


class Memory:
    """What a worker keeps to itself of past gradients: float32 vectors (entries,), one a kind, such as "residual".

    They are zero before the first step, and of one worker: `vectors` refuses to go on as another one.

    worker: (rank, world size) of the steps so far; None before the first, and after `redistribute`.
    """

    def __init__(self, layout: Layout, *kinds: str):
        self.kinds = kinds
        self.worker: tuple[int, int] | None = None
        self._layout = layout
        self.held: tuple[Tensor, ...] = ()  # of each kind; none before the first step

    def vectors(self, channel: Channel, device: torch.device) -> tuple[Tensor, ...]:
        """Those of a step of this worker, on `device`, to be written to. Raises ValueError for another worker's."""
        worker = channel.rank, channel.world_size
        # Another worker's residual would be sent a second time, and its own never.
        if self.worker not in (None, worker):
            raise ValueError(
                f"Expected channel of worker {self.worker[0]} of {self.worker[1]}, whose {self.kinds[0]} this is, got "
                f"worker {worker[0]} of {worker[1]}: raytrust.compress.redistribute turns states into those of others."
            )
        self.worker = worker
        if not self.held:
            n = self._layout.entries
            self.held = tuple(torch.zeros(n, dtype=torch.float32, device=device) for _ in self.kinds)
        elif self.kinds and self.held[0].device != device:
            # A checkpoint may lie on another device than the gradients, of which nothing is known before a step.
            self.held = tuple(v.to(device) for v in self.held)
        return self.held

    def tensors(self) -> dict[str, Tensor]:
        """Copies by kind and parameter name; none before the first step."""
        return {
            f"{kind}.{name}": part.clone()
            for kind, vector in zip(self.kinds, self.held, strict=bool(self.held))
            for name, part in zip(self._layout.names, self._layout.unflatten(vector), strict=True)
        }

    def expected(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """What a state has to hold of this memory: all of it, or none where it is of before the first step."""
        every = {
            f"{kind}.{name}": torch.empty(shape, dtype=torch.float32, device="meta")
            for kind in self.kinds
            for name, shape in zip(self._layout.names, self._layout.shapes, strict=True)
        }
        return every if any(key in state for key in every) else {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `tensors` gave, of a state that is known to fit."""
        worker = state["metadata"]["worker"]
        self.worker = None if worker is None else (worker[0], worker[1])
        names = self._layout.names
        self.held = tuple(
            torch.cat([state[f"{kind}.{name}"].reshape(-1) for name in names])
            for kind in (self.kinds if self.expected(state) else ())
        )


def metadata(config: Any, layout: Layout, memory: Memory) -> State:
    """What a state says of the compressor that gave it, without error feedback.

    config: options of the method, by name, and the method's. parameters: [name, shape] in order. memory: the kinds of
    tensors that are one worker's; all others are equal on all workers. worker: [rank, world size], see `Memory`.
    """
    return {
        "config": to_dict(config),
        "error_feedback": False,
        "parameters": parameters(layout),
        "memory": list(memory.kinds),
        "worker": None if memory.worker is None else list(memory.worker),
    }


def parameters(layout: Layout) -> list[list[Any]]:
    """[name, shape] of each, as builtins."""
    return [[name, list(shape)] for name, shape in zip(layout.names, layout.shapes, strict=True)]


def metadata_of(state: Mapping[str, Any]) -> State:
    """The metadata of a state. Raises ValueError for what is no compressor's state."""
    held = state.get("metadata")
    if not isinstance(held, dict) or not {"error_feedback", "parameters", "memory", "worker"} <= held.keys():
        raise ValueError(f"Expected state to be what a compressor's state_dict() gave, got the keys {_listed(state)}.")
    return held


def expect_metadata(state: Mapping[str, Any], expected: State) -> None:
    """Raises ValueError unless the state is of the same method, options and parameters."""
    held = metadata_of(state)
    config, other = expected["config"], held.get("config") or {}
    if other.get("method") != config.get("method"):
        raise ValueError(f"Expected state of method {config.get('method')!r}, got one of {other.get('method')!r}.")
    for option in config.keys() | other.keys():
        if config.get(option) != other.get(option):
            raise ValueError(
                f"Expected state of {config.get('method')!r} with {option}={config.get(option)!r}, "
                f"got one with {option}={other.get(option)!r}."
            )
    expect_error_feedback(held, expected["error_feedback"])
    expect_parameters(held, expected["parameters"])


def expect_error_feedback(held: State, expected: bool) -> None:
    if held["error_feedback"] != expected:
        words = {True: "with error feedback", False: "without error feedback"}
        raise ValueError(f"Expected state {words[expected]}, got one {words[not expected]}.")


def expect_parameters(held: State, expected: Sequence[Sequence[Any]]) -> None:
    others = held["parameters"]
    if len(others) != len(expected):
        raise ValueError(f"Expected state of {len(expected)} parameters, got one of {len(others)}.")
    for (name, shape), (other, other_shape) in zip(expected, others, strict=True):
        if name != other or list(shape) != list(other_shape):
            raise ValueError(
                f"Expected state of the parameter {name!r} of shape {tuple(shape)}, "
                f"got {other!r} of shape {tuple(other_shape)} in its place."
            )


def expect_tensors(state: Mapping[str, Any], expected: Mapping[str, Tensor], name: str = "state") -> None:
    """Raises ValueError unless the state holds tensors of these keys, shapes and dtypes, and no others."""
    if missing := expected.keys() - state.keys():
        raise ValueError(f"Expected {name} to hold {_listed(missing)}, got {_listed(state)}.")
    if surplus := state.keys() - expected.keys() - {"metadata"}:
        raise ValueError(f"Expected {name} to hold {_listed(expected)}, got {_listed(surplus)} besides.")
    for key, like in expected.items():
        x = state[key]
        if not isinstance(x, Tensor):
            raise ValueError(f"Expected {name}[{key!r}]={x!r} to be a tensor.")
        if x.shape != like.shape or x.dtype != like.dtype:
            raise ValueError(
                f"Expected {name}[{key!r}] of shape {tuple(like.shape)} and {like.dtype}, "
                f"got {tuple(x.shape)} and {x.dtype}."
            )


def redistribute(states: Sequence[State]) -> State:
    """The state with which every worker goes on, where their number is another than that of `states`.

        saved = [torch.load(f"worker-{rank}.pt", weights_only=True)["compressor"] for rank in range(workers_before)]
        compressor.load_state_dict(saved[rank] if len(saved) == workers else compress.redistribute(saved))

    states: of all former workers, after the same step, in any order. Every worker calls it with all of them, and gets
    the same state to the bit. What is equal on all workers, such as a warm start, stays; residuals and momenta become
    their mean. Raises ValueError if a worker's state is missing or given twice, or if they are not of one training.

    Why the mean: a step is the mean over workers of what they sent, so what the model is still owed is the mean of
    their residuals. The theory of error feedback follows just that, the weights less learning rate x mean residual
    (the virtual sequence of Stich, Cordonnier & Jaggi 2018 and Karimireddy et al. 2019). With the mean on each of the
    new workers it stays as it was, whatever their number, so that nothing of the gradient is lost or counted twice; to
    keep the *sum* would scale what is owed by (workers before) / (workers after). Of all ways to keep the mean it has
    the least mean of ||residual||^2, the quantity in which convergence is bounded. DGC's u and v and Signum's momentum
    are sums of past gradients alike, and the mean over workers is what they would be of the mean gradient.

    Each new worker learns the mean residual: it is private as an uncompressed mean gradient is.
    """
    if not states:
        raise ValueError(f"Expected states={states!r} of at least 1 worker.")
    first = metadata_of(states[0])
    # By their prefix, so that this needs no compressor: states of any method, also one that isn't registered here.
    kinds = tuple(f"{kind}." for kind in first["memory"])
    for state in states[1:]:
        _expect_one_training(states[0], state, kinds)
    _expect_every_worker(states, kinds)
    # In the order of ranks and in float64, so that all workers round alike, whatever order they read the files in.
    ordered = sorted(states, key=lambda state: state["metadata"]["worker"] or [0])
    result: State = {"metadata": first | {"worker": None}}
    for key, x in states[0].items():
        if key.startswith(kinds):
            result[key] = torch.stack([state[key].to(x) for state in ordered]).mean(0, dtype=torch.float64).to(x)
        elif key != "metadata":
            result[key] = x.clone()
    return result


def _expect_one_training(one: State, other: State, kinds: tuple[str, ...]) -> None:
    held, others = metadata_of(one) | {"worker": None}, metadata_of(other) | {"worker": None}
    if held != others:
        different = next(key for key in held.keys() | others.keys() if held.get(key) != others.get(key))
        raise ValueError(f"Expected states of one compressor, got {held.get(different)} and {others.get(different)}.")
    expect_tensors(other, {key: x for key, x in one.items() if key != "metadata"}, "each of states")
    for key, x in one.items():
        if key != "metadata" and not key.startswith(kinds) and not torch.equal(x, other[key].to(x)):
            raise ValueError(f"Expected states after the same step of one training, got two values of {key!r}.")


def _expect_every_worker(states: Sequence[State], kinds: tuple[str, ...]) -> None:
    """Where there is a memory: each worker's, once. Without one it does not matter whose states they are."""
    workers = [state["metadata"]["worker"] for state in states]
    if not any(key.startswith(kinds) for key in states[0]) or all(worker is None for worker in workers):
        return
    total = next(worker[1] for worker in workers if worker is not None)
    ranks = [worker and worker[0] for worker in workers]
    if sorted(ranks, key=str) != sorted(range(total), key=str) or any(w[1] != total for w in workers):
        raise ValueError(f"Expected states of each of the {total} workers, got those of the ranks {ranks}.")


def _listed(keys: Iterable[str], most: int = 3) -> str:
    quoted = [repr(key) for key in sorted(keys, key=str)]
    more = f" and {len(quoted) - most} more" if len(quoted) > most else ""
    return (", ".join(quoted[:most]) + more) or "nothing"
