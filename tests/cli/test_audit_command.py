"""`raytrust audit`: a network and a checkpoint of one's own, by the sweep's program, with nothing trained."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from sweep_fixtures import save_images
from torch import nn

from raytrust.__main__ import _of_audit
from raytrust.cli.options import PLACES, Directory, _check_found, _look_here
from raytrust.networks.checkpoint import identified, load_checkpoint
from raytrust.studies.frontier.row import load_rows

ROOT = Path(__file__).resolve().parents[2]
MODELS = """
from torch import nn

def build(channels, classes, width=4):
    body = nn.Sequential(nn.Conv2d(channels, width, 3, stride=2), nn.Tanh(), nn.Flatten())
    return nn.Sequential(body, nn.Linear(9 * width, classes))
"""
CONSOLE = "import sys; sys.path.remove(''); from raytrust.__main__ import main; sys.exit(main())"


def build() -> nn.Module:
    names: dict[str, object] = {}
    exec(MODELS, names)
    torch.manual_seed(3)
    return names["build"](1, 4)  # type: ignore[operator]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        # As the console program has its path: without the current folder.
        [sys.executable, "-c", CONSOLE, *arguments], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    (folder / "mymodels.py").write_text(MODELS)
    save_images(folder / "images.npz")
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in build().state_dict().items()}}, folder / "model.pt"
    )
    torch.save(nn.Linear(3, 3).state_dict(), folder / "other.pt")
    return folder


def test_it_attacks_the_network_as_it_is(folder: Path) -> None:
    small = ("--iterations", "3", "--images", "2", "--tuning", "1", "--defence", "none", "--defence", "topk:0.1")
    done = run(
        folder, "audit", "mymodels:build", "--checkpoint", "model.pt", "--data", "images.npz", "--output", "out", *small
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 defences, mymodels:build, weights of model.pt, 1 worker; nothing is trained" in done.stdout
    assert "2/2 defences captured" in done.stdout
    assert "defences trained" not in done.stdout
    commands = done.stdout.partition("Next:")[2]
    assert "--images 6" in commands
    assert "images of your own" not in commands  # they are
    none, topk = load_rows(folder / "out" / "frontier.json")
    assert (none["name"], topk["name"]) == ("none", "Top-K 10 %")
    model = build()
    assert none["bytes_per_step"] == 4 * sum(p.numel() for p in model.parameters())
    # Of the weights in the file, which nothing has trained any further; the same for all defences.
    assert none["accuracy"] == topk["accuracy"]
    captured, *_ = (folder / "out").glob("captures/*/step-000000/model.pt")
    weights = torch.load(captured, weights_only=True)["weights"]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    report = (folder / "out" / "report.html").read_text()
    assert "weights of model.pt, not trained any further." in report


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            "--network nowhere:build",
            "there is no nowhere in the current folder or the environment: run it where it lies",
        ),
        ("--checkpoint other.pt", "to be of this Sequential, but 0 of its 2 entries fit, and 'weight' does not"),
        ("--checkpoint nowhere.pt", "Expected checkpoint='nowhere.pt' to be a file, but there is none."),
        ("--checkpoint images.npz", "to hold tensors alone: save model.state_dict(), not the model."),
        ("--capture-steps 0,3", "Expected capture_steps=(0, 3) to lie below steps=0, the length of training."),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(folder: Path, options: str, line: str) -> None:
    done = run(folder, "audit", "mymodels:build", "--data", "images.npz", "--output", "refused", *options.split())
    assert done.returncode == 2
    assert done.stderr.startswith("raytrust audit: error: Expected ")
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (folder / "refused").exists()


def test_a_checkpoint_is_named_with_its_content(tmp_path: Path) -> None:
    torch.save(build().state_dict(), tmp_path / "a.pt")
    named = identified(tmp_path / "a.pt")
    model = build()
    nn.init.zeros_(model[1].weight)  # type: ignore[index]
    inside = nn.ModuleDict({"model": build()})
    torch.save(inside.state_dict(), tmp_path / "inside.pt")
    load_checkpoint(nn.ModuleDict({"model": build()}), identified(tmp_path / "inside.pt"))
    load_checkpoint(model, named)
    assert torch.equal(model[1].weight, build()[1].weight)  # type: ignore[index]
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="but the file has changed since"):
        load_checkpoint(model, named)


def test_searching_takes_ray_and_a_resumed_audit_its_own_options() -> None:
    given = ["--preset", "audit", "--workers", "1"]
    assert _of_audit(["my:net", "--seed", "3"]) == [*given, "--local", "--network", "my:net", "--seed", "3"]
    assert _of_audit(["my:net", "--attack-trials=8"]) == [*given, "--network", "my:net", "--attack-trials=8"]
    assert _of_audit(["--resume", "DIR"]) == ["--resume", "DIR"]
    assert _of_audit(["--help"]) == ["--help"]
    assert _of_audit(["my:net", "--defence", "topk:0.1", "--local"])[-2:] == ["--defence", "none"]
    with pytest.raises(ValueError, match="Expected a network to audit"):
        _of_audit(["--seed", "3"])


def test_an_audit_lies_in_a_directory_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def directory(program: str) -> str:
        monkeypatch.setattr(sys, "argv", [program])
        return Directory("privacy_frontier", "a sweep", "sweep.json", ()).resolve(Namespace(), PLACES)[1].name

    assert directory("raytrust audit").startswith("audit-")
    assert directory("raytrust frontier").startswith("privacy_frontier-")
    assert directory("sweeps/privacy_frontier.py").startswith("privacy_frontier-")


def test_what_lies_here_is_found_where_nothing_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lying_here.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setenv("PYTHONPATH", "before")
    before = list(sys.path)
    _look_here(["json", "torch.nn"])
    assert sys.path == before
    _look_here(["lying_here"])
    assert sys.path == [*before, str(tmp_path)]
    assert os.environ["PYTHONPATH"].split(os.pathsep) == ["before", str(tmp_path)]
    _check_found({"lying_here": "network='lying_here:build'"})
    with pytest.raises(ValueError, match=r"there is no lying\.there in the current folder"):
        _check_found({"lying.there": "network='lying.there:build'"})
