from __future__ import annotations

import os
import pickle
import stat
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from raytrust.compress import build
from raytrust.config import (
    CaptureConfig,
    CompressorConfig,
    Defence,
    DenseConfig,
    LocalConfig,
    ModelConfig,
    PowerSGDConfig,
    Threat,
    TopKConfig,
    TrainConfig,
)
from raytrust.data import Dataset
from raytrust.jobs.captures import FORMAT, load_captures, save_capture
from raytrust.jobs.files import atomic_write
from raytrust.leak.observation import Capture, Observation, Truth, seen_messages
from raytrust.train.loop import train
from raytrust.wire.channel import LocalChannel, Message, Tap

COMPRESSORS: list[CompressorConfig] = [DenseConfig(), PowerSGDConfig(2), TopKConfig(level=0.1)]
VANTAGES: list[Literal["link", "peer"]] = ["link", "peer"]


def captured(
    data: Dataset, compressor: CompressorConfig, threat: Threat, model: str = "convnet", steps: tuple[int, ...] = (0,)
) -> list[Capture]:
    config = TrainConfig(
        defence=Defence(compressor, error_feedback=True),
        model=ModelConfig("resnet18" if model == "resnet18" else "convnet", width=2),
        threat=threat,
        capture=CaptureConfig(steps, tuning=1, evaluation=1),
        workers=1,
        batch_size=8,
        steps=2,
    )
    return [r for r in train(config, data, LocalChannel()) if isinstance(r, Capture)]


def tensors(value: Any) -> Iterator[Tensor]:
    """All that can be reached from a value."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def assert_equal(a: Any, b: Any) -> None:
    """To the bit, with shapes, dtypes and the order of keys."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        assert a.is_meta or torch.equal(a, b)
    elif is_dataclass(a) and not isinstance(a, type):
        for field in fields(a):
            assert_equal(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("vantage", VANTAGES)
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: c.method)
def test_what_is_loaded_is_what_was_saved(
    compressor: CompressorConfig, vantage: Literal["link", "peer"], data: Dataset, tmp_path: Path
) -> None:
    threat = Threat(vantage, batch_size=2, labels="known" if vantage == "link" else "unknown")
    for capture in captured(data, compressor, threat, "resnet18", steps=(0, 1)):
        save_capture(tmp_path, capture)
        assert_equal(load_captures(tmp_path, capture.seen.step, [capture.index])[0], capture)


@pytest.mark.parametrize("vantage", VANTAGES)
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: c.method)
def test_a_history_survives_and_is_written_once_a_step(
    compressor: CompressorConfig, vantage: Literal["link", "peer"], data: Dataset, tmp_path: Path
) -> None:
    found = captured(data, compressor, Threat(vantage, history=3), steps=(0, 1))
    assert [len(c.seen.history) for c in found] == [0, 0, 1, 1]
    for capture in found[:3]:
        save_capture(tmp_path, capture)
    path = tmp_path / "step-000001" / "history-0.pt"
    written = path.stat().st_mtime_ns
    save_capture(tmp_path, found[3])
    assert path.stat().st_mtime_ns == written
    assert not (tmp_path / "step-000000" / "history-0.pt").exists()
    for capture in found:
        assert_equal(load_captures(tmp_path, capture.seen.step, [capture.index])[0], capture)
    path.unlink()
    with pytest.raises(ValueError, match=r"history-0\.pt, but there is no such file\.$"):
        load_captures(tmp_path, 1, [0])


def test_local_steps_survive_and_older_files_are_of_one(data: Dataset, tmp_path: Path) -> None:
    capture = captured(data, DenseConfig(), Threat())[0]
    local = replace(capture, seen=replace(capture.seen, local=LocalConfig(3, 0.5, 2)))
    save_capture(tmp_path, local)
    assert_equal(load_captures(tmp_path, 0, [0])[0], local)
    path = tmp_path / "step-000000" / "seen-000.pt"
    body = torch.load(path, weights_only=True)
    del body["local"]
    torch.save(body, path)
    assert_equal(load_captures(tmp_path, 0, [0])[0], capture)


