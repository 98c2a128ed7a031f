"""Weights of a model that is trained already, from a file of its owner's."""

from __future__ import annotations

import hashlib
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
        reason = str(error).splitlines()[0]
        raise ValueError(f"Expected checkpoint={path!r} to hold tensors alone, but {reason}") from error
    try:
        network.load_state_dict(_weights(content, path))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"Expected checkpoint={path!r} to be of {type(network).__name__}, but {reason}") from error


def _weights(content: Any, path: str) -> dict[str, Tensor]:
    for entry in _ENTRIES:
        if isinstance(content, dict) and isinstance(content.get(entry), dict):
            content = content[entry]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"Expected checkpoint={path!r} to hold a state dict, or one under {', '.join(_ENTRIES)}.")
    for prefix in _PREFIXES:
        if content and all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): value for name, value in content.items()}
    return content
