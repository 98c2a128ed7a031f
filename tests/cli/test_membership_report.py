"""From finished models to rows, text, figures and the page; the command line; and the whole on Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import synthetic

from raytrust.config import CaptureConfig, Defence, MembershipConfig, ModelConfig, Threat, TopKConfig, TrainConfig
from raytrust.jobs.files import write_json
from raytrust.jobs.job import Place
from raytrust.jobs.runner import work
from raytrust.jobs.store import JobStore
from raytrust.metrics.roc import auc
from raytrust.metrics.statistics import Figure
from raytrust.reports.membership_figures import roc_figure, side_by_side_figure
from raytrust.reports.membership_page import membership_page
from raytrust.reports.membership_table import class_table, membership_table, reference_table, side_by_side
from raytrust.studies.membership.jobs import load_shadows, open_audit, plan, shadow_models
from raytrust.studies.membership.paper_cells import floors, nearest_cells
from raytrust.studies.membership.pool import PLAIN, draw_pool
from raytrust.studies.membership.row import Rule, messages_of, plain
from raytrust.studies.membership.rows import final_loss, final_scores, matched_fit, row
from raytrust.studies.membership.shadows import HELD_OUT, MEMBER, Shadow
from raytrust.studies.published import TABLE_2

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = synthetic(train=240, test=40, vivid=True)
SPARSE = Defence(TopKConfig(equal_to_rank=1), error_feedback=True)
AUDIT = MembershipConfig(
    train=TrainConfig(
        model=ModelConfig("convnet", width=4),
        threat=Threat(batch_size=8),
        capture=CaptureConfig(steps=(0, 30, 90), tuning=1, evaluation=1),
        workers=1,
        batch_size=8,
        steps=120,
        learning_rate=0.05,
    ),
    defences=(Defence(), SPARSE),
    models=4,
    points=200,
    mislabelled=20,
    duplicates=10,
    controls=10,
    guesses=20,
    property_models=1,
    property_batches=12,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> JobStore:
    store = open_audit(tmp_path_factory.mktemp("audit"), AUDIT, "data", {})
    work(store, plan(AUDIT), Place(DATA))
    return store


@pytest.fixture(scope="module")
def rows(store: JobStore) -> list[dict[str, Any]]:
    pool = draw_pool(AUDIT, DATA)
    found = [row(store, AUDIT, arm, pool, DATA.test_labels.numpy()) for arm in AUDIT.arms]
    one, other = (load_shadows(store, AUDIT, arm) for arm in AUDIT.defences)
    assert one is not None
    assert other is not None
    found[1]["matched"] = matched_fit(one, other, pool)
    return found


def test_rows_hold_what_the_models_say(rows: list[dict[str, Any]], store: JobStore) -> None:
    pool, shadows = draw_pool(AUDIT, DATA), load_shadows(store, AUDIT, SPARSE)
    assert shadows is not None
    plain = pool.kinds == PLAIN
    scores = final_scores(shadows, pool, DATA.test_labels.numpy())
    found = rows[1]
    assert set(found["final"]) == set(scores)
    for name in ("loss", "LiRA online", "attack model"):
        areas = [auc(s[plain], k[plain]) for s, k in zip(scores[name], pool.keep, strict=True)]
        assert found["final"][name].auc.value == pytest.approx(np.mean(areas))
    assert found["final"]["loss"].auc == found["final"]["confidence"].auc  # one ranking
    assert found["final"]["loss"].tpr[0.01].value is None  # 340 non-members of all models
    correct = [(s.test_logits.argmax(1) == DATA.test_labels.numpy()).mean() for s in shadows]
    assert found["accuracy"].value == pytest.approx(np.mean(correct))
    assert found["train_loss"].value == pytest.approx(np.mean([final_loss(s, pool, i) for i, s in enumerate(shadows)]))
    assert found["compression_ratio"] > 1.5
    areas = []
    for shadow in shadows:
        mine = []
        for batch in (0, 1):
            table = shadow.messages[(shadow.messages[:, 0] == 30) & (shadow.messages[:, 1] == batch)]
            table = table[np.isin(table[:, 2], (MEMBER, HELD_OUT))]
            mine.append(auc(table[:, 4], table[:, 2] == MEMBER))
        areas.append(np.mean(mine))
    (cell,) = [m for m in messages_of(found) if m.step == 30]
    assert cell.value == pytest.approx(np.mean(areas))
    assert len(found["messages"]) == 3 * 2 * 3
    assert set(found["property"]) == {"aware", "naive", "label"}
    assert found["property"]["label"] == 0


def test_the_grid_has_every_cell(rows: list[dict[str, Any]]) -> None:
    cells = {rule.key: rule for rule in rows[0]["grid"]}
    assert len(cells) == len(rows[0]["grid"]) == 6 * 2 * 3
    for signal in ("loss", "entropy", "attack model"):
        for per_class in (False, True):
            inside, shadow = (cells[signal, per_class, o] for o in ("in-sample", "shadow"))
            assert inside.value >= shadow.value  # it is chosen on the points that are judged
            assert inside.floor > 0.5 == shadow.floor
        assert cells[signal, True, "in-sample"].floor > cells[signal, False, "in-sample"].floor
    assert cells["loss", False, "in-sample"].value == cells["confidence", False, "in-sample"].value
    assert cells["loss", False, "yeom"].value != cells["confidence", False, "yeom"].value


def test_matched_fit_takes_the_step_of_nearest_loss(store: JobStore) -> None:
    pool, shadows = draw_pool(AUDIT, DATA), load_shadows(store, AUDIT, Defence())
    assert shadows is not None
    same = matched_fit(shadows, shadows, pool)
    assert same["steps"] == [120] * 4  # its own end
    assert same["train_loss"].value == pytest.approx(np.mean([final_loss(s, pool, i) for i, s in enumerate(shadows)]))

    def as_at(shadow: Shadow, place: int) -> Shadow:
        """A model whose final loss on each point is that of a captured step: two logits that give it."""
        p = np.exp(-shadow.step_losses[place].astype(np.float64))[:, None]
        logits = np.log(np.maximum((1 - p) / 3, 1e-12)).repeat(4, axis=1)
        np.put_along_axis(logits, pool.labels.numpy()[:, None], np.log(p), 1)
        return replace(shadow, logits=logits)

    early = matched_fit(shadows, [as_at(s, 1) for s in shadows], pool)
    assert early["steps"] == [30] * 4
    expected = [
        auc(-s.step_losses[1][pool.kinds == PLAIN], k[pool.kinds == PLAIN])
        for s, k in zip(shadows, pool.keep, strict=True)
    ]
    assert early["loss_auc"].value == pytest.approx(np.mean(expected))


def test_a_failed_defence_has_a_reason_and_no_figures(store: JobStore) -> None:
    pool, labels = draw_pool(AUDIT, DATA), DATA.test_labels.numpy()
    unknown = Defence(TopKConfig(level=0.5))
    assert row(store, AUDIT, unknown, pool, labels)["reason"] == "not finished"
    store.fail(shadow_models(AUDIT, unknown)[2], "out of memory")
    found = row(store, AUDIT, unknown, pool, labels)
    assert (found["status"], found["reason"]) == ("failed", "out of memory")
    assert set(found) == {"name", "arm", "run", "status", "reason"}
    assert "Top-K 50 % failed: out of memory" in membership_table([found])
    store.clear_failures()


def test_rows_are_json(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """A figure as its value and its interval; what it is of stands beside it."""
    write_json(tmp_path / "rows.json", plain(rows))
    found = json.loads((tmp_path / "rows.json").read_text())[1]
    loss, rule, message = rows[1]["final"]["loss"], rows[1]["grid"][0], rows[1]["messages"][0]
    assert found["accuracy"] == {name: getattr(rows[1]["accuracy"], name) for name in ("value", "low", "high")}
    assert set(found["final"]["loss"]) == {"auc", "tpr", "epsilon", "slices"}
    assert found["final"]["loss"]["tpr"]["0.001"] == {"value": None, "low": None, "high": None}
    assert found["final"]["loss"]["slices"]["class 1"]["low"] == loss.slices["class 1"].low
    of_rule = {"signal": rule.signal, "per_class": rule.per_class, "origin": rule.origin, "floor": rule.floor}
    assert found["grid"][0] == of_rule | {"value": rule.value, "low": rule.low, "high": rule.high}
    of_message = {"step": message.step, "control": message.control, "score": message.score}
    assert found["messages"][0] == of_message | {"value": message.value, "low": message.low, "high": message.high}
    assert found["curves"] == rows[1]["curves"]
    assert set(found["matched"]) == {"steps", "train_loss", "loss_auc", "message_auc"}


def test_the_page_needs_nothing_else(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    figures = [tmp_path / "roc.png", tmp_path / "auc.png"]
    roc_figure(rows, figures[0])
    side_by_side_figure(rows, figures[1])
    failed = {"name": "<b>", "arm": {}, "run": "x", "status": "failed", "reason": "a & b"}
    page = membership_page([*rows, failed], "the setting", figures)
    assert page.count('src="data:image/png;base64,') == 2
    assert "http" not in page.replace("http-equiv", "")
    assert "&lt;b&gt;</b> failed: a &amp; b" in page
    figure = side_by_side(rows[1])["messages, untrained model"]
    assert f"{figure.value:.2f} [{figure.low:.2f}, {figure.high:.2f}]" in page
    assert "not resolvable" in page
    assert "the setting" in page
    text = membership_table(rows)
    assert "Top-K (bytes of rank 1) + EF" in text
    assert str(figure) in text


def test_the_reference_is_the_dp_sgd_of_nearest_accuracy(rows: list[dict[str, Any]]) -> None:
    assert reference_table(rows) == []
    accuracy = rows[1]["accuracy"].value
    base = {**rows[1], "privacy": {"epsilon": 3.14159, "delta": 1e-5}}
    near, far = (
        {**base, "name": name, "accuracy": Figure(accuracy + off)}
        for name, off in (("DP near", 0.01), ("DP far", -0.3))
    )
    header, *lines = reference_table([*rows, far, near])
    assert [line[0] for line in lines] == [r["name"] for r in rows]
    assert lines[1][header.index("DP-SGD")] == "DP near"
    assert lines[1][-1] == "3.14 at delta 1e-05"


def test_classes_stand_in_a_table_of_their_own(rows: list[dict[str, Any]]) -> None:
    header, first, _ = class_table(rows)
    assert header == ["defence", "class 0", "class 1", "class 2", "class 3"]
    assert first[2].startswith(f"{rows[0]['final']['LiRA online'].slices['class 1'].value:.2f} [")
    assert class_table(rows, most=3) == []


def test_curves_end_where_they_are_resolved(rows: list[dict[str, Any]]) -> None:
    for found in rows:
        curves = found["curves"]
        for kind in ("final", "messages"):
            assert curves[kind] == sorted(curves[kind])
            assert curves[kind][-1] == 1.0
        assert curves["least"]["messages"] == 1 / 10  # ten controls


def paper_row(name: str, arm: dict[str, Any], value: float, shift: float) -> dict[str, Any]:
    cells = [
        Rule((value + shift + wrong) / 100, signal=signal, per_class=False, origin="shadow")
        for signal, wrong in (("attack model", 0.0), ("loss", 1.0), ("modified entropy", 2.0), ("entropy", 8.0))
    ]
    return {"name": name, "arm": arm, "status": "finished", "grid": cells}


def test_the_nearest_cell_is_found_after_the_shift_of_all() -> None:
    assert len(TABLE_2["cifar10"]) == 11
    none = paper_row("none", {"compressor": {"method": "none"}}, 54.02, 10)
    top = paper_row("Top-K", {"compressor": {"method": "topk", "equal_to_rank": 4, "level": None}}, 56.52, 10)
    other = paper_row("sign", {"compressor": {"method": "signsgd"}}, 0, 0)
    found = {c.attack: c for c in nearest_cells([none, top, other, {"name": "x", "status": "failed", "arm": {}}])}
    assert found["prediction confidence"].signal == "attack model"
    assert found["cross-entropy"].signal == "modified entropy"
    assert set(found["loss"].ours) == {"none", "Top-K"}
    assert found["loss"].paper == {"none": 55.17, "Top-K": 57.20}
    assert nearest_cells([other]) == []
    assert {k: round(v, 1) for k, v in floors().items()} == {1: 50.4, 10: 51.4, 100: 54.4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.npz"], "Expected nowhere.npz to be a .npz file, but there is no such file."),
        (["--models", "3"], "Expected models=3 to be even and at least 4"),
        (["--points", "99999"], "Expected points=99999 to be at most 1437, the training images."),
        (["--defence", "powersgd:0"], "Expected rank=0 to be at least 1"),
        (["--dp-sgd=-1:1"], "Expected noise=-1.0 to be positive and finite"),
        (["--dp-sgd", "1"], "Expected dp_sgd='1' to be NOISE:CLIP, two numbers, or none."),
        (["--canaries", "-1"], "Expected canaries=-1 to be at least 0"),
        (["--points", "120", "--canaries", "40"], "Expected points=120 to exceed twice the number of canaries, 80."),
        (["--messages", "1"], "Expected messages=1 to be at least 2"),
        (["--property-models", "9"], "Expected property_models=9 in [0, models]"),
        (
            ["--points", "100", "--message-batch", "16"],
            "Expected points=100 to be at least 160, for 64 images",
        ),
        (["--steps", "0"], "Expected steps=0 to be at least 1"),
        (["--cpus", "9999"], "Expected cpus=9999 to be at most the number of CPUs"),
        (["--resume", "nowhere"], "Expected resume='nowhere' to hold an audit"),
        (["--resume", "nowhere", "--models", "8"], "Expected --models not to be given with --resume"),
        (["--point", "100"], "unrecognized arguments: --point 100"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "sweeps")
    import membership

    with pytest.raises(SystemExit) as stop:
        membership.main(arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("membership.py: error: ")


def test_bad_input_is_refused_before_ray_is_imported() -> None:
    program = "import sys; sys.modules.update(ray=None, mlflow=None); sys.path.insert(0, 'sweeps'); import membership; "
    program += "membership.main(['--models', '3'])"
    found = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert found.returncode == 2, found.stderr
    assert "Expected models=3" in found.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_audit_on_ray_and_its_resumption(tmp_path: Path) -> None:
    """The whole, on digits: as a user runs it, and again from what it stored."""
    out = tmp_path / "out"
    base = [sys.executable, "sweeps/membership.py"]
    wanted = ["--steps", "20", "--points", "400", "--models", "4", "--width", "2", "--defence", "topk:0.05:ef"]
    first = subprocess.run([*base, *wanted, "--output", str(out)], cwd=REPOSITORY, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    for name in ("report.html", "results.json", "roc.png", "auc.png", "membership.txt", "mlflow.db"):
        assert (out / name).stat().st_size > 0
    results = json.loads((out / "results.json").read_text())
    assert "Top-K 5 % + EF" in first.stdout
    victim = next((out / "models").glob("*.json")).with_suffix(".npz")
    before = {path: path.stat().st_mtime_ns for path in (out / "models").glob("*.npz")}
    victim.with_suffix(".json").unlink()
    again = subprocess.run([*base, "--resume", str(out)], cwd=REPOSITORY, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    after = {path: path.stat().st_mtime_ns for path in (out / "models").glob("*.npz")}
    assert {path for path in after if after[path] != before[path]} == {victim}
    assert json.loads((out / "results.json").read_text()) == results  # the model came out the same
