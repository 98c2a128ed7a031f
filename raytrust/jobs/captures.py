"""The files of captures.

They lie under one directory a training run, in a step's directory: `model.pt` (weights, buffers and public compressor
state, shared by the step's batches), `seen-000.pt` (the messages and what the threat grants) and `truth-000.pt` (images
and labels, apart, so that the seen half can be handed to an attacker as it is); where the threat grants a history,
`history-0.pt` (the messages of the steps before, of the worker of that rank). Beside the steps lies `auxiliary.pt`, the
other images that the threat grants, the same for all captures of a training. All are written whole or not at all,
readable by their owner alone, and loaded without unpickling code.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raytrust.config import Defence, LocalConfig, ModelConfig, Threat, from_dict, to_dict
from raytrust.jobs.files import atomic_write
from raytrust.leak import EarlierStep
from raytrust.leak.observation import Capture, Observation, Truth
from raytrust.wire.channel import Message

FORMAT = 4
AUXILIARY = "auxiliary.pt"
# Fields of an observation that a file of its own holds as they are, without a conversion.
AS_THEY_ARE = ("step", "labels", "classes", "mean", "std", "victim", "world_size", "residual", "buffers_after")


def save_capture(directory: Path, capture: Capture) -> None:
    """Write the capture under `directory`; the files of the model and of a worker's history are written once a step,
    that of the auxiliary images once.

    Raises ValueError for a model in memory and for messages of a communication hook, which no file can name.
    """
    seen = capture.seen
    if seen.method is not None or seen.network is not None:
        name = getattr(seen.method, "name", "a model in memory")
        raise ValueError(f"Expected messages of a defence and a described model, got {name}, which no file can name.")
    folder = directory / f"step-{seen.step:06d}"
    model = folder / "model.pt"
    if not model.exists():
        _save(model, {"weights": seen.weights, "buffers": seen.buffers, "compressor_state": seen.compressor_state})
    history = folder / f"history-{seen.victim}.pt"
    if seen.history and not history.exists():
        steps = [{"messages": _packed(p.messages), "compressor_state": p.compressor_state} for p in seen.history]
        _save(history, {"steps": steps})
    auxiliary = directory / AUXILIARY
    if seen.auxiliary is not None and not auxiliary.exists():
        _save(auxiliary, {"images": seen.auxiliary})
    body = {
        **{name: getattr(seen, name) for name in AS_THEY_ARE},
        "messages": _packed(seen.messages),
        "mixed": seen.mixed,
        "history": len(seen.history),
        "defence": to_dict(seen.defence),
        "model": to_dict(seen.model),
        "threat": to_dict(seen.threat),
        "local": to_dict(seen.local),
        "image_shape": list(seen.image_shape),
    }
    _save(folder / f"truth-{capture.index:03d}.pt", {"images": capture.truth.images, "labels": capture.truth.labels})
    _save(folder / f"seen-{capture.index:03d}.pt", body)


def load_captures(directory: Path, step: int, indices: Sequence[int]) -> list[Capture]:
    """Read captures of one step, which share one copy of the model and of the auxiliary images. Raises ValueError if
    one is missing, damaged or of another format."""
    folder = directory / f"step-{step:06d}"
    model = _load(folder / "model.pt")
    histories: dict[int, tuple[EarlierStep, ...]] = {}
    captures = [_read(folder, model, histories, index) for index in indices]
    if not any(c.seen.threat.auxiliary for c in captures):
        return captures
    auxiliary = _load(directory / AUXILIARY)["images"]
    return [replace(c, seen=replace(c.seen, auxiliary=auxiliary)) for c in captures]


def _read(folder: Path, model: dict[str, Any], histories: dict[int, tuple[EarlierStep, ...]], index: int) -> Capture:
    body = _load(folder / f"seen-{index:03d}.pt")
    truth = _load(folder / f"truth-{index:03d}.pt")
    victim = body["victim"]
    if body["history"] and victim not in histories:
        steps = _load(folder / f"history-{victim}.pt")["steps"]
        histories[victim] = tuple(EarlierStep(_unpacked(p["messages"]), p["compressor_state"]) for p in steps)
    seen = Observation(
        **{name: body[name] for name in AS_THEY_ARE},
        weights=model["weights"],
        buffers=model["buffers"],
        compressor_state=model["compressor_state"],
        messages=_unpacked(body["messages"]),
        defence=from_dict(Defence, body["defence"]),
        model=from_dict(ModelConfig, body["model"]),
        threat=from_dict(Threat, body["threat"]),
        # Files from before there were mixed images and local steps hold none of them.
        mixed=body.get("mixed"),
        local=from_dict(LocalConfig, body.get("local", {})),
        image_shape=tuple(body["image_shape"]),
        history=histories[victim] if body["history"] else (),
    )
    return Capture(index, seen, Truth(truth["images"], truth["labels"]))


def _save(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        torch.save({"format": FORMAT, **content}, file)


def _load(path: Path) -> dict[str, Any]:
    try:
        # torch.load does not look at the archive's checksums: a flipped bit would pass as a gradient.
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(damaged)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"Expected a capture at {path}, but there is no such file.") from None
    except Exception as error:
        # torch.load raises many types for a damaged file; all of them mean the same here.
        raise ValueError(f"Expected {path} to be a capture, but it can't be read: {type(error).__name__}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"Expected {path} to be a capture of format {FORMAT}.")
    return content


def _packed(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [{"op": m.op, "sent": list(map(_pack_meta, m.sent)), "received": list(m.received)} for m in messages]


def _unpacked(messages: Sequence[dict[str, Any]]) -> tuple[Message, ...]:
    return tuple(Message(m["op"], tuple(map(_unpack_meta, m["sent"])), tuple(m["received"])) for m in messages)


def _pack_meta(x: Tensor) -> Tensor | dict[str, Any]:
    """A hidden payload keeps its shape and type alone."""
    return {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")} if x.is_meta else x


def _unpack_meta(x: Tensor | dict[str, Any]) -> Tensor:
    if isinstance(x, dict):
        return torch.empty(x["shape"], dtype=getattr(torch, x["dtype"]), device="meta")
    return x
