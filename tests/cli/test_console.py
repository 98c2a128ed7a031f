"""The console program: its sub-commands are the programs of sweeps/, at once, and without the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from raytrust.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, folder: Path = ROOT, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(path)}
    command = [sys.executable, "-m", "raytrust", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_it_lists_its_commands() -> None:
    for arguments in ((), ("--help",), ("-h",)):
        done = run(*arguments)
        assert done.returncode == 0
        assert re.findall(r"^  raytrust (\w+) ", done.stdout, flags=re.MULTILINE) == list(COMMANDS)


def test_a_command_is_a_program_of_sweeps() -> None:
    assert {script for script, _ in COMMANDS.values()} == {path.stem for path in (ROOT / "sweeps").glob("*.py")}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("sweep", f"raytrust: error: Expected command='sweep' to be one of {', '.join(COMMANDS)}."),
        ("frontier --width 0", "raytrust frontier: error: Expected width=0 in [1, 1024]."),
        ("membership --models 3", "raytrust membership: error: Expected models=3 to be even and at least 4: one is "
         "attacked, the others are its shadows."),
        ("paper --images 1", "raytrust paper: error: Expected images=1 to be at least 2."),
        ("frontier --plugin nowhere.py", None),
    ],
)  # fmt: skip
def test_it_refuses_in_one_line(arguments: str, line: str | None, tmp_path: Path) -> None:
    done = run(*arguments.split(), folder=tmp_path)
    assert done.returncode == 2
    expected = f"Expected plugin={str(tmp_path / 'nowhere.py')!r} to be a file, but there is none."
    assert done.stderr == (line or f"raytrust frontier: error: {expected}") + "\n"
    assert list(tmp_path.iterdir()) == []


def test_help_imports_no_library() -> None:
    program = """
import sys
from raytrust.__main__ import main
for arguments in ([], ["frontier", "--help"], ["membership", "--help"], ["paper", "--help"]):
    sys.argv = ["raytrust", *arguments]
    try:
        main()
    except SystemExit as stopped:
        assert stopped.code == 0
loaded = [n for n in ("torch", "numpy", "ray", "mlflow", "optuna", "pydantic") if n in sys.modules]
sys.exit(f"{loaded}" if loaded else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: raytrust") == 4


def test_a_wheel_has_the_programs(tmp_path: Path) -> None:
    """It runs from there alone, with the tables that lie in sweeps/."""
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files", "raytrust", "sweeps"], cwd=ROOT, capture_output=True, text=True)
    for name in ["pyproject.toml", "setup.py", "README.md", "LICENSE", *tracked.stdout.split()]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)  # a copy, as a build leaves things behind
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(build, cwd=source, check=True, timeout=200)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    modules = {str(path.relative_to(installed / "raytrust")) for path in (installed / "raytrust").rglob("*.py")}
    expected = {str(path.relative_to(ROOT / "raytrust")) for path in (ROOT / "raytrust").rglob("*.py")}
    assert modules == expected | {f"sweeps/{path.name}" for path in (ROOT / "sweeps").glob("*.py")}
    assert "raytrust = raytrust.__main__:main" in next(installed.glob("*.dist-info/entry_points.txt")).read_text()
    done = run("frontier", "--iterations", "0", folder=tmp_path, path=installed)
    assert done.stderr == "raytrust frontier: error: Expected iterations=0 to be at least 1.\n"
