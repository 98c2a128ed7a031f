"""Who imports whom. The core runs without ray, mlflow and optuna; attacks know nothing of training and data."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "raytrust"
HOMES = {  # the only place that may import it
    "ray": "raytrust.cluster",
    "optuna": "raytrust.cluster",
    "mlflow": "raytrust.tracking",
    "torch.distributed": "raytrust.channel",
}
EDGES = (
    "raytrust.cluster",
    "raytrust.tracking",
    "raytrust.sweep",
    "raytrust.sweep_log",
    "raytrust.membership",
    "raytrust.paper_tables",
)  # rest: core

# What a module or package of the core may import of raytrust, besides itself.
LAYERS: dict[str, set[str]] = {
    "config": set(),
    "metrics": set(),
    "lock": set(),
    "cli": {"cluster", "reports"},  # of these, what imports nothing that takes time
    "audit": {"metrics"},
    "data": set(),
    "channel": set(),
    "models": {"config"},
    "compress": {"channel", "config"},
    "capture": {"channel", "compress", "config", "models"},
    "dp": {"config", "data", "models", "train"},
    "studies": {"attacks", "capture", "channel", "config", "data", "train"},
    "shadows": {"attacks", "capture", "channel", "config", "data", "dp", "models", "store", "studies", "train"},
    "membership_rows": {"attacks", "audit", "config", "dp", "shadows"},
    "published": {"config"},
    "membership_paper": {"audit", "published"},
    "membership_figures": {"report"},
    "membership_page": {"membership_figures", "membership_paper", "published", "report", "reports"},
    "reports": {"audit", "config", "data", "figures", "frontier", "membership_figures", "placement", "report", "store"},
    "train": {"capture", "channel", "compress", "config", "data", "models"},
    "attacks": {"capture", "channel", "compress", "config", "models"},
    "evaluate": {"attacks", "capture", "config", "metrics"},
    "store": {"attacks", "capture", "config", "evaluate"},
    "paper": {
        "attacks",
        "audit",
        "capture",
        "channel",
        "config",
        "data",
        "evaluate",
        "membership_paper",
        "membership_rows",
        "metrics",
        "published",
        "report",
        "shadows",
        "store",
        "train",
    },
}


def is_within(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
CORE = [name for name in MODULES if not is_within(name, EDGES) and not name.endswith("__main__")]


def imports(path: Path) -> set[str]:
    """Everything that a file imports, also inside functions; of `from a import b` both a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_core_is_there() -> None:
    assert {f"raytrust.{name}" for name in LAYERS} <= set(CORE)


def test_the_core_runs_without_ray_mlflow_and_optuna() -> None:
    """They are made impossible to import, and so is what else only the edges need."""
    program = f"""
import sys
sys.modules.update(dict.fromkeys(("ray", "mlflow", "optuna")))  # as if they were not installed
import importlib
for name in {CORE!r}:
    importlib.import_module(name)
from raytrust.channel import LocalChannel
from raytrust.config import CaptureConfig, InversionConfig, ModelConfig, TrainConfig
from raytrust.data import load
from raytrust.evaluate import evaluate_inversion
from raytrust.train import train
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


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_one_way(layer: str) -> None:
    own = f"raytrust.{layer}"
    for name, path in MODULES.items():
        if is_within(name, (own,)):
            internal = {i.split(".")[1] for i in imports(path) if i.startswith("raytrust.")}
            assert internal - {layer} <= LAYERS[layer], f"{name} imports {internal}"


def test_the_command_line_is_there_at_once() -> None:
    """A wrong option is refused, and a signal answered, before libraries are loaded."""
    slow = ("ray", "mlflow", "sqlalchemy", "torch", "numpy", "optuna")
    program = f"import sys, raytrust.cli; print([n for n in {slow!r} if n in sys.modules])"
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
            assert not reached(name, set()) & {"raytrust.train", "raytrust.data", "raytrust.evaluate"}
            tree = ast.parse(path.read_text(encoding="utf-8"))
            words = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
            words |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | imports(path)
            assert not words & {"truth", "Truth", "load_capture", "raytrust.capture.Truth", "raytrust.capture.Capture"}


def test_only_the_evaluation_reads_the_truth() -> None:
    def reads(path: Path) -> bool:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        return any(isinstance(n, ast.Attribute) and n.attr == "truth" for n in ast.walk(tree))

    # A capture's own file format has to write it.
    assert {name for name, path in MODULES.items() if reads(path)} == {"raytrust.evaluate", "raytrust.capture"}
