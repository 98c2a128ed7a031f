"""Weights of a model that is trained already, from a file of its owner's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# What training programs call the weights in a file that holds more, and what wrappers put before each name.
_ENTRIES = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")


def identified(path: str | Path) -> str:
    """The absolute path with a digest of the content, "PATH#DIGEST", as a configuration names a checkpoint.

    Raises ValueError if there is no such file.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ValueError(f"Expected checkpoint={str(path)!r} to be a file, but there is none.")
    return f"{file}#{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"


def load_checkpoint(network: nn.Module, checkpoint: str) -> None:
    """Load the weights that `identified` names into the network.

    The file is what `torch.save` made of a state dict, or of a dict with one; it is read without unpickling code.
    Raises ValueError for another file than was named, one that can't be read so, and weights of another network.
    """
    path, _, digest = checkpoint.rpartition("#")
    if identified(path) != checkpoint:
        raise ValueError(f"Expected checkpoint={path!r} of digest {digest}, but the file has changed since.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # torch.load raises many types for what it can't read; all of them mean the same here.
    except Exception as error:
        mend = "save model.state_dict(), not the model"
        raise ValueError(f"Expected checkpoint={path!r} to hold tensors alone: {mend}.") from error
    wanted = network.state_dict()
    for weights in _readings(content, path):
        if weights.keys() == wanted.keys() and all(weights[name].shape == wanted[name].shape for name in wanted):
            network.load_state_dict(weights)
            return
    fitting = sum(name in wanted and weights[name].shape == wanted[name].shape for name in weights)
    other = next((name for name in weights if name not in wanted), next(iter(wanted), ""))
    fits = f"{fitting} of its {len(weights)} entries fit, and {other!r} does not"
    raise ValueError(f"Expected checkpoint={path!r} to be of this {type(network).__name__}, but {fits}.")


def _readings(content: Any, path: str) -> Iterator[dict[str, Tensor]]:
    """The state dict as it is, and without what wrappers put before each name."""
    for entry in _ENTRIES:
        if isinstance(content, dict) and isinstance(content.get(entry), dict):
            content = content[entry]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"Expected checkpoint={path!r} to hold a state dict, or one under {', '.join(_ENTRIES)}.")
    yield content
    for prefix in _PREFIXES:
        if content and all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): value for name, value in content.items()}
            yield content
