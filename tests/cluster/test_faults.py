"""What goes wrong on one machine: processes killed, disks full, files damaged, numbers that are none. True processes.

Whatever happens, finished defences are kept, and none is shown with a number that was not measured.
"""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import tune
from sweep_fixtures import SCRIPT, TINY, Logged, MlflowServer, Sweep, save_images
from toys import synthetic

from raytrust.cli.frontier import Spaces, run_sweep
from raytrust.config import CaptureConfig, Defence, InversionConfig, ModelConfig, SweepConfig, TrainConfig, from_dict
from raytrust.jobs.captures import load_captures
from raytrust.jobs.files import read_json
from raytrust.reports.mlflow import default_uri
from raytrust.studies.frontier.row import load_rows
from raytrust.studies.frontier.store import Store, open_store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="watches processes in /proc"),
]
ONE = ("--workers", "1", "--trials", "1", "--defence", "none", *TINY, "--attack-trials", "0")
NUMBERS = ("accuracy", "leakage_ssim", "naive_ssim", "aware_ssim", "oracle_ssim")


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[Callable[..., Sweep]]:
    """Starts sweeps of one defence, into `results`, unless told otherwise."""
    started: list[Sweep] = []
    images = str(save_images(tmp_path / "images.npz"))

    def start(*arguments: str, output: str = "results") -> Sweep:
        begin = () if "--resume" in arguments else ("--data", images, "--output", output, *ONE)
        started.append(Sweep((*begin, *arguments), tmp_path))
        return started[-1]

    yield start
    for run in started:
        run.end()


def finished(root: Path) -> list[dict[str, Any]]:
    """The rows, of which each has all its numbers."""
    rows = load_rows(root / "frontier.json")
    for row in rows:
        assert row["status"] == "finished", row
        assert all(row[name] is not None for name in NUMBERS)
    return rows


def resumed(sweep: Callable[..., Sweep], root: Path, *arguments: str) -> Sweep:
    run = sweep("--resume", str(root), *arguments)
    assert run.wait() == 0, run.output + run.errors
    return run


# Processes

MOMENTS = {
    "the first training begins": "captures/*/config.json",
    "a defence is trained": "captures/*.json",
    "a defence is evaluated": "captures/*/evaluation/*.json",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_driver_killed_at_any_moment(moment: str, sweep: Callable[..., Sweep], tmp_path: Path) -> None:
    """Of two defences. The evaluation of one takes seconds longer, as two attacks are tried on it."""
    root = tmp_path / "results"
    run = sweep("--trials", "2", "--defence", "powersgd:1", "--iterations", "300")
    run.wait_for(lambda: list(root.glob(MOMENTS[moment])))
    os.kill(run.process.pid, signal.SIGKILL)
    run.end()
    kept = {path: path.stat().st_mtime_ns for pattern in MOMENTS.values() for path in root.glob(pattern)}
    assert not (root / "frontier.json").exists()
    resumed(sweep, root)  # the lock of the killed one is stale
    assert len(finished(root)) == 2
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in kept}.items()  # nothing was done twice
    assert Logged(default_uri(root), root).statuses() == {"FINISHED"}


def test_a_train_worker_killed_mid_step_and_another_sweep_in_its_directory(
    sweep: Callable[..., Sweep], tmp_path: Path
) -> None:
    """The worker is replaced; the other sweep is refused."""
    root = tmp_path / "results"
    run = sweep("--steps", "300")
    run.wait_for(lambda: list(root.glob("captures/*/step-000020/seen-*.pt")))
    (worker,) = run.named("ray::RayTrainWorker")
    os.kill(worker, signal.SIGKILL)
    assert not list(root.glob("captures/*.json"))
    second = sweep("--resume", str(root))
    assert second.wait() == 2
    assert f"process {run.process.pid} on" in second.errors
    assert second.errors.count("\n") == 1
    assert run.wait() == 0, run.output + run.errors
    assert "FAILED" not in run.output
    (row,) = finished(root)
    training = read_json(root / "captures" / f"{row['run']}.json")
    assert len(training["losses"]) == 300


