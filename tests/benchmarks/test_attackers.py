"""The comparison of attackers, run on a narrow network and images of noise."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from raytrust.attacks.inversion import invert
from raytrust.config import InversionConfig, ModelConfig, parse_defence
from raytrust.config.attacks import GEIPING
from raytrust.data import load
from raytrust.leak.observation import Capture
from raytrust.metrics.images import ssim_table
from raytrust.metrics.statistics import paired_difference

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Without breaching, whether or not it is installed."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("attackers")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    return module


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 8x8 pixels; its last 99 test images are not attacked."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, n in (("train", 8), ("test", 103)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(n) % 4
    path = tmp_path_factory.mktemp("noise") / "noise.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture
def run(program: ModuleType, noise: Path, tmp_path: Path) -> Callable[..., int]:
    def call(*more: str) -> int:
        options = ["--data", str(noise), "--output", str(tmp_path / "out"), "--width", "4", "--images", "2"]
        return int(program.main([*options, *more]))

    return call


def captures(program: ModuleType, noise: Path, defence: str) -> list[Capture]:
    found = program.captures_of_test_images(load(str(noise)), 2, ModelConfig(width=4), parse_defence(defence))
    assert len(found) == 2
    return list(found)


def table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")][2:]


def test_draws_every_attacker_against_every_defence(
    program: ModuleType, run: Callable[..., int], noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--defence", "none", "topk:rank1", "--iterations", "3", "--ours", "lasso: tv=0.5 matching=l1") == 0
    printed = capsys.readouterr().out
    rows = table(printed)
    # Where all is sent, naive is what aware is.
    expected = [("none", name) for name in ("ours", "lasso", "textbook")]
    expected += [("Top-K (bytes of rank 1)", name) for name in ("ours", "ours naive", "lasso", "textbook")]
    assert [(row[0], row[1]) for row in rows] == expected
    assert "- none: ours naive is ours here." in printed
    assert printed == (tmp_path / "out" / "attackers.md").read_text()
    assert (tmp_path / "out" / "attackers.png").read_bytes().startswith(b"\x89PNG")

    written = json.loads((tmp_path / "out" / "attackers.json").read_text())["rows"]
    assert [f"{np.mean(row['ssim']):.3f}" for row in written] == [row[3].split()[0] for row in rows]
    # What stands there is what the attack reaches when it is called by itself, each image with its own start.
    (row,) = [r for r in written if (r["defence"][:5], r["attacker"]) == ("Top-K", "lasso")]
    for i, capture in enumerate(captures(program, noise, "topk:rank1")):
        (found,) = invert([(capture.seen, InversionConfig(iterations=3, tv=0.5, matching="l1", seed=i))])
        similarity = ssim_table(found.images[0].numpy(), capture.truth.images.numpy())[0, 0]
        assert row["ssim"][i] == pytest.approx(similarity, abs=1e-4)
    assert all(s > 0 for row in written for s in row["seconds"])


def test_finished_attacks_are_kept_by_their_settings(
    program: ModuleType, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[tuple[str, int]] = []
    attack = program._attack

    def counted(attacker: Any, capture: Capture, iterations: int, options: Any) -> Any:
        made.append((attacker.name, iterations))
        return attack(attacker, capture, iterations, options)

    monkeypatch.setattr(program, "_attack", counted)
    chosen = ["--defence", "topk:rank1", "--iterations", "3"]
    assert run(*chosen, "--attacker", "ours", "textbook") == 0
    first = capsys.readouterr().out
    assert sorted(made) == [("ours", 3)] * 2 + [("textbook", 3)] * 2
    made.clear()
    assert run(*chosen, "--attacker", "ours", "textbook") == 0
    assert (made, capsys.readouterr().out) == ([], first)
    # Another name for the same settings is no other attack; other settings are one.
    assert run(*chosen, "--ours", "again: tv=0.01", "--attacker", "again") == 0
    assert made == []
    assert run(*chosen, "--ours", "again: tv=0.02", "--attacker", "again") == 0
    assert made == [("again", 3)] * 2
    made.clear()
    # Images are normalised by the statistics of those that are attacked together.
    assert run(*chosen, "--attacker", "ours", "--images", "3") == 0
    assert made == [("ours", 3)] * 3


def test_an_attacker_is_left_out_where_it_would_exceed_the_budget(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["--defence", "powersgd:1", "--attacker", "textbook", "--iterations", "4", "1", "2"]
    assert run(*chosen, "--seconds", "1e-9") == 0
    printed = capsys.readouterr().out
    assert [row[2] for row in table(printed)] == ["1"]
    assert "textbook stops before 2 iterations" in printed
    assert run(*chosen, "--seconds", "1e9") == 0
    assert [row[2] for row in table(capsys.readouterr().out)] == ["1", "2", "4"]


def test_the_textbook_loop_makes_the_steps_of_our_fast_path(program: ModuleType, noise: Path) -> None:
    (capture, _) = captures(program, noise, "none")
    images = {}
    for n in (1, 3):
        config = replace(GEIPING, iterations=n)
        (ours,) = invert([(capture.seen, config)])
        images[n] = program.Textbook("textbook", config).attack(capture.seen, n, 0, "cpu")()
        if n == 3:
            # Of ours the best, which here is the last. A derivative near 0 may have another sign in another order.
            assert (images[n] - ours.images[0, 0]).abs().mean() < 1e-3
    assert (images[3] - images[1]).abs().mean() > 1e-2
    restarts = program.Textbook("textbook", replace(GEIPING, restarts=3)).attack(capture.seen, 1, 0, "cpu")()
    generator = torch.Generator().manual_seed(0)
    ends = [program.textbook_loop(capture.seen, replace(GEIPING, iterations=1), generator, "cpu") for _ in range(3)]
    assert torch.equal(restarts, min(ends, key=lambda end: end[0])[1])


def test_compares_with_ours_at_the_nearest_time(program: ModuleType) -> None:
    def row(attacker: str, iterations: int, ssim: list[float], seconds: float) -> Any:
        return program.Row("none", attacker, iterations, ssim, [seconds / 2, seconds, 9 * seconds], 0)

    ours = [row("ours", 50, [0.1, 0.2, 0.3], 1.0), row("ours", 100, [0.3, 0.5, 0.4], 10.0)]
    other = [row("other", 50, [0.0, 0.1, 0.1], 3.0), row("other", 100, [0.2, 0.2, 0.2], 3.4)]
    compared = program._compared([*ours, *other])
    # Nearest by the logarithm: 3.4 is beyond the root of 10, though nearer to 1 than to 10.
    assert [r.nearest for r in compared] == [None, None, 50, 100]
    assert compared[3].paired == paired_difference([0.3, 0.5, 0.4], [0.2, 0.2, 0.2])
    assert program._compared(other) == other


def test_an_attack_that_breaks_hands_in_the_mean_image(
    program: ModuleType, run: Callable[..., int], noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(program, "textbook_loop", lambda seen, *_: (math.nan, torch.full(seen.image_shape, math.nan)))
    assert run("--defence", "none", "--attacker", "textbook", "--iterations", "2") == 0
    assert "none: 2 x textbook broke on 2 images." in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out" / "attackers.json").read_text())["rows"]
    for capture, ssim in zip(captures(program, noise, "none"), row["ssim"], strict=True):
        mean = capture.seen.mean.view(1, -1, 1, 1).expand(1, *capture.seen.image_shape)
        assert ssim == pytest.approx(ssim_table(mean.numpy(), capture.truth.images.numpy())[0, 0])


@pytest.mark.parametrize("close", [True, False])
def test_labels_of_the_figure_neither_overlap_nor_leave_it(program: ModuleType, close: bool) -> None:
    names = ["ours", "ours naive", "textbook", *(f"inverting gradients {i}" for i in range(6))]
    rows = [
        program.Row("none", name, n, [0.1 + (0.0 if close else 0.05 * i), 0.2], [n / 10 + i], 0)
        for i, name in enumerate(names)
        for n in (50, 100)
    ]
    figure: Figure = program.draw(rows, {"none": 0.15}, names, "CPU seconds an image")
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    (ax,) = figure.axes
    boxes = sorted((t.get_window_extent(renderer) for t in ax.texts), key=lambda box: box.y0)
    assert sorted(t.get_text() for t in ax.texts) == sorted([*names, "mean image"])
    for low, high in pairwise(boxes):
        assert high.y0 - low.y0 > 0.9 * (low.y1 - low.y0)
    # Of all that is drawn, in inches.
    drawn, (width, height) = figure.get_tightbbox(renderer), figure.get_size_inches()
    assert 0 <= drawn.x0 < drawn.x1 <= width
    assert 0 <= drawn.y0 < drawn.y1 <= height


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attacker", "nobody"], "attacker='nobody'"),
        (["--attacker", "modern"], "package breaching"),
        (["--peer", "x: modern"], "package breaching"),
        (["--ours", "x: iterations=5"], "without iterations"),
        (["--ours", "x: strength=5"], "fields of InversionConfig"),
        (["--ours", "x: tv=-1"], "tv=-1"),
        (["--ours", "tv=1"], "NAME: FIELD=VALUE"),
        (["--ours", "textbook: tv=1"], "name of its own"),
        (["--images", "5"], "images=5"),
        (["--first", "-1"], "first=-1"),
        (["--iterations", "0"], "iterations=[0]"),
        (["--iterations", "2", "2"], "each once"),
        (["--defence", "none", "none"], "each once"),
        (["--defence", "nothing"], "defence='nothing'"),
        (["--seconds", "nan"], "seconds=nan"),
    ],
)
def test_refuses(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run(*options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_breaching_gets_what_makes_the_true_image_match(
    program: ModuleType, noise: Path, global_rng_untouched: None
) -> None:
    pytest.importorskip("breaching")
    (capture, _) = captures(program, noise, "none")
    seen = capture.seen
    import breaching

    model = seen.build_model()
    attacker = breaching.attacks.prepare_attack(
        model, torch.nn.CrossEntropyLoss(), program.Peer("x", "invertinggradients").compose(3)
    )
    (rec,), labels, _ = attacker.prepare_attack(*program.payload(seen, model, "cpu"))
    attacker.objective.initialize(attacker.loss_fn, attacker.cfg.impl, None)
    image = (capture.truth.images - seen.mean.view(-1, 1, 1)) / seen.std.view(-1, 1, 1)
    gradient = program.payload(seen, model, "cpu")[1][0]["gradients"]
    true, mirrored = (float(attacker.objective(rec, gradient, x, labels)[0].detach()) for x in (image, image.flip(-1)))
    assert true < 1e-5
    assert mirrored > 1e-3
    peer = program.Peer("x", "modern", ("optim.warmup=0",))
    first, again, other = (peer.attack(seen, 3, seed, "cpu")() for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == seen.image_shape
    assert 0 <= float(first.min()) < float(first.max()) <= 1


def test_breaching_runs_beside_ours(
    program: ModuleType, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("breaching")
    monkeypatch.setattr(program, "find_spec", importlib.util.find_spec)
    assert run("--defence", "none", "topk:rank1", "--iterations", "3", "--peer", "x: modern optim.warmup=0") == 0
    printed = capsys.readouterr().out
    peers = ["modern", "invertinggradients", "x"]
    names = ["ours", "textbook", *peers]
    assert [row[1] for row in table(printed)[: len(names)]] == names
    names = ["ours", "ours naive", "textbook", *peers[:2], "modern masked", "invertinggradients masked", "x"]
    assert [row[1] for row in table(printed)[5:]] == names
    assert run("--peer", "y: nothing") == 2
    assert run("--peer", "y: modern nothing=3") == 2


def test_ours_may_learn_from_images_that_the_threat_grants(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learned = ("--ours", "own: start=regression", "--attacker", "ours", "own", "--iterations", "2", "--defence", "none")
    assert run(*learned) == 2
    assert "Expected auxiliary=0 to be at least 2 for own." in capsys.readouterr().err
    assert run(*learned, "--auxiliary", "9") == 2
    assert "Expected auxiliary=9 to be at most 8." in capsys.readouterr().err
    assert run(*learned, "--auxiliary", "8") == 0
    rows = json.loads((tmp_path / "out" / "attackers.json").read_text())["rows"]
    assert {row["attacker"] for row in rows} == {"ours", "own"}
    assert rows[0]["ssim"] != rows[1]["ssim"]
