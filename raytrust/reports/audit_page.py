"""The page and the pictures of an audit."""

from __future__ import annotations

import platform
from dataclasses import fields
from pathlib import Path

import torch

from raytrust.jobs.files import write_file
from raytrust.reports.audit import AuditResult
from raytrust.reports.drawing import Array
from raytrust.reports.frontier_figure import frontier_figure
from raytrust.reports.frontier_page import FrontierContext, page
from raytrust.reports.reconstructions import Drawn, reconstructions_figure
from raytrust.studies.audit.study import strongest


def page_of(result: AuditResult) -> str:
    """As HTML, whole and without network."""
    study = result.study
    attacks = {
        f"attack {i}": f"{a.name}, {a.iterations} iterations"
        for i, a in enumerate([*study.attacks, *study.further], start=1)
    }
    context = FrontierContext(
        title=result.title,
        data_summary=result.summary,
        settings={
            "Audit": result.settings,
            "Threat": {f.name: getattr(study.threat, f.name) for f in fields(study.threat)},
            "Attacks": attacks,
            "Versions": {"python": platform.python_version(), "torch": torch.__version__},
        },
        originals=_originals(result),
        drawn=_drawn(result),
        timing=f"{result.seconds:.0f} s on {study.device}, {torch.get_num_threads()} threads.",
    )
    return page(result.rows, context)


def write(result: AuditResult, root: Path) -> list[Path]:
    """report.html, audit.png and, of images that can be shown, reconstructions.png."""
    paths = [root / "report.html", root / "audit.png"]
    write_file(paths[0], page_of(result).encode())
    frontier_figure(result.rows, paths[1], title="What each defence leaks")
    if (originals := _originals(result)) is not None:
        paths.append(root / "reconstructions.png")
        reconstructions_figure(originals, _drawn(result), paths[-1])
    return paths


def _originals(result: AuditResult) -> Array | None:
    reported = [r for audited in result.defences for r in audited.reported]
    # Only grey and colour can be drawn.
    shown = [r.originals.numpy() for r in reported if r.originals.shape[1] in (1, 3)]
    return shown[0] if shown else None


def _drawn(result: AuditResult) -> list[Drawn]:
    """As the sweep draws them: the best attack that ignores the compressor, and the strongest if that is another."""
    drawn = []
    for audited in result.defences if _originals(result) is not None else []:
        best, naive = strongest(audited), strongest(audited, "naive")
        plain = audited.method is None and audited.defence.shows_all
        for reached in [r for r in (naive if naive is not best else None, best) if r is not None]:
            objective = "" if plain else reached.attack.objective
            images = reached.reconstructions.numpy()
            drawn.append(Drawn(audited.name, images, reached.ssim, reached.identified_ssim, objective))
    return drawn
