"""The files that a sweep ends in, from its store: rows as JSON and text, two figures, and the page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from raytrust.config import InversionConfig, SweepConfig, to_dict
from raytrust.config.attacks import ANALYTIC
from raytrust.data import Dataset
from raytrust.jobs.files import write_file
from raytrust.reports.frontier_figure import frontier_figure
from raytrust.reports.frontier_page import FrontierContext, page
from raytrust.reports.frontier_table import frontier_table
from raytrust.reports.reconstructions import Drawn, drawn_attacks, reconstructions_figure, strip_figure
from raytrust.studies.frontier.row import Row, write_rows
from raytrust.studies.frontier.rows import train_of
from raytrust.studies.frontier.store import Store

FILES = ("report.html", "frontier.json", "frontier.png", "reconstructions.png", "strip.png", "captures")


@dataclass(frozen=True)
class Call:
    """What was called: the command without its options, those that were given, and all of them by name.

    started: `time.monotonic()` when the program began; it counts what libraries take to load.
    """

    command: str
    given: Mapping[str, Sequence[str]]
    options: Mapping[str, Any]
    started: float

    def next_commands(self, root: Path, sweep: SweepConfig) -> list[tuple[str, str]]:
        """What to do next, and the line that does it."""
        place = shlex.quote(str(root))
        longer, more = max(400, 4 * sweep.portfolio[0].iterations), 3 * sweep.train.capture.evaluation
        trials = max(8, 2 * sweep.attack_trials)
        # What names the run that was, or is to be changed.
        kept = {k: v for k, v in self.given.items() if k not in ("--output", "--resume", "--images", "--evaluation")}
        words = [word for name, values in kept.items() for value in values or [""] for word in (name, value) if word]
        again = f" {shlex.join(words)}" if words else ""
        commands = [
            (
                "attack what was captured again, longer and with more settings",
                f"{self.command} --resume {place} --iterations {longer} --attack-trials {trials}",
            ),
            ("report on more images", f"{self.command}{again} --images {more}"),
        ]
        # Who has chosen the data, when the run began or now, knows that one can.
        if self.options.get("data", "digits") == "digits" and "--data" not in self.given:
            commands.append(("use images of your own", f"{self.command}{again} --data images.npz"))
        return commands


def write_report(
    store: Store,
    sweep: SweepConfig,
    data: Dataset,
    rows: Sequence[Row],
    program: Call,
    timing: str,
    versions: Mapping[str, Any],
) -> list[Path]:
    """Write frontier.json, .txt and .png, reconstructions.png, of these a strip.png that tells the story, and
    report.html; returns those that could be written."""
    paths = {name: store.root / name for name in ("frontier.json", "frontier.png", "frontier.txt", "report.html")}
    write_rows(paths["frontier.json"], rows)
    frontier_figure(rows, paths["frontier.png"], title=f"{data.name}: what each defence leaks and costs")
    write_file(paths["frontier.txt"], (frontier_table(rows) + "\n").encode())
    drawn: list[Drawn] = []
    originals = None
    for finished in (r for r in rows if r["status"] == "finished"):
        of_defence, originals = drawn_attacks(store, sweep, finished)
        drawn += of_defence
    if originals is not None:
        paths["reconstructions.png"] = store.root / "reconstructions.png"
        reconstructions_figure(originals, drawn, paths["reconstructions.png"])
        paths["strip.png"] = store.root / "strip.png"
        strip_figure(originals, drawn, paths["strip.png"])
    context = FrontierContext(
        title=f"What compression hides of {data.name}",
        data_summary=f"{data.summary()} {_trained(sweep)}".replace("\n", " "),
        settings=_settings(sweep, program, versions),
        originals=originals,
        drawn=drawn,
        commands=program.next_commands(store.root, sweep),
        failures=_failed_attacks(store, sweep, rows),
        timing=timing,
        classes=data.classes,
    )
    write_file(paths["report.html"], page(rows, context).encode())
    return list(paths.values())


def _trained(sweep: SweepConfig) -> str:
    train = sweep.train
    if train.steps == 0:
        weights = "not trained any further" if train.model.checkpoint else "with the weights that it begins with"
        return f"{train.model.title}, {weights}."
    return f"{train.model.title}, {train.steps} steps of {train.workers} workers with {train.batch_size} images each."


def _failed_attacks(store: Store, sweep: SweepConfig, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Attacks that have no result, on defences that have one from others."""
    failures = []
    for finished in (r for r in rows if r["status"] == "finished"):
        train = train_of(store, sweep, finished)
        for split in ("tuning", "evaluation"):
            reasons = store.attack_failures(train, split)
            failures += [(f"an attack on {finished['name']} ({split} images)", reason) for reason in reasons]
    return failures


def _settings(sweep: SweepConfig, program: Call, versions: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    train = to_dict(sweep.train)
    flat = {k: v for k, v in train.items() if not isinstance(v, dict) and k != "defence"}
    nested = {f"{group}.{k}": v for group in ("model", "capture", "local") for k, v in train.get(group, {}).items()}
    attacks = {f"attack {i} of every defence": _attack(a) for i, a in enumerate(sweep.portfolio, start=1)}
    search = {"attacks that the search tries on each defence, besides": sweep.attack_trials}
    return {
        "Options": {k: v for k, v in program.options.items() if v is not None},
        "Training": flat | nested,
        "Threat": train["threat"],
        "Attacks": attacks | search,
        "Versions": {k: v for k, v in versions.items() if v is not None},
    }


def _attack(attack: InversionConfig) -> str:
    """The settings that are not default, and those that decide most."""
    values = {f.name: getattr(attack, f.name) for f in fields(attack)}
    if attack.method == ANALYTIC.method:  # heeds no setting of an optimiser
        return f"objective {attack.objective}, method {attack.method}"
    always = ("objective", "tv", "step_size", "iterations", "restarts", "signed", "schedule")
    # All thirty would hide the few that were chosen.
    shown = [n for n, v in values.items() if n in always or v != attack.__dataclass_fields__[n].default]
    return ", ".join(f"{name.replace('_', ' ')} {values[name]}" for name in shown)
