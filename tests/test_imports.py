"""Who imports whom. The core runs without ray, mlflow and optuna; attacks know nothing of training and data."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "raytrust"
HOMES = {  # the only place that may import it
    "ray": "raytrust.cluster",
    "optuna": "raytrust.cluster",
    "mlflow": "raytrust.reports.mlflow",
    "torch.distributed": "raytrust.wire",
}
# The rooms of the house, from the ground up: a room imports rooms of lower floors alone.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("config", "metrics"),
    ("data", "defend", "networks", "wire"),
    ("compress",),
    ("leak", "persample"),
    ("train",),
    ("attacks",),
    ("jobs",),
    ("studies",),
    ("cluster", "reports"),
    ("cli",),
)
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
EDGES = ("raytrust.cluster", "raytrust.cli", "raytrust.reports.mlflow", "raytrust.reports.frontier_log")  # rest: core


def is_within(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
CORE = [name for name in MODULES if not is_within(name, EDGES) and not name.endswith("__main__")]


@cache
def imports(path: Path) -> set[str]:
    """Everything that a file imports, also inside functions, but for types; of `from a import b` both a and a.b."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    skipped = {id(node) for block in for_types for node in ast.walk(block)}
    for node in (n for n in ast.walk(tree) if id(n) not in skipped):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_root_has_rooms_alone() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} <= {"__init__.py", "__main__.py", "cli.py"}
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)


def test_the_core_runs_without_ray_mlflow_and_optuna() -> None:
    """They are made impossible to import, and so is what else only the edges need."""
    program = f"""
import sys
sys.modules.update(dict.fromkeys(("ray", "mlflow", "optuna")))  # as if they were not installed
import importlib
for name in {CORE!r}:
    importlib.import_module(name)
from raytrust.wire.channel import LocalChannel
from raytrust.config import CaptureConfig, InversionConfig, ModelConfig, TrainConfig
from raytrust.data import load
from raytrust.studies.evaluate import evaluate_inversion
from raytrust.train.loop import train
config = TrainConfig(model=ModelConfig("convnet", width=2), capture=CaptureConfig((0,), 1, 1), workers=1, steps=1)
records = list(train(config, load("digits"), LocalChannel()))
evaluate_inversion(records[:1], InversionConfig(iterations=1))
assert not [n for n in sys.modules if n.split(".")[0] in ("ray", "mlflow", "optuna") and sys.modules[n] is not None]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("library", "home"), HOMES.items())
def test_a_library_has_one_home(library: str, home: str) -> None:
    users = {name for name, path in MODULES.items() if any(is_within(i, (library,)) for i in imports(path))}
    assert users
    assert {name for name in users if not is_within(name, (home,))} == set()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_lower_floors_alone(room: str) -> None:
    for name, path in MODULES.items():
        if is_within(name, (f"raytrust.{room}",)):
            others = {i.split(".")[1] for i in imports(path) if i.startswith("raytrust.")} - {room}
            lower = {other for other in others if ROOMS[other] < ROOMS[room]}
            beside = {"leak"} if room == "persample" else set()
            assert others - lower <= beside, f"{name} imports {others - lower}"


def test_the_command_line_is_there_at_once() -> None:
    """A wrong option is refused, and a signal answered, before libraries are loaded."""
    slow = ("ray", "mlflow", "sqlalchemy", "torch", "numpy", "optuna")
    program = f"import sys, raytrust.cli.options; print([n for n in {slow!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"


def test_attacks_know_nothing_of_training_and_data() -> None:
    """Not even through what they import, and they never touch the truth."""

    def reached(name: str, seen: set[str]) -> set[str]:
        for module in imports(MODULES[name]) & set(MODULES):
            if module not in seen:
                reached(module, seen | {module})
                seen |= reached(module, seen | {module})
        return seen | {name}

    for name, path in MODULES.items():
        if is_within(name, ("raytrust.attacks",)):
            assert not reached(name, set()) & {"raytrust.train.loop", "raytrust.data", "raytrust.studies.evaluate"}
            tree = ast.parse(path.read_text(encoding="utf-8"))
            words = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
            words |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | imports(path)
            assert not words & {
                "truth",
                "Truth",
                "load_captures",
                "raytrust.leak.observation.Truth",
                "raytrust.leak.observation.Capture",
            }


def test_only_the_evaluation_reads_the_truth() -> None:
    def reads(path: Path) -> bool:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        return any(isinstance(n, ast.Attribute) and n.attr == "truth" for n in ast.walk(tree))

    # The evaluation is two files, and a capture's own file format has to write it.
    assert {name for name, path in MODULES.items() if reads(path)} == {
        "raytrust.studies.comparison",
        "raytrust.studies.evaluate",
        "raytrust.jobs.captures",
    }


def test_no_file_imports_itself_by_way_of_others() -> None:
    reached: dict[str, set[str]] = {}

    def below(name: str, path: tuple[str, ...]) -> set[str]:
        assert name not in path, f"a circle: {' -> '.join((*path, name))}"
        if name not in reached:
            # A package's own face, which hands on names of its files, is no room that they take from.
            direct = (imports(MODULES[name]) & set(MODULES)) - {name}
            files = {module for module in direct if MODULES[module].name != "__init__.py"}
            reached[name] = files.union(*(below(module, (*path, name)) for module in sorted(files)))
        return reached[name]

    for name in MODULES:
        below(name, ())


def test_files_can_be_read_at_one_sitting() -> None:
    lengths = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES.values())
    assert lengths[-1] <= 350
    assert lengths[len(lengths) // 2] <= 150
