"""`import raytrust` is light, and its names are there when they are asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import raytrust


def test_importing_the_package_imports_nothing_else() -> None:
    program = "import sys; before = set(sys.modules); import raytrust; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert [name for name in done.stdout.split() if name.partition(".")[0] in ("raytrust", "torch", "numpy")] == [
        "raytrust"
    ]


def test_reading_text_loads_no_library() -> None:
    program = (
        "import sys, raytrust; raytrust.parse_defence('topk:0.1:ef'); raytrust.register; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"


def test_every_public_name_is_there() -> None:
    assert {"build", "ddp_comm_hook", "invert", "load", "parse_defence", "register"} <= set(raytrust.__all__)
    for name in raytrust.__all__:
        assert getattr(raytrust, name) is not None
        assert name in dir(raytrust)
    with pytest.raises(AttributeError, match="module 'raytrust' has no attribute 'biuld'"):
        raytrust.biuld  # noqa: B018
