"""The report as one HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raytrust.membership_paper import floors, nearest_cells
from raytrust.paper.assemble import Report, distance_to_paper
from raytrust.paper.claims import REPRODUCED
from raytrust.paper.plan import Setting, attack_name
from raytrust.paper.selection import AWARE, NAIVE, WORST
from raytrust.published import CELLS, CITATION, TABLE_1, TABLE_2, TITLES, Cell, title_of
from raytrust.report import human_bytes

Lines = list[list[str]]

STYLE = """:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:1.2rem auto;padding:0 1rem;color:#1d1d1f;background:#fff}
h1{font-size:1.45rem;line-height:1.25;margin:.2rem 0 .4rem}h2{font-size:1.15rem;margin:2.2rem 0 .4rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}p{max-width:62rem;margin:.4rem 0}
.answer{font-size:1.08rem;max-width:62rem}.cards{display:grid;grid-template-columns:repeat(3,1fr);gap:.8rem;margin:.6rem 0}
.card{border:1px solid #ccc;border-top:5px solid #777;border-radius:4px;padding:.5rem .8rem;min-width:0}
.card h3{margin:.1rem 0 .3rem}.card ul{margin:.2rem 0;padding-left:1.1rem;font-size:13.5px}.card p{font-size:13.5px}
.yes{border-top-color:#009E73}.seems{border-top-color:#D55E00}.price{border-top-color:#0072B2}
table{border-collapse:collapse;margin:.5rem 0 1.2rem;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:.28rem .6rem;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
td.n,th.n{white-space:nowrap}th{border-bottom:2px solid #999}tbody tr:nth-child(even){background:#f7f7f8}
.wide{overflow-x:auto}img{max-width:100%;height:auto}.wide img{max-width:none;width:1200px}
.badge{display:inline-block;padding:.05rem .5rem;border-radius:3px;color:#fff;background:#666;font-size:12px}
.reproduced{background:#007a5a}.overturned{background:#b34700}.not-reproduced{background:#5b4a8a}
details{margin:.6rem 0}summary{cursor:pointer}.small{font-size:13px;color:#444}
@media(max-width:700px){.cards{grid-template-columns:1fr}body{font-size:14px;padding:0 .7rem}h1{font-size:1.2rem}
.claims td,.claims th{display:block;border:0;padding:.1rem 0}.claims tr{display:block;border-bottom:1px solid #ccc;
padding:.5rem 0}.claims thead{display:none}.wide img{width:860px}}"""


def page(report: Report, root: Path) -> str:
    """The whole report. The figures are taken in from `root`."""
    parts = [_first_screen(report), _claims(report)]
    if report.table_1:
        parts += [_frontier(root), *(_table_1(report, d, root) for d in report.datasets)]
    if report.theory:
        parts.append(_theory(report, root))
    if report.audits:
        parts += [_table_2(report, d) for d in report.datasets]
    parts.append(_settings(report))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width,initial-scale=1"><title>The paper, side by side</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


# --- the first screen ---


def _first_screen(report: Report) -> str:
    found = {d: report.verdicts(d) for d in report.datasets} if report.table_1 else {}

    def items(*verdicts: str) -> str:
        lines = [
            f"<li><b>{TITLES[d]}</b> {_escape(text)}</li>"
            for d, of in found.items()
            for verdict in verdicts
            for text in of.get(verdict, [])
        ]
        return _list(lines)

    cards = ""
    if found:
        undecided = sum(len(of.get("not decided", [])) for of in found.values())
        more = f"<p>Not decided at this sample size: {undecided} cells.</p>" if undecided else ""
        cards = (
            f'<div class="cards"><div class="card yes"><h3>Protects</h3><p>Even at worst, less than half of the '
            f'uncompressed SSIM is left, with its interval.</p>{items("protects")}</div>'
            f'<div class="card seems"><h3>Only seems to</h3><p>Less than half is left to the published attack, but not '
            f'to an attacker who knows the compressor or has a better setting.</p>{items("only seems to")}'
            f"<p><b>Does not protect</b>, not even from the published attack:</p>{items('does not protect')}{more}</div>"
            f'<div class="card price"><h3>At what price</h3>{_price(report)}</div></div>'
        )
    images = max((r["n"] or 0 for r in report.table_1), default=0)
    about = (
        f"Budget “{report.budget.name}”: {images} images a cell; " if images else ""
    ) + f"seed {report.seed}. Intervals: 95 %, bootstrap over images; over models for membership."
    return (
        "<h1>Does gradient compression protect the training images? The paper, side by side with a stronger attacker"
        f'</h1><p class="answer">{_answer(report, found)}</p>{cards}<p class="small">{_escape(CITATION)}. '
        f"{_escape(about)} SSIM: 1 is a copy.</p>"
    )


def _list(lines: Sequence[str], most: int = 5) -> str:
    if not lines:
        return "<ul><li>none</li></ul>"
    shown = f"<ul>{''.join(lines[:most])}</ul>"
    rest = lines[most:]
    return shown + (f"<details><summary>{len(rest)} more</summary><ul>{''.join(rest)}</ul></details>" if rest else "")


def _answer(report: Report, found: dict[str, dict[str, list[str]]]) -> str:
    if not found:
        return "Membership inference only: see the claims below."
    counts = {v: sum(len(of.get(v, [])) for of in found.values()) for v in ("protects", "only seems to")}
    total = sum(len(texts) for of in found.values() for texts in of.values())
    gains = _gains(report)
    gain = (
        f" Knowing the compressor raises the SSIM of what is reconstructed by a factor of {np.median(gains):.1f} (median "
        f"over cells, {min(gains):.1f} to {max(gains):.1f})."
        if gains
        else ""
    )
    return (
        f"Of {total} compressed cells, {counts['protects']} protect against the worst attack that we found, and "
        f"{counts['only seems to']} only seem to.{gain}"
    )


def _gains(report: Report) -> list[float]:
    """How many times the naive SSIM the aware attack reaches, by cell, where both are above 0.01."""
    found = []
    for dataset in report.datasets:
        for cell in CELLS[1:]:
            naive, aware = (report.row(dataset, cell, kind) for kind in (NAIVE, AWARE))
            if naive and aware and naive["ours"] and aware["ours"] and min(naive["ours"], aware["ours"]) > 0.01:
                found.append(aware["ours"] / naive["ours"])
    return found


def _price(report: Report) -> str:
    dataset = report.datasets[0]
    lines: Lines = [["", "bytes", "accuracy %"]]
    plain = report.row(dataset, ("none", None), NAIVE)
    for cell in CELLS:
        row, audit = report.row(dataset, cell, NAIVE), report.audit(dataset, cell)
        if row is None or plain is None or not row["bytes_per_step"]:
            continue
        ratio = plain["bytes_per_step"] / row["bytes_per_step"]
        size = human_bytes(row["bytes_per_step"]) + ("" if cell[0] == "none" else f" (1/{ratio:.3g})")
        lines.append([title_of(cell), size, "-" if audit is None else f"{100 * audit['accuracy']['value']:.1f}"])
    note = f"Bytes of a step of ResNet-18; accuracy of the audit's networks on {TITLES[dataset]}, with error feedback."
    return f"<p>{_escape(note)}</p>{_table(lines)}"


# --- claims ---


def _claims(report: Report) -> str:
    rows = "".join(
        f"<tr><td>{_escape(c.quote)}</td><td>{_badge(c.verdict)}</td><td>{_escape(c.evidence)}<br><span "
        f'class="small">Rule: {_escape(c.rule)}</span></td></tr>'
        for c in report.claims
    )
    done = sum(c.verdict == REPRODUCED for c in report.claims)
    return (
        f"<h2>The paper's claims</h2><p>{done} of {len(report.claims)} reproduced. Each verdict is computed from the "
        "figures by the rule beside it.</p>"
        '<table class="claims"><thead><tr><th>claim</th><th>verdict</th><th>evidence</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _badge(verdict: str) -> str:
    return f'<span class="badge {verdict.replace(" ", "-")}">{_escape(verdict)}</span>'


# --- table 1, figure 1, the frontier ---


def _frontier(root: Path) -> str:
    return (
        "<h2>What is left of the images, and what it costs</h2><p>Each point is a mean over images, bars are 95 % "
        "intervals. The paper's points stand at our bytes, as it gives none.</p>"
        f"{_image(root / 'frontier.png', 'SSIM against bytes a step')}"
    )


def _table_1(report: Report, dataset: str, root: Path) -> str:
    lines: Lines = [["defence", "the paper", "% of its original", "ours, as in the paper", "knows the compressor"]]
    lines[0] += ["worst case", "% of original, at worst", "bytes a step", "worst case is"]
    for cell in CELLS:
        paper = TABLE_1[dataset][cell]
        rows = [report.row(dataset, cell, kind) for kind in (NAIVE, AWARE, WORST)]
        worst = rows[2]
        percent = None if worst is None else worst["ours_percent_of_original"]
        lines.append(
            [
                title_of(cell),
                f"{paper.mean:.4f} (std {paper.std:.4f})",
                f"{paper.percent:g}",
                *(_ssim(row) for row in rows),
                "-" if percent is None else f"{percent:.0f}",
                human_bytes(rows[0]["bytes_per_step"]) if rows[0] else "-",
                worst["setting"] if worst else "-",
            ]
        )
    floor = next((r for r in report.table_1 if r["dataset"] == dataset and r["status"] == "finished"), None)
    floors_ = (
        f" Floors: the data set's mean image reaches {floor['mean_image_ssim']:.2f}, a random other image "
        f"{floor['other_image_ssim']:.2f}."
        if floor
        else ""
    )
    grid = root / f"figure1_{dataset}.png"
    figure = (
        f"<h3>Figure 1, {TITLES[dataset]}</h3><p>Below each image its SSIM to the original.</p>"
        f"{_image(grid, f'reconstructions, {TITLES[dataset]}')}"
        if grid.exists()
        else ""
    )
    note = (
        f"Mean SSIM [95 % interval]. Ours at {report.nearest[dataset].name}, the setting that came nearest to the paper's "
        f"{TABLE_1[dataset]['none', None].mean:.4f} without compression. Worst case: the strongest attack and victim on "
        f"other images, run on these; it need not be the greatest here.{floors_}"
    )
    return f"<h2>Table 1, {TITLES[dataset]}</h2><p>{_escape(note)}</p>{_table(lines)}{figure}"


def _ssim(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if row["status"] == "failed":
        return f"failed: {row['reason']}"
    interval = "" if row["interval_low"] is None else f" [{row['interval_low']:.3f}, {row['interval_high']:.3f}]"
    return f"{row['ours']:.3f}{interval}"


# --- section 3 ---


def _theory(report: Report, root: Path) -> str:
    lines: Lines = [["data set", "step", "defence", "attainable cosine", "naive reaches", "aware reaches"]]
    lines[0] += ["naive distance at the truth", "aware distance at the truth", "naive SSIM", "aware SSIM", "n"]
    for f in report.theory:
        names = ("attainable", "naive_reached", "aware_reached")
        truths = ("naive_at_truth", "aware_at_truth")
        lines.append(
            [
                TITLES[f["dataset"]],
                str(f["step"]),
                title_of(f["cell"]),
                *(f"{np.mean(f[name]):.3f}" for name in names),
                *(f"{np.mean(f[name]):.1e}" for name in truths),
                *(f"{np.mean(f[name]):.3f}" for name in ("naive_ssim", "aware_ssim")),
                str(f["n"]),
            ]
        )
    return (
        "<h2>Section 3: what the bound says, and what it does not</h2>"
        "<p>The discarded part of the gradient bounds the cosine between the <em>true</em> gradient and what the message "
        "decodes to: ||C(g)|| / ||g||, below 1. That much is a theorem about projections, and it holds on every gradient "
        "that we tested. It bounds the score of the true image under an attacker who takes the decoded gradient for "
        "whole. It does not bound the attack: another image may score higher, and how near the best-scoring image is to "
        "the true one, the bound does not say. And it does not touch an attacker who compares only what was sent: at the "
        "true image that distance is 0, as without compression. What then protects is only that fewer numbers were sent, "
        "of which the bound says nothing.</p>"
        f"{_image(root / 'theory.png', 'cosines over training')}"
        f"<details><summary>All figures of section 3</summary>{_table(lines)}</details>"
    )


# --- table 2 ---


def _table_2(report: Report, dataset: str) -> str:
    rows, audit = [r for r in report.table_2 if r["dataset"] == dataset], report.audits[dataset]
    near = nearest_cells(list(audit), dataset)
    heads = [f"{n['attack']}: paper / ours by {n['signal']}, {_thresholds(n)}, {n['origin']}" for n in near]
    lines: Lines = [["defence", *heads, "accuracy %", "final model: loss AUC", "messages: AUC, first and last step"]]
    for i, cell in enumerate(CELLS):
        row = report.audit(dataset, cell)
        if row is None:
            failure = report.failure(dataset, cell)
            lines.append([title_of(cell), f"failed: {failure}", *[""] * (len(heads) + 2)][: len(lines[0])])
            continue
        own = [_rule(rows, cell, n) for n in near]
        cells = [f"{paper:.2f} / {text}" for paper, text in zip(TABLE_2[dataset][cell], own, strict=True)]
        accuracy, loss = audit[i]["accuracy"], audit[i]["final"]["loss"]["auc"]
        lines.append([title_of(cell), *cells, _figure(accuracy, 100, 1), _figure(loss), _messages(row)])
    grid: Lines = [["rule", "null floor", *(title_of(c) for c in CELLS)]]
    for key in dict.fromkeys((r["signal"], r["per_class"], r["origin"]) for r in rows if r["status"] == "finished"):
        own_rows = [_find(rows, cell, key) for cell in CELLS]
        known = next(r for r in own_rows if r is not None)
        kind = "a threshold a class" if key[1] else "one threshold"
        values = ["-" if r is None else f"{r['ours']:.1f}" for r in own_rows]
        grid.append([f"{key[0]}, {kind}, {key[2]}", f"{known['null_floor']:.1f}", *values])
    floor = floors()
    note = (
        "Per cent of right guesses, balanced. The paper names three attacks without their rules: each column shows that "
        "of our rules that comes nearest to it, after the mean difference over all defences is taken out. In-sample "
        f"thresholds have a floor above 50 %: {floor[1]:.1f} % at 10,000 members and as many others with one threshold, "
        f"{floor[10]:.1f} % with ten, {floor[100]:.1f} % with a hundred; ours, at our number of points, stand in the grid."
    )
    setting = rows[0]["setting"].split("; ")[-1] if rows else ""
    return (
        f"<h2>Table 2, {TITLES[dataset]}: membership inference</h2><p>{_escape(note)} Audited: {_escape(setting)}.</p>"
        f"{_table(lines)}<details><summary>Every rule</summary>{_table(grid)}</details>"
    )


def _thresholds(rule: dict[str, Any]) -> str:
    return "a threshold a class" if rule["per_class"] else "one threshold"


def _find(rows: Sequence[dict[str, Any]], cell: Cell, key: tuple[str, bool, str]) -> dict[str, Any] | None:
    for r in rows:
        if (r["compressor"], r["rank_or_level"]) == cell and r["status"] == "finished":
            if (r["signal"], r["per_class"], r["origin"]) == key:
                return r
    return None


def _rule(rows: Sequence[dict[str, Any]], cell: Cell, rule: dict[str, Any]) -> str:
    found = _find(rows, cell, (rule["signal"], rule["per_class"], rule["origin"]))
    if found is None:
        return "-"
    return _figure({"value": found["ours"], "low": found["interval_low"], "high": found["interval_high"]}, 1, 1)


def _messages(row: dict[str, Any]) -> str:
    wanted = [m for m in row["messages"] if m["control"] == "held-out points" and m["score"] == "gradient difference"]
    ends = wanted[:1] + wanted[1:][-1:]
    return "; ".join(_figure(m) for m in ends) or "-"


def _figure(found: dict[str, Any], scale: float = 1.0, digits: int = 2) -> str:
    if found["value"] is None:
        return "-"
    text = f"{scale * found['value']:.{digits}f}"
    if found["low"] is None:
        return text
    return f"{text} [{scale * found['low']:.{digits}f}, {scale * found['high']:.{digits}f}]"


# --- settings ---


def _settings(report: Report) -> str:
    parts = [
        "<h2>Every setting, and how it was chosen</h2>",
        "<p>The paper names ResNet-18 and the cosine attack, and leaves open the stem, the mode of batch norm, whether "
        "the model is trained, the weight of total variation (TV), restarts and iterations. The combinations below were "
        "tried on uncompressed gradients of tuning images (the last of the test set), and the one whose mean SSIM comes "
        "nearest to the paper's is used for its table, on other images (the first of the test set). Common to all: one "
        "image a gradient, its label known, what one worker sends, no error feedback, compressors in their first state, "
        "Adam with step size 0.1 on the sign of the gradient, falling by 10 after 3/8, 5/8 and 7/8 of the iterations. "
        "SSIM is scikit-image's, 7x7 uniform window, data range 1. Top-K sends as many bytes as PowerSGD of the same "
        "rank, values and indices counted.</p>",
    ]
    for dataset, found in report.search.items():
        lines: Lines = [["", "victim", "attack", "mean SSIM", "distance to the paper's"]]
        order = sorted(found, key=lambda s: (found[s].mean is None, distance_to_paper(found[s], dataset) or 0.0))
        lines += [_tried(s, report, dataset) for s in order]
        paper = TABLE_1[dataset]["none", None].mean
        parts.append(
            f"<h3>{TITLES[dataset]}: the paper's {paper:.4f} was sought among {len(found)} settings, on "
            f"{report.budget.tuning} tuning images</h3><p>For the worst case of its 11 cells, "
            f"{report.portfolio[dataset]} attacks of {report.budget.tuning_iterations} iterations were compared on the "
            f"tuning images.</p><details open><summary>Settings, nearest first</summary>{_table(lines)}</details>"
        )
    if report.common is not None and len(report.search) > 1:
        setting, distance = report.common
        text = f"The one setting nearest to all data sets: {setting.name}; mean distance {distance:.3f}."
        parts.append(f"<p>{_escape(text)}</p>")
    return "".join(parts)


def _tried(setting: Setting, report: Report, dataset: str) -> list[str]:
    found, mark = report.search[dataset][setting], "nearest" if setting == report.nearest[dataset] else ""
    if found.mean is None:
        return [mark, setting.victim.name, attack_name(setting.attack), f"failed: {found.reason}", "-"]
    distance = found.mean - TABLE_1[dataset]["none", None].mean
    return [mark, setting.victim.name, attack_name(setting.attack), f"{found.mean:.3f}", f"{distance:+.3f}"]


# --- HTML ---


def _image(path: Path, what: str) -> str:
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<div class="wide"><img alt="{_escape(what)}" src="data:image/png;base64,{data}"></div>'


def _table(lines: Lines) -> str:
    def cells(line: Sequence[str], tag: str) -> str:
        kinds = [' class="n"' if len(c) < 26 else "" for c in line]
        return "".join(f"<{tag}{k}>{_escape(c)}</{tag}>" for c, k in zip(line, kinds, strict=True))

    head = cells(lines[0], "th")
    body = "".join(f"<tr>{cells(line, 'td')}</tr>" for line in lines[1:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _escape(text: str) -> str:
    return html.escape(str(text))
