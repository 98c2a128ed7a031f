"""What the command line refuses, and how; what it makes of what it accepts. Ray never starts here."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import ray
from sweep_fixtures import SCRIPT, load_script, save_images
from torch import nn

from raytrust.cli import options as cli
from raytrust.cluster.searchers import sampled_defence
from raytrust.config import (
    AtomoConfig,
    CaptureConfig,
    Choice,
    Defence,
    DenseConfig,
    DGCConfig,
    HalfConfig,
    InversionConfig,
    LogInteger,
    LogUniform,
    PowerSGDConfig,
    QSGDConfig,
    RandKConfig,
    ScaledSignConfig,
    SignSGDConfig,
    SweepConfig,
    ThresholdConfig,
    TopKConfig,
    VqSGDConfig,
    from_dict,
    parse_defence,
    register,
)
from raytrust.config.attacks import DLG, GEIPING
from raytrust.jobs.files import read_json

LINE = re.compile(r"\Aprivacy_frontier\.py: error: [^\n]+\n\Z")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script()


@pytest.fixture
def refused(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Calls the script with arguments that it must refuse, in the house's way; returns the line."""
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def call(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            script.main(list(arguments))
        printed = capsys.readouterr()
        assert stopped.value.code == 2
        assert printed.out == ""
        assert LINE.match(printed.err), printed.err
        assert not ray.is_initialized()
        assert list(folder.iterdir()) == []  # neither results/ nor the --output of the test was made
        return printed.err

    return call


@pytest.fixture
def begin(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Namespace, SweepConfig, Path]]:
    """Calls the script up to where Ray would start; returns the options, the sweep and its directory."""

    def call(*arguments: str) -> tuple[Namespace, SweepConfig, Path]:
        found: list[Any] = []
        with monkeypatch.context() as context:
            context.setattr(script, "_run", lambda options, data, *rest: found.extend([options, *rest]) or 0)
            assert script.main(list(arguments)) == 0
        options, sweep, store = found
        return options, sweep, store.root

    return call


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--flavour", "red"], "--flavour red"),
        (["--work", "1"], "--work 1"),  # no abbreviations: they change their meaning when options are added
        (["stray"], "stray"),
        (["--workers", "two"], "--workers: invalid int value: 'two'"),
        (["--preset", "huge"], "--preset: invalid choice: 'huge'"),
        (["--stem", "leaf"], "--stem: invalid choice: 'leaf'"),
        (["--vantage", "moon"], "--vantage: invalid choice: 'moon'"),
        (["--width"], "--width: expected one argument"),
        (["--width", "0"], "width=0"),
        (["--width", "100000"], "width=100000"),
        (["--steps", "-3"], "steps=-3"),
        (["--trials", "0"], "trials=0"),
        (["--attack-trials", "-1"], "attack_trials=-1"),
        (["--attack", "unknown"], "Expected attack='unknown' to be one of 'geiping', 'modern', 'dlg'"),
        (["--images", "0"], "images=0"),
        (["--iterations", "0"], "iterations=0"),
        (["--workers", "0"], "workers=0"),
        (["--workers", "100000"], "workers=100000"),
        (["--seed", "-1"], "seed=-1"),
        (["--parallel", "4"], "parallel=4 to be at least 1 and to be given with --address"),
        (["--parallel", "0", "--address", "auto"], "parallel=0"),
        (["--image-size", "4"], "image_size=4"),
        (["--data", "imagenet22k"], "source='imagenet22k'"),
        (["--data", ""], "source=''"),
        (["--data", "missing.npz"], "missing.npz"),
        (["--data", "missing/"], "missing/"),
        (["--images", "5000"], "5004 training images"),
        (["--defence", "foo"], "defence='foo'"),
        (["--defence", "none", "--defence", ""], "defence=''"),
        (["--defence", "none:4"], "defence='none:4'"),
        (["--defence", "powersgd:rank"], "defence='powersgd:rank'"),
        (["--defence", "powersgd:4:rank=4"], "defence='powersgd:4:rank=4'"),
        (["--defence", "qsgd:3"], "defence='qsgd:3': Expected bits=3"),
        (["--defence", "topk:0.1:scope=tensor"], "defence='topk:0.1:scope=tensor': Expected scope='tensor'"),
        (["--defence", "dgc:0.01:ef"], "defence='dgc:0.01:ef': Expected error_feedback=True"),
        (["--defence", "powersgd:0"], "defence='powersgd:0': Expected rank=0"),
        (["--defence", "powersgd:-1"], "defence='powersgd:-1'"),
        (["--defence", "powersgd:1.5"], "defence='powersgd:1.5'"),
        (["--defence", "powersgd:4:ef:ef"], "defence='powersgd:4:ef:ef'"),
        (["--defence", "topk:1.5"], "defence='topk:1.5': Expected level=1.5"),
        (["--defence", "topk:0"], "defence='topk:0'"),
        (["--defence", "topk:nan"], "defence='topk:nan'"),
        (["--defence", "topk:rank0"], "defence='topk:rank0'"),
        (["--defence", "topk:rank"], "defence='topk:rank'"),
        (["--defence", "PowerSGD:4"], "defence='PowerSGD:4'"),
        (["--defence", "none", "--defence", "none"], "defences="),
        (["--resume", "nowhere"], "resume='nowhere'"),
        (["--resume", "nowhere", "--width", "4"], "--width"),
        (["--resume", "nowhere", "--defence", "none"], "--defence"),
        (["--resume", "nowhere", "--output", "elsewhere"], "--output"),
    ],
)
def test_a_wrong_argument(refused: Callable[..., str], arguments: list[str], named: str) -> None:
    assert named in refused(*arguments, *(() if "--resume" in arguments else ("--output", "output")))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"test_labels": None}, "test_labels"),
        ({"train_images": np.zeros((64, 64), np.uint8)}, "(64, 64)"),
        ({"train_images": np.zeros((64, 8, 8, 2), np.uint8)}, "(64, 8, 8, 2)"),
        ({"train_images": np.zeros((64, 4, 4, 1), np.uint8), "test_images": np.zeros((24, 4, 4, 1), np.uint8)}, "4x4"),
        ({"train_images": np.zeros((64, 8, 8, 1), np.float32)}, "float32"),
        ({"train_images": np.full((64, 8, 8, 1), np.nan)}, "NaN"),
        ({"train_labels": np.arange(63) % 4}, "63 labels for 64 images"),
        ({"train_labels": np.arange(64) - 1}, "got -1"),
        ({"test_labels": np.full(24, 4)}, "got 4"),
        ({"train_labels": np.zeros(64, int)}, "at least 2 classes"),
    ],
)
def test_wrong_images(refused: Callable[..., str], tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    path = save_images(tmp_path / "images.npz", **changes)
    line = refused("--data", str(path))
    assert str(path) in line
    assert named in line


def test_a_file_that_is_no_npz(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    path.write_text("image,label\n")
    assert str(path) in refused("--data", str(path))


def test_an_empty_folder_of_images(refused: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    assert str(folder) in refused("--data", str(folder))


def test_a_batch_larger_than_the_data(refused: Callable[..., str], tmp_path: Path) -> None:
    few = {f"{n}_{kind}": array for n in ("train", "test") for kind, array in _few(20).items()}
    line = refused("--data", str(save_images(tmp_path / "few.npz", **few)), "--workers", "2")
    assert "batch_size=32 x workers=2" in line
    assert "20" in line


def _few(n: int) -> dict[str, np.ndarray]:
    return {"images": np.arange(n * 64, dtype=np.uint8).reshape(n, 8, 8), "labels": np.arange(n) % 2}


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_a_download_without_a_network(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def urlopen(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setenv("HOME", str(tmp_path))  # with nothing in its cache
    line = refused("--data", name)
    assert f"Expected {name} under {tmp_path}" in line
    assert "Name or service not known" in line


# The directory of the results


def test_a_directory_that_is_not_empty(refused: Callable[..., str], tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    line = refused("--output", str(output))
    assert f"output={str(output)!r}" in line
    assert "another --output" in line
    assert [p.name for p in output.iterdir()] == ["notes.txt"]
    assert str(output / "notes.txt") in refused("--output", str(output / "notes.txt"))  # a file


def test_a_directory_with_another_sweep(
    refused: Callable[..., str], begin: Callable[..., tuple[Namespace, SweepConfig, Path]], tmp_path: Path
) -> None:
    output = tmp_path / "output"
    begin("--output", str(output), "--width", "4")
    before = (output / "sweep.json").read_bytes()
    for width in ("4", "8"):  # the same sweep is only resumed when that is asked for
        line = refused("--output", str(output), "--width", width)
        assert f"output={str(output)!r}" in line
        assert f"give --resume {output}." in line
    assert (output / "sweep.json").read_bytes() == before


def test_nothing_to_resume(refused: Callable[..., str], tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    for content in (None, "[]", "{}", '"text"', "{"):
        if content is not None:
            (output / "sweep.json").write_text(content)
        assert str(output) in refused("--resume", str(output))


def test_data_that_changed_since(
    refused: Callable[..., str], begin: Callable[..., tuple[Namespace, SweepConfig, Path]], tmp_path: Path
) -> None:
    images, output = tmp_path / "images.npz", tmp_path / "output"
    begin("--data", str(save_images(images)), "--output", str(output))
    save_images(images, train_labels=np.arange(64) % 3, test_labels=np.arange(24) % 3)
    assert f"output={str(output)!r}" in refused("--resume", str(output))


def test_a_resumed_sweep_keeps_its_options(
    begin: Callable[..., tuple[Namespace, SweepConfig, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "images.npz")
    given = ("--width", "4", "--steps", "30", "--seed", "3", "--defence", "none", "--defence", "topk:0.1:ef")
    uri = "sqlite:////elsewhere/mlflow.db"
    _, sweep, root = begin("--data", "images.npz", *given, "--output", "output", "--tracking-uri", uri)
    assert root == tmp_path / "output"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    options, again, root = begin("--resume", "../output")
    assert again == sweep
    assert root == tmp_path / "output"
    assert options.tracking_uri == uri
    assert from_dict(SweepConfig, read_json(root / "sweep.json")["sweep"]).train == sweep.train
    options, _, _ = begin("--resume", "../output", "--tracking-uri", "http://127.0.0.1:5000", "--address", "auto")
    assert (options.tracking_uri, options.address) == ("http://127.0.0.1:5000", "auto")
    assert begin("--resume", "../output")[0].address is None  # the cluster of the day is not the sweep's


# The tracking store


@pytest.mark.parametrize("name", ["x?8", "my%20results"])
def test_a_directory_whose_database_would_lie_elsewhere(
    refused: Callable[..., str], begin: Callable[..., tuple[Namespace, SweepConfig, Path]], tmp_path: Path, name: str
) -> None:
    assert f"to have no {name[1 if name[0] == 'x' else 2]} in its path" in refused("--output", name)
    _, _, root = begin("--output", str(tmp_path / name), "--tracking-uri", "http://127.0.0.1:5000")
    assert root == tmp_path / name  # a store elsewhere doesn't mind


@pytest.mark.parametrize("name", ["my results", "x#8 & y", "für alle"])
def test_an_odd_directory_is_shown_as_a_shell_reads_it(
    begin: Callable[..., tuple[Namespace, SweepConfig, Path]], tmp_path: Path, name: str
) -> None:
    options, _, root = begin("--output", str(tmp_path / name))
    assert options.tracking_uri is None
    assert shlex.split(cli.resumption(root, options))[2:] == ["--resume", str(tmp_path / name)]


def test_a_relative_store_stays_the_same(
    begin: Callable[..., tuple[Namespace, SweepConfig, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a sweep that is resumed from elsewhere."""
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    for given, expected in (("sqlite:///my.db", "sqlite:///HERE/my.db"), ("./mlruns", "file://HERE/mlruns")):
        monkeypatch.chdir(tmp_path / "here")
        expected = expected.replace("HERE", str(tmp_path / "here"))
        root = tmp_path / given.rpartition("/")[2]
        assert begin("--output", str(root), "--tracking-uri", given)[0].tracking_uri == expected
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert begin("--resume", str(root))[0].tracking_uri == expected


def test_a_store_within_the_results_is_their_own_or_refused(
    refused: Callable[..., str], begin: Callable[..., tuple[Namespace, SweepConfig, Path]], tmp_path: Path
) -> None:
    """It would be looked for in the old place when the directory is moved."""
    root = tmp_path / "results"
    assert "to lie outside" in refused("--output", str(root), "--tracking-uri", f"sqlite:///{root}/my.db")
    assert begin("--output", str(root), "--tracking-uri", f"sqlite:///{root}/mlflow.db")[0].tracking_uri is None


@pytest.mark.parametrize("address", ["http://me:s3cret@host:5000", "postgresql://me:s3cret@host/mlflow"])
def test_a_password_is_used_and_not_kept(
    begin: Callable[..., tuple[Namespace, SweepConfig, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    address: str,
) -> None:
    """A resumed sweep takes it from the environment, or has it given again."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "results"
    assert begin("--output", str(root), "--tracking-uri", address)[0].tracking_uri == address
    assert not [path for path in root.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]
    resumed, _, _ = begin("--resume", str(root))
    assert "s3cret" not in resumed.tracking_uri
    assert "s3cret" not in cli.resumption(root, resumed)
    assert begin("--resume", str(root), "--tracking-uri", address)[0].tracking_uri == address
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert begin("--resume", str(root))[0].tracking_uri == address


def test_a_mistyped_option_shows_no_password(refused: Callable[..., str]) -> None:
    line = refused("--tracking-url", "http://me:s3cret@host:5000")
    assert "http://host:5000" in line
    assert "s3cret" not in line


@pytest.mark.parametrize("trials", [2, 5, 20])
def test_a_resumed_sweep_may_have_other_trials(
    script: ModuleType, begin: Callable[..., tuple[Namespace, SweepConfig, Path]], tmp_path: Path, trials: int
) -> None:
    """Its list stays as it was."""
    _, sweep, root = begin("--output", str(tmp_path / "output"), "--trials", "4")
    assert (sweep.trials, sweep.defences) == (4, tuple(map(parse_defence, script.QUICK[:4])))
    _, again, _ = begin("--resume", str(root), "--trials", str(trials))
    assert again == replace(sweep, trials=max(4, trials))


def test_a_resumed_sweep_may_be_attacked_again(
    begin: Callable[..., tuple[Namespace, SweepConfig, Path]], tmp_path: Path
) -> None:
    """By other attacks, on what it captured; the next time it goes on with these."""
    _, sweep, root = begin("--output", str(tmp_path / "output"), "--width", "4")
    changes = ("--iterations", "7", "--attack-trials", "5", "--attack", "dlg", "--attack", "geiping")
    _, again, _ = begin("--resume", str(root), *changes)
    assert again == replace(sweep, attack_trials=5, portfolio=again.portfolio)
    named = tuple(replace(attack, iterations=7) for attack in (DLG, GEIPING))
    assert again.portfolio == (*(replace(attack, iterations=7) for attack in sweep.portfolio), *named)
    assert again.portfolio != sweep.portfolio
    _, last, _ = begin("--resume", str(root))
    assert last == again
    assert from_dict(SweepConfig, read_json(root / "sweep.json")["sweep"]) == again


def test_a_resumed_sweep_takes_other_settings_of_its_attacks(
    begin: Callable[..., tuple[Namespace, SweepConfig, Path]], tmp_path: Path
) -> None:
    """What was given then still stands, above the preset; what is given now stands above both."""
    first = ("--width", "4", "--learning-rate", "0.2", "--capture-steps", "0,7", "--tv", "0.25", "--signed", "hard")
    options, sweep, root = begin("--output", str(tmp_path / "output"), *first)
    assert (sweep.train.learning_rate, sweep.train.capture.steps) == (0.2, (0, 7))
    assert {(a.tv, a.signed, a.step_size) for a in sweep.portfolio} == {(0.25, "hard", 2.0)}
    options, again, _ = begin("--resume", str(root), "--matching", "l2", "--tv", "0.5")
    assert {(a.tv, a.signed, a.matching) for a in again.portfolio} == {(0.5, "hard", "l2")}
    assert again == replace(sweep, portfolio=again.portfolio)
    assert {"tv", "signed", "matching", "learning_rate"} <= set(options.chosen)
    assert begin("--resume", str(root))[1] == again


def test_a_network_with_a_closed_form_meets_it_unasked(
    script: ModuleType, begin: Callable[..., tuple[Namespace, SweepConfig, Path]], tmp_path: Path
) -> None:
    """One that is shipped does not, nor does a private batch of several images after local steps."""

    @register.network("perceptron")
    def perceptron(channels: int, classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * 64, 8), nn.ReLU(), nn.Linear(8, classes))

    for arguments, expected in (
        (("--network", "perceptron"), ["naive", "aware"]),
        (("--network", "perceptron", "--private-batch", "2"), ["naive", "aware"]),
        (("--network", "perceptron", "--private-batch", "2", "--local-steps", "2"), []),
        (("--network", "lenet"), []),
    ):
        output = str(tmp_path / "".join(arguments))
        _, sweep, _ = begin("--output", output, "--image-size", "8", *arguments)
        assert [a.objective for a in sweep.portfolio if a.method == "analytic"] == expected


def test_images_that_the_threat_grants_are_learned_from_unasked(
    script: ModuleType, begin: Callable[..., tuple[Namespace, SweepConfig, Path]], tmp_path: Path
) -> None:
    for number, (arguments, expected) in enumerate(
        (
            (("--auxiliary", "20"), ["noise"] * 4 + ["noise"] + ["regression"] * 4),
            (("--auxiliary", "20", "--private-batch", "11"), ["noise"] * 4),  # of ten classes
            ((), ["noise"] * 4),
        )
    ):
        options, sweep, _ = begin("--output", str(tmp_path / str(number)), "--image-size", "8", *arguments)
        assert [a.start for a in sweep.portfolio] == expected
        learns = "regression" in expected
        assert [a.method for a in sweep.portfolio].count("regression") == learns
        assert ("denoise" in script._attack_space(options, sweep)) == learns


def test_all_attacks_of_the_field_are_tried_by_one_word(
    begin: Callable[..., tuple[Namespace, SweepConfig, Path]], tmp_path: Path
) -> None:
    _, sweep, _ = begin("--output", str(tmp_path / "a"), "--attack", "published", "--iterations", "7")
    named = sweep.portfolio[4:]
    assert [(a.optimiser, a.restarts) for a in named] == [("adam", 1), ("adam", 1), ("lbfgs", 1), ("adam", 8)]
    assert {a.iterations for a in named} == {7}
    assert all(a.bn == 0 for a in named)
    _, sweep, _ = begin("--output", str(tmp_path / "b"), "--attack", "published", "--labels", "unknown")
    assert [a.label_recovery for a in sweep.portfolio[4:]] == ["counts", "counts", "joint", "bias_sign", "idlg"]


def test_an_attack_that_learns_is_refused_without_images_to_learn_from(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for number, arguments in enumerate((("--attack", "regression"), ("--start", "regression"), ("--denoise", "0.1"))):
        with pytest.raises(SystemExit, match="2"):
            script.main(["--output", str(tmp_path / str(number)), *arguments])
        assert "Expected auxiliary=0 to be at least 2 for attack='" in capsys.readouterr().err


def test_known_statistics_of_the_batch_are_used_unasked(
    begin: Callable[..., tuple[Namespace, SweepConfig, Path]], tmp_path: Path
) -> None:
    """Where the network has batch norm, and no option says how they are weighed."""
    proxy = ("--batch-statistics", "proxy", "--auxiliary", "8", "--image-size", "8")
    known = ("--batch-norm", "train", "--private-batch", "2", "--batch-statistics", "known", "--image-size", "8")
    for number, (arguments, expected) in enumerate(
        (
            (proxy, ["naive", "aware"]),
            (known, ["naive", "aware"]),
            ((*proxy, "--objective", "aware"), ["aware"]),
            ((*proxy, "--network", "convnet"), []),
            ((*known, "--batch-norm", "eval"), []),
        )
    ):
        _, sweep, _ = begin("--output", str(tmp_path / str(number)), *arguments)
        assert [a.objective for a in sweep.portfolio if a.bn > 0] == expected
    _, given, _ = begin("--output", str(tmp_path / "given"), *proxy, "--bn", "0.5")
    assert {a.bn for a in given.portfolio if a.method == "optimise"} == {0.5}
    assert (given.train.threat.batch_statistics, given.train.threat.auxiliary) == ("proxy", 8)


def test_all_defences_that_are_given_are_audited(
    begin: Callable[..., tuple[Namespace, SweepConfig, Path]], tmp_path: Path
) -> None:
    given = ("--defence", "none", "--defence", "powersgd:2", "--defence", "topk:0.1")
    for trials, expected in (("1", 3), ("3", 3), ("5", 5)):
        _, sweep, _ = begin("--output", str(tmp_path / trials), "--trials", trials, *given)
        assert [d.name for d in sweep.defences] == ["none", "PowerSGD rank 2", "Top-K 10 %"]
        assert sweep.trials == expected


def test_the_lists_and_presets_are_what_they_say(
    script: ModuleType, begin: Callable[..., tuple[Namespace, SweepConfig, Path]], tmp_path: Path
) -> None:
    _, quick, _ = begin("--output", str(tmp_path / "quick"))
    assert quick.train.capture.steps == script.PRESETS["quick"]["capture_steps"]
    assert (quick.train.workers, quick.train.model.name, quick.train.model.stem) == (2, "resnet18", "cifar")
    _, paper, _ = begin("--output", str(tmp_path / "paper"), "--preset", "paper")
    assert paper.train.model.width == 64
    assert paper.train.capture.evaluation == 10
    for sweep, names, name in ((quick, script.QUICK, "quick"), (paper, script.PAPER, "paper")):
        preset = script.PRESETS[name]
        assert preset["list"] == names
        assert sweep.defences == tuple(map(parse_defence, names))
        assert sweep.trials == len(names)
        assert sweep.train.capture == CaptureConfig(preset["capture_steps"], preset["tuning"], preset["images"])
        assert (sweep.train.batch_size, sweep.train.steps) == (preset["batch_size"], preset["steps"])
        assert sweep.attack_trials == preset["attack_trials"]
        met = [(attack.objective, attack.matching) for attack in sweep.portfolio]
        assert met == [(o, m) for o in ("naive", "aware") for m in ("cosine", "tensors")]
        for key in ("iterations", "tv", "step_size"):
            assert {getattr(attack, key) for attack in sweep.portfolio} == {preset[key]}
    assert [d.name for d in quick.defences[:3]] == ["none", "PowerSGD rank 16 + EF", "PowerSGD rank 4 + EF"]
    levels = (50, 30, 4, 2, 1)
    methods = [f"PowerSGD rank {r} + EF" for r in levels] + [f"Top-K (bytes of rank {r}) + EF" for r in levels]
    assert [d.name for d in paper.defences] == ["none", *methods]
    _, short, _ = begin("--output", str(tmp_path / "short"), "--steps", "5")
    assert short.train.capture.steps == (0,)  # no step after the end


def test_the_spaces_are_of_settings_that_there_are(script: ModuleType) -> None:
    """At both ends of each range, and for each of its choices."""
    for name, space in script.ATTACK_SPACE.items():
        for value in ends(space):
            assert getattr(InversionConfig(**{name: value}), name) == value
    found = {name: ends(space) for name, space in script.DEFENCE_SPACE.items()}
    found |= {name: ends(space) for name, space in script.DP_SGD_SPACE.items()}
    methods = {"powersgd": {PowerSGDConfig(1), PowerSGDConfig(64)}, "none": {DenseConfig()}}
    methods["topk"] = {TopKConfig(equal_to_rank=rank, equal_by="bytes") for rank in (1, 64)}
    transforms = {"none": 1, "noise": 2, "prune": 3, "dp-sgd": 2}
    points = [dict(zip(found, values, strict=True)) for values in product(*found.values())]
    every = {sampled_defence(point) for point in points}
    assert {d.compressor for d in every} == set().union(*methods.values())
    assert {d.transforms[0].method if d.transforms else "none" for d in every} == set(transforms)
    # Nothing but PowerSGD and Top-K has error feedback: 5 compressors, 4 of them with it and without.
    assert len(every) == (1 + 2 * 4) * sum(transforms.values())


def ends(space: Choice | LogUniform | LogInteger) -> tuple[Any, ...]:
    return space.values if isinstance(space, Choice) else (space.low, space.high)


def test_results_go_to_a_new_directory_by_default(
    begin: Callable[..., tuple[Namespace, SweepConfig, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, _, root = begin()
    assert root.parent == tmp_path / "results"
    assert re.fullmatch(r"privacy_frontier-\d{8}-\d{6}", root.name)


@pytest.mark.parametrize(
    ("text", "defence"),
    [
        ("none", Defence()),
        ("none:ef", Defence(error_feedback=True)),
        ("powersgd:4", Defence(PowerSGDConfig(4))),
        ("powersgd:4:ef", Defence(PowerSGDConfig(4), True)),
        ("topk:0.01", Defence(TopKConfig(level=0.01))),
        ("topk:1e-4:ef", Defence(TopKConfig(level=1e-4), True)),
        ("topk:1", Defence(TopKConfig(level=1.0))),
        ("topk:rank30", Defence(TopKConfig(equal_to_rank=30))),
        ("topk:rank30:ef", Defence(TopKConfig(equal_to_rank=30), True)),
        ("topk:rank4:equal_by=values:scope=layer", Defence(TopKConfig(None, 4, "values", "layer"))),
        ("powersgd", Defence(PowerSGDConfig())),
        ("powersgd:2:warm_start=False", Defence(PowerSGDConfig(2, False))),
        ("fp16", Defence(HalfConfig("float16"))),
        ("bf16:ef", Defence(HalfConfig("bfloat16"), True)),
        ("randk:0.1:unbiased=True", Defence(RandKConfig(0.1, True))),
        ("threshold:0.01:sample=1", Defence(ThresholdConfig(0.01, 1.0))),
        ("dgc:0.01:clip=5:warmup_steps=40", Defence(DGCConfig(0.01, clip=5.0, warmup_steps=40))),
        ("signsgd", Defence(SignSGDConfig())),
        ("signsgd:0.9", Defence(SignSGDConfig(0.9))),
        ("ef-signsgd", Defence(ScaledSignConfig(), True)),
        ("scaledsign", Defence(ScaledSignConfig())),
        ("qsgd:8:norm=max:bucket=128", Defence(QSGDConfig(8, 128, "max"))),
        ("vqsgd:50", Defence(VqSGDConfig(50))),
        ("atomo:2:ef", Defence(AtomoConfig(2), True)),
    ],
)
def test_defences_by_name(script: ModuleType, text: str, defence: Defence) -> None:
    assert script.parse_defence(text) == defence


# True processes


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nobody listens, kept from others for the while."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def run(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    started = time.monotonic()
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120)
    return done, time.monotonic() - started


def test_a_wrong_argument_costs_seconds(tmp_path: Path) -> None:
    done, seconds = run("--width", "0", "--output", str(tmp_path / "output"))
    assert done.returncode == 2
    assert LINE.match(done.stderr), done.stderr
    assert "width=0" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "output").exists()
    assert seconds < 15


def test_help_names_every_option(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for name in set(script.DEFAULTS) - {"chosen"}:
        assert "--" + name.replace("_", "-") in text


@pytest.mark.parametrize("address", ["127.0.0.1:PORT", "ray://127.0.0.1:PORT", "nonsense"])
def test_a_cluster_that_is_not_there(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], closed_port: int, address: str
) -> None:
    address = address.replace("PORT", str(closed_port))
    started = time.monotonic()
    assert script.main(["--width", "4", "--address", address, "--output", str(tmp_path / "output")]) == 2
    printed = capsys.readouterr()
    assert LINE.match(printed.err), printed.err
    assert f"address={address!r}" in printed.err
    assert not ray.is_initialized()
    assert time.monotonic() - started < 30


def test_a_cluster_that_is_not_there_in_a_true_process(tmp_path: Path, closed_port: int) -> None:
    done, seconds = run("--width", "4", "--address", f"127.0.0.1:{closed_port}", "--output", str(tmp_path / "output"))
    assert done.returncode == 2
    assert LINE.match(done.stderr), done.stderr
    assert f"127.0.0.1:{closed_port}" in done.stderr
    assert seconds < 30
