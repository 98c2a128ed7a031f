"""Sweeps from the command line to the frontier, through Ray Train, Ray Tune, Optuna and MLflow: as a user runs them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from PIL import Image
from sweep_fixtures import TINY, Logged, Sweep, save_images

from raytrust.cluster.failures import one_line
from raytrust.compress.powersgd import floats_sent
from raytrust.config import Defence, InversionConfig, ModelConfig, PowerSGDConfig, SweepConfig, from_dict
from raytrust.jobs.files import read_json
from raytrust.networks.build import build_model
from raytrust.reports.mlflow import default_uri, versions
from raytrust.studies.frontier import rows as frontier
from raytrust.studies.frontier.row import load_rows
from raytrust.studies.frontier.store import Store

pytestmark = [
    pytest.mark.timeout(1800),  # of a busy machine; a quiet one needs three minutes
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="watches processes in /proc"),
]

JUDGED: dict[str, type | tuple[type, ...]] = {"verdict": str, "verdict_reason": str, "control": bool, "pareto": bool}
COLUMNS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "compressor": str,
    "rank": (int, type(None)),
    "level": (float, type(None)),
    "equal_to_rank": (int, type(None)),
    "equal_by": (str, type(None)),
    "error_feedback": bool,
    "transforms": list,
    "noisy": bool,
    "epsilon": type(None),
    "delta": type(None),
    "understood": bool,
    "status": str,
    "reason": type(None),
    "seeds": list,
    "threat": dict,
    "run": str,
    "untrained": bool,
    "remarks": list,
    "bytes_per_step": int,
    "compression_ratio": float,
    "attacks_tried": int,
    "n_tuning_images": int,
    "accuracy": float,
    "accuracy_interval": list,
    "n_test": int,
    "leakage_ssim": float,
    "leakage_interval": list,
    "ssim_std": float,
    "psnr": float,
    "n_images": int,
    "naive_ssim": float,
    "aware_ssim": float,
    "oracle_ssim": float,
    "attack": dict,
    "registered_psnr": float,
    "mse": float,
    "lpips": (float, type(None)),
    "st_lpips": (float, type(None)),
    "identified_mse": float,
    "identified_ssim": float,
    "identified_features": float,
    "mean_image_ssim": float,
    "other_image_ssim": float,
    "label_accuracy": type(None),  # labels were granted
    "aware_gain": (float, type(None)),
    "aware_gain_interval": (list, type(None)),
    "aware_gain_p": (float, type(None)),
    "floor_ssim": float,
    "excess": float,
    "excess_interval": list,
    "identified": int,
    "candidates": int,
    "naive_excess_interval": list,
    "naive_identified": int,
    **JUDGED,
}
MEASURED = ("accuracy", "leakage_ssim", "naive_ssim", "aware_ssim", "oracle_ssim", "ssim_std", "psnr", "attack")


@pytest.fixture
def sweeps() -> Iterator[list[Sweep]]:
    """Sweeps of a test, of which nothing stays behind."""
    started: list[Sweep] = []
    yield started
    for sweep in started:
        sweep.end()


def results(root: Path) -> dict[str, dict[str, Any]]:
    """The rows by name."""
    return {row["name"]: row for row in load_rows(root / "frontier.json")}


def trainings(root: Path) -> dict[str, float]:
    """When each finished training run was written, by id."""
    finished = (path for path in root.glob("captures/*.json") if not path.name.endswith(".failed.json"))
    return {path.stem: path.stat().st_mtime_ns for path in finished}


def begun(root: Path) -> tuple[SweepConfig, Store]:
    """The sweep that a directory holds, and its store."""
    content = read_json(root / "sweep.json")
    return from_dict(SweepConfig, content["sweep"]), Store(root, content["data"])


def as_parameters(settings: dict[str, Any]) -> dict[str, str]:
    """As MLflow keeps them."""
    return {name: str(value) for name, value in settings.items()}


# One sweep from beginning to end


class Whole:
    """A finished sweep of two defences on two Train workers."""

    def __init__(self, folder: Path):
        self.root = folder / "results"
        named = ("--defence", "none", "--defence", "powersgd:1", "--trials", "2")
        sweep = Sweep(("--output", "results", "--workers", "2", *named, *TINY), folder)
        try:
            self.code = sweep.wait()
            self.left_over = sweep.left_over(20)
            self.output, self.errors = sweep.output, sweep.errors
        finally:
            sweep.end()
        assert self.code == 0, self.output + self.errors
        self.rows = load_rows(self.root / "frontier.json")
        self.logged = Logged(default_uri(self.root), self.root)
        self.sweep, self.store = begun(self.root)

    def configs(self) -> Iterator[tuple[dict[str, Any], Any]]:
        """Each row with its training config."""
        for row in self.rows:
            config = read_json(self.root / "captures" / row["run"] / "config.json")
            yield row, from_dict(type(self.sweep.train), config["train"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"))


def test_it_ends_with_a_table_the_paths_and_how_to_compare_runs(whole: Whole) -> None:
    before, _, after = whole.output.partition("done: ")
    assert "2/2 defences trained" in before
    assert "2/2 attacks tuned" in before
    assert "2/2 defences evaluated" in before
    for row in whole.rows:
        line = rf"^[* ] {re.escape(row['name'])} +{row['verdict']} +{100 * row['accuracy']:.1f} "
        assert re.search(line, after, re.MULTILINE)
    for name in ("report.html", "frontier.json", "frontier.png", "reconstructions.png", "captures"):
        assert f"  {whole.root / name}\n" in after
        assert (whole.root / name).exists()
    assert f"  mlflow ui --host 127.0.0.1 --backend-store-uri {default_uri(whole.root)}\n" in after
    assert f" --resume {whole.root} --iterations " in after
    assert re.match(r"\d+ s; training and attacks took \d+ CPU seconds, .* s a defence besides\n", after)
    *_, answer, control, page = after.splitlines()
    assert answer.startswith(("Leaks", "Undecided"))
    assert control.startswith("The attack fails here: nothing can be said about any defence")
    assert page == f"The whole answer on one page: {whole.root / 'report.html'}"
    assert (whole.root / "frontier.txt").read_text() in after


def test_it_is_quiet_and_leaves_no_process(whole: Whole) -> None:
    assert whole.errors == ""
    assert whole.left_over == []


def test_rows_have_every_column_in_its_type(whole: Whole) -> None:
    assert [row["name"] for row in whole.rows] == ["none", "PowerSGD rank 1"]
    assert len({row["run"] for row in whole.rows}) == 2
    for row in whole.rows:
        assert list(row) == list(COLUMNS)
        for name, kind in COLUMNS.items():
            assert isinstance(row[name], kind), (name, row[name])
        assert (row["status"], row["reason"]) == ("finished", None)
        for value, interval in (("accuracy", "accuracy_interval"), ("leakage_ssim", "leakage_interval")):
            low, high = row[interval]
            assert low <= row[value] <= high
        assert 0 <= row["accuracy"] <= 1
        assert -1 <= row["leakage_ssim"] <= 1
        assert (row["n_test"], row["n_images"], row["n_tuning_images"], row["seeds"]) == (360, 2, 4, [0])
        assert row["threat"]["vantage"] == "link"
        from_dict(InversionConfig, row["attack"])
    assert not any(row["control"] or row["pareto"] for row in whole.rows)  # two iterations reconstruct nothing
    assert "The attack fails here: nothing can be said about any defence" in whole.output


def test_leakage_is_the_maximum_over_the_evaluated_attacks(whole: Whole) -> None:
    for row, train in whole.configs():
        tuned, evaluated = (whole.store.attacks(train, split) for split in ("tuning", "evaluation"))
        means = {}
        for figures in evaluated:
            assert len(figures["ssim"]) == 2
            means[figures["attack"]["objective"]] = float(np.mean(figures["ssim"]))
        assert row["leakage_ssim"] == max(means.values())
        assert row["naive_ssim"] == means["naive"]
        assert row["aware_ssim"] == means.get("aware", row["naive_ssim"])
        assert row["oracle_ssim"] >= row["leakage_ssim"] - 1e-9
        assert set(means) == ({"naive"} if row["name"] == "none" else {"naive", "aware"})
        assert len(tuned) == len(whole.sweep.portfolio_against(train.defence)) + 1
        tried = {json.dumps(figures["attack"], sort_keys=True) for figures in [*tuned, *evaluated]}
        assert row["attacks_tried"] == len(tried)


def test_bytes_are_those_of_the_formula(whole: Whole) -> None:
    shapes = [p.shape for p in build_model(ModelConfig(width=4), 1, 10, seed=0).parameters()]
    dense = 4 * sum(shape.numel() for shape in shapes)
    none, rank1 = whole.rows
    assert none["bytes_per_step"] == dense
    assert rank1["bytes_per_step"] == 4 * floats_sent(shapes, 1)
    for row in whole.rows:
        assert row["compression_ratio"] == pytest.approx(dense / row["bytes_per_step"])


def test_figures_are_images(whole: Whole) -> None:
    each = [whole.root / "captures" / row["run"] / "reconstructions.png" for row in whole.rows]
    for path in [whole.root / "frontier.png", whole.root / "reconstructions.png", *each]:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert min(image.size) > 100
            image.load()
            assert image.convert("L").getextrema() != (255, 255)


def test_captures_hold_what_was_attacked(whole: Whole) -> None:
    assert len([path for path in (whole.root / "captures").iterdir() if path.is_dir()]) == 2
    seen = []
    for row, train in whole.configs():
        folder = whole.root / "captures" / row["run"] / "step-000000"
        parts = {f"{half}-00{i}.pt" for half in ("seen", "truth") for i in range(6)}
        assert {path.name for path in folder.iterdir()} == parts | {"model.pt"}
        captures = [*whole.store.captures(train, 0, "tuning"), *whole.store.captures(train, 0, "evaluation")]
        assert {c.seen.victim for c in captures} == {0, 1}
        assert {c.seen.world_size for c in captures} == {2}
        sent = [sum(x.numel() * x.element_size() for m in c.seen.messages for x in m.sent) for c in captures]
        assert sent == [row["bytes_per_step"]] * 6  # what is counted is what is attacked
        seen.append(np.concatenate([c.truth.images.numpy() for c in captures]))
    assert len({image.tobytes() for image in seen[0]}) == 6
    assert all(np.array_equal(images, seen[0]) for images in seen)  # defences are compared on the same images


def test_mlflow_has_the_sweep_its_defences_and_their_attacks(whole: Whole) -> None:
    logged = whole.logged
    assert len(logged.parents) == 1
    assert set(logged.defences) == {row["name"] for row in whole.rows}
    for row, train in whole.configs():
        tuned = [as_parameters(figures["attack"]) for figures in whole.store.attacks(train, "tuning")]
        found = [attack.data.params for attack in logged.attacks(row["name"])]
        assert sorted(found, key=str) == sorted(tuned, key=str)
    assert len(logged.below) == 2 + sum(len(logged.attacks(row["name"])) for row in whole.rows)
    assert logged.statuses() == {"FINISHED"}
    assert logged.parent.data.metrics["defences_finished"] == 2
    assert logged.parent.data.metrics["defences_failed"] == 0


def test_mlflow_has_the_parameters(whole: Whole) -> None:
    shared = {"workers": "2", "steps": "2", "model.name": "resnet18", "model.width": "4", "threat.vantage": "link"}
    assert shared.items() <= whole.logged.parent.data.params.items()
    for row in whole.rows:
        params = whole.logged.defences[row["name"]].data.params
        rank = row["rank"] or row["equal_to_rank"]  # one column to compare methods by
        columns = {"compressor": row["compressor"], "error_feedback": row["error_feedback"], "rank": rank}
        expected = shared | {name: str(value) for name, value in columns.items() if value is not None}
        assert expected.items() <= params.items()
        assert ("rank" in params) == (rank is not None)
        tags = whole.logged.defences[row["name"]].data.tags
        assert {f"attack.{name}": value for name, value in as_parameters(row["attack"]).items()}.items() <= tags.items()
        assert tags["pareto"] == str(row["pareto"])


def test_mlflow_has_the_metrics_step_by_step(whole: Whole) -> None:
    for row, train in whole.configs():
        run = whole.logged.defences[row["name"]]
        same = ("accuracy", "leakage_ssim", "naive_ssim", "aware_ssim", "oracle_ssim", "psnr", "attacks_tried")
        for name in same:
            assert run.data.metrics[name] == pytest.approx(row[name])
        for name in ("bytes_per_step", "compression_ratio"):
            assert run.data.metrics[name] == pytest.approx(row[name])
        training = whole.store.training(train)
        assert training is not None
        assert whole.logged.history(row["name"], "train_loss") == list(enumerate(training["losses"]))
        wire = [(0, row["bytes_per_step"]), (1, 2 * row["bytes_per_step"])]
        assert whole.logged.history(row["name"], "wire_bytes") == wire
        for attack in whole.logged.attacks(row["name"]):
            assert {"tuning_ssim", "tuning_oracle_ssim", "matching_objective", "seconds"} <= set(attack.data.metrics)


def test_mlflow_has_the_artifacts(whole: Whole) -> None:
    figures = {"frontier.json", "frontier.png", "frontier.txt", "reconstructions.png", "report.html", "strip.png"}
    assert whole.logged.artifacts(whole.logged.parent) == figures
    capture = {f"capture/step-000000/{name}.pt" for name in ("model", *(f"seen-00{i}" for i in range(6)))}
    for run in whole.logged.defences.values():
        assert whole.logged.artifacts(run) == {"reconstructions.png"} | capture  # and no truth


def test_mlflow_says_what_ran(whole: Whole) -> None:
    tags = whole.logged.parent.data.tags
    assert tags["seeds"] == "[0]"
    assert tags["data.fingerprint"] == whole.store.fingerprint
    assert tags["version.ray"] == ray.__version__
    said = {name: value for name, value in versions().items() if value is not None}
    assert said.items() <= tags.items()  # with the commit, where this is a checkout that has one
    assert {"version.raytrust", "version.torch", "version.mlflow", "version.optuna", "version.python"} <= set(said)


# Sweeps that are cut short


def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path, sweeps: list[Sweep]) -> None:
    """And from another directory than it was begun in. The fourth defence is the choice of the search.

    A defence of which somebody has deleted the captures meanwhile, so that no attack on it can run, is a row without
    numbers.
    """
    save_images(tmp_path / "images.npz")
    root, uri = tmp_path / "results", default_uri(tmp_path)
    named = [f"--defence={name}" for name in ("none", "topk:0.1:ef", "powersgd:1")]
    few = ("--workers", "1", "--trials", "4", *named, *TINY, "--attack-trials", "0", "--tracking-uri", uri)
    killed = Sweep(("--data", "images.npz", "--output", "results", *few), tmp_path)
    sweeps.append(killed)
    killed.wait_for(lambda: trainings(root))
    os.kill(killed.process.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    killed.end()
    assert not list(root.glob("captures/*.failed.json"))
    assert len(trainings(root)) < 4
    assert not (root / "frontier.json").exists()

    sweep, store = begun(root)
    broken = replace(sweep.train, defence=Defence(PowerSGDConfig(1)))
    figures = {"correct": 1, "n_test": 2, "test_loss": 1.0, "losses": [1.0, 1.0], "bytes_per_step": 100.0}
    store.begin(broken)
    store.finish_training(broken, figures | {"dense_bytes": 200, "seconds": 1.0, "total_seconds": 1.0})
    shutil.rmtree(store.run_directory(broken) / "step-000000", ignore_errors=True)
    finished = trainings(root)

    (tmp_path / "elsewhere").mkdir()
    resumed = Sweep(("--resume", str(root)), tmp_path / "elsewhere")
    sweeps.append(resumed)
    assert resumed.wait() == 0, resumed.output + resumed.errors
    assert finished.items() <= trainings(root).items()  # not trained again
    none, topk, failed, chosen = results(root).values()
    assert [row["status"] for row in (none, topk, failed, chosen)] == ["finished", "finished", "failed", "finished"]
    assert [none["name"], topk["name"], failed["name"]] == ["none", "Top-K 10 % + EF", "PowerSGD rank 1"]
    assert topk["bytes_per_step"] == pytest.approx(0.2 * none["bytes_per_step"], rel=1e-3)  # a value and an index
    assert chosen["compressor"] in ("powersgd", "topk")
    assert 1 <= (chosen["rank"] or chosen["equal_to_rank"]) <= 64
    assert (chosen["equal_by"] == "bytes") == (chosen["compressor"] == "topk")

    path = store.run_directory(broken) / "step-000000" / "model.pt"
    assert failed["reason"] == f"No attack has a result: Expected a capture at {path}, but there is no such file."
    assert [failed[name] for name in MEASURED] == [None] * len(MEASURED)
    assert not failed["pareto"]
    assert failed["verdict"] is None
    assert f"PowerSGD rank 1: FAILED, {failed['reason']}" in resumed.output
    assert "failed: No attack has a result: Expected a capture at" in resumed.output.partition("done: ")[2]
    assert f"--backend-store-uri {uri}\n" in resumed.output

    logged = Logged(uri, root)
    assert len(logged.parents) == 1
    assert logged.parent.info.status == "FINISHED"
    for name, row in results(root).items():
        run = logged.defences[name]
        assert run.info.status == row["status"].upper()
        if row["status"] == "failed":
            continue
        assert run.data.metrics["accuracy"] == row["accuracy"]
        assert len(logged.history(name, "train_loss")) == 2
        tuned = list((root / "captures" / row["run"] / "tuning").glob("*.json"))
        assert len(logged.attacks(name)) == len(tuned) > 0
    assert logged.defences["PowerSGD rank 1"].data.tags["raytrust.failure"] == failed["reason"]
    assert "leakage_ssim" not in logged.defences["PowerSGD rank 1"].data.metrics
    assert not (root / "mlflow.db").exists()  # it went where --tracking-uri said
    assert list((tmp_path / "elsewhere").glob("*/")) == []


class Interrupted:
    """A sweep of two defences that Ctrl-C ended while it trained."""

    def __init__(self, folder: Path):
        self.folder, self.root, self.uri = folder, folder / "results", default_uri(folder)
        images = str(save_images(folder / "images.npz"))
        named = ("--defence", "none", "--defence", "powersgd:1", "--trials", "2", "--tracking-uri", self.uri)
        sweep = Sweep(("--data", images, "--output", "results", "--workers", "1", *named, *TINY), folder)
        try:
            sweep.wait_for(lambda: list(self.root.glob("captures/*/config.json")))
            os.killpg(sweep.process.pid, signal.SIGINT)  # as a terminal does
            started = time.monotonic()
            self.code = sweep.wait()
            self.seconds = time.monotonic() - started
            self.left_over = sweep.left_over(20)
            self.output, self.errors = sweep.output, sweep.errors
        finally:
            sweep.end()
        self.statuses = Logged(self.uri, self.root).statuses()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    return Interrupted(tmp_path_factory.mktemp("interrupted"))


def test_ctrl_c_ends_a_sweep_and_says_how_to_go_on(interrupted: Interrupted) -> None:
    assert interrupted.code == 130, interrupted.output + interrupted.errors
    assert interrupted.seconds < 30
    assert re.search(rf"Go on with: python \S+ --resume {re.escape(str(interrupted.root))}\n\Z", interrupted.output)
    assert interrupted.errors == ""
    assert interrupted.statuses == {"KILLED"}
    assert interrupted.left_over == []
    assert not (interrupted.root / "frontier.json").exists()


@pytest.mark.slow
def test_a_sweep_of_which_nothing_finished_has_failed(tmp_path: Path, sweeps: list[Sweep]) -> None:
    """In every Train worker: batch norm has no statistics over one image whose features are of one pixel."""
    images = str(save_images(tmp_path / "images.npz"))
    named = ("--defence", "none", "--trials", "1", "--batch-norm", "train")
    sweep = Sweep(("--data", images, "--output", "results", "--workers", "1", *named, *TINY), tmp_path)
    sweeps.append(sweep)
    assert sweep.wait() == 1, sweep.output + sweep.errors
    (row,) = load_rows(tmp_path / "results" / "frontier.json")
    assert row["status"] == "failed"
    assert re.fullmatch(r"Expected more than 1 value per channel when training, got [^\n]+", row["reason"])
    assert row["reason"] in sweep.output
    assert "No defence finished." in sweep.output
    logged = Logged(default_uri(tmp_path / "results"), tmp_path / "results")
    assert {r.info.run_name: r.info.status for r in logged.below} == {"none": "FAILED"}
    assert logged.parent.data.metrics["defences_failed"] == 1


# Reasons


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except type(error) as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("Expected rank=0 to be at least 1."), "Expected rank=0 to be at least 1."),
        (FloatingPointError("The training loss became nan at step 3."), "The training loss became nan at step 3."),
        (KeyError("q.3"), "KeyError: 'q.3'"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("Traceback\n  in x\n\nout of memory\n"), "RuntimeError: out of memory"),
        (raised(RuntimeError("outer"), ValueError("inner")), "inner"),
        (raised(RuntimeError("outer"), raised(TypeError("middle"), ValueError(""))), "ValueError"),
        (ray.exceptions.RayTaskError("f", "traceback\nmany lines", ValueError("inner")), "inner"),
    ],
)
def test_a_reason_is_one_line_of_the_innermost_error(error: BaseException, reason: str) -> None:
    assert one_line(error) == reason


# Rows of unfinished defences


def test_what_is_not_finished_is_a_failed_row(tmp_path: Path) -> None:
    sweep = SweepConfig()
    found = frontier.row(Store(tmp_path, "data"), sweep, Defence())
    assert (found["status"], found["reason"]) == ("failed", "not finished")
    assert [found[name] for name in MEASURED] == [None] * len(MEASURED)
    assert set(found) == set(COLUMNS) - set(JUDGED)
    json.dumps(found, allow_nan=False)
