"""What ran: the revision of this code, and the versions of what it stands on."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path


def versions() -> dict[str, str | None]:
    """Tags that say what ran: the git revision of this code, and the versions of what it stands on."""
    tags: dict[str, str | None] = {"version.python": platform.python_version()}
    for package in ("raytrust", "torch", "torchvision", "ray", "optuna", "mlflow"):
        try:
            tags[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            tags[f"version.{package}"] = None
    return tags | {"mlflow.source.git.commit": _revision()}


def _revision() -> str | None:
    """The commit that this file is checked out from, marked where the tree has changes; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        # An environment may lie in somebody else's checkout, which doesn't have this file.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None
    except (OSError, subprocess.SubprocessError):
        return None