def test_ctrl_c_twice(sweep: Callable[..., Sweep], tmp_path: Path) -> None:
    root = tmp_path / "results"
    run = sweep()
    run.wait_for(lambda: list(root.glob("captures/*/config.json")))
    for _ in range(2):
        os.killpg(run.process.pid, signal.SIGINT)
        time.sleep(0.3)
    assert run.wait() == 130, run.output + run.errors
    assert run.errors == ""
    assert run.output.endswith(f"--resume {root}\n")
    assert run.left_over(20) == []
    assert run.named("ray::") == []
    assert Logged(default_uri(root), root).statuses() == {"KILLED"}
    assert not (root / "sweep.lock").exists()


@pytest.mark.parametrize(
    ("number", "everybody"),
    [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGHUP, False)],
    ids=["docker stop", "scancel", "closed terminal"],
)
def test_a_scheduler_ends_it(
    sweep: Callable[..., Sweep], tmp_path: Path, number: signal.Signals, everybody: bool
) -> None:
    """As Ctrl-C does, and no process that holds private images may leave a core file."""
    root = tmp_path / "results"
    run = sweep("--steps", "300")
    run.wait_for(lambda: list(root.glob("captures/*/config.json")))
    limits = [core_limit(process) for process in run.alive()]
    assert len(limits) > 3  # with Ray's own
    assert set(limits) == {"0"}
    (os.killpg if everybody else os.kill)(run.process.pid, number)
    assert run.wait(120) == 128 + number, run.output + run.errors
    assert run.errors == ""
    command = f"python {shlex.quote(str(SCRIPT))} --resume {root}"
    assert run.output.endswith(f"\nEnded by {number.name}; what was finished is kept. Go on with: {command}\n")
    assert run.left_over(20) == []
    assert run.named("ray::") == []
    assert Logged(default_uri(root), root).statuses() == {"KILLED"}
    assert not (root / "sweep.lock").exists()
    resumed(sweep, root)
    assert len(finished(root)) == 1


def core_limit(process: int) -> str:
    """The most bytes that the process's core file may have."""
    with suppress(OSError):  # it has just ended
        lines = Path(f"/proc/{process}/limits").read_text().splitlines()
        return next(line.split()[4] for line in lines if line.startswith("Max core file size"))
    return "0"


# Directories that are carried elsewhere


@pytest.mark.parametrize("carry", [shutil.move, shutil.copytree], ids=["moved", "copied"])
def test_a_directory_that_was_carried_elsewhere(
    sweep: Callable[..., Sweep], tmp_path: Path, carry: Callable[[Path, Path], object]
) -> None:
    """Everything that the resumed sweep writes is in the new place, also what MLflow keeps."""
    old, new = tmp_path / "results", tmp_path / "new place"
    run = sweep("--trials", "2", "--defence", "powersgd:1", "--iterations", "300")
    run.wait_for(lambda: list(old.glob("captures/*.json")))
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.wait() == 143, run.output + run.errors
    carry(old, new)
    before = {path: path.stat().st_mtime_ns for path in old.rglob("*")}
    resumed(sweep, new)
    assert {path: path.stat().st_mtime_ns for path in old.rglob("*")} == before
    assert old.exists() == (carry is shutil.copytree)
    assert len(finished(new)) == 2
    logged = Logged(default_uri(new), old)  # its run keeps its name
    assert set(logged.defences) == {"none", "PowerSGD rank 1"}
    for defence in logged.defences.values():
        assert "reconstructions.png" in logged.artifacts(defence)
    pictures = list((new / "mlartifacts").rglob("reconstructions.png"))
    assert len(pictures) == 3  # of each defence, and of the sweep
    assert not (tmp_path / "mlruns").exists()


# The tracking server


@pytest.mark.parametrize("what", ["experiment", "run"])
def test_what_is_deleted_in_mlflow_meanwhile(sweep: Callable[..., Sweep], tmp_path: Path, what: str) -> None:
    """The sweep ends with its results, and waits for nothing. A run begins anew; an experiment stays deleted."""
    root = tmp_path / "results"
    run = sweep("--steps", "300")
    run.wait_for(lambda: list(root.glob("captures/*/config.json")))
    logged = Logged(default_uri(root), root)
    if what == "run":
        logged.client.delete_run(logged.parent.info.run_id)
    else:
        logged.client.delete_experiment(logged.parent.info.experiment_id)
    run.wait_for(lambda: "defences evaluated" in run.output)
    started = time.monotonic()
    assert run.wait() == 0, run.output + run.errors
    assert time.monotonic() - started < 60
    assert run.errors == ""
    assert len(finished(root)) == 1
    if what == "run":
        assert "MLflow" not in run.output.partition("opening the MLflow store")[2].partition("Compare the runs")[0]
        assert Logged(default_uri(root), root).statuses() == {"FINISHED"}
        return
    assert run.output.count("MLflow refused an entry, the sweep goes on: ") >= 1
    again = sweep("--resume", str(root))
    assert again.wait() == 2
    assert again.errors.count("\n") == 1
    assert "restore it with: env MLFLOW_TRACKING_URI=" in again.errors
    logged.client.restore_experiment(logged.parent.info.experiment_id)
    resumed(sweep, root)
    assert Logged(default_uri(root), root).statuses() == {"FINISHED"}