def test_the_history_of_each_worker_is_a_file_of_its_own(data: Dataset, tmp_path: Path) -> None:
    first, second = captured(data, TopKConfig(level=0.1), Threat(history=1), steps=(1,))
    other = first.seen.history[0]._replace(messages=second.seen.messages)
    second = replace(second, seen=replace(second.seen, victim=1, world_size=2, history=(other,)))
    for capture in (first, second):
        save_capture(tmp_path, capture)
    for capture in (first, second):
        assert_equal(load_captures(tmp_path, 1, [capture.index])[0], capture)


def test_the_files(data: Dataset, tmp_path: Path) -> None:
    """The seen half holds none of the truth, and the model is there once a step."""
    first, second = captured(data, DenseConfig(), Threat())
    save_capture(tmp_path, first)
    model = tmp_path / "step-000000" / "model.pt"
    written = model.stat().st_mtime_ns
    save_capture(tmp_path, second)
    assert model.stat().st_mtime_ns == written
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.pt"))
    assert names == [
        "step-000000/model.pt",
        "step-000000/seen-000.pt",
        "step-000000/seen-001.pt",
        "step-000000/truth-000.pt",
        "step-000000/truth-001.pt",
    ]
    held = torch.load(tmp_path / "step-000000" / "seen-000.pt", weights_only=True)
    assert not any(torch.equal(t, first.truth.images) for t in tensors(held))
    for path in tmp_path.rglob("*"):  # nothing is left of what was written on the way
        assert not path.name.startswith(".")


@pytest.mark.parametrize("vantage", VANTAGES)
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: c.method)
def test_an_observation_holds_nothing_of_the_truth(
    compressor: CompressorConfig, vantage: Literal["link", "peer"], data: Dataset
) -> None:
    for labels in ("known", "unknown"):
        for capture in captured(data, compressor, Threat(vantage, 3, labels=labels), "resnet18"):
            truth, seen = capture.truth, capture.seen
            normalised = (truth.images - seen.mean.view(-1, 1, 1)) / seen.std.view(-1, 1, 1)
            images = {t.numel() for t in (truth.images, truth.images[0], truth.images[0, 0])}
            for t in tensors(seen):
                if t.is_meta:
                    continue
                assert t.numel() not in images or t.shape[-2:] != truth.images.shape[-2:]
                for x in (truth.images, normalised, *truth.images, *normalised):
                    assert t.numel() != x.numel() or not torch.allclose(t.flatten().float(), x.flatten())
            of_labels = [t for t in tensors(seen) if t.dtype == torch.int64 and t.ndim == 1]
            assert len(of_labels) == (labels == "known")
            assert all(torch.equal(t, truth.labels) for t in of_labels)


def test_a_peer_does_not_see_what_was_handed_to_a_collective(data: Dataset) -> None:
    for compressor in COMPRESSORS:
        link = captured(data, compressor, Threat("link"))[0].seen.messages
        peer = captured(data, compressor, Threat("peer"))[0].seen.messages
        for a, b in zip(link, peer, strict=True):
            assert not any(x.is_meta for x in (*a.sent, *a.received))
            assert all(x.is_meta for x in b.sent)
            assert not any(x.is_meta for x in b.received)
            assert a.sent_bytes == b.sent_bytes
            assert [(x.shape, x.dtype) for x in a.sent] == [(x.shape, x.dtype) for x in b.sent]
            assert all(map(torch.equal, a.received, b.received))


def test_a_peer_of_two_workers_gets_the_mean_alone(group: list[dict[str, Any]]) -> None:
    for worker in group:
        for record in worker["peer training"]:
            if isinstance(record, Capture):
                assert all(x.is_meta for m in record.seen.messages for x in m.sent)
    for worker in group:
        for step in worker["reductions"]["dense"]:
            (message,) = seen_messages(step.messages, Threat("peer"))
            visible = [t for t in tensors(message) if not t.is_meta]
            assert not any(torch.equal(t, o) for t in visible for o in (step.messages[0].sent[0], *step.own))


