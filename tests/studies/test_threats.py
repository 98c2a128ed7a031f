"""The map of threats: its cells, that it is made once, and what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toys import synthetic

from raytrust.cli.threats import open_map, run_threats
from raytrust.config import (
    CaptureConfig,
    Defence,
    InversionConfig,
    LocalConfig,
    ModelConfig,
    PowerSGDConfig,
    Threat,
    TrainConfig,
    from_dict,
    parse_defence,
    to_dict,
)
from raytrust.config.threats import ThreatMapConfig
from raytrust.jobs.files import read_json
from raytrust.metrics.verdict import VERDICTS
from raytrust.reports.threat_map import headline, map_table
from raytrust.studies.threats.study import Mapped, ThreatStudy

DATA = synthetic(channels=1)
MAP = ThreatMapConfig(
    train=TrainConfig(
        model=ModelConfig("resnet20", width=4),
        capture=CaptureConfig((0,), 1, 2),
        local=LocalConfig(2, 0.01),
        workers=1,
        batch_size=8,
        steps=3,
    ),
    defences=(Defence(), Defence(PowerSGDConfig(1)), parse_defence("dp-sgd:0.1")),
    portfolio=(InversionConfig("naive", iterations=2), InversionConfig("aware", iterations=2)),
    private_batches=(1, 2),
    local_steps=(1, 2),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("map")


@pytest.fixture(scope="module")
def mapped(root: Path) -> list[Mapped]:
    return run_threats(MAP, DATA, open_map(root, MAP, DATA, {}), spread=False)


def test_every_threat_is_there_once_and_differs_in_what_it_says() -> None:
    cells = MAP.cells()
    assert len(cells) == 2 * 2 * 2 * 2
    assert len({cell.name for cell in cells}) == len({cell.short for cell in cells}) == len(cells)
    assert cells[-1].name == "trained, 2 images, batch norm in training mode, 2 local steps"
    assert cells[-1].short == "trained, 2 images, BN train, 2 steps"
    for cell in cells:
        assert cell.train.steps == 0
        assert f"{cell.train.threat.batch_size} image" in cell.name
        assert ("training mode" in cell.name) == (cell.train.threat.batch_norm == "train")
        assert ("2 local steps" in cell.name) == (cell.train.local.steps == 2)
    assert from_dict(ThreatMapConfig, to_dict(MAP)) == MAP


def test_cells_have_figures_where_the_defence_has_a_place(mapped: list[Mapped]) -> None:
    assert [m.cell.name for m in mapped] == [cell.name for cell in MAP.cells()]
    for m in mapped:
        none, powersgd, private = m.rows
        assert [none["status"], powersgd["status"]] == ["finished", "finished"]
        assert none["n_images"] == 2 * m.cell.train.threat.batch_size
        assert powersgd["bytes_per_step"] < none["bytes_per_step"]
        # It clips the gradient of each image, which there is in evaluation mode alone.
        placed = m.cell.train.threat.batch_norm == "eval"
        assert private["status"] == ("finished" if placed else "failed")
        if not placed:
            assert private["reason"].startswith("Expected norm='batch' to be 'group'")
            assert private.get("leakage_ssim") is None


def test_statistics_are_granted_in_training_mode_alone() -> None:
    granted = replace(
        MAP, batch_statistics=("unknown", "known", "proxy"), train=replace(MAP.train, threat=Threat(auxiliary=4))
    )
    threats = [cell.train.threat for cell in granted.cells()]
    assert len(threats) == 2 * 2 * 2 * (1 + 3)
    assert len({cell.short for cell in granted.cells()}) == len(threats)
    assert {t.batch_statistics for t in threats if t.batch_norm == "eval"} == {"unknown"}
    assert [t.batch_statistics for t in threats[2:8]] == [*["unknown"] * 2, *["known"] * 2, *["proxy"] * 2]


def test_the_trained_state_is_another_model(root: Path, mapped: list[Mapped]) -> None:
    figures = read_json(root / "results.json")["trained"]
    assert figures["n_test"] == len(DATA.test_labels)
    assert len(figures["losses"]) == MAP.train.steps
    accuracies = {state: {m.rows[0]["accuracy"] for m in mapped if m.cell.state == state} for state in MAP.states}
    assert accuracies["trained"] == {figures["correct"] / figures["n_test"]}
    checkpoints = {m.cell.train.model.checkpoint for m in mapped}
    assert len(checkpoints) == 2
    assert "" in checkpoints


def test_local_steps_meet_every_way_through_them(root: Path, mapped: list[Mapped]) -> None:
    study = ThreatStudy(MAP, DATA, open_map(root, MAP, DATA, {}))
    for m in mapped:
        ways = {attack.through for attack in study.sweep(m.cell).portfolio}
        assert ways == ({"steps"} if m.cell.train.local.steps == 1 else {"steps", "surrogate", "gradient"})


def test_a_peer_sees_the_mean_of_all_workers(tmp_path: Path) -> None:
    several = replace(
        MAP, train=replace(MAP.train, workers=2), vantages=("link", "peer"), private_batches=(1,), local_steps=(1,),
        batch_norms=("eval",), states=("untrained",), defences=MAP.defences[:2],
    )  # fmt: skip
    mapped = run_threats(several, DATA, open_map(tmp_path, several, DATA, {}), spread=False)
    assert [m.cell.name.partition(", 1 step")[2] for m in mapped] == ["", ", the mean of 2 workers"]
    assert [[row["status"] for row in m.rows] for m in mapped] == [["finished"] * 2] * 2
    assert several.training.workers == 1


def test_a_second_run_does_nothing_twice(root: Path, mapped: list[Mapped], capsys: pytest.CaptureFixture[str]) -> None:
    files = {p: p.stat().st_mtime_ns for p in (root / "captures").rglob("*.json")}
    assert len(files) > 50
    again = run_threats(MAP, DATA, open_map(root, MAP, DATA, {}), spread=False)
    assert {p: p.stat().st_mtime_ns for p in (root / "captures").rglob("*.json")} == files
    assert map_table(again) == map_table(mapped)
    assert " jobs" not in capsys.readouterr().out


def test_a_run_cut_short_says_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = run_threats(MAP, DATA, open_map(tmp_path, MAP, DATA, {}), spread=False, hours=1e-9)
    assert {m.rows[0]["status"] for m in cut} == {"failed"}
    assert {m.rows[0]["reason"] for m in cut} == {"not finished"}
    assert "time is up" in capsys.readouterr().out


def test_it_says_nothing_of_defences_where_the_attack_fails(root: Path, mapped: list[Mapped]) -> None:
    assert headline(mapped) == (
        "Of 16 threats, the attack works without a defence in 0; nothing can be said about any defence, but that what "
        "leaks, leaks."
    )
    page = (root / "report.html").read_text()
    assert headline(mapped) in page
    for m in mapped:
        assert m.cell.name in page
    assert (root / "map.png").read_bytes().startswith(b"\x89PNG")


def test_the_headline_counts_threats_in_which_the_attack_works(mapped: list[Mapped]) -> None:
    cell = mapped[0]
    found = [row | {"control": True, "verdict": verdict} for row, verdict in zip(cell.rows, VERDICTS, strict=True)]
    text = headline([Mapped(cell.cell, found), *mapped[1:]])  # type: ignore[arg-type]
    assert text.startswith(
        "Of 16 threats, the attack works without a defence in 1; of 2 cells there, 0 leak, 1 resists "
    )
    assert text.endswith("In the others nothing can be said, but that what leaks, leaks.")
    alone = headline([Mapped(cell.cell, found)])  # type: ignore[arg-type]
    assert alone.startswith("Of 1 threat, the attack works without a defence in 1; of 2 cells there, ")
    assert "others" not in alone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"private_batches": ()}, r"^Expected private_batches=\(\) to be numbers from 1 on\.$"),
        ({"private_batches": (1, 1)}, r"^Expected private_batches=\(1, 1\) to hold each once\.$"),
        ({"local_steps": (0,)}, r"^Expected local_steps=\(0,\) to be numbers from 1 on\.$"),
        ({"states": ("ripe",)}, r"^Expected states=\('ripe',\) to be among untrained, trained\.$"),
        ({"defences": (Defence(PowerSGDConfig(1)),)}, r"^Expected defences=.* to begin with none, the control\.$"),
        ({"vantages": ("peer",)}, r"^Expected workers=1 to be at least 2 for the vantage 'peer'\.$"),
        ({"train": replace(MAP.train, steps=0)}, r"^Expected steps=0 to be at least 1 for the state 'trained'\.$"),
    ],
)
def test_what_can_t_be_mapped_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(MAP, **changes)


def test_another_map_is_refused_the_directory(root: Path, mapped: list[Mapped]) -> None:
    with pytest.raises(ValueError, match="to be empty or to hold this map"):
        open_map(root, replace(MAP, private_batches=(1,)), DATA, {})