def test_a_tracking_server_away_for_a_minute(sweep: Callable[..., Sweep], tmp_path: Path) -> None:
    """It goes while the defence is trained, and is back a minute later."""
    root = tmp_path / "results"
    server = MlflowServer(tmp_path, f"sqlite:///{tmp_path}/server.db")
    server.start()
    try:
        run = sweep("--tracking-uri", server.uri)
        run.wait_for(lambda: list(root.glob("captures/*/config.json")))
        server.kill()
        gone = time.monotonic()
        run.wait_for(lambda: "MLflow can't be reached" in run.output)
        while time.monotonic() - gone < 60:
            assert run.process.poll() is None, run.output + run.errors
            time.sleep(0.5)
        server.start()
        assert run.wait() == 0, run.output + run.errors
        assert "MLflow is back and has everything" in run.output
        (row,) = finished(root)
        logged = Logged(server.uri, root)
        assert logged.statuses() == {"FINISHED"}
        assert len(logged.parents) == 1
        assert logged.defences["none"].data.metrics["accuracy"] == row["accuracy"]
        assert len(logged.attacks("none")) == len(list(root.glob("captures/*/tuning/*.json")))
        assert "reconstructions.png" in logged.artifacts(logged.defences["none"])
    finally:
        server.kill()


# Disks and files