def test_the_observed_model_and_compressor(data: Dataset) -> None:
    for mode in ("eval", "train"):
        seen = captured(data, PowerSGDConfig(2), Threat(batch_norm=mode, batch_size=2), "resnet18", (1,))[0].seen
        model = seen.build_model()
        assert all(m.training == (mode == "train") for m in model.modules())
        assert_equal({n: p.detach() for n, p in model.named_parameters()}, seen.weights)
        assert_equal(dict(model.named_buffers()), seen.buffers)
        assert_equal(seen.build_compressor().public_state(), seen.compressor_state)


@pytest.fixture
def capture(data: Dataset) -> Capture:
    return captured(data, PowerSGDConfig(2), Threat())[0]


@pytest.mark.parametrize("name", ["model.pt", "seen-000.pt", "truth-000.pt"])
class TestWhatCannotBeLoaded:
    @pytest.fixture
    def path(self, name: str, capture: Capture, tmp_path: Path) -> Path:
        save_capture(tmp_path, capture)
        return tmp_path / "step-000000" / name

    def refuse(self, path: Path, message: str) -> None:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            load_captures(path.parent.parent, 0, [0])
        assert str(error.value) == message

    def test_a_missing_file(self, path: Path) -> None:
        path.unlink()
        self.refuse(path, f"Expected a capture at {path}, but there is no such file.")

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
    def test_a_file_cut_short(self, path: Path, share: float) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=r"to be a capture, but it can't be read: \w+\.$"):
            load_captures(path.parent.parent, 0, [0])

    def test_a_flipped_bit(self, path: Path) -> None:
        content = bytearray(path.read_bytes())
        held = torch.load(path, weights_only=True)
        tensor = max(tensors(held), key=lambda t: t.nbytes)
        start = bytes(content).find(tensor.numpy().tobytes())
        assert start >= 0
        content[start] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"to be a capture, but it can't be read: \w+\.$"):
            load_captures(path.parent.parent, 0, [0])

    def test_code(self, path: Path, tmp_path: Path) -> None:
        torch.save({"format": FORMAT, "step": Malice(str(tmp_path / "ran"))}, path)
        self.refuse(path, f"Expected {path} to be a capture, but it can't be read: UnpicklingError.")
        path.write_bytes(pickle.dumps(Malice(str(tmp_path / "ran")), protocol=2))
        with pytest.raises(ValueError, match=r"to be a capture, but it can't be read: \w+\.$"):
            load_captures(path.parent.parent, 0, [0])
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("content", [{"format": FORMAT - 1}, {"format": FORMAT + 1}, {"step": 0}, [1], "capture"])
    def test_another_format(self, path: Path, content: Any) -> None:
        torch.save(content, path)
        self.refuse(path, f"Expected {path} to be a capture of format {FORMAT}.")


class Malice:
    """Unpickling it writes a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(self.path),))


def test_malice_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Malice(str(tmp_path / "ran"))))
    assert (tmp_path / "ran").exists()


def write_half(path: Path, error: BaseException) -> None:
    before = path.read_bytes() if path.exists() else None
    with atomic_write(path) as file:
        file.write(b"half")
        file.flush()
        assert (path.read_bytes() if path.exists() else None) == before
        raise error


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    with pytest.raises(KeyboardInterrupt):
        write_half(path, KeyboardInterrupt())
    assert list(path.parent.iterdir()) == []


def test_a_write_that_fails_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path) as file:
        file.write(b"old")
    with pytest.raises(OSError, match="disk full"):
        write_half(path, OSError("disk full"))
    assert path.read_bytes() == b"old"
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert stat.S_ISREG(path.stat().st_mode)


def test_what_is_private_is_the_owner_s_alone(capture: Capture, tmp_path: Path) -> None:
    """Whatever the umask: a cluster's workers bring their own."""
    before = os.umask(0)
    try:
        save_capture(tmp_path / "results" / "captures" / "run", capture)
    finally:
        os.umask(before)
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "results").rglob("*")}
    assert len(found) == 6  # three files in three directories
    assert found == {path: 0o700 if path.is_dir() else 0o600 for path in found}
    assert stat.S_IMODE((tmp_path / "results").stat().st_mode) == 0o700


