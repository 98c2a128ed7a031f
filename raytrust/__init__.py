"""raytrust: what gradient compression does to privacy, accuracy and bytes on the wire.

The public names are imported when they are used, so that `import raytrust` takes no time.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "raytrust.attacks.inversion": ("Candidates", "GradientInversion", "invert"),
    "raytrust.compress": ("HookCompressor", "build", "ddp_comm_hook", "redistribute"),
    "raytrust.config": (
        "Defence",
        "InversionConfig",
        "LocalConfig",
        "ModelConfig",
        "Threat",
        "TrainConfig",
        "parse_defence",
        "register",
    ),
    "raytrust.data": ("load",),
    "raytrust.reports.audit": ("AuditResult", "audit"),
    "raytrust.studies.audit.training": ("Training",),
    "raytrust.wire.channel": ("GroupChannel", "LocalChannel", "Tap"),
    "raytrust.wire.recording": ("record",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'raytrust' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