SAVE = """
import sys
from pathlib import Path
import torch
from raytrust.jobs.captures import load_captures, save_capture
capture = load_captures(Path(sys.argv[1]), 0, [0])[0]
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    save_capture(Path(sys.argv[2]), capture)
except (OSError, RuntimeError) as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize("limit", [100, 5_000])
def test_a_capture_that_does_not_fit_is_not_there(limit: int, tmp_path: Path) -> None:
    """The kernel refuses to write on in the middle of the file."""
    assert resource.RLIMIT_FSIZE
    trained(tmp_path / "whole")
    run = subprocess.run(
        [sys.executable, "-c", SAVE, str(tmp_path / "whole"), str(tmp_path / "cut"), str(limit)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.stdout.strip() in ("OSError", "RuntimeError"), run.stderr
    assert [path for path in (tmp_path / "cut").rglob("*") if path.is_file()] == []
    with pytest.raises(ValueError, match="but there is no such file"):
        load_captures(tmp_path / "cut", 0, [0])


def trained(directory: Path) -> None:
    from raytrust.jobs.captures import save_capture
    from raytrust.leak.observation import Capture
    from raytrust.train.loop import train
    from raytrust.wire.channel import LocalChannel

    for record in train(config(), synthetic(), LocalChannel()):
        if isinstance(record, Capture):
            save_capture(directory, record)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of a size, and changes it."""
    place = tmp_path / "results"
    place.mkdir()

    def resize(size: str) -> Path:
        again = ["-o", f"remount,size={size}"] if place.is_mount() else ["-o", f"size={size}"]
        done = subprocess.run(
            ["mount", "-t", "tmpfs", *again, "tmpfs", str(place)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            pytest.skip(f"can't mount a disk: {done.stderr.strip()}")
        return place

    yield resize
    if place.is_mount():
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounts a disk")
def test_a_full_disk(sweep: Callable[..., Sweep], small_disk: Callable[[str], Path], tmp_path: Path) -> None:
    """It fills while captures are written. With room, the sweep goes on."""
    root = small_disk("300k")
    uri = default_uri(tmp_path)
    run = sweep("--tracking-uri", uri)
    assert run.wait() in (1, 2), run.output + run.errors
    assert "No space left on device" in run.output + run.errors
    assert "Traceback" not in run.errors
    # Why it has failed may have found room.
    assert not [path for path in root.glob("captures/*.json") if not path.name.endswith(".failed.json")]
    assert not [path for path in root.rglob(".*.pt*") if path.is_file()]
    for path in root.rglob("*.pt"):
        torch.load(path, weights_only=True)  # what is there is whole
    if (root / "frontier.json").exists():
        (row,) = load_rows(root / "frontier.json")
        assert row["status"] == "failed"
        assert [row[name] for name in NUMBERS] == [None] * len(NUMBERS)
    small_disk("64m")
    resumed(sweep, root, "--tracking-uri", uri)
    assert len(finished(root)) == 1


def test_damaged_captures_fail_their_defence_alone(sweep: Callable[..., Sweep], tmp_path: Path) -> None:
    """One bit of one defence's capture, and another defence's of another version."""
    root = tmp_path / "results"
    three = ("--trials", "3", "--defence", "powersgd:1", "--defence", "fp16")
    run = sweep(*three)
    run.wait_for(lambda: len(list(root.glob("captures/*.json"))) == 3)
    os.kill(run.process.pid, signal.SIGKILL)
    run.end()
    content = read_json(root / "sweep.json")
    store = Store(root, content["data"])
    config = from_dict(SweepConfig, content["sweep"])
    trains = [replace(config.train, defence=defence) for defence in config.defences]
    for attacks in [*root.glob("captures/*/tuning"), *root.glob("captures/*/evaluation")]:
        shutil.rmtree(attacks)
    flipped = store.run_directory(trains[1]) / "step-000000" / "seen-000.pt"
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    old = store.run_directory(trains[2]) / "step-000000" / "truth-001.pt"
    torch.save({"format": 1, "images": torch.zeros(1), "labels": torch.zeros(1)}, old)
    resumed(sweep, root)
    none, powersgd, half = load_rows(root / "frontier.json")
    assert none["status"] == "finished"
    assert none["leakage_ssim"] is not None
    for row, path in ((powersgd, flipped), (half, old)):
        assert row["status"] == "failed"
        assert f"Expected {path} to be a capture" in row["reason"]
        assert [row[name] for name in NUMBERS] == [None] * len(NUMBERS)
        assert not row["pareto"]


# Numbers


def config(**changes: Any) -> TrainConfig:
    base = TrainConfig(
        model=ModelConfig("convnet", width=4), capture=CaptureConfig((0,), 1, 1), workers=1, batch_size=8, steps=3
    )
    return replace(base, **changes)


def run_here(root: Path, train: TrainConfig, *portfolio: InversionConfig) -> list[dict[str, Any]]:
    """A sweep of one defence in this process."""
    data = synthetic()
    sweep = SweepConfig("odd", train, (Defence(),), 1, portfolio)
    spaces = Spaces(
        {"compressor": tune.choice(["powersgd"]), "rank": tune.choice([1]), "error_feedback": tune.choice([False])},
        {"tv": tune.choice([0.0])},
    )
    return run_sweep(sweep, spaces, data, open_store(root, sweep, data.fingerprint()), cpus=2)


GOOD = InversionConfig("naive", iterations=2)


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    (row,) = run_here(tmp_path, config(learning_rate=1e30, steps=20), GOOD)
    assert row["status"] == "failed"
    assert "nan" in row["reason"] or "inf" in row["reason"] or "finite" in row["reason"], row["reason"]
    assert "\n" not in row["reason"]
    assert [row[name] for name in NUMBERS] == [None] * len(NUMBERS)
    logged = {r.info.run_name: r for r in Logged(default_uri(tmp_path), tmp_path, "odd").below}
    assert logged["none"].info.status == "FAILED"
    assert logged["none"].data.metrics == {}
    assert logged["none"].data.tags["raytrust.failure"] == row["reason"]


def test_an_attack_that_diverges_fails_alone(tmp_path: Path) -> None:
    """The defence keeps the figures of the other attack."""
    (row,) = run_here(tmp_path, config(), GOOD, replace(GOOD, tv=1e300))
    assert row["status"] == "finished"
    assert row["attack"]["tv"] == GOOD.tv
    assert row["attacks_tried"] == 1
    assert len(list(tmp_path.glob("captures/*/tuning/*.failed.json"))) == 1