def test_a_capture_that_cannot_be_saved_leaves_no_file(
    capture: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_capture(tmp_path, capture)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_files_hold_no_more_than_they_show(tmp_path: Path) -> None:
    """A view into a large tensor would be saved with all that it is a view of."""
    large = torch.randn(40_000)
    compressor = build(Defence(), [torch.Size((4,))])
    tap = Tap(LocalChannel(), keep=True)
    compressor.reduce([large[:4]], tap)
    observation = Observation(
        step=0,
        weights={"w": torch.zeros(4)},
        buffers={},
        messages=tuple(tap.messages),
        compressor_state={},
        defence=Defence(),
        model=ModelConfig(),
        threat=Threat(),
        labels=None,
        image_shape=(1, 8, 8),
        classes=2,
        mean=torch.zeros(1),
        std=torch.ones(1),
        victim=0,
        world_size=1,
        residual=False,
    )
    save_capture(tmp_path, Capture(0, observation, Truth(torch.zeros(1, 1, 8, 8), torch.zeros(1).long())))
    assert (tmp_path / "step-000000" / "seen-000.pt").stat().st_size < 40_000
    again = load_captures(tmp_path, 0, [0])[0].seen
    assert again.messages[0].sent_bytes == 16


def test_the_buffers_that_the_batch_left_behind_survive(data: Dataset, tmp_path: Path) -> None:
    threat = Threat(batch_norm="train", batch_size=2, batch_statistics="known")
    capture = captured(data, DenseConfig(), threat, "resnet18")[0]
    assert capture.seen.buffers_after is not None
    assert not torch.equal(capture.seen.buffers_after["bn1.running_mean"], capture.seen.buffers["bn1.running_mean"])
    save_capture(tmp_path, capture)
    assert_equal(load_captures(tmp_path, 0, [capture.index])[0].seen, capture.seen)


def test_auxiliary_images_survive_and_are_written_once(data: Dataset, tmp_path: Path) -> None:
    threat = Threat(batch_size=2, batch_norm="train", batch_statistics="proxy", auxiliary=5)
    found = captured(data, DenseConfig(), threat, "resnet18", steps=(0, 1))
    for capture in found:
        save_capture(tmp_path, capture)
        assert_equal(load_captures(tmp_path, capture.seen.step, [capture.index])[0], capture)
    assert [p.name for p in tmp_path.rglob("*.pt") if "auxiliary" in p.name] == ["auxiliary.pt"]
    first, second = load_captures(tmp_path, 0, [c.index for c in found if c.seen.step == 0])
    assert first.seen.auxiliary is second.seen.auxiliary
    assert found[0].seen.auxiliary is not None
    # Nothing of it is written with each capture.
    one = (tmp_path / "step-000000" / "seen-000.pt").stat().st_size
    (tmp_path / "auxiliary.pt").unlink()
    with pytest.raises(ValueError, match="no such file"):
        load_captures(tmp_path, 0, [0])
    plain = captured(data, DenseConfig(), replace(threat, batch_statistics="unknown", auxiliary=0), "resnet18")[0]
    save_capture(tmp_path / "plain", plain)
    assert one < (tmp_path / "plain" / "step-000000" / "seen-000.pt").stat().st_size + 256
    assert not (tmp_path / "plain" / "auxiliary.pt").exists()


def test_a_hidden_payload_of_any_type_survives(capture: Capture, tmp_path: Path) -> None:
    hidden = Message(
        "all_gather",
        (torch.empty(3, 2, device="meta"), torch.empty(0, dtype=torch.int32, device="meta")),
        (torch.ones(3, 2), torch.ones(0, dtype=torch.int32)),
    )
    save_capture(tmp_path, replace(capture, seen=replace(capture.seen, messages=(hidden,))))
    assert_equal(load_captures(tmp_path, 0, [0])[0].seen.messages, (hidden,))
